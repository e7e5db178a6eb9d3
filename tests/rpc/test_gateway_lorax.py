"""LoRAX's routes over HTTP: shapes, streams, refusals in LoRAX's words."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from lorafleet.inference.v1.generation_pb2 import FinishReason
from services.common.errors import Internal, ResourceExhausted
from services.gateway.keys import KeyLimits, Scope
from tests.support.fake_base import BASE, FINGERPRINT
from tests.support.fake_inference import Script
from tests.support.gateway import GatewayUnderTest, running_gateway, wait_until

END = b"</s>"


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayUnderTest]:
    with running_gateway(tmp_path_factory.mktemp("gateway")) as running:
        running.inference.scripts["to the end"] = Script(end_token=END)
        running.adapters.publish("support")
        running.adapters.publish("support")
        running.adapters.point("support", "prod", 1)
        running.adapters.publish("secret", tenant="other")
        yield running


def post(gateway: GatewayUnderTest, path: str, inputs: str, **parameters: Any) -> httpx.Response:
    with gateway.http() as http:
        return http.post(path, json={"inputs": inputs, "parameters": parameters})


def events(text: str) -> list[dict[str, Any]]:
    blocks = text.split("\n\n")
    assert blocks.pop() == ""
    return [json.loads(block.removeprefix("data: ")) for block in blocks]


def test_a_plain_answer_is_its_text(gateway: GatewayUnderTest) -> None:
    assert post(gateway, "/generate", "to the end").json() == {"generated_text": "Hello world"}
    with gateway.http() as http:
        answer = http.post("/", json={"inputs": "hi"}).json()
    assert answer == [{"generated_text": "Hello world"}]


def test_details(gateway: GatewayUnderTest) -> None:
    answer = post(
        gateway, "/generate", "to the end", details=True, decoder_input_details=True, return_k_alternatives=2
    ).json()
    details = answer["details"]
    assert (details["finish_reason"], details["seed"]) == ("eos_token", None)
    assert (details["prompt_tokens"], details["generated_tokens"], details["skipped_tokens"]) == (10, 3, 0)
    assert details["prefill"][0] == {"id": ord("t"), "text": "t", "logprob": None}
    assert "".join(token["text"] for token in details["prefill"]) == "to the end"
    assert {token["logprob"] for token in details["prefill"][1:]} == {-0.5}
    assert [(token["text"], token["special"]) for token in details["tokens"]] == [
        ("Hello", False), (" world", False), ("</s>", True),
    ]  # fmt: skip
    assert [other["text"] for other in details["tokens"][0]["alternative_tokens"]] == ["Hello", "alt1"]


def test_the_text_of_the_prompt_and_of_the_stop_string_belong_to_the_answer(
    gateway: GatewayUnderTest,
) -> None:
    gateway.inference.scripts["stopped"] = Script(texts=["Hello", " wor", ""], stop="END")
    answer = post(gateway, "/generate", "stopped", stop=["END"], return_full_text=True, details=True).json()
    assert answer["generated_text"] == "stoppedHello worEND"
    assert answer["details"]["finish_reason"] == "stop_sequence"
    assert [token["text"] for token in answer["details"]["tokens"]] == ["Hello", " wor", "END"]
    assert list(gateway.inference.requests[-1].sampling.stop) == ["END"]


def test_a_stream_has_an_event_per_token(gateway: GatewayUnderTest) -> None:
    response = post(gateway, "/generate_stream", "to the end", temperature=0.5, seed=9)
    assert response.headers["content-type"].startswith("text/event-stream")
    *first, last = events(response.text)
    assert [event["token"]["text"] for event in first] == ["Hello", " world"]
    assert {event["generated_text"] for event in first} == {None}
    assert {event["details"] for event in first} == {None}
    assert (last["token"]["text"], last["token"]["special"]) == ("</s>", True)
    assert last["generated_text"] == "Hello world"
    assert last["details"] == {
        "finish_reason": "eos_token", "prompt_tokens": 10, "generated_tokens": 3, "seed": 9,
    }  # fmt: skip
    with gateway.http() as http:
        again = http.post("/", json={"inputs": "to the end", "stream": True})
    assert events(again.text)[-1]["generated_text"] == "Hello world"


def test_a_stream_that_fails_says_so_in_loraxs_words(gateway: GatewayUnderTest) -> None:
    gateway.inference.scripts["fails"] = Script(fail=Internal("worker_lost", "it broke"))
    gateway.inference.scripts["aborts"] = Script(reason=FinishReason.FINISH_REASON_ABORTED)
    assert events(post(gateway, "/generate_stream", "fails").text)[-1]["error_type"] == "generation"
    last = events(post(gateway, "/generate_stream", "aborts").text)[-1]
    assert last["error_type"] == "incomplete_generation"
    assert post(gateway, "/generate", "aborts").json()["error_type"] == "incomplete_generation"


@pytest.mark.parametrize(
    ("parameters", "temperature", "is_seeded"),
    [
        ({}, 0, False),
        ({"temperature": 1}, 0, False),
        ({"repetition_penalty": 1.2}, 0, False),
        ({"do_sample": True}, 1, True),
        ({"temperature": 0.7}, 0.7, True),
        ({"top_k": 5}, 1, True),
        ({"top_p": 0.5}, 1, True),
        ({"do_sample": True, "temperature": 0}, 0, False),
    ],
)
def test_answers_are_greedy_unless_sampling_is_asked_for(
    gateway: GatewayUnderTest, parameters: dict[str, Any], temperature: float, is_seeded: bool
) -> None:
    answer = post(gateway, "/generate", "hi", details=True, **parameters).json()
    sampling = gateway.inference.requests[-1].sampling
    assert sampling.temperature == temperature
    assert sampling.HasField("seed") is is_seeded
    assert answer["details"]["seed"] == (sampling.seed if is_seeded else None)


def test_every_parameter_reaches_inference(gateway: GatewayUnderTest) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    parameters = {
        "max_new_tokens": 7, "temperature": 0.5, "top_k": 5, "top_p": 0.9, "repetition_penalty": 1.1,
        "frequency_penalty": 0.5, "presence_penalty": -0.25, "seed": 3, "ignore_eos_token": True,
        "response_format": {"type": "json_object", "schema": schema},
    }  # fmt: skip
    assert post(gateway, "/generate", "hi", **parameters).status_code == 200
    sampling = gateway.inference.requests[-1].sampling
    assert json.loads(sampling.json_schema) == schema
    assert (sampling.max_tokens, sampling.top_k, sampling.seed) == (7, 5, 3)
    assert (sampling.temperature, sampling.top_p, sampling.repetition_penalty) == (0.5, 0.9, 1.1)
    assert (sampling.frequency_penalty, sampling.presence_penalty) == (0.5, -0.25)
    assert sampling.ignore_eos
    assert not sampling.HasField("logprobs")
    assert post(gateway, "/generate", "hi", response_format={"type": "json_object"}).status_code == 200
    assert json.loads(gateway.inference.requests[-1].sampling.json_schema) == {"type": "object"}


def test_the_best_of_several_is_the_likeliest(gateway: GatewayUnderTest) -> None:
    gateway.inference.scripts["pick"] = Script(logprobs=(-0.5, -0.25, -0.75))
    answer = post(gateway, "/generate", "pick", best_of=3, do_sample=True, details=True).json()
    details = answer["details"]
    assert {token["logprob"] for token in details["tokens"]} == {-0.25}
    others = [other["tokens"][0]["logprob"] for other in details["best_of_sequences"]]
    assert others == [-0.5, -0.75]
    assert gateway.inference.requests[-1].sampling.n == 3
    assert details["seed"] is None


@pytest.mark.parametrize("name", ["support", "support:2", "support@prod", f"{BASE}:support"])
def test_an_adapter_by_each_of_its_names(gateway: GatewayUnderTest, name: str) -> None:
    response = post(gateway, "/generate", "hi", adapter_id=name)
    wanted = "support:1" if name == "support@prod" else "support:2"
    assert response.headers["x-lorafleet-version"] == wanted


@pytest.mark.parametrize("name", ["unknown", "", "secret", "../support", f"ft:{BASE}:other:secret:v1"])
def test_an_adapter_that_is_not_there_is_never_the_base(gateway: GatewayUnderTest, name: str) -> None:
    response = post(gateway, "/generate", "hi", adapter_id=name)
    assert response.status_code == 404
    assert response.json()["error_type"] == "model_not_found"


@pytest.mark.parametrize("path", ["/", "/generate", "/generate_stream"])
@pytest.mark.parametrize(
    ("parameters", "named"),
    [
        ({"adapter_source": "hub"}, "adapter_source"),
        ({"api_token": "x"}, "api_token"),
        ({"merged_adapters": {"ids": ["a"], "weights": [1.0]}}, "merged_adapters"),
        ({"truncate": 5}, "truncate"),
        ({"typical_p": 0.5}, "typical_p"),
        ({"watermark": True}, "watermark"),
        ({"apply_chat_template": True}, "apply_chat_template"),
        ({"unheard_of": 1}, "unheard_of"),
        ({"best_of": 2}, "best_of"),
        ({"best_of": 2, "do_sample": True, "seed": 1}, "seed"),
        ({"best_of": 0}, "best_of"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"response_format": {"type": "grammar"}}, "response_format"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(
    gateway: GatewayUnderTest, path: str, parameters: dict[str, Any], named: str
) -> None:
    before = len(gateway.inference.requests)
    response = post(gateway, path, "hi", **parameters)
    assert response.status_code == 422
    assert response.json().keys() == {"error", "error_type"}
    assert response.json()["error_type"] == "validation"
    assert named in response.json()["error"]
    assert len(gateway.inference.requests) == before


def test_what_asks_for_nothing_is_taken(gateway: GatewayUnderTest) -> None:
    nothing: dict[str, Any] = {"typical_p": None, "truncate": None, "watermark": False, "stop": []}
    assert post(gateway, "/generate", "hi", **nothing).status_code == 200


@pytest.mark.parametrize("parameters", [{"best_of": 2, "do_sample": True}, {"decoder_input_details": True}])
def test_what_cannot_be_streamed_is_refused(gateway: GatewayUnderTest, parameters: dict[str, Any]) -> None:
    assert post(gateway, "/generate_stream", "hi", **parameters).status_code == 422
    with gateway.http() as http:
        body = {"inputs": "hi", "stream": True, "parameters": parameters}
        assert http.post("/", json=body).json()["error_type"] == "validation"


def test_errors_of_every_kind_have_loraxs_shape(gateway: GatewayUnderTest) -> None:
    gateway.inference.scripts["full"] = Script(
        refuse=ResourceExhausted("queue_full", "too much to do", retry_after_seconds=2)
    )
    full = post(gateway, "/generate", "full")
    assert (full.status_code, full.json()["error_type"]) == (429, "overloaded")
    assert full.headers["retry-after"] == "2"
    with gateway.http("lf-nonsense") as http:
        bad_key = http.post("/generate", json={"inputs": "hi"})
    assert (bad_key.status_code, bad_key.json()["error_type"]) == (401, "invalid_api_key")
    with gateway.http(gateway.new_key("default", Scope.FILES)) as http:
        no_scope = http.post("/generate", json={"inputs": "hi"})
    assert (no_scope.status_code, no_scope.json()["error_type"]) == (403, "permission_denied")
    with gateway.http() as http:
        bad_json = http.post("/generate", content=b"{", headers={"content-type": "application/json"})
        no_inputs = http.post("/generate", json={})
        empty = http.post("/generate", json={"inputs": ""})
    assert {bad_json.status_code, no_inputs.status_code, empty.status_code} == {422}
    assert "inputs" in no_inputs.json()["error"]


def test_limits_and_counts_are_those_of_the_key(gateway: GatewayUnderTest) -> None:
    _, key = gateway.keys.make("counted", [Scope.INFERENCE], limits=KeyLimits(requests_per_minute=2))
    with gateway.http(key) as http:
        answers = [http.post("/generate", json={"inputs": "abc"}) for _ in range(3)]
        usage = http.get("/v1/usage").json()["data"][0]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert answers[0].headers["x-ratelimit-remaining-requests"] == "1"
    assert answers[2].json()["error_type"] == "overloaded"
    assert (usage["requests"], usage["prompt_tokens"]) == (2, 6)


def test_a_client_that_leaves_frees_its_work(gateway: GatewayUnderTest) -> None:
    gateway.inference.scripts["for long"] = Script(hang=True)
    body = {"inputs": "for long"}
    for path in ("/generate", "/generate_stream"):
        cancelled = gateway.inference.cancelled
        with gateway.http() as http, pytest.raises(httpx.ReadTimeout):
            http.post(path, json=body, timeout=0.3)
        wait_until(lambda before=cancelled: gateway.inference.cancelled > before)  # type: ignore[misc]


def test_tokens_and_their_places(gateway: GatewayUnderTest) -> None:
    with gateway.http() as http:
        tokens = http.post("/tokenize", json={"inputs": "aé"}).json()
        refused = http.post("/tokenize", json={"inputs": "a", "add_special_tokens": False})
    assert [(token["start"], token["stop"]) for token in tokens] == [(0, 1), (1, 2), (1, 2)]
    assert tokens[0] == {"id": ord("a"), "text": "a", "start": 0, "stop": 1}
    assert (refused.status_code, refused.json()["error_type"]) == (422, "validation")


def test_what_is_served(gateway: GatewayUnderTest) -> None:
    with gateway.http() as http:
        info = http.get("/info").json()
    assert (info["model_id"], info["model_sha"]) == (BASE, FINGERPRINT.removeprefix("sha256:"))
    assert (info["max_total_tokens"], info["max_stop_sequences"]) == (1024, 4)
    assert (info["model_dtype"], info["model_device_type"]) == ("torch.bfloat16", "cpu")
