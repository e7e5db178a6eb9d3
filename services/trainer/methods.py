"""Which fine-tuning methods there are, and what each can do on a 4-bit base."""

from __future__ import annotations

from dataclasses import dataclass

from services.common.errors import InvalidArgument


@dataclass(frozen=True, slots=True)
class MethodCapability:
    """What a method can do.

    Attributes:
        name: as in `TrainingSpec.method`.
        trains_on_nf4: whether it trains on a 4-bit base.
        served_exactly: whether its result is a plain LoRA, without approximation.
        served_rank_factor: the rank of that LoRA over the rank trained.
    """

    name: str
    trains_on_nf4: bool
    served_exactly: bool
    served_rank_factor: int


DEFAULT_METHOD = "lora"
METHODS: dict[str, MethodCapability] = {
    method.name: method
    for method in (
        # Hu et al. 2021, arXiv 2106.09685: W x + (alpha / r) B A x.
        MethodCapability("lora", trains_on_nf4=True, served_exactly=True, served_rank_factor=1),
        # Kalajdzievski 2023, arXiv 2312.03732: W x + (alpha / sqrt(r)) B A x.
        MethodCapability("rslora", trains_on_nf4=True, served_exactly=True, served_rank_factor=1),
    )
}


def find_method(name: str) -> MethodCapability:
    """Return the method called `name`; raise `InvalidArgument` (`unsupported_method`) where there is none."""
    if name not in METHODS:
        supported = ", ".join(METHODS)
        raise InvalidArgument(
            "unsupported_method",
            f"method {name[:64]!r} is not offered; choose one of {supported}",
            field="spec.method",
            value=name,
            limit=supported,
        )
    return METHODS[name]
