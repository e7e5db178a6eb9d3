"""The calls to the public HTTP API that the command line and the demo make."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

Json = dict[str, Any]

_CONNECT_SECONDS = 5.0
_ANSWER_SECONDS = 600.0
_DONE = "[DONE]"
_SERVER_PROBLEM = 500
_TRY_LATER = frozenset({httpx.codes.REQUEST_TIMEOUT, httpx.codes.TOO_MANY_REQUESTS})
ENDED_STATES = frozenset({"succeeded", "failed", "cancelled"})


class ApiError(Exception):
    """The API refused, or could not be reached.

    Attributes:
        code: the stable reason, `unreachable` when there was no answer.
        is_passing: the same call may succeed later: nothing answered, a server had a problem of its own, or
            a limit was reached for now.
    """

    def __init__(self, message: str, *, code: str, is_passing: bool = False) -> None:
        super().__init__(message)
        self.code = code
        self.is_passing = is_passing


class Api:
    """A connection to one fleet's HTTP door."""

    def __init__(self, base_url: str, api_key: str) -> None:
        """Connect lazily.

        Args:
            base_url: as OpenAI clients take it, ending in `/v1`.
            api_key: sent with every call.
        """
        self._client = httpx.Client(
            base_url=base_url,
            headers=authorization(api_key),
            timeout=httpx.Timeout(_ANSWER_SECONDS, connect=_CONNECT_SECONDS),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        exc_traceback: TracebackType | None,
    ) -> None:
        self._client.close()

    def models(self) -> list[Json]:
        """Return every model the key can call: the base, adapters and aliases."""
        return self._list("/models")

    def adapters(self) -> list[Json]:
        """Return every adapter."""
        return self._list("/adapters")

    def base_name(self) -> str:
        """Return the name of the base that is served."""
        for model in self.models():
            if model.get("parent") is None:
                return str(model["id"])
        raise ApiError("no base model is served", code="model_not_found")

    def create_key(self, body: Mapping[str, Any]) -> Json:
        """Make an API key; the answer holds it."""
        return self._call("POST", "/keys", json=body)

    def keys(self) -> list[Json]:
        """Return the tenant's keys, without their secrets."""
        return self._list("/keys")

    def revoke_key(self, key_id: str) -> Json:
        """Make a key useless."""
        return self._call("DELETE", f"/keys/{key_id}")

    def upload(self, path: Path) -> str:
        """Upload a training file and return its id."""
        with path.open("rb") as file:
            answer = self._call(
                "POST", "/files", data={"purpose": "fine-tune"}, files={"file": (path.name, file)}
            )
        return str(answer["id"])

    def create_job(self, body: Mapping[str, Any], *, idempotency_key: str | None = None) -> Json:
        """Create a fine-tuning job; the same key with the same body gives the first one again."""
        headers = {} if idempotency_key is None else {"Idempotency-Key": idempotency_key}
        return self._call("POST", "/fine_tuning/jobs", json=body, headers=headers)

    def job(self, job_id: str) -> Json:
        """Return one fine-tuning job."""
        return self._call("GET", f"/fine_tuning/jobs/{job_id}")

    def jobs(self) -> list[Json]:
        """Return every fine-tuning job, newest first."""
        return self._list("/fine_tuning/jobs")

    def stream_completion(self, body: Mapping[str, Any]) -> Iterator[str]:
        """Yield the text of a completion as it is generated."""
        for chunk in self._stream("/completions", body):
            for choice in chunk["choices"]:
                yield choice["text"]

    def stream_chat(self, body: Mapping[str, Any]) -> Iterator[str]:
        """Yield the text of a chat answer as it is generated."""
        for chunk in self._stream("/chat/completions", body):
            for choice in chunk["choices"]:
                yield choice["delta"].get("content") or ""

    def _list(self, path: str) -> list[Json]:
        """Return all pages of a list."""
        items: list[Json] = []
        query: dict[str, str] = {}
        while True:
            page = self._call("GET", path, params=query)
            items += page["data"]
            if not page.get("has_more") or not page["data"]:
                return items
            query = {"after": str(page["data"][-1]["id"])}

    def _call(self, method: str, path: str, **arguments: Any) -> Json:
        try:
            answer = self._client.request(method, path, **arguments)
        except httpx.TransportError as error:
            raise unreachable(error) from error
        if answer.is_error:
            raise api_error(answer.status_code, answer.content)
        return parsed(answer.content)

    def _stream(self, path: str, body: Mapping[str, Any]) -> Iterator[Json]:
        try:
            with self._client.stream("POST", path, json={**body, "stream": True}) as answer:
                if answer.is_error:
                    raise api_error(answer.status_code, answer.read())
                for line in answer.iter_lines():
                    chunk = event_data(line)
                    if chunk is not None:
                        yield chunk
        except httpx.TransportError as error:
            raise unreachable(error) from error


def authorization(api_key: str) -> dict[str, str]:
    """Return the headers that show a key."""
    return {"Authorization": f"Bearer {api_key}"}


def event_data(line: str) -> Json | None:
    """Return the object that a line of an event stream carries, or None where it carries none.

    Raises:
        ApiError: the line tells that the stream failed.
    """
    field, _, value = line.partition(":")
    value = value.removeprefix(" ")
    if field != "data" or value == _DONE:
        return None
    chunk = parsed(value.encode())
    if "error" in chunk:
        raise _from_body(chunk, is_passing=False)
    return chunk


def api_error(status_code: int, content: bytes) -> ApiError:
    """Return the error that an answer stands for."""
    is_passing = status_code >= _SERVER_PROBLEM or status_code in _TRY_LATER
    try:
        return _from_body(parsed(content), is_passing=is_passing)
    except (ValueError, KeyError):
        message = f"HTTP status {status_code} without an error object"
        return ApiError(message, code="bad_answer", is_passing=is_passing)


def parsed(content: bytes) -> Json:
    """Return the JSON object in `content`; raise `ValueError` where it is none."""
    value = json.loads(content)
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def unreachable(error: httpx.TransportError) -> ApiError:
    """Return the error for a call that got no answer."""
    message = f"the fleet cannot be reached: {error}; is it up? (`lorafleet status`)"
    return ApiError(message, code="unreachable", is_passing=True)


def _from_body(body: Json, *, is_passing: bool) -> ApiError:
    error = body["error"]
    return ApiError(str(error["message"]), code=str(error["code"]), is_passing=is_passing)
