"""`adapter_config.json`: what we honour, what must stay at PEFT's default, and all else refused by name."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from services.common.adapter_format.limits import AdapterLimits
from services.common.adapter_format.patterns import first_match, is_plain_key, is_plain_name
from services.common.adapter_format.strict_json import JsonFault, StrictJsonError, parse_object
from services.common.adapter_format.summary import AdapterKind
from services.common.errors import InvalidArgument, ResourceExhausted

FIELD = "config"

_T = TypeVar("_T")

_CONFIG_DEPTH = 8
_MAX_TARGETS = 1000
_MAX_TEXT_CHARS = 1024

# Read below, each with a check of its own.
_HONOURED = frozenset(
    {
        "peft_type",
        "task_type",
        "r",
        "lora_alpha",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "target_modules",
    }
)
# No effect on a finished adapter; still checked, so that nothing is ignored unseen.
_RECORDED = frozenset(
    {
        "base_model_name_or_path",
        "revision",
        "peft_version",
        "inference_mode",
        "lora_dropout",
        "init_lora_weights",
        "qalora_group_size",
    }
)
# A feature that we do not serve, and the values that mean "not used".
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "bias": ("none",),
    "corda_config": (None, {}),
    "ensure_weight_tying": (False,),
    "eva_config": (None, {}),
    "exclude_modules": (None, []),
    "fan_in_fan_out": (False,),
    "kasa_config": (None,),
    "layer_replication": (None, []),
    "layers_pattern": (None, [], ""),
    "layers_to_transform": (None, []),
    "loftq_config": (None, {}),
    "lora_bias": (False,),
    "lora_ga_config": (None,),
    "modules_to_save": (None, []),
    "monteclora_config": (None,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "use_bdlora": (None, False),
    "use_dora": (False,),
    "use_qalora": (False,),
    "velora_config": (None,),
}
_FEATURE_KINDS = {
    "bias": AdapterKind.LORA_BIAS,
    "lora_bias": AdapterKind.LORA_BIAS,
    "use_dora": AdapterKind.LORA_SCALE,
    "modules_to_save": AdapterKind.HEAD,
}
# These name code or libraries to import; PEFT writes them, so they may stand there, but only like this.
_FIXED: dict[str, tuple[object, ...]] = {
    "auto_mapping": (None,),
    "megatron_config": (None,),
    "megatron_core": (None, "megatron.core"),
}
# Initialisations that leave the base weights as they are. Others (PiSSA, OLoRA, LoftQ, ...) change the base.
_HARMLESS_INITS = (True, False, "gaussian", "orthogonal")


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """The settings of a LoRA adapter that its weights are read by."""

    rank: int
    alpha: float
    use_rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    target_modules: tuple[str, ...]
    declared_base: str

    def rank_of(self, module: str) -> int:
        """The rank of `module`, by the first pattern that fits it."""
        return first_match(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        """alpha / r (LoRA, Hu et al. 2021, section 4.1) or alpha / sqrt(r) (rsLoRA, Kalajdzievski 2023)."""
        alpha = first_match(self.alpha_pattern, module, self.alpha)
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
    _check_keys(config)
    _check_recorded(config)
    return LoraConfig(
        rank=_rank(config.get("r", 8), "r", limits),
        alpha=_alpha(config.get("lora_alpha", 8), "lora_alpha"),
        use_rslora=_boolean(config, "use_rslora"),
        rank_pattern=_pattern(config, "rank_pattern", lambda value, at: _rank(value, at, limits)),
        alpha_pattern=_pattern(config, "alpha_pattern", _alpha),
        target_modules=_targets(config.get("target_modules")),
        declared_base=_text(config, "base_model_name_or_path"),
    )


def _parse(data: bytes, limits: AdapterLimits) -> dict[str, Any]:
    if not data:
        raise InvalidArgument("missing_file", "adapter_config.json is empty.", field=FIELD)
    if len(data) > limits.max_config_bytes:
        raise ResourceExhausted(
            "config_too_large",
            f"adapter_config.json has more than {limits.max_config_bytes} bytes.",
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


def _check_keys(config: dict[str, Any]) -> None:
    for key, value in config.items():
        if key in _HONOURED or key in _RECORDED:
            continue
        if key in _FIXED:
            if not _is_one_of(value, _FIXED[key]):
                raise _unsupported_field(key, value, "it names code to import")
        elif key in _NEUTRAL:
            if not _is_one_of(value, _NEUTRAL[key]):
                raise _unsupported_feature(key, value)
        else:
            raise _unsupported_field(key, value, "it is not a setting of LoRA adapters that we know")
    if config.get("peft_type") != "LORA":
        raise _unsupported_feature("peft_type", config.get("peft_type"))
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise _unsupported_feature("task_type", config["task_type"])


def _check_recorded(config: dict[str, Any]) -> None:
    _text(config, "revision")
    _text(config, "peft_version")
    _boolean(config, "inference_mode")
    dropout = config.get("lora_dropout", 0.0)
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout <= 1:
        raise _bad_value("lora_dropout", dropout, "a number from 0 to 1")
    group_size = config.get("qalora_group_size", 16)
    if type(group_size) is not int or group_size < 1:
        raise _bad_value("qalora_group_size", group_size, "a whole number above 0")
    init = config.get("init_lora_weights", True)
    if not _is_one_of(init, _HARMLESS_INITS):
        raise _unsupported_feature("init_lora_weights", init)


def _rank(value: object, at: str, limits: AdapterLimits) -> int:
    if type(value) is not int or value < 1:
        raise InvalidArgument(
            "bad_rank", f"{at} must be a whole number from 1.", field=f"{FIELD}.{at}", value=value, limit="1"
        )
    if value > limits.max_rank:
        raise InvalidArgument(
            "rank_too_large",
            f"{at} is {_number_text(value)}; the limit is {limits.max_rank}.",
            field=f"{FIELD}.{at}",
            value=value,
            limit=limits.max_rank,
        )
    return value


def _alpha(value: object, at: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not _is_usable(value):
        raise InvalidArgument(
            "bad_alpha", f"{at} must be a finite number above 0.", field=f"{FIELD}.{at}", value=value
        )
    return float(value)


def _is_usable(value: float) -> bool:
    # Compared before float(): a whole number may be larger than any float.
    return 0 < value <= 1e12


def _pattern(config: dict[str, Any], key: str, check: Callable[[object, str], _T]) -> dict[str, _T]:
    value = config.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict) or len(value) > _MAX_TARGETS:
        raise _bad_value(key, value, f"an object of at most {_MAX_TARGETS} names")
    for name in value:
        if not is_plain_key(name):
            raise _unsupported_field(
                key, name, "only dotted module names are matched, not regular expressions"
            )
    return {name: check(item, f"{key}.{name}") for name, item in value.items()}


def _targets(value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        raise _unsupported_field("target_modules", value, "only a list of module names is matched")
    if not isinstance(value, list) or not 1 <= len(value) <= _MAX_TARGETS:
        raise _bad_value("target_modules", value, f"a list of 1 to {_MAX_TARGETS} module names")
    for name in value:
        if not isinstance(name, str) or not is_plain_name(name):
            raise _unsupported_field("target_modules", name, "only dotted module names are matched")
    return tuple(value)


def _text(config: dict[str, Any], key: str) -> str:
    value = config.get(key)
    if value is None:
        return ""
    if not isinstance(value, str) or len(value) > _MAX_TEXT_CHARS:
        raise _bad_value(key, value, f"text of at most {_MAX_TEXT_CHARS} characters")
    return value


def _boolean(config: dict[str, Any], key: str) -> bool:
    value = config.get(key, False)
    if not isinstance(value, bool):
        raise _bad_value(key, value, "true or false")
    return value


def _is_one_of(value: object, allowed: tuple[object, ...]) -> bool:
    # 0 == False, but a number is no boolean.
    return any(isinstance(value, bool) == isinstance(one, bool) and value == one for one in allowed)


def _number_text(value: int) -> str:
    """Return `value` in decimal, or its number of bits where it would fill a line."""
    return str(value) if value.bit_length() <= 128 else f"a number of {value.bit_length()} bits"


def _bad_value(key: str, value: object, wanted: str) -> InvalidArgument:
    return InvalidArgument(
        "bad_config", f"{key} must be {wanted}.", field=f"{FIELD}.{key}", value=_shown(value)
    )


def _unsupported_field(key: str, value: object, why: str) -> InvalidArgument:
    name = key[:80]
    message = f"Setting {name!r} of adapter_config.json is refused: {why}."
    return InvalidArgument("unsupported_field", message, field=f"{FIELD}.{name}", value=_shown(value))


def _unsupported_feature(key: str, value: object) -> InvalidArgument:
    kind = _FEATURE_KINDS.get(key)
    served = f" (an adapter of kind {kind.value})" if kind else ""
    message = f"{key} = {_shown(value)}{served} is not supported."
    return InvalidArgument("unsupported_feature", message, field=f"{FIELD}.{key}", value=_shown(value))


def _shown(value: object) -> str:
    return json.dumps(value)[:120]
