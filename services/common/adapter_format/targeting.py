"""Which layers a config lets an adapter change: targets, exclusions and layer numbers, as PEFT reads them.

The tensors say which layers an adapter does change; the config must allow each of them, since PEFT would not
load the others. `target_modules` and `exclude_modules` are lists of dotted names, or `"all-linear"` for the
targets. A regular expression in their place is refused by name: it is never compiled, so no pattern of a
stranger can run here, and dropping it unread would serve layers that PEFT does not. `layers_to_transform`
and `layers_pattern` are honoured by reading layer numbers out of the dotted names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from services.common.adapter_format.config_values import bad_value, unsupported_field
from services.common.adapter_format.patterns import is_plain_name, is_target

ALL_LINEAR = "all-linear"
HEADS = ("classifier", "lm_head", "score")

_MAX_NAMES = 1000
_MAX_LAYER = 100_000


@dataclass(frozen=True, slots=True)
class Targeting:
    """The layers that may be adapted.

    Attributes:
        targets: names, in full or by their end; None for every linear layer but the output head.
        excluded: names, in full or by their end, that are never adapted.
        layers: the layer numbers that `targets` apply to; None for all.
        layer_lists: names of the lists that hold the layers (`layers`, `h`); empty for any.
    """

    targets: frozenset[str] | None
    excluded: frozenset[str] = frozenset()
    layers: frozenset[int] | None = None
    layer_lists: tuple[str, ...] = ()

    def includes(self, module: str) -> bool:
        """Whether PEFT would adapt the linear layer `module` of the base."""
        if is_target(self.excluded, module):
            return False
        if self.targets is None:
            return module.rpartition(".")[2] not in HEADS
        if module in self.targets or self.layers is None:
            return is_target(self.targets, module)
        return is_target(self.targets, module) and self._layer_of(module) in self.layers

    def includes_embedding(self, module: str) -> bool:
        """Whether PEFT would adapt the embedding `module` of the base, which "all-linear" does not name."""
        return self.targets is not None and self.includes(module)

    def _layer_of(self, module: str) -> int | None:
        parts = module.split(".")
        lists: tuple[str | None, ...] = self.layer_lists or (None,)
        for wanted in lists:
            # Without a name of the list, PEFT wants one more part before it (`model.layers.3.`).
            first = 2 if wanted is None else 1
            for at in range(first, len(parts) - 1):
                if parts[at].isdecimal() and wanted in (None, parts[at - 1]):
                    return int(parts[at]) if len(parts[at]) < 10 else None
        return None


def parse_targeting(config: dict[str, Any]) -> Targeting:
    """Return what `config` says about layers.

    Raises:
        InvalidArgument: `bad_config`, or `unsupported_field` for regular expressions.
    """
    targets = config.get("target_modules")
    layers = _layers(config.get("layers_to_transform"))
    layer_lists = _layer_lists(config.get("layers_pattern"))
    if layers is None and layer_lists:
        raise bad_value("layers_pattern", config["layers_pattern"], "absent without layers_to_transform")
    if targets == ALL_LINEAR:
        if layers is not None:
            raise bad_value("layers_to_transform", config["layers_to_transform"], f"absent with {ALL_LINEAR}")
        return Targeting(None, _excluded(config.get("exclude_modules")))
    return Targeting(
        _names("target_modules", targets), _excluded(config.get("exclude_modules")), layers, layer_lists
    )


def _excluded(value: object) -> frozenset[str]:
    return frozenset() if value in (None, [], "") else _names("exclude_modules", value)


def _names(key: str, value: object) -> frozenset[str]:
    if isinstance(value, str):
        raise unsupported_field(key, value, "only lists of module names are matched, not regular expressions")
    if not isinstance(value, list) or not 1 <= len(value) <= _MAX_NAMES:
        raise bad_value(key, value, f"a list of 1 to {_MAX_NAMES} module names")
    for name in value:
        if not isinstance(name, str) or not is_plain_name(name):
            raise unsupported_field(key, name, "only dotted module names are matched")
    return frozenset(value)


def _layers(value: object) -> frozenset[int] | None:
    if value is None or value == []:
        return None
    numbers = value if isinstance(value, list) else [value]
    if len(numbers) > _MAX_NAMES or not all(type(n) is int and 0 <= n <= _MAX_LAYER for n in numbers):
        raise bad_value("layers_to_transform", value, f"at most {_MAX_NAMES} numbers from 0 to {_MAX_LAYER}")
    return frozenset(numbers)


def _layer_lists(value: object) -> tuple[str, ...]:
    if value in (None, [], ""):
        return ()
    names = value if isinstance(value, list) else [value]
    for name in names:
        if not isinstance(name, str) or not is_plain_name(name) or "." in name:
            raise unsupported_field("layers_pattern", name, "only plain names are matched")
    if len(names) > _MAX_NAMES:
        raise bad_value("layers_pattern", len(names), f"a list of at most {_MAX_NAMES} names")
    return tuple(names)
