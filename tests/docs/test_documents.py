"""What the documents say about commands, words, files and figures is so."""

import importlib.util
import re
import shlex
from typing import Any

import pytest
import typer.main

from docs.tooling.figures import PAGE, figures_filled_in
from lorafleet.cli.app import app
from lorafleet.fleet.config import BUNDLED_BASE_NAME
from tests.support.documents import ROOT, Block, blocks, documents

LINK = re.compile(r"!?\[[^\]]*\]\(([^)#\s]+)")
PROGRAM: Any = typer.main.get_command(app)
SHELL = [block for document in documents() for block in blocks(document) if block.language == "sh"]


def words(block: Block, program: str) -> list[list[str]]:
    """The arguments of every call of a program in a block."""
    calls = [shlex.split(command) for command in block.commands]
    return [call[1:] for call in calls if call[0].rpartition("/")[2] == program]


def command_of(call: list[str]) -> tuple[Any, list[str]]:
    """The command that a call names, and what is left of the call."""
    command, rest = PROGRAM, list(call)
    while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
        assert rest[0] in command.commands, f"lorafleet has no {rest[0]}"
        command = command.commands[rest.pop(0)]
    return command, rest


@pytest.mark.parametrize("block", SHELL, ids=lambda block: f"{block.document}:{block.commands[0][:40]}")
def test_the_program_has_every_command_and_option(block: Block) -> None:
    for call in words(block, "lorafleet"):
        command, rest = command_of(call)
        options = {
            name: option for option in command.params for name in (*option.opts, *option.secondary_opts)
        }
        arguments = [option for option in command.params if option.param_type_name == "argument"]
        given = 0
        while rest:
            word = rest.pop(0)
            if not word.startswith("-"):
                given += 1
                continue
            assert word in options or word == "--help", f"lorafleet {' '.join(call)}: no option {word}"
            if word != "--help" and not options[word].is_flag:
                assert rest, f"{word} takes a value"
                rest.pop(0)
        assert given <= len(arguments), f"lorafleet {' '.join(call)}: too many arguments"


def test_the_makefile_and_python_have_every_word() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    for block in SHELL:
        for call in words(block, "make"):
            assert {word for word in call if "=" not in word} <= targets, f"{block.document}: make {call}"
        for call in words(block, "python"):
            assert call[0] != "-m" or importlib.util.find_spec(call[1]), (
                f"{block.document}: python -m {call[1]}"
            )


@pytest.mark.parametrize("document", documents())
def test_links_lead_somewhere(document: str) -> None:
    for link in LINK.findall((ROOT / document).read_text("utf-8")):
        # Reference pages are written when the site is built, whose strict form checks them.
        if (
            "://" not in link
            and not link.startswith("reference/")
            and link not in {"changelog.md", "contributing.md"}
        ):
            assert ((ROOT / document).parent / link).exists(), f"{document} links to {link}"


def test_the_bundled_base_goes_by_its_name() -> None:
    for document in documents():
        named = set(re.findall(r"\blorafleet-[0-9]+m\b", (ROOT / document).read_text("utf-8")))
        assert named <= {BUNDLED_BASE_NAME}, f"{document} names {named}"


def test_figures_are_those_of_the_results() -> None:
    text = PAGE.read_text("utf-8")
    assert figures_filled_in(text) == text, "run `python -m docs.tooling.figures`"
    assert text.count("-->") >= 10
