"""What LoRAX's own client gets; runs in an environment of its own."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import lorax  # type: ignore[import-not-found]
import lorax.errors  # type: ignore[import-not-found]


def main() -> None:
    """Ask for everything and print what came."""
    place = json.loads(sys.argv[1])
    headers = {"Authorization": f"Bearer {place['key']}"}
    client = lorax.Client(place["root_url"], headers=headers)
    asked = {"adapter_id": place["adapter"], "max_new_tokens": 12}
    said: dict[str, Any] = {}

    whole = client.generate(place["prompt"], **asked)
    said["completion"] = whole.generated_text
    said["generated_tokens"] = whole.details.generated_tokens
    said["finish_reason"] = whole.details.finish_reason.value
    said["logprobs"] = [token.logprob for token in whole.details.tokens]
    said["token_ids"] = [token.id for token in whole.details.tokens]

    chunks = list(client.generate_stream(place["prompt"], **asked))
    said["streamed"] = "".join(chunk.token.text for chunk in chunks if not chunk.token.special)
    said["streamed_text"] = chunks[-1].generated_text
    said["num_chunks"] = len(chunks)

    other = lorax.AsyncClient(place["root_url"], headers=headers)

    async def at_once() -> list[str]:
        answers = await asyncio.gather(*(other.generate(place["prompt"], **asked) for _ in range(3)))
        return [answer.generated_text for answer in answers]

    async def streamed() -> str:
        parts = [chunk async for chunk in other.generate_stream(place["prompt"], **asked)]
        return "".join(chunk.token.text for chunk in parts if not chunk.token.special)

    said["batch"] = asyncio.run(at_once())
    said["async_streamed"] = asyncio.run(streamed())
    said["base_completion"] = client.generate(place["prompt"], max_new_tokens=12).generated_text
    said["pushed_completion"] = client.generate(
        place["prompt"], adapter_id=place["pushed"], max_new_tokens=12
    ).generated_text
    full = client.generate(place["prompt"], **asked, return_full_text=True, return_k_alternatives=3)
    said["full_text"] = full.generated_text
    said["alternatives"] = len(full.details.tokens[0].alternative_tokens)
    sampled = {**asked, "do_sample": True, "temperature": 1.5, "seed": 7}
    said["sampled"] = [client.generate(place["prompt"], **sampled).generated_text for _ in range(2)]

    said["errors"] = {
        "absent": error_of(lambda: client.generate("hi", adapter_id="absent")),
        "absent_streamed": error_of(lambda: list(client.generate_stream("hi", adapter_id="absent"))),
        "source": error_of(lambda: client.generate("hi", adapter_id="numbers", adapter_source="hub")),
        "key": error_of(lambda: lorax.Client(place["root_url"]).generate("hi")),
    }
    json.dump(said, sys.stdout)


def error_of(call: Any) -> list[str] | None:
    """Return the class and the words of the error that a call ends with."""
    kinds = tuple(
        kind for kind in vars(lorax.errors).values() if isinstance(kind, type) and issubclass(kind, Exception)
    )
    try:
        call()
    except kinds as error:
        return [type(error).__name__, str(error)]
    return None


if __name__ == "__main__":
    main()
