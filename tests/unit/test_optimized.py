"""Row 145: under `python -O` the suite still checks what it says, and nothing is protected by an assert."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.support.asserting import assert_false

SERVICES = Path(__file__).parents[2] / "services"

# What a caller sends is decided on here. These files hold no assert at all, so none can vanish.
GUARDS = (
    "common/call_context.py",
    "common/channels.py",
    "common/config.py",
    "common/names.py",
    "common/server.py",
    "common/tls.py",
    "common/rpc/*.py",
    "common/store/*.py",
    "common/adapter_format/safetensors_header.py",
    "common/adapter_format/strict_json.py",
    "gateway/auth*.py",
    "gateway/keys.py",
    "gateway/multipart.py",
    "gateway/json_body.py",
    "inference/validation.py",
    "inference/admission.py",
    "registry/servicers/*.py",
    "registry/paging.py",
    "registry/blobs.py",
    "trainer/requests.py",
)


def test_row_145_a_false_assert_fails_in_a_test_and_in_a_helper() -> None:
    with pytest.raises(AssertionError):
        assert not GUARDS
    with pytest.raises(AssertionError):
        assert_false()


@pytest.mark.parametrize("pattern", GUARDS)
def test_row_145_no_guard_is_an_assert(pattern: str) -> None:
    files = sorted(SERVICES.glob(pattern))
    assert files, f"{pattern} names no file any more"
    found = [
        f"{path.relative_to(SERVICES)}:{node.lineno}"
        for path in files
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Assert)
    ]
    assert found == []


def test_row_145_no_assert_reads_what_a_caller_sent() -> None:
    words = {"request", "context", "metadata", "header", "headers", "body", "tenant", "token", "key"}
    found = []
    for path in sorted(SERVICES.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Assert) and not _narrows_a_type(node.test):
                names = {n.id for n in ast.walk(node.test) if isinstance(n, ast.Name)}
                if names & words:
                    found.append(f"{path.relative_to(SERVICES)}:{node.lineno}")
    # The driver's own table of its own request ids.
    assert [place for place in found if not place.startswith("inference/driver.py")] == []


def _narrows_a_type(test: ast.expr) -> bool:
    """Whether it only tells the type checker what is known: `isinstance(...)` or `... is not None`."""
    if isinstance(test, ast.Call) and isinstance(test.func, ast.Name):
        return test.func.id == "isinstance"
    return isinstance(test, ast.Compare) and isinstance(test.ops[0], ast.Is | ast.IsNot)
