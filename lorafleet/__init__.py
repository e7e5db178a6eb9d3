"""Lorafleet: fine-tune many LoRA adapters on one 4-bit base, and serve all of them mixed."""
