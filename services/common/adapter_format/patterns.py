"""Module names as PEFT matches them, without regular expressions from strangers.

PEFT looks up `rank_pattern` and `alpha_pattern` by `re.match(rf"(.*\\.)?({key})$", module)`. Here a key is a
dotted name, optionally led by `^` (whole name), for which that expression has a linear meaning: the key
stands at the end of the module's name, after a dot or at its start, and a dot in the key stands for any one
character.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TypeVar

_KEY = re.compile(r"\^?[A-Za-z0-9_]+(?:\.[A-Za-z0-9_]+)*")
MAX_KEY_CHARS = 256

_T = TypeVar("_T")


def is_plain_key(key: str) -> bool:
    """Whether `key` is a dotted name that this module can match."""
    return len(key) <= MAX_KEY_CHARS and _KEY.fullmatch(key) is not None


def is_plain_name(name: str) -> bool:
    """Whether `name` is a dotted module name or the end of one."""
    return is_plain_key(name) and not name.startswith("^")


def matches_key(key: str, module: str) -> bool:
    """Whether PEFT would apply the pattern `key` to `module`."""
    if key.startswith("^"):
        return _same_but_dots(key[1:], module)
    start = len(module) - len(key)
    if start < 0 or (start > 0 and module[start - 1] != "."):
        return False
    return _same_but_dots(key, module[start:])


def first_match(patterns: Mapping[str, _T], module: str, default: _T) -> _T:
    """Return the value of the first pattern, in the order of the config, that fits `module`."""
    for key, value in patterns.items():
        if matches_key(key, module):
            return value
    return default


def is_target(target_modules: Sequence[str], module: str) -> bool:
    """Whether `module` is named by `target_modules`, in full or by its end."""
    return any(module == target or module.endswith("." + target) for target in target_modules)


def _same_but_dots(key: str, text: str) -> bool:
    if len(key) != len(text):
        return False
    return all(wanted in (".", got) for wanted, got in zip(key, text, strict=True))
