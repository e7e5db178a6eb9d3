"""The gRPC face of the registry: each method checks, calls, translates, returns."""

from services.registry.servicers.adapter_servicer import AdapterServicer
from services.registry.servicers.base_model_servicer import BaseModelServicer
from services.registry.servicers.file_servicer import FileServicer

__all__ = ["AdapterServicer", "BaseModelServicer", "FileServicer"]
