"""The server side of every call: one interceptor and its layers, one concern per file.

From the outside in: request id, trace, metrics, access log, errors, deadline, drain, caller, then the method.
"""

from __future__ import annotations

from services.common.rpc.access_log import access_log_layer
from services.common.rpc.call import Layer
from services.common.rpc.deadline import deadline_layer
from services.common.rpc.drain import DrainLayer
from services.common.rpc.errors import errors_layer
from services.common.rpc.interceptor import CallInterceptor
from services.common.rpc.metering import metering_layer
from services.common.rpc.request_id import request_id_layer
from services.common.rpc.tenant import tenant_layer
from services.common.rpc.tracing import tracing_layer

__all__ = ["CallInterceptor", "DrainLayer", "standard_layers"]


def standard_layers(
    *,
    unary_timeout_seconds: float,
    stream_timeout_seconds: float,
    drain: DrainLayer,
    caller: Layer = tenant_layer,
) -> tuple[Layer, ...]:
    """Return the layers that every server of ours puts around every call, outermost first.

    `caller` finds out for whom a call is: behind the gateway by the tenant in its metadata.
    """
    return (
        request_id_layer,
        tracing_layer,
        metering_layer,
        access_log_layer,
        errors_layer,
        deadline_layer(unary_seconds=unary_timeout_seconds, stream_seconds=stream_timeout_seconds),
        drain.layer,
        caller,
    )
