"""Tools and response formats over HTTP."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from openai import OpenAI

from tests.support.fake_base import BASE
from tests.support.fake_inference import Script
from tests.support.gateway import GatewayUnderTest, running_gateway, sse_objects

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}
LIST = {"type": "array"}
CALL = '{"name": "weather", "arguments": {"city": "Kraków"}}'


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayUnderTest]:
    with running_gateway(tmp_path_factory.mktemp("gateway"), key_cache_seconds=0) as running:
        yield running


def ask(gateway: GatewayUnderTest, *texts: str, **fields: Any) -> Any:
    """Ask a model that writes `texts`."""
    gateway.inference.scripts["hi"] = Script(texts=list(texts) or ["ok"])
    body = {"model": BASE, "messages": [{"role": "user", "content": "hi"}], **fields}
    with gateway.http() as http:
        return http.post("/v1/chat/completions", json=body)


@pytest.mark.parametrize(
    "written",
    [
        CALL,
        f"<tool_call>\n{CALL}\n</tool_call>",
        CALL.replace("arguments", "parameters"),
        json.dumps({"name": "weather", "arguments": json.dumps({"city": "Kraków"})}),
    ],
)
def test_a_call_is_read_out_of_what_the_model_writes(gateway: GatewayUnderTest, written: str) -> None:
    pieces = [written[:7], written[7:20], written[20:]]
    choice = ask(gateway, *pieces, tools=[WEATHER, CLOCK]).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    (call,) = choice["message"]["tool_calls"]
    assert call["type"] == "function"
    assert call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"]) == {"city": "Kraków"}
    sent = gateway.inference.requests[-1]
    assert [json.loads(tool)["function"]["name"] for tool in sent.chat.tools] == ["weather", "clock"]
    assert json.loads(sent.chat.tools[0]) == WEATHER
    assert sent.sampling.WhichOneof("constraint") is None


@pytest.mark.parametrize(
    "written",
    [
        "It is sunny.",
        '{"name": "other", "arguments": {}}',
        '{"name": "weather", "arguments": 3}',
        "{not json",
        "<to",
    ],
)
def test_what_is_no_call_stays_text(gateway: GatewayUnderTest, written: str) -> None:
    choice = ask(gateway, written, tools=[WEATHER]).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == (written, "stop")
    assert "tool_calls" not in choice["message"]
    chunks, is_done = sse_objects(ask(gateway, *written, tools=[WEATHER], stream=True).text)
    assert is_done
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    assert "".join(delta.get("content") or "" for delta in deltas) == written


def test_text_is_not_held_back_longer_than_it_may_be_a_call(gateway: GatewayUnderTest) -> None:
    chunks, _ = sse_objects(ask(gateway, "<", "b", ">hi", tools=[WEATHER], stream=True).text)
    texts = [choice["delta"].get("content") for chunk in chunks for choice in chunk["choices"]]
    assert [text for text in texts if text] == ["<b", ">hi"]


def test_a_streamed_call_comes_whole_and_the_stock_client_reads_it(gateway: GatewayUnderTest) -> None:
    gateway.inference.scripts["hi"] = Script(texts=[CALL[:10], CALL[10:]])
    with OpenAI(base_url=f"{gateway.url}/v1", api_key=gateway.key) as client:
        stream: Any = client.chat.completions.create(
            model=BASE,
            messages=[{"role": "user", "content": "hi"}],
            tools=[WEATHER],  # type: ignore[list-item]
            stream=True,
        )
        chunks = [chunk for chunk in stream if chunk.choices]
    calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    assert len(calls) == 1
    assert calls[0].function is not None
    assert calls[0].function.name == "weather"
    assert json.loads(calls[0].function.arguments or "") == {"city": "Kraków"}
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    assert not any(chunk.choices[0].delta.content for chunk in chunks)


def test_a_required_call_is_a_constraint(gateway: GatewayUnderTest) -> None:
    named = {"type": "function", "function": {"name": "weather"}}
    for choice, tools in (("required", 2), (named, 1)):
        assert ask(gateway, CALL, tools=[WEATHER, CLOCK], tool_choice=choice).status_code == 200
        schema = json.loads(gateway.inference.requests[-1].sampling.json_schema)
        calls = schema.get("anyOf", [schema])
        assert len(calls) == tools
        assert calls[0]["properties"]["name"] == {"const": "weather"}
        assert calls[0]["properties"]["arguments"] == WEATHER["function"]["parameters"]  # type: ignore[index]


def test_no_tool_is_offered_where_none_may_be_called(gateway: GatewayUnderTest) -> None:
    choice = ask(gateway, CALL, tools=[WEATHER], tool_choice="none").json()["choices"][0]
    assert choice["message"]["content"] == CALL
    assert not gateway.inference.requests[-1].chat.tools


def test_earlier_calls_and_their_results_reach_the_model(gateway: GatewayUnderTest) -> None:
    called = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": None, "tool_calls": [called]},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
        {"role": "user", "content": "hi"},
    ]
    assert ask(gateway, messages=messages, tools=[WEATHER]).status_code == 200
    sent = gateway.inference.requests[-1].chat.messages
    assert [(call.id, call.name, call.arguments) for call in sent[1].tool_calls] == [
        ("call_1", "weather", "{}")
    ]
    assert (sent[2].role, sent[2].tool_call_id, sent[2].content) == ("tool", "call_1", "rain")


@pytest.mark.parametrize(
    ("asked", "schema"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, {"type": "object"}),
        (
            {"type": "json_schema", "json_schema": {"name": "n", "schema": LIST}},
            LIST,
        ),
        ({"type": "json_schema", "json_schema": {"name": "n", "strict": True}}, {"type": "object"}),
    ],
)
def test_response_formats(gateway: GatewayUnderTest, asked: dict[str, Any], schema: Any) -> None:
    assert ask(gateway, "[]", response_format=asked).status_code == 200
    sampling = gateway.inference.requests[-1].sampling
    assert (json.loads(sampling.json_schema) if sampling.WhichOneof("constraint") else None) == schema


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [WEATHER, WEATHER]}, "tools"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}},
         "tool_choice.function.name"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"parallel_tool_calls": True}, "parallel_tool_calls"),
        ({"tools": [WEATHER], "tool_choice": "required", "response_format": {"type": "json_object"}},
         "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.name"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_by_name(
    gateway: GatewayUnderTest, fields: dict[str, Any], param: str
) -> None:
    refused = ask(gateway, **fields)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == param
