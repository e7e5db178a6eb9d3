"""The HTTP client, job following and demo traffic against a small server on a real port."""

import asyncio
import io
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, Request, UploadFile
from rich.console import Console
from starlette.responses import JSONResponse, StreamingResponse

from lorafleet.api import Api, ApiError, event_data
from lorafleet.demo.report import Agreement, Report, load_of, print_report
from lorafleet.demo.traffic import Ask, Traffic
from lorafleet.following import follow

KEY = "lf-test"


class Door:
    """A server with two pages of jobs, one that trains while it is looked at, and a model that counts."""

    def __init__(self) -> None:
        self.app = FastAPI()
        self.uploads: list[bytes] = []
        self.looks = 0
        self.most_at_once = 0
        self._at_once = 0
        self.url = ""
        self.app.get("/v1/models")(self.models)
        self.app.get("/v1/fine_tuning/jobs")(self.jobs)
        self.app.get("/v1/fine_tuning/jobs/{job_id}")(self.job)
        self.app.post("/v1/files")(self.files)
        self.app.post("/v1/completions")(self.completions)

    async def models(self, request: Request) -> Any:
        if request.headers["authorization"] != f"Bearer {KEY}":
            error = {"message": "no such key", "type": "t", "param": None, "code": "invalid_api_key"}
            return JSONResponse({"error": error}, status_code=401)
        return {"data": [{"id": "fine", "parent": "base"}, {"id": "base", "parent": None}]}

    async def jobs(self, after: str | None = None) -> Any:
        page = ["j1", "j2"] if after is None else ["j3"]
        assert after in {None, "j2"}
        return {"data": [{"id": name} for name in page], "has_more": after is None}

    async def job(self, job_id: str) -> Any:
        self.looks += 1
        if self.looks == 2:
            return JSONResponse({"error": {"message": "away", "code": "unavailable"}}, status_code=503)
        progress = {
            "step": self.looks,
            "total_steps": 4,
            "loss": 1.5,
            "tokens_per_second": 10.0,
            "eta_seconds": 2,
        }
        status = "succeeded" if self.looks >= 4 else "running"
        known = None if self.looks == 1 else progress
        return {"id": job_id, "status": status, "lorafleet": {"adapter": "mine", "progress": known}}

    async def files(self, file: UploadFile) -> Any:
        self.uploads.append(await file.read())
        return {"id": "file-1"}

    async def completions(self, request: Request) -> Any:
        body = await request.json()
        return StreamingResponse(self._stream(body["prompt"]), media_type="text/event-stream")

    async def _stream(self, prompt: str) -> AsyncIterator[str]:
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            for text in ("one ", "two ", prompt):
                await asyncio.sleep(0.02)
                if text == "die":
                    raise ConnectionResetError
                if text == "break":
                    yield 'data: {"error": {"message": "it broke", "code": "internal"}}\n\n'
                    return
                yield f"data: {json.dumps({'choices': [{'text': text}]})}\n\n"
            yield 'data: {"choices": [], "usage": {"completion_tokens": 3}}\n\n'
            yield "data: [DONE]\n\n"
        finally:
            self._at_once -= 1


@pytest.fixture
def door() -> Iterator[Door]:
    door = Door()
    server = uvicorn.Server(uvicorn.Config(door.app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    door.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1"
    yield door
    server.should_exit = True
    thread.join(10)


def test_lists_are_read_to_their_last_page(door: Door) -> None:
    with Api(door.url, KEY) as api:
        assert [job["id"] for job in api.jobs()] == ["j1", "j2", "j3"]
        assert api.base_name() == "base"


def test_refusals_carry_message_and_code(door: Door) -> None:
    with Api(door.url, "lf-wrong") as api, pytest.raises(ApiError, match="no such key") as refused:
        api.models()
    assert (refused.value.code, refused.value.is_passing) == ("invalid_api_key", False)


def test_nothing_there_is_an_error_that_may_pass() -> None:
    with Api("http://127.0.0.1:9/v1", KEY) as api, pytest.raises(ApiError, match="cannot be reached") as gone:
        api.models()
    assert (gone.value.code, gone.value.is_passing) == ("unreachable", True)


def test_files_go_up_whole(door: Door, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"line\n" * 100_000)
    with Api(door.url, KEY) as api:
        assert api.upload(path) == "file-1"
    assert door.uploads == [path.read_bytes()]


def test_streams_end_with_done_and_break_with_an_error(door: Door) -> None:
    with Api(door.url, KEY) as api:
        assert "".join(api.stream_completion({"prompt": "three"})) == "one two three"
        with pytest.raises(ApiError, match="it broke"):
            list(api.stream_completion({"prompt": "break"}))


def test_following_outlasts_a_gateway_that_is_away(door: Door) -> None:
    shown = io.StringIO()
    with Api(door.url, KEY) as api:
        (job,) = follow(api, ["j1"], Console(file=shown, force_terminal=True, width=120))
    assert job["status"] == "succeeded"
    assert door.looks == 4
    assert "mine" in shown.getvalue()
    assert "step 4/4  loss 1.500  10 tokens/s  2 s left" in shown.getvalue()


async def test_traffic_keeps_its_limit_and_its_order(door: Door) -> None:
    asks = [Ask("m", str(number), 8, ("\n",)) for number in range(6)]
    async with Traffic.to(door.url, KEY) as traffic:
        answers = await traffic.ask_all(asks, at_once=2)
        assert [answer.text for answer in answers] == [f"one two {number}" for number in range(6)]
        assert door.most_at_once == 2
        assert all(answer.tokens == 3 and len(answer.piece_gaps_seconds) == 2 for answer in answers)
        assert all(answer.first_piece_seconds >= 0.02 for answer in answers)

        many = await traffic.keep_asking(asks, at_once=4, seconds=0.3)
        assert door.most_at_once == 4
        assert len(many.answers) > 6
        assert {answer.ask.prompt for answer in many.answers} == {"0", "1", "2", "3", "4", "5"}
        assert not many.failures

        with pytest.raises(ApiError, match="it broke"):
            await traffic.ask_all([*asks, Ask("m", "break", 8, ())], at_once=3)


async def test_a_load_counts_what_failed_and_goes_on(door: Door) -> None:
    good, breaks, dies = (Ask("m", prompt, 8, ()) for prompt in ("good", "break", "die"))
    async with Traffic.to(door.url, KEY) as traffic:
        came = await traffic.keep_asking([good, breaks, dies], at_once=3, seconds=1.5)
        assert {answer.ask for answer in came.answers} == {good}
        assert came.failures["internal"] >= 1
        assert came.failures["unreachable"] >= 1
        with pytest.raises(ApiError, match="it broke"):
            await traffic.keep_asking([breaks], at_once=2, seconds=0.1)

    load = load_of("mixed", came, streams=3)
    assert load.requests == len(came.answers)
    report = Report("base", (), (load,), Agreement(1, 1), {})
    printed = io.StringIO()
    print_report(report, Console(file=printed, width=200))
    failed = came.failures.total()
    assert f"requests that failed: {failed} of {failed + load.requests} (" in printed.getvalue()
    printed = io.StringIO()
    print_report(replace(report, loads=(replace(load, failures={}),)), Console(file=printed, width=200))
    assert f"requests that failed: 0 of {load.requests}\n" in printed.getvalue()


@pytest.mark.parametrize("line", ["", ": comment", "event: x", "data: [DONE]"])
def test_lines_without_an_object_are_passed_over(line: str) -> None:
    assert event_data(line) is None


def test_a_space_after_the_colon_may_be_missing() -> None:
    assert event_data('data:{"a": 1}') == {"a": 1}
