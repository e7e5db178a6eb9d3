"""What is known of versions: by digest and by tenant, bounded, and as text that survives a restart."""

from __future__ import annotations

import json

import pytest

from services.inference.sources import AdapterSource, AdapterSources, SourceFile


def source(number: int, tenant: str = "acme") -> AdapterSource:
    digest = f"sha256:{number}"
    files = {"adapter_config.json": SourceFile("sha256:c", 10)}
    return AdapterSource(tenant, digest, f"one@{digest}", f"one:{number}", 8, files)


def test_each_tenant_knows_the_same_bytes_by_its_own_name() -> None:
    sources = AdapterSources()
    sources.note(source(1))
    sources.note(source(1, "globex"))
    assert sources.get("sha256:1", "acme") == source(1)
    assert sources.get("sha256:1", "globex") == source(1, "globex")
    assert sources.get("sha256:1", "stranger") is None
    assert sources.of_tenant("stranger") == {}
    assert sources.get("sha256:1") == source(1, "globex")
    sources.note(source(1))
    assert sources.require("sha256:1") == source(1), "who asked last may read it now"


def test_the_oldest_is_forgotten_for_its_tenant_only() -> None:
    sources = AdapterSources(limit=2)
    for one in (source(1), source(1, "globex"), source(2)):
        sources.note(one)
    assert sources.of_tenant("acme") == {"sha256:2": source(2)}
    assert sources.get("sha256:1") == source(1, "globex")


def test_a_source_comes_back_from_its_text() -> None:
    assert AdapterSource.from_json(source(1).to_json()) == source(1)
    assert source(1).adapter == "one"


@pytest.mark.parametrize(
    "text",
    ["", "3", "{}", '{"files": {}}', '{"files": {"a": 1}}', json.dumps({"tenant": 1, "files": {}})],
)
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - the class is all that is promised
        AdapterSource.from_json(text)


def test_a_field_of_another_type_is_refused() -> None:
    fields = json.loads(source(1).to_json())
    for name in ("tenant", "digest", "max_rank"):
        with pytest.raises(ValueError, match="not an adapter's source"):
            AdapterSource.from_json(json.dumps(fields | {name: None}))
