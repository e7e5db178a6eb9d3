"""A multipart/form-data body as a sequence of parts and their bytes, held nowhere."""

from __future__ import annotations

from dataclasses import dataclass

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from services.common.errors import InvalidArgument

MAX_PARTS = 16


@dataclass(frozen=True, slots=True)
class FormPart:
    """The beginning of a part; `filename` is None for a text field."""

    name: str
    filename: str | None


@dataclass(frozen=True, slots=True)
class FormData:
    """Bytes of the part that began last."""

    data: bytes


class MultipartForm:
    """Takes a body apart, chunk by chunk.

    Raises:
        InvalidArgument: `unsupported_media_type` or `bad_form`, from any of its methods.
    """

    def __init__(self, content_type: str) -> None:
        kind, options = parse_options_header(content_type)
        boundary = options.get(b"boundary")
        if kind != b"multipart/form-data" or not boundary:
            raise InvalidArgument(
                "unsupported_media_type", "send the body as multipart/form-data", field="content-type"
            )
        self._items: list[FormPart | FormData] = []
        self._parts = 0
        self._is_complete = False
        self._header_name = b""
        self._header_value = b""
        self._disposition = b""
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._on_part_begin,
                    "on_header_field": self._on_header_field,
                    "on_header_value": self._on_header_value,
                    "on_header_end": self._on_header_end,
                    "on_headers_finished": self._on_headers_finished,
                    "on_part_data": self._on_part_data,
                    "on_end": self._on_end,
                },
            )
        except FormParserError as error:
            raise _bad_form() from error

    def feed(self, chunk: bytes) -> list[FormPart | FormData]:
        """Return what a chunk of the body holds."""
        try:
            self._parser.write(chunk)
        except FormParserError as error:
            raise _bad_form() from error
        items, self._items = self._items, []
        return items

    def finish(self) -> None:
        """Check that the body came to its end."""
        if not self._is_complete:
            raise _bad_form()

    def _on_part_begin(self) -> None:
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise InvalidArgument("bad_form", f"the form has more than {MAX_PARTS} parts", limit=MAX_PARTS)
        self._disposition = b""

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _on_header_end(self) -> None:
        if self._header_name.lower() == b"content-disposition":
            self._disposition = self._header_value
        self._header_name = self._header_value = b""

    def _on_headers_finished(self) -> None:
        kind, options = parse_options_header(self._disposition)
        name = options.get(b"name")
        if kind != b"form-data" or not name:
            raise _bad_form()
        filename = options.get(b"filename")
        self._items.append(FormPart(_text(name), None if filename is None else _text(filename)))

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        self._items.append(FormData(data[start:end]))

    def _on_end(self) -> None:
        self._is_complete = True


def _text(value: bytes) -> str:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _bad_form() from error


def _bad_form() -> InvalidArgument:
    return InvalidArgument("bad_form", "the body is not a well-formed multipart/form-data form")
