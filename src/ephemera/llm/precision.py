"""Number types: their names, the one that sums are taken in, and whether a CPU multiplies bfloat16 at all."""

from __future__ import annotations

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def wide_of(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def multiplies_bfloat16() -> bool:
    """Whether this CPU has what torch's fast bfloat16 products need (AVX-512 on x86). Without it they take some 40 times as
    long as float32's (docs/performance.md)."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
