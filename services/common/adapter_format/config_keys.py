"""The keys of `adapter_config.json`: which are read, which must stay at PEFT's default, which are mere text.

Every key that is in none of the tables is refused. `auto_mapping` names a class and a module that PEFT would
import; here both are text, never imported, and only names inside `transformers.models` are accepted.
"""

from __future__ import annotations

import re
from typing import Any

from services.common.adapter_format.config_values import (
    bad_value,
    boolean,
    is_one_of,
    text,
    unsupported_feature,
    unsupported_field,
)

# Each is read, with a check of its own, by `config` or `targeting`.
_HONOURED = frozenset(
    {
        "alpha_pattern",
        "bias",
        "exclude_modules",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "lora_bias",
        "modules_to_save",
        "peft_type",
        "r",
        "rank_pattern",
        "target_modules",
        "task_type",
        "use_dora",
        "use_rslora",
    }
)
# No effect on a finished adapter; still checked, so that nothing is ignored unseen.
_RECORDED = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "revision",
        "peft_version",
        "inference_mode",
        "lora_dropout",
        "init_lora_weights",
        "qalora_group_size",
    }
)
# A feature that the format does not have, and the values that mean "not used".
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "corda_config": (None, {}),
    "ensure_weight_tying": (False,),
    "eva_config": (None, {}),
    "fan_in_fan_out": (False,),
    "kasa_config": (None,),
    "layer_replication": (None, []),
    "loftq_config": (None, {}),
    "lora_ga_config": (None,),
    "monteclora_config": (None,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "use_bdlora": (None, False),
    "use_qalora": (False,),
    "velora_config": (None,),
}
# These name libraries to import; PEFT writes them, so they may stand there, but only like this.
_FIXED: dict[str, tuple[object, ...]] = {
    "megatron_config": (None,),
    "megatron_core": (None, "megatron.core"),
}
# Initialisations that leave the base weights as they are. Others (PiSSA, OLoRA, LoftQ, ...) change the base.
_HARMLESS_INITS = (True, False, "gaussian", "orthogonal")

_CLASS = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_LIBRARY = re.compile(r"transformers\.models(?:\.[a-z0-9_]{1,64}){1,4}")


def check_keys(config: dict[str, Any]) -> None:
    """Refuse unknown keys, unsupported features, and bad values of the keys that are only recorded.

    Raises:
        InvalidArgument: `unsupported_field`, `unsupported_feature` or `bad_config`.
    """
    for key, value in config.items():
        if key in _HONOURED or key in _RECORDED:
            continue
        if key in _FIXED:
            if not is_one_of(value, _FIXED[key]):
                raise unsupported_field(key, value, "it names code to import")
        elif key in _NEUTRAL:
            if not is_one_of(value, _NEUTRAL[key]):
                raise unsupported_feature(key, value)
        else:
            raise unsupported_field(key, value, "it is not a setting of LoRA adapters that we know")
    if config.get("peft_type") != "LORA":
        raise unsupported_feature("peft_type", config.get("peft_type"))
    _check_recorded(config)
    _check_auto_mapping(config.get("auto_mapping"))


def _check_recorded(config: dict[str, Any]) -> None:
    for key in ("base_model_name_or_path", "revision", "peft_version"):
        text(config, key)
    boolean(config, "inference_mode")
    dropout = config.get("lora_dropout", 0.0)
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout <= 1:
        raise bad_value("lora_dropout", dropout, "a number from 0 to 1")
    group_size = config.get("qalora_group_size", 16)
    if type(group_size) is not int or group_size < 1:
        raise bad_value("qalora_group_size", group_size, "a whole number above 0")
    init = config.get("init_lora_weights", True)
    if not is_one_of(init, _HARMLESS_INITS):
        raise unsupported_feature("init_lora_weights", init)


def _check_auto_mapping(value: object) -> None:
    if value is None:
        return
    if isinstance(value, dict) and value.keys() == {"base_model_class", "parent_library"}:
        class_name, library = value["base_model_class"], value["parent_library"]
        are_text = isinstance(class_name, str) and isinstance(library, str)
        if are_text and _CLASS.fullmatch(class_name) and _LIBRARY.fullmatch(library):
            return
    raise unsupported_field("auto_mapping", value, "it names code outside transformers.models")
