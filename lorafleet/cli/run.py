"""`lorafleet run`: one answer, or a conversation."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from lorafleet.api import Api
from lorafleet.cli.connection import connect
from lorafleet.cli.output import JsonOption, StateOption, print_json, problems, progress

_FROM_STDIN = "-"


def run(
    model: Annotated[str, typer.Argument(help="An adapter (name, name:3, name@alias) or the base.")],
    prompt: Annotated[str | None, typer.Argument(help="The prompt; - reads it from standard input.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Send PROMPT as a chat message.")] = False,
    exact: Annotated[bool, typer.Option("--exact", help="Add no line break to PROMPT.")] = False,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0 takes the likeliest token.")] = 0.0,
    state: StateOption = None,
    as_json: JsonOption = False,
) -> None:
    """Answer PROMPT, streaming; without PROMPT, chat in the terminal.

    A prompt is ended by a line break, as prompts in training files are.
    """
    settings = {"model": model, "max_tokens": max_tokens, "temperature": temperature}
    with problems(as_json=as_json), connect(state) as api:
        if prompt is None:
            if as_json:
                raise typer.BadParameter("--json needs a PROMPT")
            _converse(api, settings)
            return
        text = sys.stdin.read() if prompt == _FROM_STDIN else prompt
        if chat:
            answer = api.stream_chat({**settings, "messages": [{"role": "user", "content": text}]})
        else:
            ended = text if exact or text.endswith("\n") else text + "\n"
            answer = api.stream_completion({**settings, "prompt": ended})
        if as_json:
            print_json({"model": model, "text": "".join(answer)})
        else:
            _write(answer)


def _converse(api: Api, settings: dict[str, Any]) -> None:
    """Chat until the end of the input, remembering what was said."""
    progress.print(f"chatting with {settings['model']}; Ctrl-D ends")
    messages: list[dict[str, str]] = []
    while (line := _next_line()) is not None:
        messages.append({"role": "user", "content": line})
        answer = _write(api.stream_chat({**settings, "messages": messages}))
        messages.append({"role": "assistant", "content": answer})


def _next_line() -> str | None:
    try:
        return progress.input("[bold]>[/] ")
    except EOFError:
        return None


def _write(pieces: Iterator[str]) -> str:
    """Write the pieces as they come, and return them put together."""
    text = ""
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
        text += piece
    sys.stdout.write("\n")
    return text
