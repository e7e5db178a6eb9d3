"""Experiments: many fine-tunes from one manifest, to one table."""
