"""Choosing the inference replica that answers a request."""
