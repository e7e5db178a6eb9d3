"""What LiteLLM gets as a client; runs in an environment of its own."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

import litellm  # type: ignore[import-not-found]
import openai


def main() -> None:
    """Ask for everything and print what came."""
    place = json.loads(sys.argv[1])
    litellm.telemetry = False
    to_us = {"api_base": place["base_url"], "api_key": place["key"]}
    adapter, base = f"openai/{place['adapter']}", f"openai/{place['base']}"
    messages = [{"role": "user", "content": place["prompt"]}]
    asked = {"model": adapter, "messages": messages, "temperature": 0, "max_tokens": 12, **to_us}
    said: dict[str, Any] = {}

    whole = litellm.completion(**asked)
    said["chat"] = whole.choices[0].message.content
    said["usage"] = whole.usage.model_dump(include={"prompt_tokens", "completion_tokens", "total_tokens"})
    said["finish_reason"] = whole.choices[0].finish_reason

    chunks = list(litellm.completion(**asked, stream=True, stream_options={"include_usage": True}))
    said["streamed"] = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    said["num_chunks"] = len([chunk for chunk in chunks if chunk.choices and chunk.choices[0].delta.content])
    counted = next(chunk.usage for chunk in reversed(chunks) if getattr(chunk, "usage", None))
    said["streamed_usage"] = counted.model_dump(
        include={"prompt_tokens", "completion_tokens", "total_tokens"}
    )

    async def at_once() -> list[str]:
        answers = await asyncio.gather(*(litellm.acompletion(**asked) for _ in range(3)))
        return [answer.choices[0].message.content for answer in answers]

    said["batch"] = asyncio.run(at_once())
    said["base_chat"] = litellm.completion(**{**asked, "model": base}).choices[0].message.content
    texts = {"prompt": place["prompt"], "temperature": 0, "max_tokens": 12, **to_us}
    completed = litellm.text_completion(model=f"text-completion-openai/{place['adapter']}", **texts)
    said["completion"] = completed.choices[0].text
    embedded = litellm.embedding(model=base, input=["one", "two words"], encoding_format="float", **to_us)
    said["embeddings"] = [item["embedding"] for item in embedded.data]

    said["errors"] = {
        "absent": error_of(**{**asked, "model": "openai/absent"}),
        "temperature": error_of(**{**asked, "temperature": 9}),
        "key": error_of(**{**asked, "api_key": "lf-no"}),
    }

    few = {**asked, "model": base, "max_tokens": 1, "api_key": place["limited_key"]}
    for _ in range(place["requests_per_minute"] + 1):
        said["limited"] = error_of(**few)
    began_at = time.monotonic()
    litellm.completion(**{**few, "max_retries": 3})
    said["waited_seconds"] = time.monotonic() - began_at
    json.dump(said, sys.stdout)


def error_of(**asked: Any) -> list[str | int] | None:
    """Return the class and the HTTP status of the error that a completion ends with."""
    try:
        litellm.completion(**{"max_retries": 0, **asked})
    except openai.APIStatusError as error:
        return [type(error).__name__, error.status_code]
    return None


if __name__ == "__main__":
    main()
