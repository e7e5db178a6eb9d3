"""The manifest of an experiment: bases x tasks x recipes, as YAML."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator

_MAX_BYTES = 1 << 20

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?$")]


class ManifestError(Exception):
    """A manifest cannot be used; the message names every field that is wrong."""


class _Loader(yaml.SafeLoader):
    """YAML as people write it: `4e-3` is a number, as in YAML 1.2 and everywhere else."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)"),
    list("-+.0123456789"),
)


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TaskChoice(_Part):
    """One task of the data folder, and how much of it is used; absent limits are the manifest's."""

    name: Annotated[str, StringConstraints(pattern=r"^[a-z0-9](?:[a-z0-9_]{0,60}[a-z0-9])?$")]
    train_rows: Annotated[int, Field(ge=1)] | None = None
    test_rows: Annotated[int, Field(ge=1, le=1000)] | None = None


class Recipe(_Part):
    """How a run is trained: OpenAI's two hyperparameters, and options of the fine-tuning API beside them.

    The trainer knows the options, their ranges and their defaults; what it does not know it refuses by name.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    n_epochs: Annotated[int, Field(ge=1)] | None = None
    batch_size: Annotated[int, Field(ge=1)] | None = None

    @property
    def hyperparameters(self) -> dict[str, int]:
        """What the API takes as `hyperparameters`."""
        given = {"n_epochs": self.n_epochs, "batch_size": self.batch_size}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def options(self) -> dict[str, Any]:
        """What the API takes as options."""
        return dict(self.__pydantic_extra__ or {})


class Manifest(_Part):
    """An experiment: every task on every base by every recipe.

    Attributes:
        data: folder of tasks, each `NAME/{TASK.json,train.jsonl,test.jsonl}`; relative to the manifest.
        bases: names of bases as the fleet serves them.
        train_rows: most training rows of a task; absent: all.
        test_rows: most test rows of a task, 1 to 1,000.
        runs_at_once: most runs that are handed to the fleet at a time.
        requests_at_once: most requests that the served models answer at a time.
        retry_collapsed: what a second run of a collapsed one changes of its recipe; absent: no second run.
    """

    name: Name
    data: Path = Path()
    bases: Annotated[list[Name], Field(min_length=1, max_length=64)]
    tasks: Annotated[list[TaskChoice], Field(min_length=1, max_length=1024)]
    recipes: Annotated[dict[Name, Recipe], Field(min_length=1, max_length=64)]
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 7
    train_rows: Annotated[int, Field(ge=1)] | None = None
    test_rows: Annotated[int, Field(ge=1, le=1000)] = 100
    runs_at_once: Annotated[int, Field(ge=1, le=1024)] = 32
    requests_at_once: Annotated[int, Field(ge=1, le=1024)] = 32
    retry_collapsed: Recipe | None = None

    @field_validator("tasks", mode="before")
    @classmethod
    def _names_alone(cls, value: Any) -> Any:
        if isinstance(value, list):
            return [{"name": item} if isinstance(item, str) else item for item in value]
        return value

    @field_validator("bases", "tasks", mode="after")
    @classmethod
    def _once_each(cls, value: list[Any]) -> list[Any]:
        names = [item.name if isinstance(item, TaskChoice) else item for item in value]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"{', '.join(twice)} is named more than once")
        return value


def load_manifest(path: Path, *, data: Path | None = None) -> Manifest:
    """Read a manifest; its `data` folder comes back absolute.

    Args:
        data: folder of tasks in place of the manifest's, relative to where we are.

    Raises:
        ManifestError: it cannot be read, is no YAML, a field is missing, unknown or out of range, or it
            names no data folder and none is given.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ManifestError(f"{path} cannot be read: {error.strerror}") from error
    if len(text) > _MAX_BYTES:
        raise ManifestError(f"{path} has {len(text):,} bytes; a manifest has at most {_MAX_BYTES:,}")
    try:
        # A loader that is safe but for reading numbers well.
        manifest = Manifest.model_validate(yaml.load(text, Loader=_Loader))  # noqa: S506
    except (yaml.YAMLError, RecursionError) as error:
        raise ManifestError(f"{path} is no YAML: {error}") from error
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc'])) or 'manifest'}: {e['msg']}" for e in error.errors()]
        raise ManifestError(f"{path}: " + "; ".join(lines)) from error
    if data is None and "data" not in manifest.model_fields_set:
        raise ManifestError(f"{path}: data: the manifest names no folder of tasks; give one with --data")
    folder = path.parent / manifest.data.expanduser() if data is None else data.expanduser()
    return manifest.model_copy(update={"data": folder.resolve()})
