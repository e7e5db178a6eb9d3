"""How much memory a job may use on this machine."""

from __future__ import annotations

from pathlib import Path

import psutil

from services.trainer.config import TrainerSettings

_GROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_GROUP_USE = Path("/sys/fs/cgroup/memory.current")


def job_limit_bytes(settings: TrainerSettings) -> int:
    """Return what is configured; else the GPU's memory, or what is free here beside our own jobs."""
    if settings.memory_limit_bytes:
        return settings.memory_limit_bytes
    if settings.device_type == "cuda":
        import torch

        return int(torch.cuda.get_device_properties(0).total_memory)
    # What our jobs hold now is free again when this one's turn comes.
    own = sum(_resident_bytes(child) for child in psutil.Process().children(recursive=True))
    return min(psutil.virtual_memory().available, _group_room_bytes()) + own


def _group_room_bytes() -> int:
    """Return what the control group of a container leaves; the machine's memory where there is no limit."""
    total = int(psutil.virtual_memory().total)
    if not _GROUP_LIMIT.exists():
        return total
    limit = _GROUP_LIMIT.read_text(encoding="ascii").strip()
    if not limit.isdigit():
        return total
    return max(0, min(total, int(limit)) - int(_GROUP_USE.read_text(encoding="ascii")))


def _resident_bytes(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0
