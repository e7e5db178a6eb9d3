"""Rows 69 to 86 and 101 to 107 at the gRPC door, each beside eight good streams that must not notice.

What belongs to HTTP alone (headers, bodies, paths) is the gateway's; here are the same rows as gRPC has them.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio

from lorafleet.inference.v1 import generation_pb2 as messages
from lorafleet.inference.v1 import inference_service_pb2 as calls
from lorafleet.registry.v1 import adapter_pb2
from services.common.call_context import call_scope
from services.common.errors import Code, LorafleetError
from services.common.valkey import EmbeddedValkey
from services.inference.engine.batch import Batch
from services.inference.engine.runner import Runner
from tests.support.inference import Fleet, Stream, request, running_fleet
from tests.support.models import make_peft_adapter, make_tiny_llama
from tests.unit.inference.test_constraints import REFUSED

pytestmark = pytest.mark.asyncio(loop_scope="module")

BASE = messages.ModelRef(base=True)
USER = messages.ChatMessage(role="user", content="x")
LETTERS = dict.fromkeys(range(70, 96), 100.0)
LONG: dict[str, Any] = {"max_tokens": 150, "ignore_eos": True}

GOOD = [
    request("Good one", **LONG),
    request("Good two", "one", **LONG),
    request("Good three", "two", **LONG),
    request("Good four", "one", **LONG, logit_bias=LETTERS),
    request("Good five", "two", **LONG, temperature=1.0, seed=5, logprobs=3),
    request("Good six", "one", max_tokens=150, regex="([a-z]{3} ){60}"),
    request("Good seven", None, **LONG, stop=["\x00never"], presence_penalty=1.0),
    request("Good eight", "two", **LONG, temperature=1.0, n=2, seed=8),
]


@dataclass
class Place:
    """The fleet, and what the good streams say when they are alone."""

    fleet: Fleet
    alone: list[dict[int, list[int]]]

    async def beside(self, work: Callable[[], Awaitable[None]]) -> None:
        """Do `work` while the good streams run; they must say what they say alone, by the same process."""
        before = await self.fleet.client.idle()
        streams = [asyncio.create_task(self.fleet.client.generate(good)) for good in GOOD]
        await self.fleet.client.until(lambda status: status.running > 0)
        await work()
        said = [answers_of(stream) for stream in await asyncio.gather(*streams)]
        assert said == self.alone
        after = await self.fleet.client.idle()
        assert after.start_time == before.start_time


def answers_of(stream: Stream) -> dict[int, list[int]]:
    return {index: answer.token_ids for index, answer in stream.answers.items()}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def place(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Place]:
    folder = tmp_path_factory.mktemp("fleet")
    base = make_tiny_llama(folder / "base", seed=1)
    adapters = {
        name: make_peft_adapter(base, folder / name, r=rank, seed=rank)
        for name, rank in (("one", 4), ("two", 8), ("moving", 8), ("spare", 2))
    }
    async with AsyncExitStack() as stack:
        valkey = stack.enter_context(EmbeddedValkey.start(folder / "valkey"))
        fleet = await stack.enter_async_context(
            running_fleet(base, folder, valkey.url, resolve_fresh_seconds=0.0)
        )
        await fleet.publish(adapters)
        alone = [answers_of(await fleet.client.generate(good)) for good in GOOD]
        yield Place(fleet, alone)


def chat(*turns: messages.ChatMessage) -> messages.GenerateRequest:
    return messages.GenerateRequest(model=BASE, chat=messages.ChatPrompt(messages=turns))


def rows_of_constraints() -> dict[int, list[tuple[messages.GenerateRequest, str, str]]]:
    """Return rows 81 to 83 as requests."""
    rows: dict[int, list[tuple[messages.GenerateRequest, str, str]]] = {}
    for name, (kind, text, field) in REFUSED.items():
        reason = "unsupported_regex" if ".pattern" in field else kind.reason
        bad = request("x", **{kind.value: text})
        rows.setdefault(int(name.split()[0]), []).append((bad, reason, field))
    rows[82].append((request("x", regex=r"(a)\1"), "unsupported_regex", "sampling.regex"))
    rows[83].append((request("x", grammar="start: nothing"), "unsupported_grammar", "sampling.grammar"))
    deep = "start: " + "(" * 5000 + '"a"' + ")" * 5000
    rows[83].append((request("x", grammar=deep), "unsupported_grammar", "sampling.grammar"))
    return rows


# By row: the requests, and the reason and the field of each refusal.
BAD: dict[int, list[tuple[messages.GenerateRequest, str, str]]] = {
    69: [
        (request(adapter="nobody"), "adapter_not_found", ""),
        (request(adapter=""), "bad_name", "model.adapter"),
        (request(adapter="a" * 10_000), "bad_name", "model.adapter"),
        (request(adapter="../../etc/passwd"), "bad_name", "model.adapter"),
        (messages.GenerateRequest(text="x"), "invalid_value", "model"),
    ],
    70: [(request(n=n), "invalid_value", "sampling.n") for n in (0, 17, 129, 10**9)],
    71: [
        (request(temperature=value), "invalid_value", "sampling.temperature")
        for value in (math.nan, math.inf, -1.0, 3.0)
    ],
    72: [
        (request(top_p=0.0), "invalid_value", "sampling.top_p"),
        (request(top_p=1.1), "invalid_value", "sampling.top_p"),
        (request(top_k=265), "invalid_value", "sampling.top_k"),
        (request(min_p=math.nan), "invalid_value", "sampling.min_p"),
        (request(presence_penalty=2.1), "invalid_value", "sampling.presence_penalty"),
        (request(frequency_penalty=-2.1), "invalid_value", "sampling.frequency_penalty"),
        (request(repetition_penalty=0.0), "invalid_value", "sampling.repetition_penalty"),
    ],
    73: [
        (request(max_tokens=0), "invalid_value", "sampling.max_tokens"),
        (request(max_tokens=2**32 - 1), "context_length_exceeded", "sampling.max_tokens"),
        (request(max_tokens=3, min_tokens=4), "invalid_value", "sampling.min_tokens"),
    ],
    74: [
        (request(logprobs=21), "invalid_value", "sampling.logprobs"),
        (request(prompt_logprobs=10**6), "invalid_value", "sampling.prompt_logprobs"),
    ],
    75: [
        (request(stop=list("abcde")), "invalid_value", "sampling.stop"),
        (request(stop=[""]), "invalid_value", "sampling.stop[0]"),
        (request(stop=["x" * 10**6]), "invalid_value", "sampling.stop[0]"),
        (request(stop_token_ids=[264]), "invalid_value", "sampling.stop_token_ids[0]"),
    ],
    76: [
        (request(logit_bias={264: 1.0}), "invalid_value", "sampling.logit_bias"),
        (request(logit_bias=dict.fromkeys(range(10**5), 0.0)), "invalid_value", "sampling.logit_bias"),
        (request(logit_bias={5: 1e308}), "invalid_value", "sampling.logit_bias[5]"),
    ],
    78: [
        (request("x" * 513), "context_length_exceeded", "prompt"),
        (request("x" * 10**6), "context_length_exceeded", "prompt"),
        (request("x" * 500, max_tokens=13), "context_length_exceeded", "sampling.max_tokens"),
    ],
    79: [
        (chat(), "bad_messages", "messages"),
        (chat(messages.ChatMessage(role="system", content="x")), "bad_messages", "messages[0].role"),
        (chat(USER, messages.ChatMessage(role="root")), "bad_messages", "messages[1].role"),
        (messages.GenerateRequest(model=BASE), "invalid_value", "prompt"),
        (request(""), "invalid_value", "prompt"),
    ],
    80: [
        (
            messages.GenerateRequest(model=BASE, chat=messages.ChatPrompt(messages=[USER], tools=["{}"])),
            "unsupported_parameter",
            "tools",
        ),
        (
            messages.GenerateRequest(model=BASE, chat=messages.ChatPrompt(messages=[USER], tools=["{"])),
            "invalid_value",
            "tools[0]",
        ),
    ],
    **rows_of_constraints(),
}


@pytest.mark.parametrize("row", BAD)
async def test_row(place: Place, row: int) -> None:
    async def work() -> None:
        started = time.monotonic()
        refusals = await asyncio.gather(*(refusal(place.fleet, bad) for bad, _, _ in BAD[row]))
        assert time.monotonic() - started < 1.0 + 0.5 * len(BAD[row])
        for error, (bad, reason, field) in zip(refusals, BAD[row], strict=True):
            assert (error.reason, error.field or "") == (reason, field), (str(bad)[:200], error)
            assert error.code in (Code.INVALID_ARGUMENT, Code.NOT_FOUND)
            assert len(error.message) < 1000

    await place.beside(work)


async def refusal(fleet: Fleet, bad: messages.GenerateRequest) -> LorafleetError:
    with pytest.raises(LorafleetError) as caught:
        await fleet.client.generate(bad)
    return caught.value


async def test_row_77_seeds_beyond_64_bits_cannot_be_said_and_the_ends_are_served(place: Place) -> None:
    for seed in (2**63, -(2**63) - 1):
        with pytest.raises(ValueError, match="range"):
            messages.SamplingParams(seed=seed)

    async def work() -> None:
        for seed in (2**63 - 1, -(2**63)):
            one = request("x", temperature=1.0, seed=seed, max_tokens=5)
            assert (await place.fleet.client.generate(one)).only.finished is not None

    await place.beside(work)


async def test_row_80_a_request_has_no_way_to_bring_a_template(place: Place) -> None:
    assert {field.name for field in messages.ChatPrompt.DESCRIPTOR.fields} == {"messages", "tools"}

    async def work() -> None:
        content = "{{ 7 * 7 }}{% for i in range(10**9) %}{% endfor %}"
        prompt = messages.ChatPrompt(messages=[messages.ChatMessage(role="user", content=content)])
        stub = place.fleet.client.stub
        tokenized = await place.fleet.client.call(stub.Tokenize, calls.TokenizeRequest(chat=prompt))
        assert content.encode() in b"".join(tokenized.tokens)

    await place.beside(work)


async def test_row_84_half_open_connections_cost_nothing(place: Place) -> None:
    host, _, port = place.fleet.address.rpartition(":")

    async def work() -> None:
        opened = [await asyncio.open_connection(host, int(port)) for _ in range(100)]
        for _, writer in opened:
            writer.write(b"PRI * HTTP/2.0\r\n")
        await asyncio.sleep(0.2)
        assert (await place.fleet.client.generate(request("x", max_tokens=3))).only.finished is not None
        for _, writer in opened:
            writer.close()

    await place.beside(work)


async def test_row_85_a_reader_that_does_not_read_holds_nothing_of_the_engine(place: Place) -> None:
    async def work() -> None:
        with call_scope(tenant="acme"):
            stalled = [place.fleet.client.stub.Generate(request("x", **LONG, n=8)) for _ in range(4)]
        # Nobody reads; the sequences come to their end all the same.
        await asyncio.sleep(0.2)
        await place.fleet.client.until(lambda status: status.running + status.queued == 0)
        for stream in stalled:
            stream.cancel()

    await place.beside(work)


async def test_row_86_whoever_leaves_is_forgotten_at_any_moment(place: Place) -> None:
    async def work() -> None:
        long = request("x" * 300, "spare", max_tokens=200, ignore_eos=True, n=4)
        for delay_seconds in (0.0, 0.002, 0.01, 0.03, 0.1):
            with call_scope(tenant="acme"):
                stream = place.fleet.client.stub.Generate(long)
                await asyncio.sleep(delay_seconds)
                stream.cancel()
        left = time.monotonic()
        while sum(adapter.leases for adapter in await residents(place, "spare:1")):
            assert time.monotonic() - left < 2.0
            await asyncio.sleep(0.01)

    await place.beside(work)


async def residents(place: Place, version_ref: str) -> list[calls.ResidentAdapter]:
    found = await place.fleet.client.residents()
    return [found[version_ref]] if version_ref in found else []


async def test_row_101_and_102_characters_come_whole_whatever_they_are(place: Place) -> None:
    text = "é🚢日本\u2028\u2029\x00\r\n"

    async def work() -> None:
        quoted = json.dumps({"const": text})
        for length in range(1, 20):
            cut = await place.fleet.client.generate(request("x", json_schema=quoted, max_tokens=length))
            assert "\ufffd" not in cut.only.text
            assert json.dumps(text, ensure_ascii=False).startswith(cut.only.text[:1])
        whole = await place.fleet.client.generate(request("x", json_schema=quoted, max_tokens=200))
        assert json.loads(whole.only.text) == text
        grammar = 'start: "é🚢日本\u2028\u2029"'
        one = await place.fleet.client.generate(request("x", grammar=grammar, max_tokens=40))
        assert one.only.text == "é🚢日本\u2028\u2029"

    await place.beside(work)


async def test_row_103_stops_across_tokens_and_characters(place: Place) -> None:
    async def work() -> None:
        free = request("Once", max_tokens=40, ignore_eos=True, logit_bias=LETTERS)
        text = (await place.fleet.client.generate(free)).only.text
        for stops in ([text[7:11]], [text[9:12], text[5:14]], [text[6:8], text[7:9]]):
            cut = request("Once", max_tokens=40, ignore_eos=True, logit_bias=LETTERS, stop=stops)
            stream = await place.fleet.client.generate(cut)
            assert stream.only.finished is not None
            assert stream.only.finished.reason == messages.FINISH_REASON_STOP
            end = min(text.index(stop) + len(stop) for stop in stops)
            assert text.startswith(stream.only.text + stream.only.finished.stop)
            assert len(stream.only.text) + len(stream.only.finished.stop) == end
            assert not any(stop in stream.only.text for stop in stops)

    await place.beside(work)


async def test_row_104_64_adapters_of_which_one_cannot_be_loaded(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = place.fleet
    base = make_tiny_llama(tmp_path / "base", seed=1)
    folders = {
        f"many-{number}": make_peft_adapter(base, tmp_path / str(number), r=2 + number % 5, seed=number)
        for number in range(8)
    }
    # Eight sets of weights, each under eight names that differ in what they claim of themselves.
    published: dict[str, adapter_pb2.AdapterVersion] = {}
    for number in range(64):
        folder = folders[f"many-{number % 8}"]
        config = json.loads((folder / "adapter_config.json").read_text())
        config["lora_alpha"] = 4 + number
        (folder / "adapter_config.json").write_text(json.dumps(config))
        published |= await fleet.publish({f"of-64-{number}": folder})
    broken = published["of-64-17"].digest

    from services.inference.fetcher import RegistryFetcher

    fetch = RegistryFetcher.fetch

    def failing(self: RegistryFetcher, digest: str, *args: Any, **kwargs: Any) -> Any:
        if digest == broken:
            raise BrokenBytesError("adapter_corrupt", "The bytes are not what they should be.")
        return fetch(self, digest, *args, **kwargs)

    monkeypatch.setattr(RegistryFetcher, "fetch", failing)

    async def work() -> None:
        asked = [request("Hi", f"of-64-{number}", max_tokens=4) for number in range(64)]
        answers = await asyncio.gather(*map(fleet.client.generate, asked), return_exceptions=True)
        failed = [answer for answer in answers if isinstance(answer, BaseException)]
        assert len(failed) == 1
        assert isinstance(failed[0], LorafleetError)
        assert failed[0].reason == "adapter_corrupt"
        for number in (0, 16, 63):
            alone = await fleet.client.generate(asked[number])
            together = answers[number]
            assert isinstance(together, Stream)
            assert alone.tokens == together.tokens

    await place.beside(work)


class BrokenBytesError(LorafleetError):
    """What a load may fail with."""

    code = Code.DATA_LOSS


async def test_row_105_and_106_a_version_stays_to_the_end_and_its_successor_is_itself(
    place: Place, tmp_path: Path
) -> None:
    fleet = place.fleet
    base = make_tiny_llama(tmp_path / "base", seed=1)
    other = make_peft_adapter(base, tmp_path / "other", r=8, seed=99)
    ask = request("The same beginning of a prompt", "moving", max_tokens=400, ignore_eos=True)
    undisturbed = await fleet.client.generate(ask)

    async def work() -> None:
        running = asyncio.create_task(fleet.client.generate(ask))
        while not sum(adapter.leases for adapter in await residents(place, "moving:1")):  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        with pytest.raises(LorafleetError) as caught:
            await fleet.client.call(fleet.client.stub.Evict, calls.EvictRequest(adapter="moving"))
        assert caught.value.reason == "adapter_in_use"
        await fleet.publish({"moving": other, "copy": other})
        after = await fleet.client.generate(ask)
        copy = request("The same beginning of a prompt", "copy", max_tokens=400, ignore_eos=True)
        assert after.tokens == (await fleet.client.generate(copy)).tokens
        assert after.tokens != undisturbed.tokens
        assert (await running).tokens == undisturbed.tokens
        assert (await running).started.version_ref == undisturbed.started.version_ref

    await place.beside(work)


async def test_row_107_a_step_that_fails_costs_the_request_that_broke_it(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Runner.run
    # A token that no good stream has, in its prompt or in its answer.
    said = {token_id for answers in place.alone for answer in answers.values() for token_id in answer}
    poison = next(token_id for token_id in range(6, 38) if token_id not in said)

    def breaking(self: Runner, batch: Batch) -> Any:
        if (batch.input_ids == poison).any():
            raise RuntimeError("a kernel failed")
        return run(self, batch)

    monkeypatch.setattr(Runner, "run", breaking)

    async def work() -> None:
        prompt = messages.TokenPrompt(token_ids=[70, poison])
        with pytest.raises(LorafleetError) as caught:
            await place.fleet.client.generate(messages.GenerateRequest(model=BASE, tokens=prompt))
        assert (caught.value.code, caught.value.reason) == (Code.INTERNAL, "engine_step_failed")
        assert (await place.fleet.client.generate(request("x"))).only.finished is not None

    await place.beside(work)


async def test_no_deadline_in_the_past_starts_work(place: Place) -> None:
    async def work() -> None:
        with call_scope(tenant="acme"), pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in place.fleet.client.stub.Generate(request("x"), timeout=1e-9):
                pass
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED

    await place.beside(work)
