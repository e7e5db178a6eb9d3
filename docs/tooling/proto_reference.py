"""The gRPC reference: one page for each package of the contract, from its comments."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    ServiceDescriptorProto,
)
from google.rpc import status_pb2

from docs.tooling.markdown import anchor, table

PROTOS = Path(__file__).parents[2] / "protos"
_Path = tuple[int, ...]
_PACKAGE_ROOT = "lorafleet."
# Field numbers in descriptor.proto, of which the paths of comments are made.
_MESSAGES, _ENUMS, _SERVICES = 4, 5, 6
_FIELDS, _NESTED, _NESTED_ENUMS, _METHODS, _VALUES = 2, 3, 4, 2, 2
_SCALARS = {number: name.removeprefix("TYPE_").lower() for name, number in FieldDescriptorProto.Type.items()}


@dataclass
class _Page:
    """A package's page while it is written."""

    package: str
    lines: list[str] = field(default_factory=list)

    def add(self, *lines: str) -> None:
        """Add lines, and an empty one after them."""
        self.lines += [*lines, ""]


def proto_pages() -> dict[str, str]:
    """Return the Markdown of each page by its name: `registry`, `trainer`, `inference`.

    Raises:
        subprocess.CalledProcessError: the contract does not compile.
    """
    files = _compiled()
    pages: dict[str, _Page] = {}
    for file in files:
        service = file.package.split(".")[1]
        page = pages.setdefault(service, _Page(file.package))
        comments = _comments(file)
        for index, declared in enumerate(file.service):
            _add_service(page, declared, comments, (_SERVICES, index))
    for page in pages.values():
        page.add("## Messages")
    for file in files:
        page, comments = pages[file.package.split(".")[1]], _comments(file)
        for index, message in enumerate(file.message_type):
            _add_message(page, message, "", comments, (_MESSAGES, index))
        for index, enum in enumerate(file.enum_type):
            _add_enum(page, enum, "", comments, (_ENUMS, index))
    return {name: "\n".join([f"# gRPC: {page.package}", "", *page.lines]) for name, page in pages.items()}


def _compiled() -> list[FileDescriptorProto]:
    sources = sorted(str(path.relative_to(PROTOS)) for path in PROTOS.rglob("*.proto"))
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder) / "image.binpb"
        includes = [f"-I{PROTOS}", f"-I{Path(status_pb2.__file__).parents[2]}"]
        command = [sys.executable, "-m", "grpc_tools.protoc", *includes, "--include_source_info"]
        subprocess.run([*command, f"-o{image}", *sources], check=True)
        return list(FileDescriptorSet.FromString(image.read_bytes()).file)


def _comments(file: FileDescriptorProto) -> dict[_Path, str]:
    return {
        tuple(location.path): location.leading_comments
        for location in file.source_code_info.location
        if location.leading_comments
    }


def _prose(comment: str) -> Iterator[str]:
    """Yield a comment as Markdown: what is indented in it is a block of its own."""
    is_block = False
    for line in comment.splitlines():
        text = line.removeprefix(" ")
        if text.startswith("  ") != is_block:
            yield "```"
            is_block = not is_block
        yield text.removeprefix("  ")
    if is_block:
        yield "```"


def _add_service(
    page: _Page, service: ServiceDescriptorProto, comments: dict[_Path, str], path: _Path
) -> None:
    page.add(f"## {service.name}", "", *_prose(comments.get(path, "")))
    for index, method in enumerate(service.method):
        asked = _type_link(method.input_type, page) + (" (stream)" if method.client_streaming else "")
        given = _type_link(method.output_type, page) + (" (stream)" if method.server_streaming else "")
        page.add(f"### {service.name}.{method.name}", "", f"{asked} → {given}")
        page.add(*_prose(comments.get((*path, _METHODS, index), "")))


def _add_message(
    page: _Page, message: DescriptorProto, outer: str, comments: dict[_Path, str], path: _Path
) -> None:
    if message.options.map_entry:
        return
    name = f"{outer}{message.name}"
    page.add(f"### {name}", "", *_prose(comments.get(path, "")))
    maps = {entry.name: entry for entry in message.nested_type if entry.options.map_entry}
    rows = [
        (found.name, _field_type(found, maps, page), comments.get((*path, _FIELDS, index), ""))
        for index, found in enumerate(message.field)
    ]
    if rows:
        page.add(*table(("field", "type", ""), rows))
    for index, nested in enumerate(message.nested_type):
        _add_message(page, nested, f"{name}.", comments, (*path, _NESTED, index))
    for index, enum in enumerate(message.enum_type):
        _add_enum(page, enum, f"{name}.", comments, (*path, _NESTED_ENUMS, index))


def _add_enum(
    page: _Page, enum: EnumDescriptorProto, outer: str, comments: dict[_Path, str], path: _Path
) -> None:
    page.add(f"### {outer}{enum.name}", "", *_prose(comments.get(path, "")))
    rows = [
        (value.name, str(value.number), comments.get((*path, _VALUES, index), ""))
        for index, value in enumerate(enum.value)
    ]
    page.add(*table(("value", "number", ""), rows))


def _field_type(found: FieldDescriptorProto, maps: dict[str, DescriptorProto], page: _Page) -> str:
    entry = maps.get(found.type_name.rpartition(".")[2])
    if entry is not None:
        key, value = (_plain_type(part, page) for part in entry.field)
        return f"map of {key} to {value}"
    kind = _plain_type(found, page)
    if found.label == FieldDescriptorProto.LABEL_REPEATED:
        return f"repeated {kind}"
    return f"optional {kind}" if found.proto3_optional else kind


def _plain_type(found: FieldDescriptorProto, page: _Page) -> str:
    return _type_link(found.type_name, page) if found.type_name else _SCALARS[found.type]


def _type_link(type_name: str, page: _Page) -> str:
    """Return a link to a type of ours, or the full name of one of Google's."""
    full = type_name.lstrip(".")
    if not full.startswith(_PACKAGE_ROOT):
        return f"`{full}`"
    service, name = full.split(".")[1], ".".join(full.split(".")[3:])
    target = "" if full.startswith(f"{page.package}.") else f"{service}.md"
    return f"[{name}]({target}#{anchor(name)})"
