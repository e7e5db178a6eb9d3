"""Whatever is offered as a name: it is refused by a typed error, or it is harmless wherever names go."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import PurePosixPath
from urllib.parse import unquote

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from services.common import names
from services.common.errors import InvalidArgument
from services.common.names import AdapterRef

CHECKS: dict[str, tuple[Callable[[str], str], str]] = {
    "adapter": (names.adapter_name, "bad_name"),
    "base": (names.base_name, "bad_name"),
    "alias": (names.alias_name, "bad_alias"),
    "tenant": (names.tenant_name, "bad_tenant"),
    "digest": (names.digest, "bad_digest"),
}
# Mostly what names are made of, so that many pass, and some of what attacks are made of.
hostile = st.text(alphabet="abz09.-_/\\%:@~ \0\r\n\u0430\u202e\uff0e\u00e9AZ", max_size=70)
texts = st.one_of(hostile, st.text(max_size=70), st.from_regex(r"[a-z0-9._-]{1,70}", fullmatch=True))


def refusal_of(check: Callable[[str], object], text: str) -> InvalidArgument | None:
    try:
        accepted = check(text)
    except InvalidArgument as error:
        return error
    assert str(accepted) == text
    return None


@pytest.mark.parametrize("kind", CHECKS)
@settings(max_examples=400, deadline=None)
@given(text=texts)
@example(text="../../x")
@example(text="a..b")
@example(text="a\n")
@example(text="b\u0456lling")
@example(text="%2e%2e%2f")
@example(text="sha256:" + "0" * 64)
@example(text="sha256:" + "0" * 64 + "\n")
def test_row_28_a_name_is_refused_or_harmless(kind: str, text: str) -> None:
    check, reason = CHECKS[kind]
    refusal = refusal_of(check, text)
    if refusal is not None:
        assert refusal.reason == reason
        assert refusal.field
        assert refusal.limit
        return
    assert text.isascii()
    assert text.isprintable()
    assert text == text.lower() == text.strip() == unquote(text)
    assert len(text) <= 71
    assert PurePosixPath("/root", text).relative_to("/root").parts == (text,)
    assert ".." not in text


@settings(max_examples=600, deadline=None)
@given(texts, st.sampled_from(["", ":", "@", "@sha256:"]), texts | st.integers().map(str))
@example("a", ":", "1")
@example("a", "@", "prod")
@example("a", "@sha256:", "0" * 64)
@example("a", ":", "\u0661")
@example("a", ":", "01")
def test_row_28_a_reference_is_refused_or_reads_back(name: str, mark: str, rest: str) -> None:
    text = name + (mark + rest if mark else "")
    refusal = refusal_of(AdapterRef.parse, text)
    if refusal is not None:
        assert refusal.reason in ("bad_name", "bad_version", "bad_alias", "bad_digest")
        return
    ref = AdapterRef.parse(text)
    assert str(ref) == text
    assert AdapterRef.parse(str(ref)) == ref
    assert sum(part is not None for part in (ref.version, ref.alias, ref.digest)) <= 1
