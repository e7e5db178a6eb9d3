"""The command line without a fleet: exit codes, JSON and messages."""

import json
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from lorafleet.cli.app import _COMMANDS, app
from lorafleet.cli.demo import _quoted


@pytest.fixture(autouse=True)
def no_fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("LORAFLEET_URL", "LORAFLEET_GRPC_TARGET", "LORAFLEET_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LORAFLEET_STATE", str(tmp_path / "state"))
    return tmp_path


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


@pytest.mark.parametrize("command", [name for name, _ in _COMMANDS])
def test_every_command_has_help_and_speaks_json(command: str) -> None:
    shown = call(command, "--help")
    assert shown.exit_code == 0
    assert "--json" in shown.output


@pytest.mark.parametrize("arguments", [["list"], ["jobs"], ["run", "model", "hello"], ["ps"], ["show", "x"]])
def test_without_a_fleet_the_message_names_the_remedy(arguments: list[str]) -> None:
    shown = call(*arguments)
    assert shown.exit_code == 1
    assert "lorafleet up" in shown.stderr
    assert shown.stdout == ""
    as_json = call(*arguments, "--json")
    assert as_json.exit_code == 1
    error = json.loads(as_json.stdout)["error"]
    assert error["code"] == "fleet"
    assert "lorafleet up" in error["message"]


@pytest.mark.parametrize(
    "arguments",
    [["nonsense"], ["train", "absent.jsonl", "--name", "x"], ["run"], ["up", "--port", "70000"]],
)
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    assert call(*arguments).exit_code == 2


def test_status_and_down_of_nothing() -> None:
    status = call("status", "--json")
    assert status.exit_code == 1
    assert json.loads(status.stdout)["running"] is False
    down = call("down", "--json")
    assert down.exit_code == 0
    assert json.loads(down.stdout)["was_running"] is False


def test_a_folder_that_is_no_model_is_refused(no_fleet: Path) -> None:
    refused = call("up", "--base", str(no_fleet), "--json")
    assert refused.exit_code == 1
    assert "no model folder" in json.loads(refused.stdout)["error"]["message"]


def test_another_fleet_by_its_url_needs_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAFLEET_URL", "http://127.0.0.1:9/v1")
    assert "LORAFLEET_API_KEY is not" in call("list").stderr
    monkeypatch.setenv("LORAFLEET_API_KEY", "lf-x")
    unreachable = call("list", "--json")
    assert json.loads(unreachable.stdout)["error"]["code"] == "unreachable"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "one"], "give that with --data"),
        (["--data", "."], "--data needs --tasks"),
        (["--data", ".", "--tasks", "absent"], "task absent cannot be read"),
    ],
)
def test_a_demo_of_unusable_tasks_starts_nothing(no_fleet: Path, arguments: list[str], message: str) -> None:
    refused = call("demo", *arguments, "--json")
    assert refused.exit_code == 1
    assert message in json.loads(refused.stdout)["error"]["message"]
    assert not (no_fleet / "state").exists()


@pytest.mark.parametrize("text", ["plain", "two\nlines", "it's", 'a "b" \\ $HOME'])
def test_suggested_prompts_survive_the_shell(text: str) -> None:
    shown = subprocess.run(
        ["/bin/bash", "-c", f"printf %s {_quoted(text)}"], capture_output=True, check=True, timeout=10
    )
    assert shown.stdout.decode() == text
