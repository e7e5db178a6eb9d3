"""Scripts that make what the repository bundles: the base model and the demo data."""
