"""The hyperparameters of a training run: defaults, ranges, and the refusal of what lies outside."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from services.common.errors import FieldViolation, InvalidArgument
from services.trainer.methods import DEFAULT_METHOD, MethodCapability, find_method

MIN_SEQ_LEN = 8
DEFAULT_MAX_SEQ_LEN = 2048
DEFAULT_RECIPE = "default"
DEFAULT_RANK = 16
DEFAULT_LORA_PLUS_RATIO = 16.0
# Fields that a recipe sets where the caller does not.
RECIPES: dict[str, dict[str, object]] = {
    DEFAULT_RECIPE: {},
    # Zhao et al. 2024, arXiv 2405.00732, figure 4; alpha and dropout are defaults of the library used there.
    "paper": {
        "rank": 8,
        "alpha": 16.0,
        "dropout": 0.05,
        "target_modules": ("q_proj", "v_proj"),
        "learning_rate": 2e-4,
        "batch_size": 1,
        "gradient_accumulation_steps": 16,
        "warmup_ratio": 0.03,
        "weight_decay": 0.0,
    },
}


class OverlongPolicy(StrEnum):
    """What happens to rows longer than `max_seq_len`."""

    REJECT = "reject"
    TRUNCATE = "truncate"
    DROP = "drop"


class LossScope(StrEnum):
    """Which tokens count in the loss."""

    COMPLETIONS = "completions"
    ALL = "all"


class Schedule(StrEnum):
    """How the learning rate falls after the warm-up."""

    COSINE = "cosine"
    LINEAR = "linear"
    CONSTANT = "constant"


class Optimizer(StrEnum):
    """How the weights are updated; all of them are AdamW (Loshchilov and Hutter 2017, arXiv 1711.05101)."""

    ADAMW = "adamw"
    ADAMW_8BIT = "adamw_8bit"
    PAGED_ADAMW = "paged_adamw"
    PAGED_ADAMW_8BIT = "paged_adamw_8bit"


class TaskMetric(StrEnum):
    """How greedy answers on held-out rows are scored."""

    NONE = "none"
    EXACT_MATCH = "exact_match"
    ROUGE_L = "rouge_l"
    TOKEN_F1 = "token_f1"  # noqa: S105
    PEARSON = "pearson"
    NUMERIC = "numeric"
    ACCURACY = "accuracy"
    CHOICE_LETTER = "choice_letter"
    SQL_MATCH = "sql_match"
    ENTITY_F1 = "entity_f1"


@dataclass(frozen=True, slots=True)
class TrainingSpec:
    """Every hyperparameter with its value; `trainer/v1/job.proto` states meaning and range of each."""

    max_seq_len: int
    method: str = DEFAULT_METHOD
    rank: int = DEFAULT_RANK
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ()
    learning_rate: float = 2e-4
    n_epochs: int = 3
    batch_size: int = 4
    gradient_accumulation_steps: int = 1
    schedule: Schedule = Schedule.COSINE
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    overlong_policy: OverlongPolicy = OverlongPolicy.REJECT
    loss_scope: LossScope = LossScope.COMPLETIONS
    validation_fraction: float = 0.1
    checkpoint_steps: int = 50
    gradient_checkpointing: bool = False
    task_metric: TaskMetric = TaskMetric.NONE
    evaluation_rows: int = 100
    recipe: str = DEFAULT_RECIPE
    optimizer: Optimizer = Optimizer.ADAMW
    packing: bool = False
    group_by_length: bool = True
    lora_plus_ratio: float = 1.0
    early_stopping_patience: int = 0
    token_budget: int = 0
    minutes_budget: float = 0.0
    joint: bool = True
    strict: bool = False

    @property
    def rows_per_step(self) -> int:
        """Rows of one optimizer step."""
        return self.batch_size * self.gradient_accumulation_steps


@dataclass(frozen=True, slots=True)
class _Range:
    low: float
    high: float
    low_open: bool = False
    high_open: bool = False

    def holds(self, value: float) -> bool:
        above = value > self.low if self.low_open else value >= self.low
        below = value < self.high if self.high_open else value <= self.high
        return math.isfinite(value) and above and below

    def __str__(self) -> str:
        low = f"above {self.low:g}" if self.low_open else f"{self.low:g}"
        high = f"below {self.high:g}" if self.high_open else f"{self.high:g}"
        return f"{low} to {high}"


_RANGES = {
    "rank": _Range(1, 256),
    "alpha": _Range(0, 1024, low_open=True),
    "dropout": _Range(0, 1, high_open=True),
    "learning_rate": _Range(0, 1, low_open=True),
    "n_epochs": _Range(1, 50),
    "batch_size": _Range(1, 256),
    "gradient_accumulation_steps": _Range(1, 256),
    "warmup_ratio": _Range(0, 0.5),
    "weight_decay": _Range(0, 1),
    "max_grad_norm": _Range(0, 1000, low_open=True),
    "validation_fraction": _Range(0, 0.5),
    "checkpoint_steps": _Range(1, 10_000),
    "evaluation_rows": _Range(0, 1000),
    "lora_plus_ratio": _Range(1, 64),
    "early_stopping_patience": _Range(0, 100),
    "token_budget": _Range(0, 2**50),
    "minutes_budget": _Range(0, 100_000),
}


_OPTIMIZERS = tuple(optimizer.value for optimizer in Optimizer)


def resolve_spec(
    given: Mapping[str, object], *, max_model_len: int, module_names: Sequence[str]
) -> TrainingSpec:
    """Return the full specification for what a caller gave; absent fields take their defaults.

    Args:
        given: field names of `TrainingSpec` and their values, only those that the caller set.
        max_model_len: the base's longest sequence in tokens.
        module_names: the base's linear layers by dotted name; the default targets are their last parts.

    Raises:
        InvalidArgument: `unsupported_method`, or `bad_hyperparameter` with every field that is out of range.
    """
    recipe = str(given.get("recipe") or DEFAULT_RECIPE)
    values = RECIPES.get(recipe, {}) | dict(given)
    values["recipe"] = recipe
    method = find_method(str(values.get("method") or DEFAULT_METHOD))
    values["method"] = method.name
    ranges = _RANGES | {"max_seq_len": _Range(MIN_SEQ_LEN, max_model_len)}
    violations = [] if recipe in RECIPES else [_unknown("recipe", recipe, RECIPES)]
    optimizer = str(values.get("optimizer") or Optimizer.ADAMW)
    if optimizer in _OPTIMIZERS:
        values["optimizer"] = Optimizer(optimizer)
    else:
        violations.append(_unknown("optimizer", optimizer, _OPTIMIZERS))
    for name, allowed in ranges.items():
        value = values.get(name)
        if value is None:
            continue
        assert isinstance(value, int | float)
        if not allowed.holds(value):
            violations.append(_violation(name, f"{name} is {value:g}; it must be {allowed}"))
    suffixes = {name.rpartition(".")[2] for name in module_names}
    targets = values.get("target_modules") or sorted(suffixes)
    assert isinstance(targets, Sequence)
    unknown = sorted(set(targets) - suffixes)
    if unknown:
        known = ", ".join(sorted(suffixes))
        text = f"target_modules names {unknown[0][:64]!r}; the base has {known}"
        violations.append(_violation("target_modules", text))
    violations += _without_effect(given, method)
    if violations:
        raise InvalidArgument(
            "bad_hyperparameter",
            "; ".join(violation.description for violation in violations),
            field=violations[0].field,
            violations=violations,
        )
    values["target_modules"] = tuple(sorted(set(targets)))
    values.setdefault("max_seq_len", min(max_model_len, DEFAULT_MAX_SEQ_LEN))
    rank = values.get("rank", DEFAULT_RANK)
    assert isinstance(rank, int)
    if method.has_scale:
        values.setdefault("alpha", 2.0 * rank)
    else:
        values["alpha"] = float(rank)
    if method.name == "lora+":
        values.setdefault("lora_plus_ratio", DEFAULT_LORA_PLUS_RATIO)
    return TrainingSpec(**values)  # type: ignore[arg-type]


def _without_effect(given: Mapping[str, object], method: MethodCapability) -> list[FieldViolation]:
    """Return a violation for every field that the method would not listen to."""
    violations = []
    if not method.has_scale and given.get("alpha", 0) not in (0, given.get("rank", DEFAULT_RANK)):
        violations.append(_violation("alpha", f"alpha does nothing with method {method.name}; leave it out"))
    if method.name != "lora+" and given.get("lora_plus_ratio", 1.0) != 1.0:
        violations.append(_violation("lora_plus_ratio", "lora_plus_ratio is for method lora+ alone"))
    return violations


def _unknown(name: str, value: str, known: Iterable[str]) -> FieldViolation:
    return _violation(name, f"{name} {value[:64]!r} is not known; choose one of {', '.join(known)}")


def _violation(name: str, description: str) -> FieldViolation:
    return FieldViolation(f"spec.{name}", description, "bad_hyperparameter")
