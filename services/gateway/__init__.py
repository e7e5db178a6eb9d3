"""The HTTP door: OpenAI's API in front of the registry, the trainer and the inference service."""
