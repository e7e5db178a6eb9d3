"""The stages of one job in the child process, from its files to its published version."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path

from services.common.errors import InvalidArgument
from services.common.failpoints import failpoint
from services.common.prompts import PromptEncoder
from services.trainer.bases import TrainableBase
from services.trainer.config import TrainerSettings
from services.trainer.figures import metrics_csv
from services.trainer.job import Draft, Facts, Job, JobResult, JobState, Level, ParityReport
from services.trainer.parity import ParityGate, parity_failed
from services.trainer.preparation import PreparedData, prepare_validated
from services.trainer.publishing import job_result, model_card
from services.trainer.registry_client import RegistryClient
from services.trainer.reporter import RunReporter
from services.trainer.tokens import stop_token_id
from services.trainer.training.base import SharedBase
from services.trainer.training.batches import BatchPlan
from services.trainer.training.evaluate import evaluate
from services.trainer.training.initialise import new_adapter
from services.trainer.training.loop import TrainingRun
from services.trainer.training.model import AdapterModel
from services.trainer.training.probes import probe


class Pipeline:
    """Runs one job on a base that others may share. Every stage that is recorded as done is not done again.

    Every method raises `Interrupted` where the worker asks for an end, and `LorafleetError` where the job
    has failed.
    """

    def __init__(
        self, reporter: RunReporter, settings: TrainerSettings, registry: RegistryClient, folder: Path
    ) -> None:
        """Prepare to run the reporter's job; `folder` is empty and goes away with the process."""
        self._reporter = reporter
        self._settings = settings
        self._registry = registry
        self._folder = folder
        self._base_path = settings.bases[self.job.request.base_model]
        self._encoder = PromptEncoder.load(self._base_path)
        self._data: PreparedData | None = None
        self._run: TrainingRun | None = None

    @property
    def job(self) -> Job:
        """The job as it stands."""
        return self._reporter.job

    async def prepare(self) -> None:
        """Fetch the rows, which must be those that were validated."""
        job = self.job
        assert job.dataset is not None, "a job that runs was validated"
        failpoint("tokens.before_download")
        limit = self._settings.max_file_bytes
        for file_id in job.request.files:
            path = self._folder / file_id
            await self._reporter.patience.call(
                partial(self._registry.download, file_id, path, max_bytes=limit)
            )
        self._data = await asyncio.to_thread(
            prepare_validated,
            job.request,
            job.dataset,
            self._folder,
            self._encoder,
            folder=self._folder / "tokens",
            check=self._reporter.check,
        )
        failpoint("tokens.after_write")

    def begin(self, base: SharedBase) -> TrainingRun:
        """Return the run of the job on `base`, at its first step or at its last checkpoint."""
        self._reporter.check()
        request = self.job.request
        spec = request.spec
        if spec.early_stopping_patience and not len(self._rows.validation):
            raise InvalidArgument(
                "bad_hyperparameter",
                "early_stopping_patience needs held-out rows; give a validation_file or validation_fraction",
                field="spec.early_stopping_patience",
            )
        if spec.gradient_checkpointing:
            base.checkpoint_activations()
        plan = BatchPlan(
            self._rows.training,
            spec.batch_size,
            spec.gradient_accumulation_steps,
            spec.n_epochs,
            request.seed,
            packed_tokens=spec.max_seq_len if spec.packing else 0,
            group_by_length=spec.group_by_length,
        )
        adapter = new_adapter(base, spec, seed=request.seed, rows=self._rows.training)
        model = AdapterModel(base, adapter, spec, stop_token_id(self._encoder))
        rows = self._rows.validation
        self._run = TrainingRun(model, plan, spec, self._reporter, seed=request.seed, validation_rows=rows)
        self._reporter.resume(self._run)
        return self._run

    async def conclude(self) -> None:
        """Evaluate and publish what was trained."""
        run = self._run
        assert run is not None, "the run has begun"
        await asyncio.to_thread(self._evaluate, run.model)
        await self._store_figures(run)
        folder, base = await asyncio.to_thread(self._write_adapter, run.model)
        await self._check_parity(run.model, folder, base)
        await self._publish(folder, base)

    @property
    def _rows(self) -> PreparedData:
        assert self._data is not None, "the rows are there"
        return self._data

    def _evaluate(self, model: AdapterModel) -> None:
        if self.job.evaluation is not None:
            return
        rows = self._rows.validation
        self._reporter.send(Draft(f"Evaluating on {len(rows)} held-out rows"))
        request = self.job.request
        measured = evaluate(
            model, rows, self._encoder, request.spec, seed=request.seed, check=self._reporter.check
        )
        values = {f"{figure.name}_base": figure.base_value for figure in measured.figures}
        values |= {f"{figure.name}_adapter": figure.adapter_value for figure in measured.figures}
        if measured.collapsed:
            text = "The adapter gives one and the same answer to different prompts: it has collapsed"
            self._reporter.send(Draft(text, level=Level.WARN, data={"collapsed": 1.0}))
        facts = Facts(evaluation=measured.figures, collapsed=measured.collapsed)
        failpoint("evaluate.before_record")
        self._reporter.record(Draft("Evaluation done", data=values, facts=facts))

    async def _store_figures(self, run: TrainingRun) -> None:
        if self.job.result_file is None:
            data = metrics_csv(run.state.figures)
            filename = f"{self.job.id}-metrics.csv"
            file_id = await self._reporter.patience.call(
                partial(self._registry.create_result_file, filename, data)
            )
            self._reporter.record(Draft("Metrics of every step stored", facts=Facts(result_file=file_id)))

    def _write_adapter(self, model: AdapterModel) -> tuple[Path, TrainableBase]:
        """Write what is to be published, and return its folder with the base it is bound to."""
        base_name = self.job.request.base_model
        folder = self._folder / "adapter"
        error = model.save(folder, base_name)
        if self.job.conversion_error is None:
            draft = Draft(
                f"The adapter is written; conversion error {error:.2g}",
                data={"conversion_error": error},
                facts=Facts(conversion_error=error),
            )
            self._reporter.record(draft)
        return folder, TrainableBase.load(base_name, self._base_path, self._settings.base_quantization)

    async def _check_parity(self, model: AdapterModel, folder: Path, base: TrainableBase) -> None:
        """Have the inference service compute what was trained; raise `FailedPrecondition` if it differs."""
        report = self.job.parity
        if report is None:
            gate = ParityGate.configured(self._settings, self._registry)
            if gate is None:
                return
            report = await self._measure_parity(gate, model, folder, base)
        if report is None:
            text = "The inference service has another base: what it computes was not compared"
            self._reporter.send(Draft(text, level=Level.WARN))
        elif not report.holds:
            raise parity_failed(report)

    async def _measure_parity(
        self, gate: ParityGate, model: AdapterModel, folder: Path, base: TrainableBase
    ) -> ParityReport | None:
        digest = base.fingerprint.digest
        try:
            probes = await asyncio.to_thread(probe, model, self._rows.for_probes)
            report = await self._reporter.patience.call(
                partial(gate.check, folder, probes, name=self.job.id, base_fingerprint_digest=digest)
            )
        finally:
            await gate.close()
        if report is not None:
            text = f"Served and trained log-probabilities {'agree' if report.holds else 'differ'}"
            values = {"max_difference": report.max_difference, "mean_difference": report.mean_difference}
            self._reporter.record(Draft(text, data=values, facts=Facts(parity=report)))
        return report

    async def _publish(self, folder: Path, base: TrainableBase) -> None:
        self._reporter.check()
        failpoint("publish.before_call")
        published = await self._reporter.patience.call(
            partial(
                self._registry.publish,
                folder,
                adapter=self.job.request.adapter,
                base_fingerprint_digest=base.fingerprint.digest,
                card=model_card(self.job, self._encoder),
                idempotency_key=self.job.id,
            )
        )
        failpoint("publish.after_call")
        self._succeed(job_result(self.job, published))

    def _succeed(self, result: JobResult) -> None:
        self._reporter.send(Draft(f"New fine-tuned model created: {result.fine_tuned_model}"))
        text = "The job has successfully completed"
        self._reporter.record(Draft(text, state=JobState.SUCCEEDED, facts=Facts(result=result)))
        failpoint("report.after_record")
        self._reporter.thin_checkpoints()
