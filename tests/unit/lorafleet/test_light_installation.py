"""An installation without torch: the command line works, and a fleet is refused with what to install."""

import importlib.util
from pathlib import Path

import pytest

from lorafleet.fleet import launch
from lorafleet.fleet.config import Wishes
from lorafleet.fleet.errors import FleetError
from lorafleet.fleet.state import StateFolder


def test_a_fleet_without_its_libraries_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in {"torch", "peft"} else find_spec(name)
    )
    state = StateFolder(tmp_path / "state")
    with pytest.raises(FleetError, match=r"torch, peft.*lorafleet\[trainer\]"):
        launch.up(state, Wishes())
    assert not state.root.exists()
