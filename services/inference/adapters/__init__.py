"""Adapters: their weights, the tiers they live in, and how their rows are added to a batch."""
