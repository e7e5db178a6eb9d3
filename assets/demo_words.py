"""The words that the demo tasks are about; what the base is pretrained on by generators leaves them out."""

from __future__ import annotations

from assets.demo_sentences import DEPARTMENTS, DISHES, DRINKS, HEATING_MODES, ROOMS

DEMO_WORDS = frozenset(
    (*DEPARTMENTS, *DISHES, *DRINKS, *ROOMS, *HEATING_MODES, "dish", "size", "blinds", "heating")
)
