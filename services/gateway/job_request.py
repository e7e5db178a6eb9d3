"""The body of `POST /v1/fine_tuning/jobs`, and the job that it asks the trainer for."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, StringConstraints, model_validator

from lorafleet.trainer.v1.job_pb2 import LossScope, OverlongPolicy, Schedule, TaskMetric, TrainingSpec
from lorafleet.trainer.v1.trainer_service_pb2 import CreateJobRequest
from services.common.errors import InvalidArgument
from services.common.names import base_name
from services.gateway.errors import model_not_found
from services.gateway.json_body import Body, field_error
from services.gateway.sampling import Metadata

# What `learning_rate_multiplier` multiplies: the trainer's default.
DEFAULT_LEARNING_RATE = 2e-4
_HYPERPARAMETERS = "method.supervised.hyperparameters"
_OPTIONS = "method.supervised.lorafleet"

# From the trainer's field names to ours.
FIELDS = {
    "spec.n_epochs": f"{_HYPERPARAMETERS}.n_epochs",
    "spec.batch_size": f"{_HYPERPARAMETERS}.batch_size",
    "spec.": f"{_OPTIONS}.",
    "base_model": "model",
    "adapter": "suffix",
    "idempotency_key": "idempotency-key",
}

# Ranges are the trainer's to check; here a number must only fit the contract's types.
Count = Annotated[int, Field(ge=0, le=2**32 - 1)]
Suffix = Annotated[str, StringConstraints(min_length=1, max_length=64)]
TaskMetricName = Literal[
    "exact_match",
    "accuracy",
    "choice_letter",
    "sql_match",
    "numeric",
    "rouge_l",
    "token_f1",
    "entity_f1",
    "pearson",
]


class Hyperparameters(Body):
    """OpenAI's three; `auto` leaves them to the trainer."""

    batch_size: Literal["auto"] | Count | None = None
    learning_rate_multiplier: Literal["auto"] | float | None = None
    n_epochs: Literal["auto"] | Count | None = None


class LorafleetOptions(Body):
    """Everything else that decides a run: fields, ranges and defaults of the contract's `TrainingSpec`."""

    method: str | None = None
    rank: Count | None = None
    alpha: float | None = None
    dropout: float | None = None
    target_modules: Annotated[list[str], Field(max_length=64)] | None = None
    learning_rate: float | None = None
    gradient_accumulation_steps: Count | None = None
    schedule: Literal["cosine", "linear", "constant"] | None = None
    warmup_ratio: float | None = None
    weight_decay: float | None = None
    max_grad_norm: float | None = None
    max_seq_len: Count | None = None
    overlong_policy: Literal["reject", "truncate", "drop"] | None = None
    loss_scope: Literal["completions", "all"] | None = None
    validation_fraction: float | None = None
    checkpoint_steps: Count | None = None
    gradient_checkpointing: bool | None = None
    task_metric: TaskMetricName | None = None
    evaluation_rows: Count | None = None
    recipe: str | None = None
    optimizer: str | None = None
    packing: bool | None = None
    group_by_length: bool | None = None
    lora_plus_ratio: float | None = None
    early_stopping_patience: Count | None = None
    token_budget: Annotated[int, Field(ge=0, le=2**64 - 1)] | None = None
    minutes_budget: float | None = None
    joint: bool | None = None
    strict: bool | None = None


class Supervised(Body):
    """`method.supervised`."""

    hyperparameters: Hyperparameters | None = None
    lorafleet: LorafleetOptions | None = None

    @model_validator(mode="after")
    def _check_learning_rate(self) -> Supervised:
        multiplier = self.hyperparameters and self.hyperparameters.learning_rate_multiplier
        if (
            isinstance(multiplier, float | int)
            and self.lorafleet
            and self.lorafleet.learning_rate is not None
        ):
            raise field_error(
                "hyperparameters.learning_rate_multiplier", "give a multiplier or a learning_rate, not both"
            )
        return self


class Method(Body):
    """`method`: supervised fine-tuning is the one there is."""

    unsupported: ClassVar[frozenset[str]] = frozenset({"dpo", "reinforcement"})

    type: str
    supervised: Supervised | None = None

    @model_validator(mode="after")
    def _check_type(self) -> Method:
        if self.type != "supervised":
            raise field_error("type", "only supervised is supported", reason="unsupported_parameter")
        return self


class JobRequest(Body):
    """A fine-tuning job. `method` wins over the older top-level `hyperparameters`, as in OpenAI's API."""

    unsupported: ClassVar[frozenset[str]] = frozenset({"integrations"})

    model: str | None
    training_file: str
    validation_file: str | None = None
    hyperparameters: Hyperparameters | None = None
    method: Method | None = None
    suffix: Suffix | None = None
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    metadata: Metadata | None = None

    def create_request(self, idempotency_key: str | None) -> CreateJobRequest:
        """Return what to ask the trainer.

        Raises:
            NotFound: `model_not_found`; the model cannot be the name of a base.
        """
        try:
            base = base_name(self.model or "", field="model")
        except InvalidArgument as error:
            raise model_not_found() from error
        return CreateJobRequest(
            base_model=base,
            training_file=self.training_file,
            validation_file=self.validation_file or "",
            adapter=self.suffix or "",
            spec=self._spec(),
            seed=self.seed,
            metadata=self.metadata or {},
            idempotency_key=idempotency_key or "",
        )

    def _spec(self) -> TrainingSpec:
        supervised = (self.method and self.method.supervised) or Supervised()
        numbers = self.hyperparameters if self.method is None else supervised.hyperparameters
        options = supervised.lorafleet or LorafleetOptions()
        given: dict[str, Any] = options.model_dump(exclude_none=True)
        for name, enum in _ENUMS.items():
            if name in given:
                given[name] = enum.Value(f"{name}_{given[name]}".upper())
        if numbers is not None:
            for name in ("batch_size", "n_epochs"):
                if isinstance(value := getattr(numbers, name), int):
                    given[name] = value
            if isinstance(numbers.learning_rate_multiplier, float | int):
                given["learning_rate"] = DEFAULT_LEARNING_RATE * numbers.learning_rate_multiplier
        return TrainingSpec(**given)


_ENUMS: dict[str, Any] = {
    "schedule": Schedule,
    "overlong_policy": OverlongPolicy,
    "loss_scope": LossScope,
    "task_metric": TaskMetric,
}
