"""The base model and its seams: loading, attention over paged KV, linear layers with adapters."""
