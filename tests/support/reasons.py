"""The catalogue of error reasons, read out of the source."""

from __future__ import annotations

import ast
from pathlib import Path

from services.common.errors import Code
from services.common.status import TABLE

ERROR_CLASSES = {row.error_class.__name__: code for code, row in TABLE.items()}


def error_reasons(root: Path) -> dict[str, dict[Code, list[str]]]:
    """Return each reason raised under `root`: its codes, and the places (`file:line`) of each code."""
    found: dict[str, dict[Code, list[str]]] = {}
    for path in sorted(root.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not node.args:
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
            reason = node.args[0]
            if name in ERROR_CLASSES and isinstance(reason, ast.Constant) and isinstance(reason.value, str):
                places = found.setdefault(reason.value, {}).setdefault(ERROR_CLASSES[name], [])
                places.append(f"{path.relative_to(root)}:{node.lineno}")
    return found
