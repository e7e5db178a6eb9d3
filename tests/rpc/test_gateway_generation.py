"""Completions and chat over HTTP: shapes, streams, failures, and clients that leave."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from lorafleet.inference.v1.generation_pb2 import FinishReason
from services.common.errors import Internal, ResourceExhausted, Unavailable
from tests.support.fake_base import BASE
from tests.support.fake_inference import Script
from tests.support.gateway import GatewayUnderTest, running_gateway, sse_objects, wait_until

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
TEXT = {"type": "text", "text": "a"}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayUnderTest]:
    with running_gateway(tmp_path_factory.mktemp("gateway")) as running:
        yield running


def chat(text: str = "hi", **changes: Any) -> dict[str, Any]:
    return {"model": BASE, "messages": [{"role": "user", "content": text}], **changes}


def completion(text: str = "hi", **changes: Any) -> dict[str, Any]:
    return {"model": BASE, "prompt": text, **changes}


def post(gateway: GatewayUnderTest, path: str, body: dict[str, Any]) -> httpx.Response:
    with gateway.http() as http:
        return http.post(path, json=body)


def test_a_whole_chat_answer(gateway: GatewayUnderTest) -> None:
    response = post(gateway, CHAT, chat("a question", n=2, logprobs=True, top_logprobs=1))
    answer = response.json()
    assert answer["object"] == "chat.completion"
    assert answer["model"] == BASE
    assert answer["system_fingerprint"].startswith("fp_")
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    first = answer["choices"][0]
    assert first["message"] == {"role": "assistant", "content": "Hello world", "refusal": None}
    assert first["finish_reason"] == "stop"
    assert [entry["token"] for entry in first["logprobs"]["content"]] == ["Hello", " world"]
    assert [len(entry["top_logprobs"]) for entry in first["logprobs"]["content"]] == [1, 1]
    assert answer["usage"] == {
        "prompt_tokens": len("a question"),
        "completion_tokens": 4,
        "total_tokens": len("a question") + 4,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_every_sampling_field_reaches_inference(gateway: GatewayUnderTest) -> None:
    fields: dict[str, Any] = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1,
        "presence_penalty": 0.25, "frequency_penalty": -0.5, "seed": -7, "n": 2, "min_tokens": 3,
        "ignore_eos": True,
    }  # fmt: skip
    body = chat(**fields, stop="END", stop_token_ids=[4, 5], logit_bias={"7": -3}, max_completion_tokens=9)
    assert post(gateway, CHAT, body).status_code == 200
    sampling = gateway.inference.requests[-1].sampling
    assert {name: getattr(sampling, name) for name in fields} == fields
    assert (list(sampling.stop), list(sampling.stop_token_ids)) == (["END"], [4, 5])
    assert (dict(sampling.logit_bias), sampling.max_tokens) == ({7: -3}, 9)
    assert not sampling.HasField("logprobs")


def test_what_was_left_out_stays_out(gateway: GatewayUnderTest) -> None:
    assert post(gateway, CHAT, chat()).status_code == 200
    assert not gateway.inference.requests[-1].sampling.ListFields()
    assert post(gateway, COMPLETIONS, completion()).status_code == 200
    assert gateway.inference.requests[-1].sampling.max_tokens == 16


def test_messages_reach_inference(gateway: GatewayUnderTest) -> None:
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [TEXT, {"type": "text", "text": "b"}], "name": "ann"},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": "d"},
    ]  # fmt: skip
    assert post(gateway, CHAT, {"model": BASE, "messages": messages}).status_code == 200
    sent = gateway.inference.requests[-1].chat.messages
    assert [(message.role, message.content, message.name) for message in sent] == [
        ("system", "be brief", ""),
        ("user", "ab", "ann"),
        ("assistant", "c", ""),
        ("user", "d", ""),
    ]


def test_tenant_request_id_and_trace_go_along(gateway: GatewayUnderTest) -> None:
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    headers = {"traceparent": f"00-{trace_id}-b7ad6b7169203331-01", "x-request-id": "mine-1"}
    with gateway.http() as http:
        assert http.post(CHAT, json=chat(), headers=headers).headers["x-request-id"] == "mine-1"
    assert gateway.inference.metadata["lorafleet-tenant"] == "default"
    assert gateway.inference.metadata["x-request-id"] == "mine-1"
    assert gateway.inference.metadata["traceparent"].split("-")[1] == trace_id


def test_a_chat_stream(gateway: GatewayUnderTest) -> None:
    response = post(gateway, CHAT, chat(stream=True, stream_options={"include_usage": True}))
    assert response.headers["content-type"].startswith("text/event-stream")
    chunks, is_done = sse_objects(response.text)
    assert is_done
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks[:-1]]
    assert deltas[0]["role"] == "assistant"
    assert all("role" not in delta for delta in deltas[1:])
    assert "".join(delta.get("content", "") for delta in deltas) == "Hello world"
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None, None, None, "stop"]
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * 4
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["total_tokens"] == 4


def test_a_stream_without_usage_never_mentions_it(gateway: GatewayUnderTest) -> None:
    chunks, _ = sse_objects(post(gateway, CHAT, chat(stream=True)).text)
    assert not any("usage" in chunk for chunk in chunks)


def test_a_streamed_answer_equals_the_whole_one(gateway: GatewayUnderTest) -> None:
    body = completion("prompt", echo=True, logprobs=2, n=2)
    whole = post(gateway, COMPLETIONS, body).json()
    chunks, is_done = sse_objects(post(gateway, COMPLETIONS, {**body, "stream": True}).text)
    assert is_done
    for choice in whole["choices"]:
        parts = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"] == "promptHello world"
        with_logprobs = [part["logprobs"] for part in parts if part["logprobs"]]
        for name, values in choice["logprobs"].items():
            assert [value for part in with_logprobs for value in part[name]] == values
        assert parts[-1]["finish_reason"] == choice["finish_reason"]


def test_echo_with_logprobs_as_scoring_tools_ask_for_it(gateway: GatewayUnderTest) -> None:
    ids = list(b"The cat")
    body = {"model": BASE, "prompt": [ids, list(b"A dog")], "max_tokens": 1, "logprobs": 1, "echo": True}
    gateway.inference.scripts["The cat"] = Script(texts=["!"], reason=FinishReason.FINISH_REASON_LENGTH)
    answer = post(gateway, COMPLETIONS, body).json()
    first, second = answer["choices"]
    assert (first["text"], second["text"]) == ("The cat!", "A dogHello world")
    assert first["logprobs"]["tokens"] == [*"The cat", "!"]
    assert first["logprobs"]["token_logprobs"] == [None] + [-0.5] * 7
    assert first["logprobs"]["text_offset"] == list(range(8))
    assert (first["finish_reason"], second["finish_reason"]) == ("length", "stop")
    assert answer["usage"]["prompt_tokens"] == len("The cat") + len("A dog")


def test_several_prompts_keep_their_order_and_one_version(gateway: GatewayUnderTest) -> None:
    version = gateway.adapters.publish("ordered")
    for text in ("slow", "fast"):
        gateway.inference.scripts[text] = Script(texts=[text], pause_seconds=0.1 if text == "slow" else 0)
    body = {"model": "ordered", "prompt": ["slow", "fast"], "n": 2}
    response = post(gateway, COMPLETIONS, body)
    assert [choice["text"] for choice in response.json()["choices"]] == ["slow", "slow", "fast", "fast"]
    asked = {request.model.adapter for request in gateway.inference.requests[-2:]}
    assert asked == {f"ordered@{version.digest}"}


def test_the_answer_says_which_version_it_is_from(gateway: GatewayUnderTest) -> None:
    first = gateway.adapters.publish("versioned")
    gateway.adapters.point("versioned", "prod", 1)
    second = gateway.adapters.publish("versioned")
    for name, version in [
        ("versioned", second),
        ("versioned:1", first),
        ("versioned@prod", first),
        (f"versioned@{first.digest}", first),
        (f"{BASE}:versioned@prod", first),
        (f"ft:{BASE}:default:versioned:v2", second),
    ]:
        response = post(gateway, CHAT, chat(model=name))
        assert response.json()["model"] == name
        assert response.headers["x-lorafleet-version"] == f"versioned:{version.version}"
        assert response.headers["x-lorafleet-digest"] == version.digest
    assert "x-lorafleet-version" not in post(gateway, CHAT, chat()).headers


def test_another_tenants_adapter_is_unknown(gateway: GatewayUnderTest) -> None:
    gateway.adapters.publish("private", tenant="acme")
    answers = [post(gateway, CHAT, chat(model=name)) for name in ("private", "never-was")]
    assert [answer.status_code for answer in answers] == [404, 404]
    assert answers[0].text == answers[1].text


def test_row_102_hostile_characters_survive_the_stream(gateway: GatewayUnderTest) -> None:
    texts = ["a\u2028", "b\u2029", "\x00", "\r\n\r\n", "data: [DONE]\n\n", "😀é", "\x85"]
    gateway.inference.scripts["hostile"] = Script(texts=texts)
    response = post(gateway, CHAT, chat("hostile", stream=True))
    chunks, is_done = sse_objects(response.text)
    assert is_done
    assert [chunk["choices"][0]["delta"].get("content") for chunk in chunks[1:-1]] == texts
    whole = post(gateway, CHAT, chat("hostile")).json()
    assert whole["choices"][0]["message"]["content"] == "".join(texts)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_a_refusal_is_no_stream(gateway: GatewayUnderTest, path: str) -> None:
    gateway.inference.scripts["full"] = Script(
        refuse=ResourceExhausted("queue_full", "too many requests wait", retry_after_seconds=2.5)
    )
    body = chat("full", stream=True) if path == CHAT else completion("full", stream=True)
    response = post(gateway, path, body)
    assert response.status_code == 429
    assert response.headers["retry-after"] == "3"
    assert response.json()["error"]["code"] == "queue_full"


@pytest.mark.parametrize(
    ("script", "code"),
    [
        (Script(fail=Unavailable("adapter_unavailable", "lost")), "adapter_unavailable"),
        (Script(fail=Internal("internal", "lost")), "internal"),
        (Script(reason=FinishReason.FINISH_REASON_ABORTED), "generation_aborted"),
    ],
)
def test_a_failure_in_a_stream_ends_it_without_done(
    gateway: GatewayUnderTest, script: Script, code: str
) -> None:
    gateway.inference.scripts["failing"] = script
    for path, body in (
        (CHAT, chat("failing", stream=True)),
        (COMPLETIONS, completion("failing", stream=True)),
    ):
        response = post(gateway, path, body)
        objects, is_done = sse_objects(response.text)
        assert response.status_code == 200
        assert not is_done
        assert objects[-1]["error"]["code"] == code
        assert objects[-1]["error"].keys() == {"message", "type", "param", "code"}
    whole = post(gateway, CHAT, chat("failing"))
    assert whole.status_code >= 500
    assert whole.json()["error"]["code"] == code


def test_one_bad_prompt_among_several_ends_all(gateway: GatewayUnderTest) -> None:
    gateway.inference.scripts["busy"] = Script(refuse=Unavailable("adapter_unavailable", "lost"))
    gateway.inference.scripts["endless"] = Script(hang=True)
    before = gateway.inference.cancelled
    response = post(gateway, COMPLETIONS, {"model": BASE, "prompt": ["endless", "busy"]})
    assert (response.status_code, response.json()["error"]["code"]) == (503, "adapter_unavailable")
    wait_until(lambda: gateway.inference.cancelled == before + 1)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("script", [Script(hang=True), Script(hang_before_start=True)])
async def test_row_86_a_client_that_leaves_frees_the_work(
    gateway: GatewayUnderTest, path: str, stream: bool, script: Script
) -> None:
    gateway.inference.scripts["leaving"] = script
    before, started = gateway.inference.cancelled, gateway.inference.started
    body = chat("leaving", stream=stream) if path == CHAT else completion("leaving", stream=stream)
    headers = {"authorization": f"Bearer {gateway.key}"}
    async with httpx.AsyncClient(base_url=gateway.url, headers=headers, timeout=10) as http:
        asking = asyncio.create_task(_read(http, path, body))
        await asyncio.to_thread(wait_until, lambda: gateway.inference.started == started + 1)
        await asyncio.sleep(0.05)
        assert not asking.done()
        left_at = time.monotonic()
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
    await asyncio.to_thread(wait_until, lambda: gateway.inference.cancelled == before + 1)
    assert time.monotonic() - left_at < 2


async def _read(http: httpx.AsyncClient, path: str, body: dict[str, Any]) -> None:
    async with http.stream("POST", path, json=body) as response:
        async for _ in response.aiter_bytes():
            pass


def test_many_streams_at_once_keep_apart(gateway: GatewayUnderTest) -> None:
    async def one(http: httpx.AsyncClient, number: int) -> str:
        text = f"stream {number}"
        gateway.inference.scripts[text] = Script(
            texts=[f"{number}", " and", f" {number}"], pause_seconds=0.01
        )
        response = await http.post(CHAT, json=chat(text, stream=True))
        chunks, is_done = sse_objects(response.text)
        assert is_done
        return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)

    async def everything() -> list[str]:
        headers = {"authorization": f"Bearer {gateway.key}"}
        async with httpx.AsyncClient(base_url=gateway.url, headers=headers, timeout=30) as http:
            return await asyncio.gather(*(one(http, number) for number in range(32)))

    assert asyncio.run(everything()) == [f"{number} and {number}" for number in range(32)]
