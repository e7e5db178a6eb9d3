"""Writes an adapter as the folder that plain PEFT loads: the two files as they were published, and a card."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from services.common.adapter_format.reader import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE
from services.common.adapter_format.summary import AdapterSummary


@dataclass(frozen=True, slots=True)
class AdapterCard:
    """What a reader of the exported folder should know: text and figures, all given by the publisher."""

    name: str
    version: int
    digest: str
    base_model: str
    base_digest: str
    description: str
    summary: AdapterSummary

    def to_markdown(self) -> str:
        """Return the text of README.md: front matter that model hubs read, then the facts."""
        # A JSON string is a YAML string, so no value can break out of its line.
        lines = [
            "---",
            f"base_model: {json.dumps(self.base_model)}",
            "library_name: peft",
            'tags: ["lora"]',
            "---",
            f"# {self.name}, version {self.version}",
            "",
            self.description or "No description was given.",
            "",
            "| fact | value |",
            "| --- | --- |",
            f"| adapter digest | `{self.digest}` |",
            f"| base fingerprint | `{self.base_digest}` |",
            f"| weights | `{self.summary.weights_digest}` |",
            f"| size | {self.summary.weights_bytes} bytes, {self.summary.dtype} |",
            f"| rank (largest) | {self.summary.max_rank} |",
            f"| layers | {len(self.summary.modules)} ({', '.join(self.summary.targets)}) |",
            f"| parameters | {self.summary.num_parameters} |",
            "",
        ]
        return "\n".join(lines)


def export_folder(config: Path, weights: Path, out: Path, card: AdapterCard) -> None:
    """Write `out` (new or empty) with the adapter's two files, byte for byte, and its card.

    Raises:
        FileExistsError: `out` holds something already.
    """
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty")
    shutil.copyfile(config, out / CONFIG_FILE)
    shutil.copyfile(weights, out / WEIGHTS_FILE)
    (out / CARD_FILE).write_text(card.to_markdown(), encoding="utf-8")
