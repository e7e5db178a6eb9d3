"""The decoder seam: layers of the Llama kind decode in one call of the compiled kernel.

The model's own layer stays: it runs prompts, and it is the twin. When the kernel is installed, each layer is
computed both ways on random inputs, and keeps to its own code unless they agree; so an architecture that only
looks like Llama is never served by the kernel.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from services.inference.kernels.decoder import DecoderParts, DecodingRows, KernelDecoder, norm_of
from services.inference.kernels.library import Kernels
from services.inference.kernels.linear import KernelLayer, KernelLinear
from services.inference.model.attention import AttentionStep, DecodeGroup
from services.inference.model.kernel_linear import KernelLoraLinear
from services.inference.model.kv import KvShape, PagedKv

logger = logging.getLogger(__name__)

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_PERCEPTRON = ("gate_proj", "up_proj", "down_proj")
_NORMS = ("input_layernorm", "post_attention_layernorm")
_HEAD_NORMS = ("q_norm", "k_norm")
_CHECK_BLOCK_SIZE = 4
_CHECK_LENGTHS = (7, 1, 12)
_TOLERANCE = 1e-4


class FusedDecoderLayer:
    """One decoder layer: the kernel in steps that only decode, the model's own code in all others."""

    def __init__(self, twin: nn.Module, parts: DecoderParts, index: int, kernel: KernelDecoder) -> None:
        self._twin: Callable[..., Any] = twin.forward
        self._parts = parts
        self._record = parts.record()
        self._index = index
        self._kernel = kernel

    def forward(
        self,
        hidden_states: Tensor,
        *args: object,
        step: AttentionStep,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: object,
    ) -> Any:
        """Return what the layer's own `forward` does: hidden states [1, tokens, hidden]."""
        if position_embeddings is None or step.prefills or hidden_states.shape[1] > self._kernel.max_rows:
            return self._twin(
                hidden_states, *args, step=step, position_embeddings=position_embeddings, **kwargs
            )
        return self.decode(hidden_states, position_embeddings, step)

    def decode(self, hidden_states: Tensor, rotation: tuple[Tensor, Tensor], step: AttentionStep) -> Tensor:
        """Run the kernel."""
        kv = step.kv
        groups = [
            DecodingRows(group.rows, group.tables, group.lengths, group.max_length) for group in step.decodes
        ]
        self._kernel.begin(step, self._parts, groups, step.slots, rotation, kv.shape.block_size)
        step.layers[self._index] = self._parts.window
        return self._kernel.layer(self._record, hidden_states, (kv.keys[self._index], kv.values[self._index]))

    def agrees(self, kv: PagedKv) -> bool:
        """Whether the kernel computes what the layer's own code does, on random inputs.

        The layer's own code also tells its window here: models hand it to their attention by the call, and
        it may be far longer than any sequence that is tried.
        """
        generator = torch.Generator().manual_seed(self._index)
        parts = self._parts
        x = torch.randn(1, len(_CHECK_LENGTHS), parts.qkv.in_features, generator=generator)
        angles = torch.rand(1, len(_CHECK_LENGTHS), parts.head_dim // 2, generator=generator) * 6.0
        angles = torch.cat((angles, angles), dim=-1)
        rotation = (angles.cos(), angles.sin())
        for pages in (kv.keys[self._index], kv.values[self._index]):
            pages.copy_(torch.randn(pages.shape, generator=generator))
        step = _check_step(kv)
        try:
            expected = self._twin(
                x, attention_mask=None, position_ids=None, step=step, position_embeddings=rotation
            )
        except (TypeError, ValueError, AttributeError) as error:
            logger.debug(
                "layer %d does not take what a decoder layer of the Llama kind does: %s", self._index, error
            )
            return False
        self._parts = replace(parts, window=step.layers.get(self._index))
        self._record = self._parts.record()
        got = self.decode(x, rotation, step)
        return isinstance(expected, Tensor) and torch.allclose(
            got, expected, rtol=_TOLERANCE, atol=_TOLERANCE
        )


@torch.inference_mode()
def install_decoder(model: PreTrainedModel, linear: KernelLinear, kernels: Kernels) -> int:
    """Let every layer that is of the Llama kind decode through the kernel; return how many are.

    `install_kernels` has been here before.
    """
    decoder = KernelDecoder(kernels, linear)
    layers = model.get_decoder().layers
    shape = KvShape.of(model.config, _CHECK_BLOCK_SIZE, torch.float32)
    kv = PagedKv(
        shape, sum(-(-length // _CHECK_BLOCK_SIZE) for length in _CHECK_LENGTHS), torch.device("cpu")
    )
    fused = 0
    for index, layer in enumerate(layers):
        parts = take_apart(layer)
        if parts is None or not decoder.serves(parts):
            continue
        candidate = FusedDecoderLayer(layer, parts, index, decoder)
        if candidate.agrees(kv):
            layer.forward = candidate.forward
            fused += 1
    return fused


def take_apart(layer: nn.Module) -> DecoderParts | None:
    """Return the parts of a layer that looks like Llama's; None for any other."""
    children = dict(layer.named_children())
    attention, perceptron = children.get("self_attn"), children.get("mlp")
    if attention is None or perceptron is None or set(children) != {"self_attn", "mlp", *_NORMS}:
        return None
    of_attention, of_perceptron = dict(attention.named_children()), dict(perceptron.named_children())
    if set(of_attention) - set(_HEAD_NORMS) != set(_ATTENTION) or "act_fn" not in of_perceptron:
        return None
    activation = of_perceptron.pop("act_fn")
    if set(of_perceptron) != set(_PERCEPTRON) or type(activation).__name__ not in ("SiLU", "SiLUActivation"):
        return None
    linears = {**of_attention, **of_perceptron}
    qkv = _layer(linears, _ATTENTION[:3])
    o, gate_up, down = (
        _layer(linears, ("o_proj",)),
        _layer(linears, _PERCEPTRON[:2]),
        _layer(linears, ("down_proj",)),
    )
    norms = [norm_of(children[name]) for name in _NORMS]
    head_norms = [norm_of(of_attention[name]) if name in of_attention else None for name in _HEAD_NORMS]
    there = all(
        name not in of_attention or norm is not None
        for name, norm in zip(_HEAD_NORMS, head_norms, strict=True)
    )
    head_dim, scaling = getattr(attention, "head_dim", None), getattr(attention, "scaling", None)
    if qkv is None or o is None or gate_up is None or down is None or None in norms or not there:
        return None
    if not isinstance(head_dim, int) or not isinstance(scaling, float):
        return None
    queries, keys, values = qkv.out_features
    if queries % head_dim or keys % head_dim or keys != values or o.in_features != queries:
        return None
    return DecoderParts(
        qkv,
        o,
        gate_up,
        down,
        (*norms, *head_norms),
        queries // head_dim,
        keys // head_dim,
        head_dim,
        None,
        scaling,
    )


def _layer(linears: Mapping[str, nn.Module], names: tuple[str, ...]) -> KernelLayer | None:
    modules = [linears[name] for name in names]
    seams = [module for module in modules if isinstance(module, KernelLoraLinear) and module.streams]
    if len(seams) != len(modules) or len({seam.base.in_features for seam in seams}) != 1:
        return None
    return KernelLayer.of([(seam.row, seam.base) for seam in seams], with_base=True)


def _check_step(kv: PagedKv) -> AttentionStep:
    """Sequences of `_CHECK_LENGTHS` that have filled their pages but for the last token."""
    size = kv.shape.block_size
    width = max(-(-length // size) for length in _CHECK_LENGTHS)
    tables, slots, first = [], [], 0
    for length in _CHECK_LENGTHS:
        blocks = list(range(first, first + -(-length // size)))
        first += len(blocks)
        tables.append(blocks + [0] * (width - len(blocks)))
        slots.append(blocks[(length - 1) // size] * size + (length - 1) % size)
    group = DecodeGroup(
        rows=torch.arange(len(_CHECK_LENGTHS)),
        tables=torch.tensor(tables),
        lengths=torch.tensor(_CHECK_LENGTHS),
        max_length=max(_CHECK_LENGTHS),
    )
    return AttentionStep(kv, torch.tensor(slots), decodes=(group,), prefills=())
