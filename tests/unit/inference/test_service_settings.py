"""The settings of the inference process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from services.common.config import EXIT_BAD_CONFIGURATION, load
from services.common.fingerprint import ComputeDtype, QuantizationType
from services.inference.settings import InferenceSettings

PREFIX = "LORAFLEET_INFERENCE_"


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    values = {"BASE_NAME": "tiny", "BASE_PATH": str(tmp_path), "ADAPTER_CACHE_PATH": str(tmp_path / "cache")}
    for name, value in values.items():
        monkeypatch.setenv(PREFIX + name, value)
    return monkeypatch


def test_engine_and_server_settings_come_from_one_place(
    variables: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    variables.setenv(PREFIX + "COMPUTE_DTYPE", "bfloat16")
    variables.setenv(PREFIX + "GRACE_SECONDS", "3")
    settings = load(InferenceSettings)
    assert (settings.listen, settings.registry_target) == ("127.0.0.1:7103", "127.0.0.1:7101")
    assert (settings.base_name, settings.base_path, settings.grace_seconds) == ("tiny", tmp_path, 3.0)
    quantization = settings.base_quantization
    assert (quantization.type, quantization.block_size) == (QuantizationType.NF4, 64)
    assert quantization.compute_dtype is ComputeDtype.BFLOAT16


def test_every_bad_variable_is_named(
    variables: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = {"BASE_NAME": "../x", "KV_BITES": "1", "REGISTRY_TARGET": "nowhere", "FETCH_TIMEOUT_SECONDS": "nan"}
    for name, value in bad.items():
        variables.setenv(PREFIX + name, value)
    with pytest.raises(SystemExit) as caught:
        load(InferenceSettings)
    assert caught.value.code == EXIT_BAD_CONFIGURATION
    said = capsys.readouterr().err
    assert all(PREFIX + name in said for name in bad), said


def test_bad_settings_are_refused_before_torch_is_imported(
    variables: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The import takes seconds; a start that is refused should take none of them."""
    variables.setenv(PREFIX + "KV_BYTES", "many")
    # What stands in its place would end the process with another status and message.
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    path = os.pathsep.join([str(tmp_path), str(Path.cwd())])
    refused = subprocess.run(
        [sys.executable, "-m", "services.inference"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert refused.returncode == EXIT_BAD_CONFIGURATION, refused.stderr
    assert PREFIX + "KV_BYTES" in refused.stderr
    assert "torch was imported" not in refused.stderr


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_settings_are_read_without_torch(variables: pytest.MonkeyPatch, tmp_path: Path, kernels: str) -> None:
    variables.setenv(PREFIX + "KERNELS", kernels)
    code = (
        "import sys; from services.common.config import load; "
        "from services.inference.settings import InferenceSettings; load(InferenceSettings); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], timeout=60, check=True)
