"""Lint the contract and write its Python stubs; with `--check`, compare them with what is checked in.

The stubs land under `lorafleet/`, where the proto packages (`lorafleet.registry.v1` ...) and the Python
packages agree, so their imports need no rewriting.
"""

import argparse
import filecmp
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from google.rpc import status_pb2

PROTOS = Path(__file__).parent
TOOLS = Path(sys.executable).parent
STUBS = PROTOS.parent / "lorafleet"
LINT = {
    "version": "v2",
    "lint": {
        "use": ["STANDARD"],
        # Calls return the resource itself, as AIP-131 to AIP-136 ask; see docs/adr/0002.
        "except": ["RPC_RESPONSE_STANDARD_NAME", "RPC_REQUEST_RESPONSE_UNIQUE"],
        "ignore": ["google"],
        "disallow_comment_ignores": True,
    },
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    check = parser.parse_args().check
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch)
        lint(out / "image.binpb")
        generate(out / "stubs")
        return compare(out / "stubs" / "lorafleet") if check else install(out / "stubs" / "lorafleet")


def sources() -> list[str]:
    return sorted(str(path.relative_to(PROTOS)) for path in PROTOS.rglob("*.proto"))


def protoc(*arguments: str) -> None:
    include = [f"-I{PROTOS}", f"-I{Path(status_pb2.__file__).parents[2]}"]
    subprocess.run([sys.executable, "-m", "grpc_tools.protoc", *include, *arguments, *sources()], check=True)


def lint(image: Path) -> None:
    """buf reads the compiled image, because the imported google/rpc protos come from an installed package."""
    protoc("--include_source_info", "--include_imports", f"-o{image}")
    subprocess.run([str(TOOLS / "buf"), "lint", str(image), "--config", json.dumps(LINT)], check=True)


def generate(out: Path) -> None:
    out.mkdir()
    plugins = [f"--plugin={name}={TOOLS / name}" for name in ("protoc-gen-mypy", "protoc-gen-mypy_grpc")]
    outputs = [f"--{kind}_out={out}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")]
    protoc(*plugins, *outputs)


def stub_files(root: Path) -> set[Path]:
    return {path.relative_to(root) for path in root.rglob("*_pb2*.py*") if "__pycache__" not in path.parts}


def compare(fresh: Path) -> int:
    names = stub_files(fresh) | stub_files(STUBS)
    _, differ, missing = filecmp.cmpfiles(fresh, STUBS, [str(name) for name in names], shallow=False)
    for name in sorted(differ + missing):
        print(f"stub is not what the protos say: lorafleet/{name} (run `make proto`)", file=sys.stderr)
    return 1 if differ or missing else 0


def install(fresh: Path) -> int:
    for stale in stub_files(STUBS) - stub_files(fresh):
        (STUBS / stale).unlink()
    for name in stub_files(fresh):
        target = STUBS / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((fresh / name).read_bytes())
        (target.parent / "__init__.py").touch()
        (target.parent.parent / "__init__.py").touch()
    return 0


if __name__ == "__main__":
    sys.exit(main())
