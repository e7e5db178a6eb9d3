"""The linear seam: linear layers and the input embedding get the rows' adapters added to their output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor, nn
from transformers import PreTrainedModel

from services.common.errors import Unimplemented
from services.inference.adapters.ends import EmbeddingRows, HeadRows, add_embedding, apply_head
from services.inference.adapters.ops import AdapterGroup, add_lora
from services.inference.adapters.tables import AdapterRows
from services.inference.adapters.targets import LoraTargets
from services.inference.model.values import ModelValues


class StepKernel(Protocol):
    """What computes linear layers in place of their torch forms."""

    def begin(self, rows: Sequence[AdapterRows], num_rows: int) -> None:
        """Bind the adapters of a step of `num_rows` rows."""
        ...

    def end(self) -> None:
        """Bind no adapter."""
        ...


class StepBinding:
    """Which adapters the rows of the current step use. Owned by one model; set by its runner around each
    step.

    Attributes:
        groups: of the decoder's layers, by token.
        embedding_rows: of the input embedding, by token.
        head_rows: of the output head, by row of logits.
        hidden: what the output head was given in this step [rows, hidden].
        kernel: what computes the linear layers in place of their torch forms, where there is one; it knows
            the rows' adapters itself.
    """

    def __init__(self) -> None:
        self.kernel: StepKernel | None = None
        self.clear()

    def clear(self) -> None:
        """Bind no adapter."""
        self.groups: tuple[AdapterGroup, ...] = ()
        self.embedding_rows: tuple[EmbeddingRows, ...] = ()
        self.head_rows: tuple[HeadRows, ...] = ()
        self.hidden: Tensor | None = None
        if self.kernel is not None:
            self.kernel.end()


class LoraLinear(nn.Module):
    """A linear layer of the base, plus B A x for each row's adapter.

    `base` may be a full-precision or a bitsandbytes 4-bit layer; it is called unchanged. Without adapters in
    the step nothing is added and nothing is paid.
    """

    def __init__(self, base: nn.Linear, name: str, binding: StepBinding) -> None:
        super().__init__()
        self.base = base
        self.name = name
        self._binding = binding

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., in] to [..., out]; all dimensions but the last make the flat batch's rows."""
        y: Tensor = self.base(x)
        groups = self._binding.groups
        if groups:
            add_lora(y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]), groups, self.name)
        return y


class LoraHead(nn.Module):
    """The output head of the base, with the changes of each row's adapter."""

    def __init__(self, base: nn.Linear, binding: StepBinding) -> None:
        super().__init__()
        self.base: nn.Module = base
        self._binding = binding

    @property
    def weight(self) -> Tensor:
        """The base's weight, which some models tie to their embedding."""
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """Map x [1, rows, hidden] to logits [1, rows, vocabulary]."""
        y: Tensor = self.base(x)
        self._binding.hidden = x.reshape(-1, x.shape[-1])
        rows = self._binding.head_rows
        if rows:
            apply_head(y.view(-1, y.shape[-1]), self._binding.hidden, rows)
        return y


class LoraEmbedding(nn.Module):
    """The input embedding of the base, plus B a[t] for each token t whose row's adapter has them."""

    def __init__(self, base: nn.Embedding, binding: StepBinding) -> None:
        super().__init__()
        self.base = base
        self._binding = binding

    @property
    def weight(self) -> Tensor:
        """The base's weight."""
        return self.base.weight

    def forward(self, token_ids: Tensor) -> Tensor:
        """Map token ids [1, tokens] to [1, tokens, hidden]."""
        y: Tensor = self.base(token_ids)
        rows = self._binding.embedding_rows
        if rows:
            add_embedding(y.view(-1, y.shape[-1]), token_ids.view(-1), rows)
        return y


def install_lora(model: PreTrainedModel) -> tuple[StepBinding, LoraTargets]:
    """Put a `LoraLinear` around every linear layer inside the decoder's layers of `model`, and a `LoraHead`
    and a `LoraEmbedding` around its ends.

    Other linear layers are left alone and listed in `LoraTargets.others`, and modules that hold the stacked
    weights of experts in `LoraTargets.experts`, so that an adapter for them is refused by name.

    Raises:
        Unimplemented: `architecture_unsupported`.
    """
    binding = StepBinding()
    names = {id(module): name for name, module in model.named_modules()}
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    layers, head, embedding = _parts(model)
    inside = {id(module): module for module in layers.modules()}
    shapes = {name: _shape(module) for name, module in linears.items() if id(module) in inside}
    others = {name: _shape(module) for name, module in linears.items() if name not in shapes}
    head_name, embedding_name = names[id(head)], names[id(embedding)]
    del others[head_name]
    targets = LoraTargets(
        shapes,
        others,
        head=(head_name, _shape(head)),
        embedding=(embedding_name, (embedding.num_embeddings, embedding.embedding_dim)),
        experts=frozenset(names[key] for key, module in inside.items() if _holds_experts(module)),
        values=ModelValues(linears, embedding),
    )
    for name in shapes:
        _replace(model, name, LoraLinear(linears[name], name, binding))
    _replace(model, head_name, LoraHead(head, binding))
    _replace(model, embedding_name, LoraEmbedding(embedding, binding))
    return binding, targets


def _parts(model: PreTrainedModel) -> tuple[nn.ModuleList, nn.Linear, nn.Embedding]:
    """Return the decoder's layers, the output head and the input embedding."""
    layers = getattr(model.get_decoder(), "layers", None)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if (
        isinstance(layers, nn.ModuleList)
        and isinstance(head, nn.Linear)
        and isinstance(embedding, nn.Embedding)
    ):
        return layers, head, embedding
    name = type(model).__name__
    raise Unimplemented(
        "architecture_unsupported",
        f"{name} has no list of decoder layers with one linear output head and one input embedding.",
        field="base",
        value=name,
    )


def _shape(module: nn.Linear) -> tuple[int, int]:
    return module.in_features, module.out_features


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _holds_experts(module: nn.Module) -> bool:
    """Whether `module` has weights of its own with one matrix for each expert: [experts, out, in]."""
    return any(parameter.dim() == 3 for parameter in module.parameters(recurse=False))
