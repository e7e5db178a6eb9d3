"""What LangChain's ChatOpenAI, OpenAI and OpenAIEmbeddings get; runs in an environment of its own."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any, Literal

import openai
from langchain_core.messages import HumanMessage  # type: ignore[import-not-found]
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings  # type: ignore[import-not-found]
from pydantic import BaseModel


class Verdict(BaseModel):
    """An answer of which a model can only choose the words."""

    is_good: bool
    grade: Literal["one", "two", "three"]


def main() -> None:
    """Ask for everything and print what came."""
    place = json.loads(sys.argv[1])
    to_us = {"base_url": place["base_url"], "api_key": place["key"]}
    said: dict[str, Any] = {}

    chat = ChatOpenAI(model=place["adapter"], temperature=0, max_tokens=12, **to_us)
    whole = chat.invoke([HumanMessage(place["prompt"])])
    said["chat"] = whole.content
    said["usage"] = whole.usage_metadata
    said["finish_reason"] = whole.response_metadata["finish_reason"]

    chunks = list(chat.stream(place["prompt"], stream_usage=True))
    said["streamed"] = "".join(chunk.content for chunk in chunks)
    said["num_chunks"] = len([chunk for chunk in chunks if chunk.content])
    said["streamed_usage"] = next(chunk.usage_metadata for chunk in reversed(chunks) if chunk.usage_metadata)

    async def at_once() -> list[str]:
        answers = await chat.abatch([place["prompt"]] * 3)
        return [answer.content for answer in answers]

    said["batch"] = asyncio.run(at_once())
    base = ChatOpenAI(model=place["base"], temperature=0, max_tokens=12, **to_us)
    said["base_chat"] = base.invoke(place["prompt"]).content
    longer = ChatOpenAI(model=place["adapter"], temperature=0, max_tokens=200, **to_us)
    verdict = longer.with_structured_output(Verdict, method="json_schema")
    said["structured"] = verdict.invoke(place["prompt"]).model_dump()

    completions = OpenAI(model=place["adapter"], temperature=0, max_tokens=12, **to_us)
    said["completion"] = completions.invoke(place["prompt"])
    said["completion_streamed"] = "".join(completions.stream(place["prompt"]))

    # Without it the texts are sent as tokens of OpenAI's own vocabulary.
    embeddings = OpenAIEmbeddings(model=place["base"], check_embedding_ctx_length=False, **to_us)
    said["embeddings"] = embeddings.embed_documents(["one", "two words"])

    said["errors"] = {
        "absent": error_of(lambda: chat.model_copy(update={"model_name": "absent"}).invoke("hi")),
        "temperature": error_of(lambda: ChatOpenAI(model=place["base"], temperature=9, **to_us).invoke("hi")),
        "key": error_of(
            lambda: ChatOpenAI(model=place["base"], base_url=place["base_url"], api_key="lf-no").invoke("hi")
        ),
    }

    few = {"base_url": place["base_url"], "api_key": place["limited_key"], "model": place["base"]}
    impatient = ChatOpenAI(max_tokens=1, max_retries=0, **few)
    for _ in range(place["requests_per_minute"] + 1):
        said["limited"] = error_of(lambda: impatient.invoke("hi"))
    began_at = time.monotonic()
    ChatOpenAI(max_tokens=1, max_retries=3, **few).invoke("hi")
    said["waited_seconds"] = time.monotonic() - began_at
    json.dump(said, sys.stdout)


def error_of(call: Any) -> list[str | None] | None:
    """Return the class and the code of the error that a call ends with."""
    try:
        call()
    except openai.APIStatusError as error:
        return [*(kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "openai"), error.code]
    return None


if __name__ == "__main__":
    main()
