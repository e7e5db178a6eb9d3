"""Generation over gRPC: mixed streams, what a stream says, and what ends it."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from lorafleet.inference.v1 import generation_pb2 as messages
from lorafleet.inference.v1 import inference_service_pb2 as calls
from services.common.call_context import call_scope
from services.common.errors import LorafleetError
from tests.support.inference import Fleet, request, running_fleet
from tests.support.models import ALL_LINEAR_TARGETS, QV_TARGETS, make_peft_adapter, make_tiny_llama

# The letters a to z of the byte-level tokenizer, far above all other tokens.
LETTERS = dict.fromkeys(range(70, 96), 100.0)

ADAPTERS = {"qv-4": (4, QV_TARGETS), "qv-16": (16, QV_TARGETS), "all-8": (8, ALL_LINEAR_TARGETS)}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("base") / "tiny", seed=1)


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    made = {
        name: make_peft_adapter(base, folder / name, r=rank, targets=targets, seed=seed)
        for seed, (name, (rank, targets)) in enumerate(ADAPTERS.items())
    }
    made["rs-8"] = make_peft_adapter(base, folder / "rs-8", use_rslora=True, seed=9)
    return made


@pytest.fixture
async def fleet(
    base: Path, adapters: dict[str, Path], tmp_path: Path, redis_url: str
) -> AsyncIterator[Fleet]:
    async with running_fleet(base, tmp_path, redis_url) as fleet:
        await fleet.publish(adapters)
        yield fleet


async def test_mixed_streams_equal_solo_streams(fleet: Fleet, adapters: dict[str, Path]) -> None:
    models = [None, *adapters] * 3
    requests = [
        request("Fleet " * (1 + number) + str(number), model, max_tokens=10 + number)
        for number, model in enumerate(models)
    ]
    together = await asyncio.gather(*(fleet.client.generate(one) for one in requests))
    alone = [await fleet.client.generate(one) for one in requests]
    assert [stream.tokens for stream in together] == [stream.tokens for stream in alone]
    assert [stream.only.text for stream in together] == [stream.only.text for stream in alone]
    status = await fleet.client.idle()
    assert status.generated_tokens == 2 * sum(len(stream.tokens) for stream in alone)
    assert (await fleet.client.status()).steps < sum(len(stream.tokens) for stream in alone) * 2


async def test_each_adapter_answers_in_its_own_way(fleet: Fleet, adapters: dict[str, Path]) -> None:
    streams = {
        model: await fleet.client.generate(request("Hello there", model)) for model in [None, *adapters]
    }
    assert len({tuple(stream.tokens) for stream in streams.values()}) == len(streams)
    for model, stream in streams.items():
        started = stream.started
        assert started.base_fingerprint_digest == fleet.base_digest
        assert started.prompt_tokens == len("Hello there")
        assert started.version_ref == ("" if model is None else f"{model}:1")
        assert started.version_digest.startswith("" if model is None else "sha256:")
    residents = await fleet.client.residents()
    assert set(residents) == {f"{name}:1" for name in adapters}
    assert {adapter.max_rank for adapter in residents.values()} == {4, 8, 16}


async def test_references_name_versions(fleet: Fleet, adapters: dict[str, Path], tmp_path: Path) -> None:
    second = (await fleet.publish({"qv-4": adapters["all-8"]}))["qv-4"]
    await fleet.registry.set_alias("prod", 1, adapter="qv-4")
    expected = {"qv-4": 2, "qv-4:1": 1, "qv-4:2": 2, "qv-4@prod": 1, f"qv-4@{second.digest}": 2}
    for ref, version in expected.items():
        assert (await fleet.client.generate(request(adapter=ref))).started.version_ref == f"qv-4:{version}"
    await fleet.registry.set_alias("prod", 2, adapter="qv-4")
    moved = await fleet.client.generate(request(adapter="qv-4@prod"))
    assert moved.started.version_digest == second.digest
    # The same bytes under two names are one version in memory.
    first = await fleet.client.generate(request(adapter="all-8"))
    assert first.started.version_digest == second.digest


async def test_stream_is_whole_characters_and_equals_its_tokens(fleet: Fleet) -> None:
    # Bytes of "é" and of "🚢" in any order: characters cut anywhere, and bytes that never become one.
    tokens = (
        await fleet.client.call(fleet.client.stub.Tokenize, calls.TokenizeRequest(text="é🚢"))
    ).token_ids
    bias = dict.fromkeys(tokens, 100.0)
    for seed in range(6):
        stream = await fleet.client.generate(
            request("A", max_tokens=40, temperature=2.0, seed=seed, logit_bias=bias)
        )
        text = await fleet.client.call(
            fleet.client.stub.Detokenize, calls.DetokenizeRequest(token_ids=stream.tokens)
        )
        # A character that the length cut off is dropped; as the end of a whole text it is broken.
        assert text.text in (stream.only.text, stream.only.text + "\ufffd")
    whole = "é🚢 \u2028\x00\r\n日本"
    tokens = (
        await fleet.client.call(fleet.client.stub.Tokenize, calls.TokenizeRequest(text=whole))
    ).token_ids
    back = await fleet.client.call(fleet.client.stub.Detokenize, calls.DetokenizeRequest(token_ids=tokens))
    assert back.text == whole


async def test_stop_strings_are_never_sent(fleet: Fleet) -> None:
    free = await fleet.client.generate(request("Once", max_tokens=30, ignore_eos=True, logit_bias=LETTERS))
    text = free.only.text
    stop = text[10:13]
    cut = await fleet.client.generate(
        request("Once", max_tokens=30, ignore_eos=True, logit_bias=LETTERS, stop=[stop, "never"])
    )
    assert cut.only.text == text[: text.index(stop)]
    finished = cut.only.finished
    assert finished is not None
    assert (finished.reason, finished.stop) == (messages.FINISH_REASON_STOP, stop)
    assert finished.usage.completion_tokens == len(cut.tokens) == text.index(stop) + len(stop)
    assert finished.usage.prompt_tokens == 4


async def test_stop_tokens_and_lengths_are_told_apart(fleet: Fleet) -> None:
    free = await fleet.client.generate(request("Once", max_tokens=20, ignore_eos=True, logit_bias=LETTERS))
    assert free.only.finished is not None
    assert free.only.finished.reason == messages.FINISH_REASON_LENGTH
    assert len(free.tokens) == 20
    token = free.tokens[7]
    position = free.tokens.index(token)
    stopped = await fleet.client.generate(
        request("Once", max_tokens=20, ignore_eos=True, logit_bias=LETTERS, stop_token_ids=[token])
    )
    assert stopped.tokens == free.tokens[: position + 1]
    assert stopped.only.finished is not None
    assert stopped.only.finished.reason == messages.FINISH_REASON_STOP
    assert stopped.only.finished.stop == free.only.text[position]
    ended = await fleet.client.generate(request("Once", logit_bias={0: 100.0}))
    assert ended.only.finished is not None
    assert (ended.only.finished.reason, ended.only.finished.stop) == (messages.FINISH_REASON_STOP, "")
    assert ended.only.text == ""


async def test_logprobs_are_sorted_and_fit_the_tokens(fleet: Fleet) -> None:
    stream = await fleet.client.generate(request("Once", logprobs=5, prompt_logprobs=2, max_tokens=6))
    assert len(stream.only.logprobs) == len(stream.tokens) == 6
    for token_id, position in zip(stream.tokens, stream.only.logprobs, strict=True):
        assert position.chosen.token_id == token_id
        values = [alternative.logprob for alternative in position.alternatives]
        assert len(values) == 5
        assert values == sorted(values, reverse=True)
        # Greedy: what was chosen is the likeliest.
        assert position.chosen.logprob == values[0] <= 0
    prompt = stream.started.prompt_logprobs
    assert b"".join(position.chosen.text for position in prompt) == b"nce"
    assert all(len(position.alternatives) == 2 for position in prompt)
    plain = await fleet.client.generate(request("Once", max_tokens=6))
    assert plain.tokens == stream.tokens
    assert not plain.only.logprobs
    assert not plain.started.prompt_logprobs


async def test_seed_fixes_every_completion_whatever_else_runs(fleet: Fleet) -> None:
    seeded = request("Once", "qv-4", temperature=1.0, seed=7, n=3, max_tokens=16)
    alone = await fleet.client.generate(seeded)
    crowd = [request(f"{number} other", "all-8", temperature=1.0) for number in range(6)]
    streams = await asyncio.gather(*(fleet.client.generate(one) for one in [*crowd, seeded]))
    answers = [streams[-1].answers[index].token_ids for index in range(3)]
    assert answers == [alone.answers[index].token_ids for index in range(3)]
    assert len({tuple(answer) for answer in answers}) == 3
    other = request("Once", "qv-4", temperature=1.0, seed=8, n=3, max_tokens=16)
    assert (await fleet.client.generate(other)).answers[0].token_ids != answers[0]


async def test_chat_uses_the_template(fleet: Fleet) -> None:
    chat = messages.ChatPrompt(messages=[messages.ChatMessage(role="user", content="Hi <|user|>")])
    tokenized = await fleet.client.call(fleet.client.stub.Tokenize, calls.TokenizeRequest(chat=chat))
    assert b"".join(tokenized.tokens) == b"<|user|>Hi <|user|><|endoftext|><|assistant|>"
    assert sum(token_id < 6 for token_id in tokenized.token_ids) == 3
    sampling = messages.SamplingParams(max_tokens=8, temperature=0)
    model = messages.ModelRef(base=True)
    by_chat = await fleet.client.generate(messages.GenerateRequest(model=model, chat=chat, sampling=sampling))
    tokens = messages.TokenPrompt(token_ids=tokenized.token_ids)
    by_tokens = await fleet.client.generate(
        messages.GenerateRequest(model=model, tokens=tokens, sampling=sampling)
    )
    assert by_chat.tokens == by_tokens.tokens
    assert by_chat.started.prompt_tokens == len(tokenized.token_ids)


async def test_tools_reach_the_template(tmp_path: Path, redis_url: str) -> None:
    base = make_tiny_llama(tmp_path / "base", seed=1)
    template = (
        "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{{ m.role + ':' + m.content }}"
        "{% for call in m.tool_calls or [] %}{{ call.id + call.function.name }}"
        "{{ call.function.arguments | tojson }}{% endfor %}{{ m.tool_call_id or '' }}|{% endfor %}"
    )
    (base / "chat_template.jinja").write_text(template)
    turns = [
        messages.ChatMessage(role="user", content="sum"),
        messages.ChatMessage(
            role="assistant", tool_calls=[messages.ToolCall(id="c1", name="add", arguments='{"a": 1}')]
        ),
        messages.ChatMessage(role="tool", content="2", tool_call_id="c1"),
    ]
    chat = messages.ChatPrompt(messages=turns, tools=['{"type": "function"}'])
    async with running_fleet(base, tmp_path, redis_url) as fleet:
        stub = fleet.client.stub
        tokenized = await fleet.client.call(stub.Tokenize, calls.TokenizeRequest(chat=chat))
        expected = b'[{"type": "function"}]user:sum|assistant:c1add{"a": 1}|tool:2c1|'
        assert b"".join(tokenized.tokens) == expected
        bad: list[tuple[messages.ChatPrompt, str, str]] = [
            (messages.ChatPrompt(messages=turns, tools=["[]"]), "invalid_value", "tools[0]"),
            (messages.ChatPrompt(messages=turns, tools=["{}"] * 129), "invalid_value", "tools"),
            (
                messages.ChatPrompt(
                    messages=[
                        turns[0],
                        messages.ChatMessage(
                            role="assistant", tool_calls=[messages.ToolCall(name="add", arguments="1")]
                        ),
                    ]
                ),
                "bad_messages",
                "messages[1].tool_calls[0].arguments",
            ),
            (
                messages.ChatPrompt(
                    messages=[
                        messages.ChatMessage(
                            role="user", tool_calls=[messages.ToolCall(name="add", arguments="{}")]
                        )
                    ]
                ),
                "bad_messages",
                "messages[0].tool_calls",
            ),
        ]
        for prompt, reason, field in bad:
            with pytest.raises(LorafleetError) as caught:
                await fleet.client.call(stub.Tokenize, calls.TokenizeRequest(chat=prompt))
            assert (caught.value.reason, caught.value.field) == (reason, field)


@pytest.mark.parametrize("adapter", [None, "qv-4"])
async def test_constrained_streams_fit(fleet: Fleet, adapter: str | None) -> None:
    number = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
    schema = json.dumps(number | {"additionalProperties": False})
    kinds = [{"json_schema": schema}, {"regex": "(ab){1,3}"}, {"grammar": 'start: "x" | "yé"'}]
    streams = await asyncio.gather(
        *(
            fleet.client.generate(
                request("Once", adapter, temperature=1.0, seed=seed, n=2, max_tokens=80, **kind)
            )
            for kind in kinds
            for seed in range(3)
        )
    )
    answers = [answer for stream in streams for answer in stream.answers.values()]
    ended = [
        answer
        for answer in answers
        if answer.finished is not None and answer.finished.reason == messages.FINISH_REASON_STOP
    ]
    assert len(ended) >= 12
    for stream, kind in zip(streams, [kind for kind in kinds for _ in range(3)], strict=True):
        for answer in stream.answers.values():
            if answer not in ended:
                continue
            if "json_schema" in kind:
                assert json.loads(answer.text)["a"] in (1, 2)
            elif "regex" in kind:
                assert answer.text in ("ab", "abab", "ababab")
            else:
                assert answer.text in ("x", "yé")


@pytest.mark.parametrize("adapter", [None, "qv-4"])
async def test_cancel_frees_everything_within_a_step(fleet: Fleet, adapter: str | None) -> None:
    with call_scope(tenant="acme"):
        long = [
            fleet.client.stub.Generate(request("Once", adapter, max_tokens=400, ignore_eos=True, n=2))
            for _ in range(3)
        ]
        for call in long:
            first = await call.read()
            assert isinstance(first, messages.GenerateResponse)
            assert first.WhichOneof("event") == "started"
    assert (await fleet.client.status()).running == 6
    for call in long:
        call.cancel()
    status = await fleet.client.idle()
    await asyncio.sleep(0.1)
    assert (await fleet.client.status()).steps == status.steps
    assert status.generated_tokens < 6 * 400


async def test_cancel_of_a_queued_request_frees_it(fleet: Fleet) -> None:
    with call_scope(tenant="acme"):
        running = [
            fleet.client.stub.Generate(request("Once", max_tokens=300, ignore_eos=True, n=16))
            for _ in range(2)
        ]
        for call in running:
            await call.read()
        queued = fleet.client.stub.Generate(request("Once", "qv-4", max_tokens=5))
        await fleet.client.until(lambda status: status.queued == 1)
        for call in [queued, *running]:
            call.cancel()
    await fleet.client.idle()


async def test_deadline_ends_the_work(fleet: Fleet) -> None:
    with call_scope(tenant="acme"), pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in fleet.client.stub.Generate(
            request("Once", max_tokens=480, ignore_eos=True, n=16), timeout=0.3
        ):
            pass
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    status = await fleet.client.idle()
    assert status.generated_tokens < 16 * 480


async def test_deadline_already_past_means_no_work(fleet: Fleet) -> None:
    before = await fleet.client.idle()
    with call_scope(tenant="acme"), pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in fleet.client.stub.Generate(request("Once", "qv-4"), timeout=1e-9):
            pass
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    after = await fleet.client.idle()
    assert (after.steps, after.prompt_tokens) == (before.steps, before.prompt_tokens)


async def test_scores_are_the_logprobs_of_generation(fleet: Fleet) -> None:
    stream = await fleet.client.generate(
        request("Once", "qv-4", logprobs=0, max_tokens=6, logit_bias=LETTERS)
    )
    completions = [stream.only.text, "zzz", "é"]
    scored = await fleet.client.call(
        fleet.client.stub.Score,
        calls.ScoreRequest(model=messages.ModelRef(adapter="qv-4"), text="Once", completions=completions),
    )
    first, second, third = scored.scores
    assert [token.token_id for token in first.tokens] == stream.tokens
    expected = [position.chosen.logprob for position in stream.only.logprobs]
    assert [token.logprob for token in first.tokens] == pytest.approx(expected, abs=1e-4)
    assert first.logprob == pytest.approx(math.fsum(expected), abs=1e-3)
    assert (len(second.tokens), len(third.tokens)) == (3, 2)
    assert not second.is_greedy
    assert scored.usage.prompt_tokens == 4
    assert scored.usage.completion_tokens == 6 + 3 + 2
    await fleet.client.idle()


async def test_score_knows_the_greedy_completion(fleet: Fleet) -> None:
    for number in range(40):
        stream = await fleet.client.generate(request(f"Once {number}", max_tokens=1))
        if stream.only.text.isascii() and stream.only.text.isprintable() and stream.only.text:
            break
    greedy = stream.only.text
    assert greedy
    scored = await fleet.client.call(
        fleet.client.stub.Score,
        calls.ScoreRequest(
            model=messages.ModelRef(base=True),
            text=f"Once {number}",
            completions=[greedy, chr(ord(greedy) ^ 1)],
        ),
    )
    assert [score.is_greedy for score in scored.scores] == [True, False]


async def test_a_failed_score_ends_the_others(fleet: Fleet) -> None:
    with pytest.raises(LorafleetError) as caught:
        await fleet.client.call(
            fleet.client.stub.Score,
            calls.ScoreRequest(model=messages.ModelRef(base=True), text="Once", completions=["x", "y" * 600]),
        )
    assert caught.value.reason == "context_length_exceeded"
    await fleet.client.idle()
