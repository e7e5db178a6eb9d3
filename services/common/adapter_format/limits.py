"""How large and how wild an adapter may be."""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB


@dataclass(frozen=True, slots=True)
class AdapterLimits:
    """The limits of the adapter format. A registry may lower them; it never raises `max_header_bytes`.

    Attributes:
        max_config_bytes: size of `adapter_config.json`.
        max_header_bytes: size of the JSON header of the safetensors file.
        max_weights_bytes: size of `adapter_model.safetensors`.
        max_rank: largest rank of one module; the inference engine refuses more.
        max_delta_norm: largest `scale * |B| * |A|` of one module (Frobenius norms, so a bound on the norm of
            `scale * B @ A`). Trained adapters stay below some hundreds; a million means that training
            diverged.
        max_modules: number of adapted modules. With `max_header_bytes` it bounds the time and the memory that
            a header costs before it is refused.
        scan_chunk_bytes: memory that the scan of the values may take at a time.
    """

    max_config_bytes: int = 64 * KIB
    max_header_bytes: int = 4 * MIB
    max_weights_bytes: int = 2 * GIB
    max_rank: int = 256
    max_delta_norm: float = 1e6
    max_modules: int = 2048
    scan_chunk_bytes: int = 4 * MIB

    @property
    def max_tensors(self) -> int:
        """Tensors that `max_modules` layers can have: A, B and one vector each, and an output head."""
        return 3 * self.max_modules + 2


DEFAULT_LIMITS = AdapterLimits()
