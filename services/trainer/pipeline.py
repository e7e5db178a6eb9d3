"""A job from its files to its published version, in the child process."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch

from services.common.errors import DataLoss
from services.common.ids import new_id
from services.common.prompts import PromptEncoder
from services.common.store import ObjectStore
from services.trainer.bases import TrainableBase
from services.trainer.config import TrainerSettings
from services.trainer.job import (
    CHECKPOINT_PREFIX,
    Checkpoint,
    Draft,
    Facts,
    Job,
    JobResult,
    JobState,
    Level,
    ParityReport,
    Progress,
)
from services.trainer.journal import checkpoint_prefix
from services.trainer.link import Order, Outcome, WorkerLink
from services.trainer.parity import TOLERANCE_NATS, ParityGate, parity_failed
from services.trainer.patience import Patience
from services.trainer.preparation import PreparedData, prepare
from services.trainer.publishing import job_result, metrics_csv, model_card
from services.trainer.registry_client import RegistryClient
from services.trainer.tokens import stop_token_id
from services.trainer.training.batches import BatchPlan
from services.trainer.training.checkpoint import CheckpointStore
from services.trainer.training.evaluate import evaluate
from services.trainer.training.loop import TrainingRun
from services.trainer.training.model import AdapterModel, BaseFolder, attach_adapter, load_base
from services.trainer.training.probes import probe

KEPT_CHECKPOINTS = 2
# After this many steps the pace is known well enough to tell the minutes.
MEASURED_STEPS = 3
# However long a job runs, it tells about its steps some hundreds of times.
EVENTS_PER_RUN = 400


class Interrupted(Exception):  # noqa: N818 - not a failure
    """The worker asked for an end."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome.value)
        self.outcome = outcome


