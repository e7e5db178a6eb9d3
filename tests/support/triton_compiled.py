# mypy: disable-error-code="no-untyped-def,no-untyped-call"
"""Compiles the Triton kernels for GPUs that need not be here, and prints what came out, as JSON.

python -m tests.support.triton_compiled
"""

from __future__ import annotations

import json
from typing import Any

import triton  # type: ignore[import-not-found,unused-ignore]
from triton.backends.compiler import GPUTarget  # type: ignore[import-not-found,unused-ignore]
from triton.compiler import ASTSource  # type: ignore[import-not-found,unused-ignore]

from services.inference.kernels import triton_attention, triton_lora

# Compute capability, activations, head size.
TARGETS = ((80, "bf16", 128), (90, "bf16", 96), (90, "fp32", 64))
_ADDRESSES = dict.fromkeys(("rows", "tables", "lengths", "row_tables"), "*i64")
_SUMS = dict.fromkeys(("totals", "maxima", "sums", "low"), "*fp32")
_COUNTS = dict.fromkeys(
    (
        "token_stride",
        "head_stride",
        "width",
        "block_size",
        "window",
        "splits",
        "module",
        "low_stride",
    ),
    "i32",
)


def main() -> None:
    """Compile every kernel for every target."""
    found = []
    for capability, dtype, head_dim in TARGETS:
        values = dict.fromkeys(("queries", "keys", "values", "output", "sinks", "x", "y"), f"*{dtype}")
        types = {**_ADDRESSES, **_SUMS, **_COUNTS, **values, "scaling": "fp32", "softcap": "fp32"}
        attend = {"group": 4, "head_dim": head_dim, "group_block": 16, "dim_block": 128, "key_block": 64}
        join = {"head_dim": head_dim, "dim_block": 128, "has_sinks": True}
        lora = {"fields": triton_lora._FIELDS, "rank_block": triton_lora._RANK_BLOCK}
        for kernel, constants in (
            (triton_attention._attend_part, {**attend, "has_softcap": True}),
            (triton_attention._join_parts, join),
            (triton_lora._shrink, {**lora, "in_block": triton_lora._IN_BLOCK}),
            (triton_lora._expand, {**lora, "out_block": triton_lora._OUT_BLOCK}),
        ):
            found.append(compile_for(capability, kernel, types, constants))
            found[-1]["dtype"] = dtype
    print(json.dumps(found))  # noqa: T201 - it is what it is for


def compile_for(capability: int, kernel: Any, types: dict[str, str], constants: dict[str, Any]) -> Any:
    """Compile as at a launch whose tensors, and the layer's width, are divisible by 16."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    aligned = [
        (at,)
        for at, name in enumerate(names)
        if signature[name].startswith("*") or (name == "width" and "module" in names)
    ]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={at: [["tt.divisibility", 16]] for at in aligned},
    )
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    return {
        "kernel": kernel.__name__,
        "capability": capability,
        "shared_bytes": made.metadata.shared,
        "cubin_bytes": len(made.asm["cubin"]),
        "wide_loads": made.asm["ptx"].count("ld.global.v4") + made.asm["ptx"].count("cp.async.cg"),
    }


if __name__ == "__main__":
    main()
