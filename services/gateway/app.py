"""The HTTP application: routers, the layers around them, and what they share."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware
from starlette.exceptions import HTTPException

from services.common.errors import LorafleetError
from services.common.store import ObjectStore
from services.gateway import (
    adapter_files,
    adapters,
    chat,
    compare,
    completions,
    embeddings,
    errors,
    files,
    fine_tuning,
    health,
    key_routes,
    models,
    upload_routes,
    usage_routes,
)
from services.gateway.config import GatewaySettings
from services.gateway.document import document
from services.gateway.errors import ClientGoneError
from services.gateway.keys import KeyRing
from services.gateway.limits import limiter
from services.gateway.lorax import routes as lorax
from services.gateway.metering import Meter
from services.gateway.request_boundary import RequestBoundary
from services.gateway.rpc_door import rpc_door
from services.gateway.served_base import ServedBase
from services.gateway.state import Gateway
from services.gateway.upload_parts import UploadParts
from services.gateway.uploads import UploadSpace
from services.gateway.upstream import Upstream
from services.gateway.usage import UsageBook

ROUTERS = (
    health.router,
    models.router,
    completions.router,
    chat.router,
    embeddings.router,
    lorax.router,
    files.router,
    upload_routes.router,
    fine_tuning.router,
    adapters.router,
    adapter_files.router,
    compare.router,
    key_routes.router,
    usage_routes.router,
    document.router,
)


def create_app(settings: GatewaySettings, store: ObjectStore) -> FastAPI:
    """Return the application; its channels open when it starts and close when it stops.

    Args:
        settings: where the services are, and the limits.
        store: holds the API keys.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        upstream = Upstream(settings)
        keys = KeyRing(store, settings.key_pepper.get_secret_value(), settings.key_cache_seconds)
        usage, parts = UsageBook(store), UploadParts(store)
        async with limiter(settings) as limits, usage.kept(), parts.swept():
            meter = Meter(limits, usage)
            app.state.gateway = Gateway(
                settings=settings,
                upstream=upstream,
                keys=keys,
                served_base=ServedBase(upstream.inference),
                uploads=UploadSpace(settings.max_file_bytes, settings.max_concurrent_uploads),
                upload_parts=parts,
                meter=meter,
                usage=usage,
            )
            async with rpc_door(settings, keys, upstream, meter) as door:
                app.state.grpc_address = door.bound if door is not None else None
                yield
        await upstream.close()

    # FastAPI's own document knows neither bodies nor answers, and its pages load scripts from elsewhere.
    app = FastAPI(lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    for router in ROUTERS:
        app.include_router(router)
    app.add_exception_handler(LorafleetError, errors.on_lorafleet_error)
    app.add_exception_handler(grpc.RpcError, errors.on_rpc_error)
    app.add_exception_handler(HTTPException, errors.on_http_exception)
    app.add_exception_handler(RequestValidationError, errors.on_bad_parameters)
    app.add_exception_handler(ClientGoneError, errors.on_client_gone)
    app.add_middleware(RequestBoundary)
    # Outside of ours, so that the access log knows the trace. Spans per chunk would drown it.
    app.add_middleware(OpenTelemetryMiddleware, exclude_spans=["receive", "send"])
    return app
