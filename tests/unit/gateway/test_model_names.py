"""How model names of the HTTP API are read."""

from __future__ import annotations

import pytest

from lorafleet.inference.v1.generation_pb2 import ModelRef
from services.common.errors import NotFound
from services.gateway.model_names import parse_model_name

DIGEST = "sha256:" + "a" * 64


def reference(text: str | None) -> ModelRef:
    return parse_model_name(text, base="tiny-base", tenant="acme").reference()


def test_the_base_by_its_own_name() -> None:
    assert reference("tiny-base") == ModelRef(base=True)


@pytest.mark.parametrize(
    ("text", "adapter"),
    [
        ("support", "support"),
        ("support:3", "support:3"),
        ("support@prod", "support@prod"),
        (f"support@{DIGEST}", f"support@{DIGEST}"),
        ("tiny-base:support", "support"),
        ("tiny-base:support:3", "support:3"),
        ("tiny-base:support@prod", "support@prod"),
        ("tiny-base:7", "7"),
        ("ft:tiny-base:acme:support:v12", "support:12"),
    ],
)
def test_adapter_names(text: str, adapter: str) -> None:
    assert reference(text) == ModelRef(adapter=adapter)


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "other-base:support",
        "tiny-base:",
        "tiny-base:tiny-base:support",
        "ft:other:acme:support:v1",
        "ft:tiny-base:other:support:v1",
        "ft:tiny-base:acme:support:v0",
        "ft:tiny-base:acme:support:1",
        "ft:tiny-base:acme::v1",
        "ft:tiny-base:acme:support:v1:ckpt-step-9",
        "../../etc/passwd",
        "a/b",
        "Support",
        "support:03",
        "support@",
        "support@sha256:abc",
        "support\n",
        "x" * 10_000,
    ],
)
def test_anything_else_is_one_and_the_same_error(text: str | None) -> None:
    with pytest.raises(NotFound) as caught:
        reference(text)
    assert (caught.value.reason, caught.value.field) == ("model_not_found", "model")
    assert caught.value.message == "the model does not exist or you have no access to it"
