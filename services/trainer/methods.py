"""Which fine-tuning methods there are, and what each can do on a 4-bit base.

`python -m services.trainer.methods` prints docs/methods.md.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from services.common.errors import InvalidArgument

if TYPE_CHECKING:
    from services.trainer.spec import TrainingSpec


@dataclass(frozen=True, slots=True)
class MethodCapability:
    """What a method can do.

    Attributes:
        name: as in `TrainingSpec.method`.
        source: the paper and, in short, what the method does.
        trains_on_nf4: whether it trains on a 4-bit base.
        served_exactly: whether what is published computes what was trained, but for rounding.
        served_rank_factor: rank of the published LoRA over the rank trained; 0 where there is none.
        served_as: the kind of adapter that is published.
        is_converted: whether what is published has another form than what was trained; the error is measured
            then.
        has_scale: whether alpha sets the size of the update.
        offered: whether jobs of this method are taken.
        note: what a user should know; the reason where it is not offered.
    """

    name: str
    source: str
    trains_on_nf4: bool = True
    served_exactly: bool = True
    served_rank_factor: int = 1
    served_as: str = "lora"
    is_converted: bool = False
    has_scale: bool = True
    offered: bool = True
    note: str = ""

    @property
    def trains_jointly(self) -> bool:
        """Whether jobs of this method can share forward passes: all updates here are separable by row."""
        return self.offered


def _refused(name: str, source: str, note: str, *, trains_on_nf4: bool = True) -> MethodCapability:
    return MethodCapability(
        name,
        source,
        trains_on_nf4=trains_on_nf4,
        served_exactly=False,
        served_rank_factor=0,
        served_as="",
        offered=False,
        note=note,
    )


DEFAULT_METHOD = "lora"
METHODS: dict[str, MethodCapability] = {
    method.name: method
    for method in (
        MethodCapability("lora", "Hu et al. 2021, arXiv 2106.09685: (alpha / r) B A"),
        MethodCapability("rslora", "Kalajdzievski 2023, arXiv 2312.03732: (alpha / sqrt(r)) B A"),
        MethodCapability(
            "lora+",
            "Hayou et al. 2024, arXiv 2402.12354: B learns at lora_plus_ratio times the rate of A",
        ),
        MethodCapability(
            "dora",
            "Liu et al. 2024, arXiv 2402.09353: a trained norm for each row of W + (alpha / r) B A",
            served_as="lora+scale",
        ),
        MethodCapability(
            "eva",
            "Paischer et al. 2024, arXiv 2410.07170: A begins at the main directions of the layer's inputs",
            note="The rank differs from layer to layer; `rank` is the mean.",
        ),
        MethodCapability(
            "olora",
            "Buyukakyuz 2024, arXiv 2406.01775: B A begins at a part of the base's QR",
            served_rank_factor=2,
            note="The base stays as it is: the part taken is subtracted as a second, frozen half.",
        ),
        MethodCapability(
            "pissa",
            "Meng et al. 2024, arXiv 2404.02948: B A begins at the base's largest singular components",
            served_rank_factor=2,
            note="As olora. Singular values are those of the expanded 4-bit base.",
        ),
        MethodCapability(
            "miss",
            "Kang and Yin 2024, arXiv 2409.15371: one trained matrix, applied to sums of every r-th input",
            is_converted=True,
            has_scale=False,
        ),
        MethodCapability(
            "bone",
            "The earlier name of miss",
            is_converted=True,
            has_scale=False,
            note="Trains as miss. Its variant `bat` is not offered: that update has full rank.",
        ),
        MethodCapability(
            "vera",
            "Kopiczko et al. 2023, arXiv 2310.11454: two trained vectors around drawn, shared matrices",
            is_converted=True,
            has_scale=False,
            note="Wants a large rank (64 to 256); the vectors are folded into a LoRA of that rank.",
        ),
        MethodCapability(
            "kasa",
            "Wang et al. 2024, arXiv 2412.06071: trained singular values; the base's smallest are left out",
            served_rank_factor=2,
            is_converted=True,
            note="The components left out are a second, frozen half. Both regularisers are in the loss.",
        ),
        _refused("adalora", "Zhang et al. 2023, arXiv 2303.10512", "Its ranks move while it trains."),
        _refused("randlora", "Albert et al. 2025, arXiv 2502.00987", "Its update has full rank."),
        _refused("oft", "Qiu et al. 2023, arXiv 2306.07280", "It turns the base; the update has full rank."),
        _refused("ia3", "Liu et al. 2022, arXiv 2205.05638", "It scales without a low-rank part."),
        _refused("fourierft", "Gao et al. 2024, arXiv 2405.03003", "Its update has full rank."),
        _refused("hira", "Huang et al. 2025", "Its update is a product with the base and has full rank."),
        _refused(
            "loftq",
            "Li et al. 2023, arXiv 2310.08659",
            "It makes a 4-bit base of its own for each adapter, and the base is shared.",
            trains_on_nf4=False,
        ),
        _refused(
            "loha",
            "Hyeon-Woo et al. 2021, arXiv 2108.06098",
            "Its rank is r squared, and its parts cannot be told apart once published.",
            trains_on_nf4=False,
        ),
    )
}


def find_method(name: str) -> MethodCapability:
    """Return the method called `name`.

    Raises:
        InvalidArgument: `unsupported_method`, where it is not offered.
    """
    method = METHODS.get(name)
    if method is None or not method.offered:
        supported = ", ".join(each.name for each in METHODS.values() if each.offered)
        why = f": {method.note}" if method is not None else ";"
        raise InvalidArgument(
            "unsupported_method",
            f"method {name[:64]!r} is not offered{why} choose one of {supported}",
            field="spec.method",
            value=name,
            limit=supported,
        )
    return method


def can_join(spec: TrainingSpec) -> bool:
    """Whether a job may be trained together with others: it wants to, and its method can."""
    return spec.joint and METHODS[spec.method].trains_jointly


def methods_page() -> str:
    """Return docs/methods.md."""
    lines = [
        "# Fine-tuning methods",
        "",
        "What `spec.method` can name. `python -m services.trainer.methods` writes this page; the tests train",
        "each method on a 4-bit base and compare what is published, loaded by PEFT, with what was trained.",
        "",
        "| method | what it is | on NF4 | published as | exact when served | trains jointly | note |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [_row(method) for method in METHODS.values()]
    lines += [
        "",
        "- *Published as*: `lora` is plain LoRA, `lora+scale` LoRA with a norm for each row (DoRA); `2r` is",
        "  LoRA of twice the rank trained.",
        "- *Exact when served*: the published files compute what was trained, but for rounding. Where the",
        "  form was changed on the way, the relative error of the weight change is measured for every",
        "  version and stands on its card as `conversion_error`.",
        "- *Trains jointly*: jobs on one base share its forward passes when the queue holds several; the",
        "  result is that of training alone.",
        "- A method that is not offered is refused with `unsupported_method` and the note.",
    ]
    return "\n".join(lines) + "\n"


def _row(method: MethodCapability) -> str:
    if not method.offered:
        nf4 = "yes" if method.trains_on_nf4 else "no"
        return f"| `{method.name}` | {method.source} | {nf4} | not offered | | | {method.note} |"
    rank = "" if method.served_rank_factor == 1 else f", {method.served_rank_factor}r"
    exact = "yes, converted" if method.is_converted else "yes"
    cells = (
        f"`{method.name}`",
        method.source,
        "yes",
        f"`{method.served_as}`{rank}",
        exact,
        "yes",
        method.note,
    )
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.stdout.write(methods_page())
