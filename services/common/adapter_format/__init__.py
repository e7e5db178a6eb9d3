"""The adapter format: PEFT LoRA folders, checked without torch and without PEFT; kinds in `AdapterKind`."""

from services.common.adapter_format.config import LoraConfig, parse_config
from services.common.adapter_format.export import AdapterCard, export_folder
from services.common.adapter_format.identity import version_digest
from services.common.adapter_format.limits import DEFAULT_LIMITS, AdapterLimits
from services.common.adapter_format.reader import (
    CARD_FILE,
    CONFIG_FILE,
    WEIGHTS_FILE,
    ModuleTable,
    check_file_names,
    read_adapter,
    read_folder,
)
from services.common.adapter_format.safetensors_header import SafetensorsHeader, TensorInfo, read_header
from services.common.adapter_format.summary import (
    AdapterKind,
    AdapterSummary,
    LoraModule,
    OutputHead,
)

__all__ = [
    "CARD_FILE",
    "CONFIG_FILE",
    "DEFAULT_LIMITS",
    "WEIGHTS_FILE",
    "AdapterCard",
    "AdapterKind",
    "AdapterLimits",
    "AdapterSummary",
    "LoraConfig",
    "LoraModule",
    "ModuleTable",
    "OutputHead",
    "SafetensorsHeader",
    "TensorInfo",
    "check_file_names",
    "export_folder",
    "parse_config",
    "read_adapter",
    "read_folder",
    "read_header",
    "version_digest",
]
