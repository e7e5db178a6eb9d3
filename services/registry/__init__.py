"""The registry: bases, immutable adapter versions, aliases and files; the object store is its truth."""
