"""A walk through the HTTP API on which every operation answers well."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx

from lorafleet.inference.v1.inference_service_pb2 import ResidentAdapter, Tier
from lorafleet.registry.v1.file_pb2 import File
from lorafleet.trainer.v1.job_pb2 import Checkpoint, Progress
from tests.support.adapter_files import config_bytes, lora_tensors, safetensors_bytes
from tests.support.fake_base import BASE
from tests.support.fake_inference import Script
from tests.support.gateway import GatewayUnderTest

ROWS = b'{"prompt": "a", "completion": "b"}\n' * 20
Json = dict[str, Any]

CHAT = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
FOLDER = {
    "adapter_config.json": config_bytes(),
    "adapter_model.safetensors": safetensors_bytes(lora_tensors(seed=1)),
}


@dataclass
class Tour:
    """Calls operations by the paths of the document, and tells of each answer.

    A gateway before a real registry with a base named as the served one is needed.
    """

    gateway: GatewayUnderTest
    http: httpx.Client
    seen: list[tuple[str, str, httpx.Response]] = field(default_factory=list)

    def call(self, method: str, path: str, query: str = "", **request: Any) -> Any:
        """Call an operation; names in braces are taken from `names`."""
        names = request.pop("names", {})
        response = self.http.request(method, path.format(**names) + query, **request)
        assert response.status_code == 200, (method, path, response.text)
        self.seen.append((path, method.lower(), response))
        is_json = response.headers["content-type"] == "application/json"
        return response.json() if is_json else response

    def all(self) -> Iterator[tuple[str, str, httpx.Response]]:
        """Walk through everything; yield path, method and answer of each call."""
        for part in (self._open, self._answers, self._adapters, self._files, self._jobs, self._keys):
            part()
            yield from self.seen
            self.seen.clear()

    def _open(self) -> None:
        self.call("GET", "/health")
        self.call("GET", "/readyz")
        self.call("GET", "/v1/models")
        self.call("GET", "/info")

    def _answers(self) -> None:
        self.gateway.inference.scripts |= {
            "call": Script(texts=['{"name": "look", "arguments": {}}']),
            "to the end": Script(end_token=b"</s>"),
        }
        text: Json = {"model": BASE, "prompt": "hi"}
        spoken: Json = {"model": BASE, "messages": CHAT}
        usage: Json = {"stream": True, "stream_options": {"include_usage": True}}
        echoed: Json = {"logprobs": 2, "echo": True, "n": 2}
        for more in ({}, echoed, {"logprobs": 0}, usage):
            self.call("POST", "/v1/completions", json=text | more)
        likely: Json = {"logprobs": True, "top_logprobs": 2}
        called = {"tools": [TOOL]}
        for more in ({}, likely, usage | likely, {"stream": True}):
            self.call("POST", "/v1/chat/completions", json=spoken | more)
        for stream in (False, True):
            messages = [{"role": "user", "content": "call"}]
            body: Json = {"model": BASE, "messages": messages, "stream": stream, **called}
            self.call("POST", "/v1/chat/completions", json=body)
        for encoding in ("float", "base64"):
            body = {"model": BASE, "input": ["a", "b"], "encoding_format": encoding}
            self.call("POST", "/v1/embeddings", json=body)
        self.call("POST", "/tokenize", json={"inputs": "héllo"})
        rich: Json = {"details": True, "return_k_alternatives": 2}
        every: Json = {**rich, "decoder_input_details": True, "best_of": 2, "do_sample": True}
        for parameters in ({}, rich, every):
            body = {"inputs": "to the end", "parameters": parameters}
            self.call("POST", "/generate", json=body)
            self.call("POST", "/", json=body)
        for path in ("/generate_stream", "/"):
            self.call("POST", path, json={"inputs": "hi", "parameters": rich} | _stream(path))

    def _adapters(self) -> None:
        names = {"name": "support", "version": 1, "alias": "prod", "file": "adapter_config.json"}
        form = {name: (name, content) for name, content in FOLDER.items()}
        for seed in (1, 2):
            form["adapter_model.safetensors"] = ("weights", safetensors_bytes(lora_tensors(seed=seed)))
            made = self.call("POST", "/v1/adapters/{name}/versions", names=names, files=form)
        self.gateway.adapters.publish("support")
        self.gateway.inference.resident.append(
            ResidentAdapter(digest=made["digest"], version_ref="support:2", tier=Tier.TIER_HOST)
        )
        self.call("GET", "/v1/models/{model}", names={"model": f"{BASE}:support"})
        self.call("GET", "/v1/adapters")
        assert self.call("GET", "/v1/adapters/resident")["data"]
        self.call("GET", "/v1/adapters/{name}", names=names)
        self.call("GET", "/v1/adapters/{name}/versions", names=names)
        self.call("GET", "/v1/adapters/{name}/versions/{version}", names=names)
        self.call("GET", "/v1/adapters/{name}/versions/{version}/files/{file}", names=names)
        alias = "/v1/adapters/{name}/aliases/{alias}"
        for version in (1, 2):
            self.call("PUT", alias, names=names, json={"version": version})
        self.call("POST", f"{alias}/rollback", names=names, json={})
        assert self.call("GET", f"{alias}/history", names=names)["data"]
        assert self.call("GET", "/v1/adapters/{name}/aliases", names=names)["data"]
        body = {"models": [BASE, BASE], "prompt": "hi"}
        self.call("POST", "/v1/adapters/compare", json=body)
        self.call("DELETE", alias, names=names)
        self.call("DELETE", "/v1/adapters/{name}/versions/{version}", names=names)
        self.call("DELETE", "/v1/adapters/{name}", names=names)

    def _files(self) -> None:
        form = {"file": ("rows.jsonl", ROWS)}
        file = self.call("POST", "/v1/files", files=form, data={"purpose": "fine-tune"})
        names = {"file_id": file["id"]}
        self.call("GET", "/v1/files")
        self.call("GET", "/v1/files/{file_id}", names=names)
        assert self.call("GET", "/v1/files/{file_id}/content", names=names).content == ROWS
        self.call("DELETE", "/v1/files/{file_id}", names=names)
        new = {"filename": "a", "purpose": "fine-tune", "bytes": len(ROWS), "mime_type": ""}
        for end in ("complete", "cancel"):
            upload = {"upload_id": self.call("POST", "/v1/uploads", json=new)["id"]}
            part = self.call("POST", "/v1/uploads/{upload_id}/parts", names=upload, files={"data": ROWS})
            body: Json = {"json": {"part_ids": [part["id"]]}} if end == "complete" else {}
            self.call("POST", f"/v1/uploads/{{upload_id}}/{end}", names=upload, **body)

    def _jobs(self) -> None:
        trainer = self.gateway.trainer
        self.gateway.files.stored["default", "file-rows"] = File(), b""
        created = self.call(
            "POST", "/v1/fine_tuning/jobs", json={"model": BASE, "training_file": "file-rows", "seed": 1}
        )
        job_id = created["id"]
        jobs, names = "/v1/fine_tuning/jobs/{job_id}", {"job_id": job_id}
        self.call("GET", "/v1/fine_tuning/jobs")
        self.call("POST", f"{jobs}/pause", names=names)
        self.call("POST", f"{jobs}/resume", names=names)
        trainer.add_event(job_id, "A step", metrics=Progress(step=1, loss=0.5))
        trainer.checkpoints[job_id].append(Checkpoint(id="ftckpt-1", job_id=job_id, step=1, train_loss=0.5))
        self.call("GET", f"{jobs}/checkpoints", names=names)
        published = {**names, "checkpoint_id": "ftckpt-1"}
        self.call("POST", f"{jobs}/checkpoints/{{checkpoint_id}}/publish", names=published, json={})
        trainer.succeed(job_id, self.gateway.adapters.publish("tuned"))
        self.call("GET", jobs, names=names)
        self.call("GET", f"{jobs}/events", names=names)
        self.call("GET", f"{jobs}/events", "?stream=true", names=names)
        body = {"model": BASE, "training_file": "file-rows"}
        other = self.call("POST", "/v1/fine_tuning/jobs", json=body)["id"]
        self.call("POST", f"{jobs}/cancel", names={"job_id": other})

    def _keys(self) -> None:
        made = self.call("POST", "/v1/keys", json={"name": "ci", "expires_in_days": 1})
        self.call("GET", "/v1/keys")
        self.call("DELETE", "/v1/keys/{key_id}", names={"key_id": made["id"]})
        for group in ("day", "key", "adapter", "none"):
            assert self.call("GET", "/v1/usage", f"?group_by={group}")["data"]


def _stream(path: str) -> dict[str, bool]:
    return {"stream": True} if path == "/" else {}
