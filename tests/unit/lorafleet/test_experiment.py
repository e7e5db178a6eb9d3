"""Experiments: what a manifest means, what survives a crash, and what the table says."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from lorafleet.api import ApiError, Json
from lorafleet.experiment.executor import RunFiles, RunState
from lorafleet.experiment.experiment import Standing, run_experiment
from lorafleet.experiment.ledger import Ledger, LedgerError
from lorafleet.experiment.manifest import ManifestError, Recipe, load_manifest
from lorafleet.experiment.plan import Cell, plan, retry_of

MANIFEST = """
name: trial
data: tasks
bases: [tiny]
tasks: [alpha, {name: beta, train_rows: 3}]
recipes:
  quick: {n_epochs: 1, rank: 4}
  slow: {n_epochs: 2, method: dora}
train_rows: 5
test_rows: 4
"""


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    for name in ("alpha", "beta", "gamma"):
        folder = tmp_path / "tasks" / name
        folder.mkdir(parents=True)
        card = {
            "title": name,
            "task_type": "classification",
            "metric": "accuracy",
            "baselines": {"majority_label_accuracy": 0.5},
        }
        (folder / "TASK.json").write_text(json.dumps(card))
        for part in ("train", "test"):
            rows = [{"prompt": f"{part} {n}\n", "completion": "yes"} for n in range(10)]
            (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "trial.yaml"
    path.write_text(MANIFEST)
    return path


def cells_of(path: Path) -> list[Cell]:
    return plan(load_manifest(path))


def changed(path: Path, old: str, new: str) -> Path:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    return path


def test_every_task_runs_by_every_recipe(manifest: Path) -> None:
    cells = cells_of(manifest)
    assert [cell.key for cell in cells] == [
        "tiny/alpha/quick",
        "tiny/alpha/slow",
        "tiny/beta/quick",
        "tiny/beta/slow",
    ]
    assert [cell.adapter for cell in cells] == [
        "trial-alpha-quick",
        "trial-alpha-slow",
        "trial-beta-quick",
        "trial-beta-slow",
    ]
    assert [(len(cell.task.train), len(cell.task.test)) for cell in cells] == [(5, 4), (5, 4), (3, 4), (3, 4)]
    assert cells[0].recipe.hyperparameters == {"n_epochs": 1}
    assert cells[1].recipe.options == {"method": "dora"}


def test_numbers_are_read_as_people_write_them(manifest: Path) -> None:
    changed(manifest, "rank: 4", "learning_rate: 4e-3, alpha: 1E2, dropout: .5e-1, method: e3")
    assert cells_of(manifest)[0].recipe.options == {
        "learning_rate": 0.004, "alpha": 100.0, "dropout": 0.05, "method": "e3",
    }  # fmt: skip


def test_a_run_is_what_decides_it(manifest: Path) -> None:
    digests = [cell.digest for cell in cells_of(manifest)]
    assert len(set(digests)) == 4
    assert digests == [cell.digest for cell in cells_of(manifest)]
    again = [cell.digest for cell in cells_of(changed(manifest, "rank: 4", "rank: 8"))]
    assert [old == new for old, new in zip(digests, again, strict=True)] == [False, True, False, True]


def test_long_adapter_names_are_cut_and_stay_apart(manifest: Path) -> None:
    changed(manifest, "name: trial", f"name: {'t' * 60}")
    names = [cell.adapter for cell in cells_of(manifest)]
    assert len(set(names)) == 4
    assert all(len(name) <= 64 for name in names)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("bases: [tiny]", "bases: []", "bases: "),
        ("bases: [tiny]", "bases: [tiny, tiny]", "tiny is named more than once"),
        ("bases: [tiny]", "bases: [../x]", "bases.0: "),
        ("alpha,", "alpha, alpha,", "alpha is named more than once"),
        ("test_rows: 4", "test_rows: 0", "test_rows: "),
        ("test_rows: 4", "tset_rows: 4", "tset_rows: "),
        ("n_epochs: 1", "n_epochs: 0", "recipes.quick.n_epochs: "),
        ("name: trial", "", "name: "),
        ("name: trial", "name: [", "is no YAML"),
        ("name: trial", "name: !!python/object/apply:os.getcwd []", "is no YAML"),
    ],
)
def test_every_wrong_field_is_named(manifest: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(ManifestError) as caught:
        load_manifest(changed(manifest, old, new))
    assert message in str(caught.value)


class Crash(BaseException):
    """The end of this process."""


class Place:
    """An executor that remembers, as a fleet does, and that can be made to fail."""

    def __init__(self) -> None:
        self.runs: dict[str, Cell] = {}
        self.requests: dict[str, RunFiles] = {}
        self.files = 0
        self.polls: dict[str, int] = {}
        self.most_at_once = 0
        self.faults: list[BaseException | None] = []
        self.accepts_all = False

    def _fault(self) -> None:
        fault = self.faults.pop(0) if self.faults else None
        if fault is not None:
            raise fault

    def place_files(self, cell: Cell) -> RunFiles:
        self._fault()
        self.files += 1
        return RunFiles(f"train-{self.files}", f"test-{self.files}")

    def submit(self, cell: Cell, files: RunFiles) -> str:
        self._fault()
        if cell.recipe_name == "refused" and not self.accepts_all:
            raise ApiError("rank is 9999", code="bad_hyperparameter")
        assert self.requests.setdefault(cell.digest, files) == files, "one key, two requests"
        self.runs[cell.digest] = cell
        # The answer may be lost after the deed.
        self._fault()
        return cell.digest

    def state(self, run_id: str) -> RunState:
        self._fault()
        self.polls[run_id] = self.polls.get(run_id, 0) + 1
        self.most_at_once = max(self.most_at_once, sum(1 for n in self.polls.values() if n < 3))
        if self.polls[run_id] < 3:
            return RunState("running", self.polls[run_id], 3)
        return RunState("succeeded", 3, 3, outcome_of(self.runs[run_id]))


def outcome_of(cell: Cell, **changes: Any) -> Json:
    measured = {
        "name": "accuracy", "base_value": 0.25, "adapter_value": 0.75, "rows": 4,
        "lift_ci_low": 0.1, "lift_ci_high": 0.9,
    }  # fmt: skip
    facts = {"started_at": 100, "evaluation": [measured], "collapsed": False}
    return {
        "status": "succeeded", "finished_at": 160, "trained_tokens": 99, "error": None,
        "fine_tuned_model": f"ft:{cell.adapter}", "lorafleet": facts, **changes,
    }  # fmt: skip


def run(cells: Sequence[Cell], place: Place, path: Path, shown: list[Standing] | None = None) -> list[Any]:
    with Ledger(path, "trial") as ledger:
        return run_experiment(
            cells,
            place,
            ledger,
            runs_at_once=2,
            show=(shown if shown is not None else []).append,
            pause=lambda _: None,
        )


def test_all_runs_end_in_the_table(manifest: Path, tmp_path: Path) -> None:
    cells, place, shown = cells_of(manifest), Place(), list[Standing]()
    lines = run(cells, place, tmp_path / "ledger", shown)
    assert [line["fine_tuned_model"] for line in lines] == [f"ft:{cell.adapter}" for cell in cells]
    assert place.most_at_once == 2
    assert [s.ended for s in shown] == sorted(s.ended for s in shown)
    assert (shown[-1].ended, shown[-1].running) == (4, ())
    # What has ended is not asked for again.
    polls = dict(place.polls)
    assert run(cells, place, tmp_path / "ledger") == lines
    assert place.polls == polls


def test_a_crash_at_any_call_submits_nothing_twice(manifest: Path, tmp_path: Path) -> None:
    cells = cells_of(manifest)
    calm = Place()
    expected = run(cells, calm, tmp_path / "calm")
    for crash_at in range(24):
        place = Place()
        place.faults = [*[None] * crash_at, Crash()]
        path = tmp_path / f"ledger-{crash_at}"
        with pytest.raises(Crash):
            run(cells, place, path)
        assert run(cells, place, path) == expected
        assert len(place.runs) == 4


def test_what_passes_is_waited_for_and_what_does_not_is_a_line(manifest: Path, tmp_path: Path) -> None:
    cells = cells_of(changed(manifest, "slow:", "refused:"))
    place = Place()
    gone = ApiError("cannot be reached", code="unreachable", is_passing=True)
    place.faults = [None, gone, gone, None, None, gone]
    lines = run(cells, place, tmp_path / "ledger")
    assert [line["status"] for line in lines] == ["succeeded", "refused", "succeeded", "refused"]
    assert lines[1]["error"]["message"] == "rank is 9999"
    # What a refused run lacked may be there by now: the next start tries it again.
    tried = len(place.polls)
    place.accepts_all = True
    assert [line["status"] for line in run(cells, place, tmp_path / "ledger")] == ["succeeded"] * 4
    assert len(place.polls) == tried + 2
    place.faults = [ApiError("no", code="invalid_api_key")]
    with pytest.raises(ApiError, match="no"):
        run(cells, place, tmp_path / "other")


def test_a_line_cut_short_is_not_believed(manifest: Path, tmp_path: Path) -> None:
    cells, path = cells_of(manifest), tmp_path / "ledger"
    expected = run(cells, Place(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    assert run(cells, replayed(cells), path) == expected
    assert len(path.read_bytes().splitlines()) == len(whole.splitlines())
    with pytest.raises(LedgerError, match="not the ledger of the experiment other"):
        Ledger(path, "other")
    path.write_bytes(b"no json\n")
    with pytest.raises(LedgerError, match="is no ledger"):
        Ledger(path, "trial")


def replayed(cells: Sequence[Cell]) -> Place:
    """A place that knows the runs of an earlier process."""
    place = Place()
    place.runs = {cell.digest: cell for cell in cells}
    return place


def test_a_base_may_be_chosen_and_keeps_its_names(manifest: Path) -> None:
    changed(manifest, "bases: [tiny]", "bases: [tiny, small]")
    loaded = load_manifest(manifest)
    chosen = plan(loaded, ["small"])
    assert [cell.adapter for cell in chosen] == [c.adapter for c in plan(loaded) if c.base == "small"]
    assert len(chosen) == 4
    with pytest.raises(ManifestError, match="large is not among the bases"):
        plan(loaded, ["large"])


def test_the_data_folder_may_be_given_with_the_command(manifest: Path, tmp_path: Path) -> None:
    given = tmp_path / "elsewhere"
    (tmp_path / "tasks").rename(given)
    assert len(plan(load_manifest(manifest, data=given))) == 4
    changed(manifest, "data: tasks", "")
    assert load_manifest(manifest, data=given).data == given
    with pytest.raises(ManifestError, match="give one with --data"):
        load_manifest(manifest)


def test_a_retry_changes_the_recipe_the_seed_and_the_name(manifest: Path) -> None:
    first = cells_of(manifest)[0]
    again = retry_of(first, Recipe.model_validate({"n_epochs": 5, "learning_rate": 1e-4}))
    assert (again.recipe_name, again.retry_of, again.seed) == ("quick-retry", "quick", first.seed + 1)
    assert again.recipe.hyperparameters == {"n_epochs": 5}
    assert again.recipe.options == {"rank": 4, "learning_rate": 1e-4}
    assert again.adapter == "trial-alpha-quick-retry"
    assert again.digest != first.digest
