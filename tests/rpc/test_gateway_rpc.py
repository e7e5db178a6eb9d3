"""The gRPC door: keys on every method, tenants by key alone, and everything streamed through."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import grpc
import pytest

from lorafleet.inference.v1 import generation_pb2
from lorafleet.inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from lorafleet.registry.v1 import adapter_pb2, file_pb2
from lorafleet.registry.v1.adapter_pb2_grpc import AdapterServiceStub
from lorafleet.registry.v1.file_pb2_grpc import FileServiceStub
from services.common.errors import FailedPrecondition, LorafleetError, NotFound
from services.common.status import from_rpc_error
from services.gateway.config import GatewaySettings
from services.gateway.keys import Scope
from services.gateway.rpc_door import rpc_door
from services.gateway.rpc_methods import PublicMethod, public_methods
from tests.support.fake_inference import Script
from tests.support.gateway import GatewayUnderTest, running_gateway, wait_until
from tests.support.reflection import ReflectionClient

METHODS = public_methods()
SECONDS = 10


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayUnderTest]:
    folder = tmp_path_factory.mktemp("gateway")
    with running_gateway(folder, key_cache_seconds=0, grpc_listen="127.0.0.1:0") as running:
        yield running


@pytest.fixture
def channel(gateway: GatewayUnderTest) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(gateway.rpc_address) as channel:
        yield channel


def bearer(key: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {key}"),)


def refusal(call: Callable[[], Any]) -> LorafleetError:
    """What a call that must fail is refused with."""
    with pytest.raises(grpc.RpcError) as caught:
        list(answer) if hasattr(answer := call(), "__iter__") else answer
    return from_rpc_error(caught.value)


def send(channel: grpc.Channel, method: PublicMethod, metadata: Any = ()) -> Any:
    kinds: dict[tuple[bool, bool], Any] = {
        (False, False): channel.unary_unary,
        (False, True): channel.unary_stream,
        (True, False): channel.stream_unary,
        (True, True): channel.stream_stream,
    }
    request: Any = iter([b""]) if method.streams_requests else b""
    kind = kinds[method.streams_requests, method.streams_responses]
    return kind(method.path)(request, metadata=metadata, timeout=SECONDS)


def test_the_contract_is_public_but_for_leases() -> None:
    names = {method.path.rpartition(".")[2] for method in METHODS}
    assert {"InferenceService/Generate", "TrainerService/CreateJob", "AdapterService/PublishVersion"} <= names
    assert not any("Lease" in name for name in names)
    assert len(names) > 40


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.path)
def test_no_method_answers_without_its_key(
    gateway: GatewayUnderTest, channel: grpc.Channel, method: PublicMethod
) -> None:
    unknown = "lf-" + "a" * 16 + "-" + "b" * 43
    for metadata in (
        (),
        bearer(unknown),
        (("lorafleet-tenant", "default"),),
        bearer(gateway.key) * 2,
        (("authorization", gateway.key),),
    ):
        error = refusal(partial(send, channel, method, metadata))
        assert (error.code.value, error.reason) == ("UNAUTHENTICATED", "invalid_api_key")
    if method.scope is not None:
        others = gateway.new_key("default", *(scope for scope in Scope if scope is not method.scope))
        error = refusal(lambda: send(channel, method, bearer(others)))
        assert (error.code.value, error.reason) == ("PERMISSION_DENIED", "permission_denied")


def test_leases_are_not_to_be_had(gateway: GatewayUnderTest, channel: grpc.Channel) -> None:
    stub = AdapterServiceStub(channel)
    request = adapter_pb2.AcquireLeaseRequest(digest="sha256:" + "0" * 64, holder="me", ttl_seconds=60)
    with pytest.raises(grpc.RpcError) as caught:
        stub.AcquireLease(request, metadata=bearer(gateway.key), timeout=SECONDS)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_the_key_alone_says_for_whom(gateway: GatewayUnderTest, channel: grpc.Channel) -> None:
    gateway.adapters.publish("mine")
    stub = AdapterServiceStub(channel)
    request = adapter_pb2.ResolveVersionRequest(ref="mine")
    own = stub.ResolveVersion(request, metadata=bearer(gateway.key), timeout=SECONDS)
    assert own.adapter == "mine"
    other = (*bearer(gateway.new_key("other")), ("lorafleet-tenant", "default"))
    error = refusal(lambda: stub.ResolveVersion(request, metadata=other, timeout=SECONDS))
    unknown = refusal(
        lambda: stub.ResolveVersion(
            adapter_pb2.ResolveVersionRequest(ref="nobodys"), metadata=other, timeout=SECONDS
        )
    )
    assert isinstance(error, NotFound)
    assert (error.reason, error.message.replace("mine", "nobodys")) == (unknown.reason, unknown.message)


def test_tokens_come_as_they_are_made_and_end_with_the_client(
    gateway: GatewayUnderTest, channel: grpc.Channel
) -> None:
    gateway.inference.scripts["hold on"] = Script(texts=["a", "b"], hang=True)
    request = generation_pb2.GenerateRequest(model=generation_pb2.ModelRef(base=True), text="hold on")
    before = gateway.inference.cancelled
    stream = InferenceServiceStub(channel).Generate(request, metadata=bearer(gateway.key), timeout=SECONDS)
    assert next(stream).started.prompt_tokens == len("hold on")
    assert [next(stream).delta.text, next(stream).delta.text] == ["a", "b"]
    stream.cancel()
    wait_until(lambda: gateway.inference.cancelled == before + 1)


def test_an_error_of_the_service_arrives_whole(gateway: GatewayUnderTest, channel: grpc.Channel) -> None:
    gateway.inference.scripts["refuse"] = Script(
        refuse=FailedPrecondition(
            "rank_too_large", "rank 999 is above 64", field="model", value=999, limit=64
        )
    )
    request = generation_pb2.GenerateRequest(model=generation_pb2.ModelRef(base=True), text="refuse")
    stub = InferenceServiceStub(channel)
    error = refusal(lambda: stub.Generate(request, metadata=bearer(gateway.key), timeout=SECONDS))
    assert (error.code.value, error.reason, error.field, error.limit) == (
        "FAILED_PRECONDITION",
        "rank_too_large",
        "model",
        "64",
    )
    assert error.message == "rank 999 is above 64"


def test_a_file_is_streamed_through(gateway: GatewayUnderTest, channel: grpc.Channel) -> None:
    data = bytes(range(256)) * 2000
    header = file_pb2.CreateFileHeader(
        filename="rows.jsonl",
        purpose=file_pb2.FilePurpose.FILE_PURPOSE_FINE_TUNE,
        digest="sha256:" + hashlib.sha256(data).hexdigest(),
    )

    def requests() -> Iterator[file_pb2.CreateFileRequest]:
        yield file_pb2.CreateFileRequest(header=header)
        for start in range(0, len(data), 64 * 1024):
            yield file_pb2.CreateFileRequest(data=data[start : start + 64 * 1024])

    made = FileServiceStub(channel).CreateFile(requests(), metadata=bearer(gateway.key), timeout=SECONDS)
    assert gateway.files.stored["default", made.id][1] == data
    assert gateway.files.largest_message_bytes < 65 * 1024


def test_a_client_that_knows_only_the_address(gateway: GatewayUnderTest) -> None:
    gateway.adapters.publish("seen")
    with ReflectionClient(gateway.rpc_address, bearer(gateway.key)) as client:
        request = client.message("lorafleet.registry.v1.GetAdapterRequest", adapter="seen")
        answer = client.call("lorafleet.registry.v1.AdapterService.GetAdapter", request)
    assert answer.name == "seen"


async def test_keys_do_not_travel_in_plain_text(gateway: GatewayUnderTest) -> None:
    settings: GatewaySettings = gateway.app.state.gateway.settings
    reachable = settings.model_copy(update={"grpc_listen": "0.0.0.0:0"})
    state = gateway.app.state.gateway
    with pytest.raises(FailedPrecondition, match="plain text"):
        async with rpc_door(reachable, gateway.keys, state.upstream, state.meter):
            pass
