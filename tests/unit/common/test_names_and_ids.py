"""Names, adapter references and ids: what passes, what does not, and that each refusal is typed."""

from __future__ import annotations

import re
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common import names
from services.common.errors import InvalidArgument
from services.common.ids import is_id, new_id
from services.common.names import AdapterRef

HEX = "0123456789abcdef" * 4
adapter_names = st.from_regex(r"[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?", fullmatch=True).filter(
    lambda name: ".." not in name
)
aliases = st.from_regex(r"[a-z](?:[a-z0-9-]{0,30}[a-z0-9])?", fullmatch=True)


@given(name=adapter_names, version=st.integers(1, 999_999_999), alias=aliases)
def test_every_reference_prints_as_it_parses(name: str, version: int, alias: str) -> None:
    for text, reference in {
        name: AdapterRef(name),
        f"{name}:{version}": AdapterRef(name, version=version),
        f"{name}@{alias}": AdapterRef(name, alias=alias),
        f"{name}@sha256:{HEX}": AdapterRef(name, digest=f"sha256:{HEX}"),
    }.items():
        assert AdapterRef.parse(text) == reference
        assert str(reference) == text


@given(st.text(max_size=80))
def test_any_text_parses_or_is_refused_by_name(text: str) -> None:
    try:
        reference = AdapterRef.parse(text, field="model")
    except InvalidArgument as error:
        assert error.reason in {"bad_name", "bad_version", "bad_alias", "bad_digest"}  # noqa: PT017
        assert error.field == "model"  # noqa: PT017
    else:
        assert str(reference) == text


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "bad_name"),
        ("A", "bad_name"),
        ("a/b", "bad_name"),
        ("a..b", "bad_name"),
        ("../etc", "bad_name"),
        (".a", "bad_name"),
        ("a-", "bad_name"),
        ("a\n", "bad_name"),
        ("é", "bad_name"),
        ("a" * 65, "bad_name"),
        ("a:", "bad_version"),
        ("a:0", "bad_version"),
        ("a:01", "bad_version"),
        ("a:-1", "bad_version"),
        ("a:1234567890", "bad_version"),
        ("a:٣", "bad_version"),
        ("a:1:2", "bad_version"),
        ("a:1@prod", "bad_name"),
        ("a@", "bad_alias"),
        ("a@1", "bad_alias"),
        ("a@Prod", "bad_alias"),
        ("a@prod@x", "bad_alias"),
        ("a@" + "b" * 33, "bad_alias"),
        ("a@sha256:", "bad_digest"),
        ("a@sha256:" + HEX.upper(), "bad_digest"),
        ("a@sha256:" + HEX + "0", "bad_digest"),
        ("@prod", "bad_name"),
    ],
)
def test_bad_references(text: str, reason: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        AdapterRef.parse(text)
    assert refused.value.reason == reason


def test_other_names() -> None:
    assert names.tenant_name("0-acme-9") == "0-acme-9"
    assert names.base_name("lorafleet-base.v1_x") == "lorafleet-base.v1_x"
    assert names.alias_name("p") == "p"
    assert names.digest(f"sha256:{HEX}") == f"sha256:{HEX}"
    with pytest.raises(InvalidArgument, match="bad_tenant"):
        names.tenant_name("acme.corp")
    with pytest.raises(InvalidArgument, match="bad_name"):
        names.base_name("org/model")
    with pytest.raises(InvalidArgument, match="bad_digest"):
        names.digest(HEX)


def test_ids_sort_by_time_and_need_no_escaping() -> None:
    ids = [new_id("ftjob", now_ms=moment) for moment in (1, 2, 1_000, 1_800_000_000_000)]
    assert ids == sorted(ids)
    for identifier in ids:
        assert quote(identifier, safe="") == identifier
        assert re.fullmatch(r"ftjob-[0-9a-z]{26}", identifier)


def test_ids_differ_and_are_recognised() -> None:
    ids = {new_id("file") for _ in range(1000)}
    assert len(ids) == 1000
    assert all(is_id("file", identifier) for identifier in ids)
    assert not is_id("ftjob", next(iter(ids)))
    assert not is_id("file", "file-../../etc/passwd/aaaaaaaaaa")
    assert not is_id("file", "file-" + "u" * 26)


@pytest.mark.skipif(not __debug__, reason="our own asserts are not run under python -O")
def test_a_prefix_that_is_no_word_is_our_own_mistake() -> None:
    with pytest.raises(AssertionError):
        new_id("ft-job")
