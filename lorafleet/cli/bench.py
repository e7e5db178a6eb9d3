"""`lorafleet bench`."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import Annotated

import typer

from lorafleet.api import Api
from lorafleet.cli.connection import coordinates
from lorafleet.cli.output import JsonOption, StateOption, print_json, problems, progress, results
from lorafleet.demo.report import Load, load_of, load_table
from lorafleet.demo.traffic import Ask, Traffic

_PROMPT = "The quick brown fox\n"


def bench(
    models: Annotated[
        str,
        typer.Option(help="What is asked, in turn, separated by commas; the base and every adapter without."),
    ] = "",
    streams: Annotated[int, typer.Option(min=1, max=1024, help="Requests at a time.")] = 16,
    seconds: Annotated[float, typer.Option(min=1, help="How long each load lasts.")] = 10.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 32,
    prompt: Annotated[str, typer.Option(help="What is asked.")] = _PROMPT,
    state: StateOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure the fleet: the base alone, then the base and adapters mixed in the same batch."""
    with problems(as_json=as_json):
        url, key = coordinates(state)
        with Api(url, key) as api:
            base = api.base_name()
            chosen = [name for name in models.split(",") if name] or [
                base,
                *(adapter["name"] for adapter in api.adapters() if adapter["latest_version"]),
            ]
        with progress.status(f"{streams} streams"):
            loads = asyncio.run(_measure(url, key, base, chosen, prompt, max_tokens, streams, seconds))
    if as_json:
        print_json({"base": base, "models": chosen, "loads": [asdict(load) for load in loads]})
    else:
        results.print(load_table(loads))


async def _measure(
    url: str,
    key: str,
    base: str,
    models: list[str],
    prompt: str,
    max_tokens: int,
    streams: int,
    seconds: float,
) -> list[Load]:
    async with Traffic.to(url, key) as traffic:
        of_base = [Ask(base, prompt, max_tokens, ())]
        mixed = [Ask(model, prompt, max_tokens, ()) for model in models]
        # Every adapter is loaded once before the clock runs.
        await traffic.ask_all(mixed, at_once=streams)
        alone = await traffic.keep_asking(of_base, at_once=streams, seconds=seconds)
        together = await traffic.keep_asking(mixed, at_once=streams, seconds=seconds)
    return [
        load_of("base only", alone, streams=streams),
        load_of(f"{len(models)} models mixed", together, streams=streams),
    ]
