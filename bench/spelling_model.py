"""A base and adapters whose weights are set by hand, so that each adapter answers with its own number.

A number has four digits of base twelve. The first two lie in the values that the adapter's `v_proj` writes to
the KV cache for every token, so keys and values of another version change the answer; the last two lie in its
`down_proj`. Attention is uniform, the state (which digit is next) is in the embedding of the last token, and
an MLP unit for each digit at each place fires where state and value agree. The base alone answers with its
end token at once.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tests.support.models import VOCAB_SIZE, byte_tokenizer

PLACES = 4
BASE = 12
NUMBERS = BASE**PLACES
QUESTION = "?"

_HIDDEN = 128
_UNITS = 64
_EOS = 0
# Coordinates of the residual stream: digits that were read, digits to write, states, and a constant.
_READ = 0
_WRITE = 24
_STATE = 72
_CONSTANT = 80
_SHARPNESS = 5.0


def digits_of(number: int) -> list[int]:
    """Return the digits, the highest first."""
    return [number // BASE ** (PLACES - 1 - place) % BASE for place in range(PLACES)]


def number_of(token_ids: list[int]) -> int | None:
    """Return the number that an answer spells, or None where it is none."""
    if len(token_ids) != PLACES:
        return None
    digits = [token_id - _token(place, 0) for place, token_id in enumerate(token_ids)]
    if not all(0 <= digit < BASE for digit in digits):
        return None
    return int(sum(digit * BASE ** (PLACES - 1 - place) for place, digit in enumerate(digits)))


def make_base(path: Path) -> Path:
    """Write the base to `path`: one Llama layer of 128 hidden units, and the byte tokenizer of the tests."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=_HIDDEN,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=_UNITS,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=_EOS,
        pad_token_id=1,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        model = LlamaForCausalLM(config)
        for name, weight in model.named_parameters():
            weight.fill_(1.0) if "norm" in name else weight.zero_()
        layer = model.model.layers[0]
        _write_states(model.model.embed_tokens.weight)
        layer.self_attn.o_proj.weight.copy_(torch.eye(_HIDDEN))
        _write_units(layer.mlp.gate_proj.weight, layer.mlp.down_proj.weight)
        layer.mlp.up_proj.weight[:, _CONSTANT] = 1.0
        for place in range(PLACES):
            for digit in range(BASE):
                model.lm_head.weight[_token(place, digit), _write(place, digit)] = 1.0
        # What fires nowhere ends.
        model.lm_head.weight[_EOS, _CONSTANT] = 0.01
    path.mkdir(parents=True)
    model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def adapter_files(number: int, rank: int) -> dict[str, bytes]:
    """Return the two files of the adapter that answers with `number`, as PEFT would write them.

    Args:
        rank: at least 2; what is not needed of it is zeros.
    """
    digits = digits_of(number)
    value_a, value_b = torch.zeros(rank, _HIDDEN), torch.zeros(_HIDDEN, rank)
    value_a[0, _CONSTANT] = 1.0
    down_a, down_b = torch.zeros(rank, _UNITS), torch.zeros(_HIDDEN, rank)
    for place in (0, 1):
        # The norm before attention makes the constant 8; what is read is to be 1.
        value_b[_read(place, digits[place]), 0] = 1 / 8
    for place in (2, 3):
        down_a[place - 2, _free_unit(place)] = 1.0
        down_b[_write(place, digits[place]), place - 2] = 1.0
    prefix = "base_model.model.model.layers.0"
    tensors: dict[str, Tensor] = {
        f"{prefix}.self_attn.v_proj.lora_A.weight": value_a,
        f"{prefix}.self_attn.v_proj.lora_B.weight": value_b,
        f"{prefix}.mlp.down_proj.lora_A.weight": down_a,
        f"{prefix}.mlp.down_proj.lora_B.weight": down_b,
    }
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": ["v_proj", "down_proj"],
    }
    return {"adapter_config.json": json.dumps(config).encode(), "adapter_model.safetensors": save(tensors)}


def _token(place: int, digit: int) -> int:
    # Tokens above the letters that prompts are made of.
    return 150 + place * BASE + digit


def _read(place: int, digit: int) -> int:
    return _READ + place * BASE + digit


def _write(place: int, digit: int) -> int:
    return _WRITE + place * BASE + digit


def _free_unit(place: int) -> int:
    """Return the unit that fires in the state of a place whose digit the adapter's `down_proj` writes."""
    return 2 * BASE + place - 2


def _write_states(embedding: Tensor) -> None:
    """Give each token the state of the place that follows it; ordinary tokens have one that nothing heeds."""
    (question,) = byte_tokenizer().encode(QUESTION)
    embedding[:, _CONSTANT] = 1.0
    states = torch.full((VOCAB_SIZE,), _STATE + PLACES + 1)
    states[question] = _STATE
    for place in range(PLACES):
        states[_token(place, 0) : _token(place, BASE)] = _STATE + place + 1
    embedding[torch.arange(VOCAB_SIZE), states] = 1.0


def _write_units(gate: Tensor, down: Tensor) -> None:
    """Make each unit fire where its state holds and, for the first two places, its digit was read."""
    for place in (0, 1):
        for digit in range(BASE):
            unit = place * BASE + digit
            gate[unit, _STATE + place] = _SHARPNESS
            gate[unit, _read(place, digit)] = _SHARPNESS
            gate[unit, _CONSTANT] = -1.5 * _SHARPNESS
            down[_write(place, digit), unit] = 1.0
    for place in (2, 3):
        gate[_free_unit(place), _STATE + place] = _SHARPNESS
        gate[_free_unit(place), _CONSTANT] = -0.5 * _SHARPNESS
