"""`adapter_config.json` as an object: the settings that the weights are read by.

`config_keys` says which keys may stand there at all, `targeting` reads which layers they allow.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from services.common.adapter_format.config_keys import check_keys
from services.common.adapter_format.config_values import (
    FIELD,
    bad_value,
    boolean,
    is_one_of,
    shown,
    text,
    unsupported_feature,
    unsupported_field,
)
from services.common.adapter_format.limits import AdapterLimits
from services.common.adapter_format.patterns import PatternTable, is_plain_key
from services.common.adapter_format.strict_json import JsonFault, StrictJsonError, parse_object
from services.common.adapter_format.targeting import HEADS, Targeting, parse_targeting
from services.common.errors import InvalidArgument, ResourceExhausted

_T = TypeVar("_T")

_CONFIG_DEPTH = 8
_MAX_PATTERNS = 1000
_MAX_PATTERN_SHAPES = 64
_MAX_ALPHA = 1e12
# PEFT gives these tasks a fresh head, so an adapter for them is nothing without it.
_HEAD_TASKS = ("SEQ_CLS", "TOKEN_CLS")


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """The settings of a LoRA adapter that its weights are read by.

    Attributes:
        rank, alpha, use_rslora, rank_pattern, alpha_pattern: what `rank_of` and `scale_of` answer from.
        targeting: the layers that may be adapted.
        lora_bias: every B has a bias of its own (`lora_bias`).
        base_bias: the biases of adapted layers were trained too (`bias`).
        use_dora: every adapted layer has a magnitude vector (`use_dora`).
        heads: the output heads that may come along (`modules_to_save`).
        declared_base: `base_model_name_or_path`: text, never followed.
    """

    rank: int
    alpha: float
    use_rslora: bool
    rank_pattern: PatternTable[int]
    alpha_pattern: PatternTable[float]
    targeting: Targeting
    lora_bias: bool
    base_bias: bool
    use_dora: bool
    heads: tuple[str, ...]
    declared_base: str

    def rank_of(self, module: str) -> int:
        """The rank of `module`, by the first pattern that fits it."""
        return self.rank_pattern.value_of(module, self.rank)

    def scale_of(self, module: str) -> float:
        """alpha / r (LoRA, Hu et al. 2021, section 4.1) or alpha / sqrt(r) (rsLoRA, Kalajdzievski 2023)."""
        alpha = self.alpha_pattern.value_of(module, self.alpha)
        rank = self.rank_of(module)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def parse_config(data: bytes, limits: AdapterLimits) -> LoraConfig:
    """Return the settings in the bytes of an `adapter_config.json`.

    Raises:
        ResourceExhausted: `config_too_large`.
        InvalidArgument: `missing_file` (empty), `bad_config`, `duplicate_key`, `unsupported_field`,
            `unsupported_feature`, `bad_rank`, `rank_too_large` or `bad_alpha`; `field` is `config` or a path
            in it.
    """
    config = _parse(data, limits)
    check_keys(config)
    heads = _heads(config.get("modules_to_save"))
    _check_task(config.get("task_type"), heads)
    return LoraConfig(
        rank=_rank(config.get("r", 8), "r", limits),
        alpha=_alpha(config.get("lora_alpha", 8), "lora_alpha"),
        use_rslora=boolean(config, "use_rslora"),
        rank_pattern=_pattern(config, "rank_pattern", lambda value, at: _rank(value, at, limits)),
        alpha_pattern=_pattern(config, "alpha_pattern", _alpha),
        targeting=parse_targeting(config),
        lora_bias=boolean(config, "lora_bias"),
        base_bias=_base_bias(config.get("bias", "none")),
        use_dora=boolean(config, "use_dora"),
        heads=heads,
        declared_base=text(config, "base_model_name_or_path"),
    )


def _parse(data: bytes, limits: AdapterLimits) -> dict[str, Any]:
    if not data:
        raise InvalidArgument("missing_file", "adapter_config.json is empty.", field=FIELD)
    if len(data) > limits.max_config_bytes:
        raise ResourceExhausted(
            "config_too_large",
            f"adapter_config.json has {len(data)} bytes; the limit is {limits.max_config_bytes}.",
            field=FIELD,
            value=len(data),
            limit=limits.max_config_bytes,
            final=True,
        )
    try:
        return parse_object(data, max_depth=_CONFIG_DEPTH)
    except StrictJsonError as error:
        reason = "duplicate_key" if error.fault is JsonFault.DUPLICATE_KEY else "bad_config"
        raise InvalidArgument(reason, f"adapter_config.json: {error}.", field=FIELD) from error


def _heads(value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or any(not isinstance(name, str) or name not in HEADS for name in value):
        raise unsupported_feature("modules_to_save", value)
    return tuple(sorted(set(value)))


def _check_task(value: object, heads: tuple[str, ...]) -> None:
    if value in (None, "CAUSAL_LM"):
        return
    if value not in _HEAD_TASKS or not {"classifier", "score"} & set(heads):
        raise unsupported_feature("task_type", value)


def _base_bias(value: object) -> bool:
    if not is_one_of(value, ("none", "all", "lora_only")):
        raise unsupported_feature("bias", value)
    return value != "none"


def _rank(value: object, at: str, limits: AdapterLimits) -> int:
    wanted = f"a whole number from 1 to {limits.max_rank}"
    if type(value) is not int or value < 1:
        message = f"{at} is {shown(value)}; it must be {wanted}."
        raise InvalidArgument("bad_rank", message, field=f"{FIELD}.{at}", value=value, limit=wanted)
    if value > limits.max_rank:
        raise InvalidArgument(
            "rank_too_large",
            f"{at} is {shown(value)}; the limit is {limits.max_rank}.",
            field=f"{FIELD}.{at}",
            value=value,
            limit=limits.max_rank,
        )
    return value


def _alpha(value: object, at: str) -> float:
    # Compared before float(): a whole number may be larger than any float.
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= _MAX_ALPHA:
        wanted = f"a number above 0 and at most {_MAX_ALPHA:.0e}"
        message = f"{at} is {shown(value)}; it must be {wanted}."
        raise InvalidArgument("bad_alpha", message, field=f"{FIELD}.{at}", value=value, limit=wanted)
    return float(value)


def _pattern(config: dict[str, Any], key: str, check: Callable[[object, str], _T]) -> PatternTable[_T]:
    value = config.get(key)
    if value is None:
        return PatternTable({})
    if not isinstance(value, dict) or len(value) > _MAX_PATTERNS:
        raise bad_value(key, value, f"an object of at most {_MAX_PATTERNS} names")
    for name in value:
        if not is_plain_key(name):
            raise unsupported_field(
                key, name, "only dotted module names are matched, not regular expressions"
            )
    table = PatternTable({name: check(item, f"{key}.{name}") for name, item in value.items()})
    if table.num_shapes > _MAX_PATTERN_SHAPES:
        wanted = f"names with at most {_MAX_PATTERN_SHAPES} different lengths and places of their dots"
        raise bad_value(key, f"{table.num_shapes} of them", wanted)
    return table
