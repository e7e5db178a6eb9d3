"""The embedded fleet: Valkey and the four services as supervised processes on this machine."""
