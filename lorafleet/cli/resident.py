"""`lorafleet ps`."""

from __future__ import annotations

from google.protobuf.json_format import MessageToDict
from rich.table import Table

from lorafleet.cli.connection import connect_rpc
from lorafleet.cli.jobs import local_time
from lorafleet.cli.output import JsonOption, StateOption, print_json, problems, results
from lorafleet.inference.v1 import inference_service_pb2 as calls

_MIB = 1024 * 1024
_TIERS = {
    calls.TIER_LOADING: "loading",
    calls.TIER_DISK: "disk",
    calls.TIER_HOST: "host",
    calls.TIER_DEVICE: "device",
    calls.TIER_FAILED: "failed",
}


def ps(state: StateOption = None, as_json: JsonOption = False) -> None:
    """List the adapters that are loaded or loading, and what the engine does."""
    with problems(as_json=as_json), connect_rpc(state) as client:
        status, resident = client.inference.status(), client.inference.resident()
    if as_json:
        print_json(
            {
                "engine": MessageToDict(status, preserving_proto_field_name=True),
                "adapters": [MessageToDict(one, preserving_proto_field_name=True) for one in resident],
            }
        )
        return
    results.print(
        f"{status.base_model} on {status.device}: {status.running} running, {status.queued} queued, "
        f"{status.waiting_for_adapter} waiting for an adapter; KV {_share(status.kv)}, "
        f"adapters {_share(status.adapters_device)}"
    )
    table = Table("version", "tier", "device", "host", "disk", "leases", "pinned", "last use", box=None)
    for adapter in resident:
        table.add_row(
            adapter.version_ref,
            _TIERS.get(adapter.tier, "") + (f" ({adapter.error_reason})" if adapter.error_reason else ""),
            _size(adapter.device_bytes),
            _size(adapter.host_bytes),
            _size(adapter.disk_bytes),
            str(adapter.leases),
            "yes" if adapter.pinned else "",
            local_time(adapter.last_use_time.seconds) if adapter.HasField("last_use_time") else "",
        )
    results.print(table)


def _share(usage: calls.TierUsage) -> str:
    return f"{usage.used_bytes / _MIB:.0f} of {usage.budget_bytes / _MIB:.0f} MiB"


def _size(size_bytes: int) -> str:
    return f"{size_bytes / _MIB:.1f} MiB" if size_bytes else ""
