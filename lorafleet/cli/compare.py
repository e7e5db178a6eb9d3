"""`lorafleet compare`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from lorafleet.cli.connection import connect_rpc
from lorafleet.cli.output import JsonOption, StateOption, plain, print_json, problems, results
from lorafleet.client.generation import Completion

_BASE = "base"


def compare(
    models: Annotated[str, typer.Argument(help="Adapters (name, name:3, name@alias), separated by commas.")],
    prompt: Annotated[str, typer.Argument(help="What all of them are asked.")],
    exact: Annotated[bool, typer.Option("--exact", help="Add no line break to PROMPT.")] = False,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 128,
    state: StateOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the base's greedy answer beside those of adapters, and how sure each is of its own."""
    text = prompt if exact or prompt.endswith("\n") else prompt + "\n"
    refs = [None, *(name.strip() for name in models.split(",") if name.strip())]
    with problems(as_json=as_json), connect_rpc(state) as client:
        answers = [
            client.inference.generate(text, model=ref, max_tokens=max_tokens, temperature=0.0, logprobs=0)
            for ref in refs
        ]
    if as_json:
        print_json({"prompt": text, "answers": [_as_json(answer) for answer in answers]})
        return
    table = Table("model", "answer", "tokens", "nats per token", box=None, show_lines=False)
    for answer in answers:
        table.add_row(
            answer.version or _BASE,
            plain(answer.text.strip()),
            str(answer.completion_tokens),
            f"{_mean_logprob(answer):.3f}",
        )
    results.print(table)


def _as_json(answer: Completion) -> dict[str, object]:
    return {
        "model": answer.version or _BASE,
        "digest": answer.version_digest,
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "completion_tokens": answer.completion_tokens,
        "mean_logprob": _mean_logprob(answer),
    }


def _mean_logprob(answer: Completion) -> float:
    logprobs = [position.chosen.logprob for position in answer.logprobs]
    return sum(logprobs) / len(logprobs) if logprobs else 0.0
