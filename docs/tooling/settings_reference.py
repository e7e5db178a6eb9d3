"""The settings reference: every environment variable of every service, from the settings classes."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from enum import Enum
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from docs.tooling.markdown import table
from services.common.config import Settings
from services.gateway.config import GatewaySettings
from services.inference.settings import InferenceSettings
from services.registry.config import RegistrySettings
from services.trainer.config import TrainerSettings

_CLASSES: dict[str, type[Any]] = {
    "registry": RegistrySettings,
    "trainer": TrainerSettings,
    "inference": InferenceSettings,
    "gateway": GatewaySettings,
}
_ATTRIBUTE = re.compile(r"^    (\w+): (.+(?:\n {8}.+)*)", re.MULTILINE)


def settings_page() -> str:
    """Return the Markdown of the page."""
    return "\n".join(["# Settings", "", *_introduction(), *_sections()])


def _introduction() -> Iterator[str]:
    yield "Services read environment variables, once, when they start, and nothing else. A variable that"
    yield "begins with a service's prefix and sets nothing is refused, and so is a value out of range: the"
    yield "service names every bad variable, never its value, and ends with exit code 2."
    yield ""


def _sections() -> Iterator[str]:
    for service, settings in _CLASSES.items():
        said = _descriptions(settings)
        prefix = settings.model_config["env_prefix"]
        yield from (f"## {service}", "")
        yield from table(
            ("variable", "default", ""),
            [
                (
                    str(field.validation_alias or f"{prefix}{name}".upper()),
                    _default(field),
                    said.get(name, ""),
                )
                for name, field in settings.model_fields.items()
            ],
        )


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "**required**"
    value = field.get_default(call_default_factory=True, validated_data={})
    assert value is not PydanticUndefined
    if value is None or value in ("", ()):
        return ""
    return f"`{value.value if isinstance(value, Enum) else value}`"


def _descriptions(settings: type[Settings]) -> dict[str, str]:
    """Return what is said of each field: below it, or under `Attributes:` in its class's docstring."""
    said: dict[str, str] = {}
    for declared in reversed(settings.__mro__):
        if not declared.__module__.startswith("services."):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(declared))).body[0]
        assert isinstance(body, ast.ClassDef)
        documented = (ast.get_docstring(body) or "").partition("Attributes:\n")[2]
        said |= {name: " ".join(text.split()) for name, text in _ATTRIBUTE.findall(documented)}
        for field, after in zip(body.body, body.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                said |= _said_below(field.target.id, after)
    return said


def _said_below(name: str, after: ast.stmt) -> dict[str, str]:
    if not isinstance(after, ast.Expr) or not isinstance(after.value, ast.Constant):
        return {}
    return {name: " ".join(str(after.value.value).split())}
