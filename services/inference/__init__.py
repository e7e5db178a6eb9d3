"""The inference service: one shared base model, a continuous-batching engine, adapters paged in from the
registry.
"""
