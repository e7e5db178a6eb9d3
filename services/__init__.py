"""The services of Lorafleet: registry, trainer, inference and gateway, and what they share."""
