"""Follow fine-tuning jobs to their end, with a line of live progress for each."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from lorafleet.api import ENDED_STATES, Api, ApiError, Json

_POLL_SECONDS = 0.5
# A service that was killed is back well within this time.
_PATIENCE_SECONDS = 60.0


def follow(api: Api, job_ids: Sequence[str], console: Console) -> list[Json]:
    """Show the jobs until every one has ended, and return them in the same order.

    Raises:
        ApiError: the API refused, or did not answer for a minute.
    """
    jobs: list[Json] = []
    with _display(console) as display:
        lines = [display.add_task(job_id, total=None, status="", detail="") for job_id in job_ids]
        for jobs in _observations(api, job_ids):
            for line, job in zip(lines, jobs, strict=True):
                _show(display, line, job)
    return jobs


def _observations(api: Api, job_ids: Sequence[str]) -> Iterator[list[Json]]:
    """Yield the jobs as they are now, again and again, until all have ended."""
    answered_at = time.monotonic()
    while True:
        try:
            jobs = [api.job(job_id) for job_id in job_ids]
        except ApiError as error:
            if not error.is_passing or time.monotonic() - answered_at > _PATIENCE_SECONDS:
                raise
        else:
            answered_at = time.monotonic()
            yield jobs
            if all(job["status"] in ENDED_STATES for job in jobs):
                return
        time.sleep(_POLL_SECONDS)


def _display(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[status]:<16}"),
        TextColumn("{task.fields[detail]}"),
        TimeElapsedColumn(),
        console=console,
    )


def _show(display: Progress, line: TaskID, job: Json) -> None:
    progress = job["lorafleet"]["progress"]
    name = job["lorafleet"]["adapter"] or job["id"]
    display.update(line, description=name, status=job["status"])
    if progress is not None:
        display.update(
            line, completed=progress["step"], total=progress["total_steps"], detail=_detail(progress)
        )
    if job["status"] in ENDED_STATES:
        display.stop_task(line)


def _detail(progress: Json) -> str:
    figures = [f"step {progress['step']}/{progress['total_steps']}"]
    if progress["loss"] is not None:
        figures.append(f"loss {progress['loss']:.3f}")
    if progress["tokens_per_second"]:
        figures.append(f"{progress['tokens_per_second']:.0f} tokens/s")
    if progress["eta_seconds"]:
        figures.append(f"{progress['eta_seconds']:.0f} s left")
    return "  ".join(figures)
