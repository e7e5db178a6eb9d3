"""The engine: a plain object that is stepped, without grpc, protobuf or asyncio."""
