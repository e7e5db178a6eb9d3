"""Where the runs of an experiment are carried out.

`Executor` is what a cluster's engine has to offer; `FleetExecutor` hands the runs to a fleet.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lorafleet.api import ENDED_STATES, Api, Json
from lorafleet.experiment.plan import Cell
from lorafleet.tasks import Row, write_rows


@dataclass(frozen=True, slots=True)
class RunFiles:
    """A task's rows where the executor keeps them."""

    training: str
    test: str


@dataclass(frozen=True, slots=True)
class RunState:
    """How a run stands.

    Attributes:
        status: as the fine-tuning API has it: `queued`, `running`, `succeeded` ...
        step, total_steps: how far training is; 0 where that is not known.
        outcome: the job as the API shows it, once it has ended and nothing will change any more.
    """

    status: str
    step: int = 0
    total_steps: int = 0
    outcome: Json | None = None


class Executor(Protocol):
    """Carries out runs. Every call may be made again after a failure."""

    def place_files(self, cell: Cell) -> RunFiles:
        """Put the rows of the cell's task where its run can read them."""
        ...

    def submit(self, cell: Cell, files: RunFiles) -> str:
        """Start the run of `cell`, once however often it is asked for, and return its id."""
        ...

    def state(self, run_id: str) -> RunState:
        """Return how a run stands."""
        ...


class FleetExecutor:
    """Runs are fine-tuning jobs of a fleet, through its public HTTP API."""

    def __init__(self, api: Api) -> None:
        self._api = api

    def place_files(self, cell: Cell) -> RunFiles:
        """Upload the task's rows."""
        with tempfile.TemporaryDirectory(prefix="lorafleet-experiment-") as folder:
            return RunFiles(
                self._upload(cell.task.train, Path(folder) / f"{cell.task.name}-train.jsonl"),
                self._upload(cell.task.test, Path(folder) / f"{cell.task.name}-test.jsonl"),
            )

    def submit(self, cell: Cell, files: RunFiles) -> str:
        """Create the job; its idempotency key follows from the run and its files."""
        options: dict[str, Any] = {
            "task_metric": cell.task.metric_name,
            "evaluation_rows": len(cell.task.test),
            "overlong_policy": "truncate",
        }
        body: Json = {
            "model": cell.base,
            "training_file": files.training,
            "validation_file": files.test,
            "suffix": cell.adapter,
            "seed": cell.seed,
            "method": {
                "type": "supervised",
                "supervised": {
                    "hyperparameters": cell.recipe.hyperparameters,
                    "lorafleet": options | cell.recipe.options,
                },
            },
        }
        return str(self._api.create_job(body, idempotency_key=cell.digest)["id"])

    def state(self, run_id: str) -> RunState:
        """Ask for the job."""
        job = self._api.job(run_id)
        progress = job["lorafleet"]["progress"] or {}
        return RunState(
            job["status"],
            int(progress.get("step") or 0),
            int(progress.get("total_steps") or 0),
            job if job["status"] in ENDED_STATES else None,
        )

    def _upload(self, rows: tuple[Row, ...], path: Path) -> str:
        write_rows(rows, path)
        return self._api.upload(path)
