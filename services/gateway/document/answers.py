"""What each route answers when all is well."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lorafleet.inference.v1.inference_service_pb2 import ResidentAdapter
from lorafleet.registry.v1.adapter_pb2 import Adapter, AdapterVersion, Alias
from services.gateway import (
    adapter_files,
    adapters,
    chat,
    compare,
    completions,
    embeddings,
    files,
    fine_tuning,
    health,
    key_routes,
    models,
    upload_routes,
    usage_routes,
)
from services.gateway.document import own_shapes as own
from services.gateway.document import shapes
from services.gateway.document.messages import JsonSchema, message_schema
from services.gateway.lorax import routes as lorax

JSON = "application/json"
EVENTS = "text/event-stream"
BYTES = "application/octet-stream"


@dataclass(frozen=True, slots=True)
class Named:
    """A shape with a name of its own among the document's components."""

    name: str
    schema: JsonSchema


@dataclass(frozen=True, slots=True)
class Page:
    """A page of items; without `is_paged` the whole list."""

    item: Named
    is_paged: bool = True


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer of a route.

    Attributes:
        body: the JSON that it holds: a type, or a `Named` or a `Page`; None where it holds none.
        events: what an event of the route's stream holds.
        is_bytes: whether the answer is bytes.
        form: the files and texts of the form that the route takes, and whether each must be there.
        also: other status codes with the same body.
    """

    body: object = None
    events: object = None
    is_bytes: bool = False
    form: dict[str, bool] | None = None
    also: tuple[int, ...] = ()


_TEXT = {"type": "string"}


def _own(name: str, kind: str, message: Any, **more: JsonSchema) -> Named:
    """Return the shape of a message with the keys that our objects have beside its fields."""
    keys = {**more, "object": {"const": kind}}
    return Named(name, message_schema(message.DESCRIPTOR, **keys))


ADAPTER = _own("Adapter", "adapter", Adapter, id=_TEXT)
VERSION = _own("AdapterVersion", "adapter.version", AdapterVersion, id=_TEXT)
ALIAS = _own("Alias", "adapter.alias", Alias)
MOVE = _own("AliasHistoryEntry", "adapter.alias_move", Alias, id=_TEXT)
RESIDENT = _own("ResidentAdapter", "adapter.resident", ResidentAdapter, id=_TEXT)


_FOLDER = {adapter_files.CONFIG_FILE: True, adapter_files.WEIGHTS_FILE: True}

ANSWERS: dict[Callable[..., Any], Answer] = {
    health.health: Answer(shapes.Health),
    health.ready: Answer(shapes.Readiness, also=(503,)),
    models.list_models: Answer(shapes.ListOf[shapes.Model]),
    models.get_model: Answer(shapes.Model),
    completions.create_completion: Answer(shapes.TextCompletion, events=shapes.CompletionChunk),
    chat.create_chat_completion: Answer(shapes.ChatCompletion, events=shapes.ChatChunk),
    embeddings.create_embeddings: Answer(shapes.Embeddings),
    lorax.generate: Answer(own.LoraxAnswer),
    lorax.generate_stream: Answer(events=own.LoraxEvent),
    lorax.generate_either_way: Answer(list[own.LoraxAnswer], events=own.LoraxEvent),
    lorax.tokenize: Answer(list[own.LoraxPlace]),
    lorax.info: Answer(own.LoraxInfo),
    files.create_file: Answer(shapes.File, form={"file": True, "purpose": True}),
    files.list_files: Answer(shapes.PageOf[shapes.File]),
    files.get_file: Answer(shapes.File),
    files.download_file: Answer(is_bytes=True),
    files.delete_file: Answer(shapes.Deleted),
    upload_routes.create_upload: Answer(shapes.Upload),
    upload_routes.add_part: Answer(shapes.UploadPart, form={"data": True}),
    upload_routes.complete_upload: Answer(shapes.Upload),
    upload_routes.cancel_upload: Answer(shapes.Upload),
    fine_tuning.create_job: Answer(shapes.Job),
    fine_tuning.list_jobs: Answer(shapes.PageOf[shapes.Job]),
    fine_tuning.get_job: Answer(shapes.Job),
    fine_tuning.cancel_job: Answer(shapes.Job),
    fine_tuning.pause_job: Answer(shapes.Job),
    fine_tuning.resume_job: Answer(shapes.Job),
    fine_tuning.list_events: Answer(shapes.PageOf[shapes.JobEvent], events=shapes.JobEvent),
    fine_tuning.list_checkpoints: Answer(shapes.PageOf[shapes.Checkpoint]),
    fine_tuning.publish_checkpoint: Answer(shapes.Checkpoint),
    adapters.list_adapters: Answer(Page(ADAPTER)),
    adapters.list_resident: Answer(Page(RESIDENT, is_paged=False)),
    adapters.get_adapter: Answer(ADAPTER),
    adapters.delete_adapter: Answer(shapes.Deleted),
    adapters.list_versions: Answer(Page(VERSION)),
    adapters.delete_version: Answer(shapes.Deleted),
    adapters.list_aliases: Answer(Page(ALIAS, is_paged=False)),
    adapters.set_alias: Answer(ALIAS),
    adapters.roll_alias_back: Answer(ALIAS),
    adapters.delete_alias: Answer(shapes.Deleted),
    adapters.list_alias_history: Answer(Page(MOVE)),
    adapter_files.publish_version: Answer(VERSION, form={**_FOLDER, "base": False, "description": False}),
    adapter_files.get_version: Answer(VERSION),
    adapter_files.download_file: Answer(is_bytes=True),
    compare.compare: Answer(shapes.ListOf[own.ComparedAnswer]),
    key_routes.create_key: Answer(own.MadeKey),
    key_routes.list_keys: Answer(shapes.PageOf[own.Key]),
    key_routes.revoke_key: Answer(shapes.Deleted),
    usage_routes.get_usage: Answer(own.UsageReport),
}
