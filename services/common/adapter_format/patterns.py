"""Module names as PEFT matches them, without regular expressions from strangers.

PEFT looks up `rank_pattern` and `alpha_pattern` by `re.match(rf"(.*\\.)?({key})$", module)`. Here a key is a
dotted name, optionally led by `^` (whole name), for which that expression has a linear meaning: the key
stands at the end of the module's name, after a dot or at its start, and a dot in the key stands for any one
character.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Set
from typing import Generic, TypeVar

_KEY = re.compile(r"\^?[A-Za-z0-9_]+(?:\.[A-Za-z0-9_]+)*")
MAX_KEY_CHARS = 256

_T = TypeVar("_T")


def is_plain_key(key: str) -> bool:
    """Whether `key` is a dotted name that this module can match."""
    return len(key) <= MAX_KEY_CHARS and _KEY.fullmatch(key) is not None


def is_plain_name(name: str) -> bool:
    """Whether `name` is a dotted module name or the end of one."""
    return is_plain_key(name) and not name.startswith("^")


def is_target(target_modules: Set[str], module: str) -> bool:
    """Whether `module` is named by `target_modules`, in full or by its end."""
    # One look-up for each end, so that a long list of targets costs no more than a short one.
    return any(end in target_modules for end in _ends(module))


class PatternTable(Generic[_T]):
    """Values by pattern. The time of a look-up grows with `num_shapes`, not with the number of patterns.

    A key and the end of a name are compared as whole numbers of their bytes, with the bytes at the key's
    dots masked out. Keys of one length with their dots in the same places share a mask: a shape.
    """

    def __init__(self, values: Mapping[str, _T]) -> None:
        self._shapes: dict[tuple[bool, int], dict[int, dict[int, tuple[int, _T]]]] = defaultdict(dict)
        for order, (key, value) in enumerate(values.items()):
            whole, name = key.startswith("^"), key.removeprefix("^")
            mask = int.from_bytes(bytes(0 if char == "." else 0xFF for char in name))
            shape = self._shapes[whole, len(name)].setdefault(mask, {})
            shape.setdefault(_number(name) & mask, (order, value))

    @property
    def num_shapes(self) -> int:
        """The number of different masks."""
        return sum(len(shapes) for shapes in self._shapes.values())

    def value_of(self, module: str, default: _T) -> _T:
        """Return the value of the first pattern, in the order of the config, that fits `module`."""
        found: list[tuple[int, _T]] = []
        self._find(True, module, found)
        for end in _ends(module):
            self._find(False, end, found)
        return min(found, key=lambda entry: entry[0])[1] if found else default

    def _find(self, whole: bool, name: str, found: list[tuple[int, _T]]) -> None:
        shapes = self._shapes.get((whole, len(name)))
        if shapes:
            number = _number(name)
            found.extend(shape[number & mask] for mask, shape in shapes.items() if number & mask in shape)


def _ends(module: str) -> Iterator[str]:
    yield module
    at = module.find(".")
    while at >= 0:
        yield module[at + 1 :]
        at = module.find(".", at + 1)


def _number(name: str) -> int:
    return int.from_bytes(name.encode("ascii"))
