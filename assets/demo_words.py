"""The words that the demo tasks are about; what the base is pretrained on by generators leaves them out."""

from __future__ import annotations

from assets.demo_sentences import DEPARTMENTS, DISHES, DRINKS, HEATING_MODES, ROOMS
from assets.demo_writing import CITIES, OFFICE_THINGS, SUM_THINGS

DEMO_WORDS = frozenset(
    (
        *DEPARTMENTS,
        *DISHES,
        *DRINKS,
        *ROOMS,
        *HEATING_MODES,
        *SUM_THINGS,
        *OFFICE_THINGS,
        *(city.lower() for city in CITIES),
        "dish",
        "size",
        "blinds",
        "heating",
    )
)
