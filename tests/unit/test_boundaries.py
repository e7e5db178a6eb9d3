"""The structure that ARCHITECTURE.md promises: who may import whom, and that what it names exists."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SERVICES = ("registry", "trainer", "inference", "gateway")
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)")


def imports(path: Path) -> set[str]:
    """Dotted names of everything the file imports, at any depth of nesting."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} uses a relative import"
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def python_files(folder: str) -> list[Path]:
    return [path for path in (ROOT / folder).rglob("*.py") if "_pb2" not in path.name]


def starts_with(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


@pytest.mark.parametrize("service", SERVICES)
def test_services_never_import_each_other(service: str) -> None:
    others = [f"services.{other}" for other in SERVICES if other != service]
    files = python_files(f"services/{service}")
    assert files
    for path in files:
        foreign = [name for name in imports(path) if starts_with(name, *others)]
        assert not foreign, f"{path.relative_to(ROOT)} imports {foreign}"


def test_common_imports_no_service() -> None:
    for path in python_files("services/common"):
        foreign = [name for name in imports(path) if starts_with(name, *(f"services.{s}" for s in SERVICES))]
        assert not foreign, f"{path.relative_to(ROOT)} imports {foreign}"


def test_engine_knows_neither_grpc_nor_asyncio() -> None:
    for path in python_files("services/inference/engine"):
        foreign = [
            name for name in imports(path) if starts_with(name, "grpc", "google", "asyncio", "lorafleet")
        ]
        assert not foreign, f"{path.relative_to(ROOT)} imports {foreign}"


@pytest.mark.parametrize("folder", ["services/registry", "services/gateway", "lorafleet"])
def test_light_installs_need_no_torch(folder: str) -> None:
    heavy = ("torch", "transformers", "peft", "bitsandbytes", "safetensors")
    for path in python_files(folder):
        foreign = [name for name in imports(path) if starts_with(name, *heavy)]
        assert not foreign, f"{path.relative_to(ROOT)} imports {foreign}"


def test_nothing_unpickles() -> None:
    for path in [*python_files("services"), *python_files("lorafleet")]:
        names = imports(path)
        assert not any(starts_with(name, "pickle", "shelve", "marshal", "dill") for name in names), path
        assert "torch.load(" not in path.read_text("utf-8"), path


@pytest.mark.parametrize("document", ["README.md", "ARCHITECTURE.md", "docs/adr/README.md"])
def test_links_lead_somewhere(document: str) -> None:
    path = ROOT / document
    links = [link for link in LINK.findall(path.read_text("utf-8")) if "://" not in link]
    assert links or document == "ARCHITECTURE.md"
    for link in links:
        assert (path.parent / link).exists(), f"{document} links to {link}"


def test_architecture_names_what_exists() -> None:
    table = (ROOT / "ARCHITECTURE.md").read_text("utf-8").split("## Where things are")[1].split("##")[0]
    paths = re.findall(r"^\| `([a-z/]+)`", table, re.MULTILINE)
    assert len(paths) > 8
    for path in paths:
        assert (ROOT / path).is_dir(), f"ARCHITECTURE.md names {path}"