class Pipeline:
    """Runs one job. Every stage that is recorded as done is not done again."""

    def __init__(
        self, job: Job, settings: TrainerSettings, link: WorkerLink, store: ObjectStore, folder: Path
    ) -> None:
        """Prepare to run `job`; `folder` is empty and goes away with the process."""
        self._job = job
        self._settings = settings
        self._link = link
        self._checkpoints = CheckpointStore(store, checkpoint_prefix(job.id))
        self._folder = folder
        self._base_path = settings.bases[job.request.base_model]
        self._encoder = PromptEncoder.load(self._base_path)
        self._patience = Patience(self.check)
        self._last_event = 0.0
        self._written_step = job.checkpoints[-1].step if job.checkpoints else 0

    async def run(self) -> None:
        """Train, evaluate, publish.

        Raises:
            Interrupted: the worker asked for an end.
            LorafleetError: the job has failed.
        """
        registry = RegistryClient(self._settings.registry_target, self._settings.peer_tls)
        try:
            data = await self._prepare(registry)
            model = await asyncio.to_thread(self._load_model)
            run = self._training_run(model, data)
            await asyncio.to_thread(run.train)
            await asyncio.to_thread(self._evaluate, model, data)
            await self._store_figures(registry, run)
            folder, base = await asyncio.to_thread(self._write_adapter, model)
            await self._check_parity(registry, model, data, folder, base)
            await self._publish(registry, folder, base)
        finally:
            await registry.close()

    # The observer of the training run.

    def check(self) -> None:
        """Raise `Interrupted` where the worker wants the job cancelled."""
        if self._link.order is Order.CANCEL:
            raise Interrupted(Outcome.CANCELLED)

    def stepped(self, progress: Progress) -> None:
        """Tell about a step, unless that was done a moment ago."""
        now = time.monotonic()
        seconds_left = progress.eta_seconds
        interval = max(self._settings.event_interval_seconds, seconds_left / EVENTS_PER_RUN)
        if now - self._last_event < interval and progress.step != progress.total_steps:
            return
        self._last_event = now
        text = f"Step {progress.step}/{progress.total_steps}: training loss={progress.loss:.4f}"
        self._send(Draft(text, metrics=progress, facts=self._measured_minutes(progress)))

    def skipped(self, step: int, bad_steps: int) -> None:
        """Tell about a step that did not count."""
        text = f"Step {step}: loss or gradient is not finite; no update was made"
        self._send(Draft(text, level=Level.WARN, data={"bad_steps": float(bad_steps)}))

    def checkpoint(self, run: TrainingRun) -> None:
        """Store what the run needs to go on, and have it recorded."""
        state = run.state
        checkpoint_id = new_id(CHECKPOINT_PREFIX)
        folder = self._folder / checkpoint_id
        run.write(folder)
        digest = self._patience.do(lambda: self._checkpoints.save(folder, checkpoint_id))
        last = state.figures[-1] if state.figures else None
        checkpoint = Checkpoint(
            id=checkpoint_id,
            step=state.step,
            create_time=datetime.now(UTC),
            train_loss=last.loss if last else 0.0,
            manifest_digest=digest,
            trained_tokens=state.trained_tokens,
            valid_loss=last.valid_loss if last else None,
            valid_mean_token_accuracy=last.valid_accuracy if last else None,
        )
        self._record(Draft(f"Checkpoint at step {state.step}", facts=Facts(checkpoint=checkpoint)))
        self._written_step = state.step
        self._checkpoints.discard([old.id for old in self._job.checkpoints[:-KEPT_CHECKPOINTS]][-1:])

    def between_steps(self, run: TrainingRun) -> None:
        """Hand the job back where the worker wants that, with all that was done."""
        if self._link.order is Order.HAND_BACK:
            if run.state.step != self._written_step:
                self.checkpoint(run)
            raise Interrupted(Outcome.HANDED_BACK)

    # The stages.

    async def _prepare(self, registry: RegistryClient) -> PreparedData:
        """Return the rows, which must be those that were validated."""
        request = self._job.request
        paths = []
        for file_id in filter(None, (request.training_file, request.validation_file)):
            path = self._folder / file_id
            await self._patience.call(
                partial(registry.download, file_id, path, max_bytes=self._settings.max_dataset_bytes)
            )
            paths.append(path)
        validation_path = paths[1] if len(paths) > 1 else None
        data = await asyncio.to_thread(
            prepare,
            paths[0],
            validation_path,
            self._encoder,
            request.spec,
            seed=request.seed,
            folder=self._folder / "tokens",
            check=self.check,
        )
        if data.report != self._job.dataset:
            raise DataLoss("dataset_changed", "the data is not what was validated", field="training_file")
        return data

    def _load_model(self) -> AdapterModel:
        self.check()
        request = self._job.request
        base = BaseFolder(request.base_model, self._base_path, self._settings.base_quantization)
        model = load_base(base, torch.device(self._settings.device_type))
        return attach_adapter(model, request.spec, seed=request.seed, pad_id=stop_token_id(self._encoder))

    def _training_run(self, model: AdapterModel, data: PreparedData) -> TrainingRun:
        request = self._job.request
        spec = request.spec
        plan = BatchPlan(
            data.training, spec.batch_size, spec.gradient_accumulation_steps, spec.n_epochs, request.seed
        )
        run = TrainingRun(model, plan, spec, self, seed=request.seed, validation_rows=data.validation)
        if self._job.checkpoints:
            last = self._job.checkpoints[-1]
            folder = self._folder / last.id
            self._patience.do(lambda: self._checkpoints.load(last.id, last.manifest_digest, folder))
            run.resume(folder)
            self._send(Draft(f"Going on from step {run.state.step}", data={"step": float(run.state.step)}))
        return run

    def _evaluate(self, model: AdapterModel, data: PreparedData) -> None:
        if self._job.evaluation is not None:
            return
        self._send(Draft(f"Evaluating on {len(data.validation)} held-out rows"))
        request = self._job.request
        figures = evaluate(
            model, data.validation, self._encoder, request.spec, seed=request.seed, check=self.check
        )
        values = {f"{figure.name}_base": figure.base_value for figure in figures}
        values |= {f"{figure.name}_adapter": figure.adapter_value for figure in figures}
        self._record(Draft("Evaluation done", data=values, facts=Facts(evaluation=figures)))

    async def _store_figures(self, registry: RegistryClient, run: TrainingRun) -> None:
        if self._job.result_file is None:
            data = metrics_csv(run.state.figures)
            filename = f"{self._job.id}-metrics.csv"
            file_id = await self._patience.call(partial(registry.create_result_file, filename, data))
            self._record(Draft("Metrics of every step stored", facts=Facts(result_file=file_id)))

    def _write_adapter(self, model: AdapterModel) -> tuple[Path, TrainableBase]:
        """Write what is to be published, and return its folder with the base it is bound to."""
        base_name = self._job.request.base_model
        folder = self._folder / "adapter"
        model.save(folder, base_name)
        return folder, TrainableBase.load(base_name, self._base_path, self._settings.base_quantization)

    async def _check_parity(
        self,
        registry: RegistryClient,
        model: AdapterModel,
        data: PreparedData,
        folder: Path,
        base: TrainableBase,
    ) -> None:
        """Have the inference service compute what was trained; raise `FailedPrecondition` if it differs."""
        if self._settings.inference_target is None:
            return
        report = self._job.parity or await self._measure_parity(registry, model, data, folder, base)
        if report is None:
            text = "The inference service has another base: what it computes was not compared"
            self._send(Draft(text, level=Level.WARN))
        elif not report.holds:
            raise parity_failed(report)

    async def _measure_parity(
        self,
        registry: RegistryClient,
        model: AdapterModel,
        data: PreparedData,
        folder: Path,
        base: TrainableBase,
    ) -> ParityReport | None:
        settings = self._settings
        assert settings.inference_target is not None
        dtype = settings.base_quantization.compute_dtype
        tolerance = settings.parity_tolerance_nats or TOLERANCE_NATS[dtype]
        probes = await asyncio.to_thread(probe, model, data.validation or data.training)
        gate = ParityGate(settings.inference_target, registry, tolerance, settings.peer_tls)
        try:
            report = await self._patience.call(
                partial(
                    gate.check,
                    folder,
                    probes,
                    name=self._job.id,
                    base_fingerprint_digest=base.fingerprint.digest,
                )
            )
        finally:
            await gate.close()
        if report is not None:
            text = f"Served and trained log-probabilities {'agree' if report.holds else 'differ'}"
            values = {"max_difference": report.max_difference, "mean_difference": report.mean_difference}
            self._record(Draft(text, data=values, facts=Facts(parity=report)))
        return report

    async def _publish(self, registry: RegistryClient, folder: Path, base: TrainableBase) -> None:
        self.check()
        request = self._job.request
        published = await self._patience.call(
            partial(
                registry.publish,
                folder,
                adapter=request.adapter,
                base_fingerprint_digest=base.fingerprint.digest,
                card=model_card(self._job, self._encoder),
                idempotency_key=self._job.id,
            )
        )
        self._succeed(job_result(self._job, published))

    def _succeed(self, result: JobResult) -> None:
        self._send(Draft(f"New fine-tuned model created: {result.fine_tuned_model}"))
        self._record(
            Draft(
                "The job has successfully completed",
                state=JobState.SUCCEEDED,
                facts=Facts(result=result),
            )
        )
        # The version is what is left of the job; nothing goes on from its checkpoints any more.
        self._checkpoints.discard([old.id for old in self._job.checkpoints[-KEPT_CHECKPOINTS:]])

    def _measured_minutes(self, progress: Progress) -> Facts | None:
        estimate = self._job.estimate
        if estimate is None or estimate.minutes or progress.step < MEASURED_STEPS:
            return None
        seconds_per_step = progress.eta_seconds / max(1, progress.total_steps - progress.step)
        minutes = seconds_per_step * progress.total_steps / 60
        facts = Facts(estimate=replace(estimate, minutes=minutes))
        self._job = replace(self._job, estimate=facts.estimate)
        return facts

    def _send(self, draft: Draft) -> None:
        self._link.send(draft)

    def _record(self, draft: Draft) -> None:
        """Have a draft recorded durably, and take over what it says about the job."""
        self._link.send_durably(draft)
        facts = draft.facts
        assert facts is not None, "only what adds to the job is waited for"
        self._job = self._job.with_facts(facts)
