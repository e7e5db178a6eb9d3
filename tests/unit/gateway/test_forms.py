"""Multipart forms, cut anywhere."""

from __future__ import annotations

import random

import pytest

from services.common.errors import InvalidArgument
from services.gateway.multipart import FormData, FormPart, MultipartForm

BODY = (
    b'--XX\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
    b'--XX\r\nContent-Disposition: form-data; name="file"; filename="\xc3\xa9.jsonl"\r\n'
    b"Content-Type: application/octet-stream\r\n\r\n\r\n--X\r\n--XY\r\n{}\r\n\r\n--XX--\r\n"
)
CONTENT_TYPE = "multipart/form-data; boundary=XX"


def read(body: bytes, cuts: list[int]) -> dict[str, tuple[str | None, bytes]]:
    form = MultipartForm(CONTENT_TYPE)
    parts: dict[str, tuple[str | None, bytes]] = {}
    name = ""
    for start, end in zip([0, *cuts], [*cuts, len(body)], strict=True):
        for item in form.feed(body[start:end]):
            if isinstance(item, FormPart):
                name = item.name
                parts[name] = (item.filename, b"")
            else:
                assert isinstance(item, FormData)
                parts[name] = (parts[name][0], parts[name][1] + item.data)
    form.finish()
    return parts


def test_a_form_is_the_same_however_it_is_cut() -> None:
    expected = {
        "purpose": (None, b"fine-tune"),
        "file": ("é.jsonl", b"\r\n--X\r\n--XY\r\n{}\r\n"),
    }
    assert read(BODY, []) == expected
    assert read(BODY, list(range(1, len(BODY)))) == expected
    for seed in range(50):
        cuts = sorted(random.Random(seed).sample(range(1, len(BODY)), 5))
        assert read(BODY, cuts) == expected


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        BODY[:-6],
        BODY[:100],
        b"--XX\r\nContent-Disposition: attachment\r\n\r\nx\r\n--XX--\r\n",
        b'--XX\r\nContent-Disposition: form-data; name="\xff"\r\n\r\nx\r\n--XX--\r\n',
        b"".join(b'--XX\r\nContent-Disposition: form-data; name="%d"\r\n\r\n\r\n' % n for n in range(17)),
    ],
)
def test_bad_forms(body: bytes) -> None:
    with pytest.raises(InvalidArgument, match="bad_form"):
        read(body, [])


@pytest.mark.parametrize(
    "content_type", ["", "application/json", "multipart/form-data", "multipart/mixed; boundary=a"]
)
def test_other_content_types(content_type: str) -> None:
    with pytest.raises(InvalidArgument, match="unsupported_media_type"):
        MultipartForm(content_type)
