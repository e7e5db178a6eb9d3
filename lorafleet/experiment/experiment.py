"""Has runs carried out: submit, follow. Stopped and started again, it goes on where it was."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from lorafleet.api import ApiError, Json
from lorafleet.experiment.executor import Executor, RunState
from lorafleet.experiment.ledger import Ledger
from lorafleet.experiment.plan import Cell

_POLL_SECONDS = 1.0
# A service that was killed is back well within this time.
PATIENCE_SECONDS = 300.0
# Refusals that have nothing to do with the run.
EVERY_RUN = frozenset({"invalid_api_key", "permission_denied"})
_REFUSED = "refused"

ResultT = TypeVar("ResultT")


@dataclass(frozen=True, slots=True)
class Standing:
    """How an experiment stands: the runs under way by their cells, and how many have ended."""

    ended: int
    total: int
    running: tuple[tuple[Cell, RunState], ...]


def run_experiment(
    cells: Sequence[Cell],
    executor: Executor,
    ledger: Ledger,
    *,
    runs_at_once: int,
    show: Callable[[Standing], None],
    pause: Callable[[float], None] = time.sleep,
) -> list[Json]:
    """Carry out all runs, and return how each ended, in the order of `cells`.

    A run that fails has an outcome with its error; the others go on.

    Raises:
        ApiError: the fleet refused something other than a run, or did not answer for minutes.
    """
    patience = _Patience(pause)
    waiting = [cell for cell in cells if not _is_done(ledger.outcome(cell.digest))]
    under_way: list[Cell] = []
    while waiting or under_way:
        while waiting and len(under_way) < runs_at_once:
            cell = waiting.pop(0)
            if patience.call(partial(_submit, cell, executor, ledger)):
                under_way.append(cell)
        states = [(cell, patience.call(partial(_state, cell, executor, ledger))) for cell in under_way]
        for cell, state in states:
            if state.outcome is not None:
                ledger.ended(cell.digest, state.outcome)
        running = tuple((cell, state) for cell, state in states if state.outcome is None)
        under_way = [cell for cell, _ in running]
        show(Standing(len(cells) - len(waiting) - len(under_way), len(cells), running))
        if under_way:
            pause(_POLL_SECONDS)
    return [ledger.outcome(cell.digest) or {} for cell in cells]


def _is_done(outcome: Json | None) -> bool:
    """Whether a run needs nothing more. One that was refused is tried again: what it lacked may be there."""
    return outcome is not None and outcome["status"] != _REFUSED


def _submit(cell: Cell, executor: Executor, ledger: Ledger) -> bool:
    """Hand a run to the executor, unless an earlier attempt did; False where it is refused, which ends it."""
    if ledger.run_id(cell.digest) is not None:
        return True
    files = ledger.files(cell.digest)
    if files is None:
        files = executor.place_files(cell)
        # Noted first: the same files make the same run, should the next step be cut off.
        ledger.placed(cell.digest, files)
    try:
        run_id = executor.submit(cell, files)
    except ApiError as error:
        if error.is_passing or error.code in EVERY_RUN:
            raise
        ledger.ended(cell.digest, {"status": _REFUSED, "error": {"code": error.code, "message": str(error)}})
        return False
    ledger.submitted(cell.digest, run_id)
    return True


def _state(cell: Cell, executor: Executor, ledger: Ledger) -> RunState:
    run_id = ledger.run_id(cell.digest)
    assert run_id is not None, "a run under way was submitted"
    return executor.state(run_id)


class _Patience:
    """Makes a call again while its failure may pass."""

    def __init__(self, pause: Callable[[float], None]) -> None:
        self._pause = pause

    def call(self, attempt: Callable[[], ResultT]) -> ResultT:
        """Return what `attempt` returns; its error passes through where it stays for minutes."""
        began_at = time.monotonic()
        while True:
            try:
                return attempt()
            except ApiError as error:
                if not error.is_passing or time.monotonic() - began_at > PATIENCE_SECONDS:
                    raise
            self._pause(_POLL_SECONDS)
