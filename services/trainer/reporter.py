"""What a run of a job tells its worker: steps, checkpoints, and everything that is recorded."""

from __future__ import annotations

import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from services.common.failpoints import failpoint
from services.common.ids import new_id
from services.common.store import ObjectStore
from services.trainer.checkpoint_store import CheckpointStore
from services.trainer.config import TrainerSettings
from services.trainer.job import CHECKPOINT_PREFIX, Checkpoint, Draft, Facts, Job, Level, Progress
from services.trainer.journal import checkpoint_prefix
from services.trainer.link import JobLine, Order, Outcome
from services.trainer.patience import Patience
from services.trainer.training.loop import TrainingRun

KEPT_CHECKPOINTS = 2
# After this many steps the pace is known well enough to tell the minutes.
MEASURED_STEPS = 3
# However long a job runs, it tells about its steps some hundreds of times.
EVENTS_PER_RUN = 400
# The basis of minutes that follow from the job's own steps.
MEASURED = "this_job"


class Interrupted(Exception):  # noqa: N818 - not a failure
    """The worker asked for an end."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome.value)
        self.outcome = outcome


class RunReporter:
    """The observer of a job's run. It keeps the job as its records make it.

    Attributes:
        job: the job after all that was recorded.
        patience: waits for store and registry, but not past a cancel.
    """

    def __init__(
        self, job: Job, settings: TrainerSettings, line: JobLine, store: ObjectStore, folder: Path
    ) -> None:
        self.job = job
        self.patience = Patience(self.check)
        self._settings = settings
        self._line = line
        self._checkpoints = CheckpointStore(store, checkpoint_prefix(job.id))
        self._folder = folder
        self._last_event = 0.0
        self._written_step = job.checkpoints[-1].step if job.checkpoints else 0

    def check(self) -> None:
        """Raise `Interrupted` where the worker wants the job cancelled."""
        if self._line.order is Order.CANCEL:
            raise Interrupted(Outcome.CANCELLED)

    def between_steps(self, run: TrainingRun) -> None:
        """Hand the job back where the worker wants that, with all that was done."""
        failpoint("step.before")
        if self._line.order is Order.HAND_BACK:
            if run.state.step != self._written_step:
                self.checkpoint(run)
            raise Interrupted(Outcome.HANDED_BACK)

    def stepped(self, progress: Progress) -> None:
        """Tell about a step, unless that was done a moment ago."""
        now = time.monotonic()
        interval = max(self._settings.event_interval_seconds, progress.eta_seconds / EVENTS_PER_RUN)
        if now - self._last_event < interval and progress.step != progress.total_steps:
            return
        self._last_event = now
        text = f"Step {progress.step}/{progress.total_steps}: training loss={progress.loss:.4f}"
        self.send(Draft(text, metrics=progress, facts=self._measured_minutes(progress)))

    def skipped(self, step: int, bad_steps: int) -> None:
        """Tell about a step that did not count."""
        text = f"Step {step}: loss or gradient is not finite; no update was made"
        self.send(Draft(text, level=Level.WARN, data={"bad_steps": float(bad_steps)}))

    def stopped_early(self, step: int, best_valid_loss: float) -> None:
        """Tell that the run ends before its last step."""
        text = f"Step {step}: the validation loss no longer falls; the run ends at its best weights"
        self.send(Draft(text, data={"step": float(step), "best_valid_loss": best_valid_loss}))

    def checkpoint(self, run: TrainingRun) -> None:
        """Store what the run needs to go on, and have it recorded."""
        state = run.state
        checkpoint_id = new_id(CHECKPOINT_PREFIX)
        folder = self._folder / checkpoint_id
        failpoint("checkpoint.before_write")
        run.write(folder)
        failpoint("checkpoint.before_upload")
        digest = self.patience.do(lambda: self._checkpoints.save(folder, checkpoint_id))
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
        failpoint("checkpoint.before_record")
        self.record(Draft(f"Checkpoint at step {state.step}", facts=Facts(checkpoint=checkpoint)))
        failpoint("checkpoint.after_record")
        self._written_step = state.step
        self._checkpoints.discard([old.id for old in self.job.checkpoints[:-KEPT_CHECKPOINTS]][-1:])

    def resume(self, run: TrainingRun) -> None:
        """Have the run go on from the job's last checkpoint, where there is one."""
        if not self.job.checkpoints:
            return
        last = self.job.checkpoints[-1]
        folder = self._folder / last.id
        self.patience.do(lambda: self._checkpoints.load(last.id, last.manifest_digest, folder))
        run.resume(folder)
        self.send(Draft(f"Going on from step {run.state.step}", data={"step": float(run.state.step)}))

    def thin_checkpoints(self) -> None:
        """Keep the weights alone of the last checkpoints: they may be published, and nothing resumes."""
        self._checkpoints.keep_weights([old.id for old in self.job.checkpoints[-KEPT_CHECKPOINTS:]])

    def send(self, draft: Draft) -> None:
        """Have a draft recorded some time."""
        self._line.send(draft)

    def record(self, draft: Draft) -> None:
        """Have a draft recorded durably, and take over what it says about the job."""
        self._line.send_durably(draft)
        facts = draft.facts
        assert facts is not None, "only what adds to the job is waited for"
        self.job = self.job.with_facts(facts)

    def _measured_minutes(self, progress: Progress) -> Facts | None:
        estimate = self.job.estimate
        if estimate is None or estimate.minutes_basis == MEASURED or progress.step < MEASURED_STEPS:
            return None
        seconds_per_step = progress.eta_seconds / max(1, progress.total_steps - progress.step)
        minutes = seconds_per_step * progress.total_steps / 60
        facts = Facts(estimate=replace(estimate, minutes=minutes, minutes_basis=MEASURED))
        self.job = replace(self.job, estimate=facts.estimate)
        return facts
