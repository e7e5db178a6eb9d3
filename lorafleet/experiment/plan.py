"""What an experiment has to do: one run for each base, task and recipe."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

from lorafleet.experiment.manifest import Manifest, ManifestError, Recipe
from lorafleet.tasks import Task, load_tasks

_ALL_ROWS = 2**31
_MAX_RUNS = 10_000
_MAX_ADAPTER_NAME = 64


@dataclass(frozen=True, slots=True)
class Cell:
    """One run of the experiment.

    Attributes:
        key: names the run within the experiment, `BASE/TASK/RECIPE`.
        adapter: the adapter that it becomes a version of.
        retry_of: the recipe whose collapsed run this one repeats; empty for a first run.
    """

    base: str
    task: Task
    recipe_name: str
    recipe: Recipe
    seed: int
    adapter: str
    retry_of: str = ""

    @property
    def key(self) -> str:
        """The run's place in the table."""
        return f"{self.base}/{self.task.name}/{self.recipe_name}"

    @property
    def digest(self) -> str:
        """SHA-256 over all that decides the run; the same run has the same digest."""
        rows = [
            [row.prompt, row.target.completion, row.target.references, row.target.answer]
            for row in (*self.task.train, *self.task.test)
        ]
        parts = [self.key, self.recipe.model_dump(mode="json"), self.seed, len(self.task.train), rows]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode("utf-8")).hexdigest()


def plan(manifest: Manifest, bases: Collection[str] = ()) -> list[Cell]:
    """Return the runs of `manifest`, task by task; those on `bases` alone where some are given.

    Raises:
        ManifestError: too many runs, two of them would be versions of one adapter, or a base is not in it.
        TaskError: a task cannot be used.
    """
    unknown = sorted(set(bases) - set(manifest.bases))
    if unknown:
        raise ManifestError(f"{', '.join(unknown)} is not among the bases {', '.join(manifest.bases)}")
    count = len(manifest.bases) * len(manifest.tasks) * len(manifest.recipes)
    if count > _MAX_RUNS:
        raise ManifestError(f"the manifest makes {count:,} runs; at most {_MAX_RUNS:,} are taken")
    tasks = list(_tasks(manifest))
    cells = [
        Cell(base, task, name, recipe, manifest.seed, _adapter_name(manifest, base, task, name))
        for task, base, (name, recipe) in itertools.product(tasks, manifest.bases, manifest.recipes.items())
    ]
    names = [cell.adapter for cell in cells]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ManifestError(f"more than one run would make the adapter {min(twice)}; rename a task or recipe")
    return [cell for cell in cells if not bases or cell.base in bases]


def retry_of(cell: Cell, change: Recipe) -> Cell:
    """Return the second run of a collapsed one: another seed, and `change` over its recipe."""
    recipe = Recipe.model_validate(
        cell.recipe.model_dump(exclude_none=True) | change.model_dump(exclude_none=True)
    )
    return replace(
        cell,
        recipe_name=f"{cell.recipe_name}-retry",
        recipe=recipe,
        seed=cell.seed + 1,
        adapter=_fitting(f"{cell.adapter}-retry"),
        retry_of=cell.recipe_name,
    )


def _tasks(manifest: Manifest) -> Iterator[Task]:
    for choice in manifest.tasks:
        yield from load_tasks(
            manifest.data,
            [choice.name],
            max_train_rows=choice.train_rows or manifest.train_rows or _ALL_ROWS,
            test_rows=choice.test_rows or manifest.test_rows,
        )


def _adapter_name(manifest: Manifest, base: str, task: Task, recipe: str) -> str:
    """Return a name that tells the run's parts; a base or recipe that is the only one is not told."""
    parts = [manifest.name, task.name]
    if len(manifest.bases) > 1:
        parts.append(base)
    if len(manifest.recipes) > 1:
        parts.append(recipe)
    return _fitting("-".join(parts).replace("_", "-").replace(".", "-"))


def _fitting(name: str) -> str:
    if len(name) <= _MAX_ADAPTER_NAME:
        return name
    mark = hashlib.sha256(name.encode("ascii")).hexdigest()[:8]
    return f"{name[: _MAX_ADAPTER_NAME - 9].rstrip('-')}-{mark}"
