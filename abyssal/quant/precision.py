"""The accumulation type: where the reference says fp32, a float64 model stays in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32."""
    return dtype if dtype == torch.float64 else torch.float32


def wide(x: Tensor) -> Tensor:
    """`x` in float32, or unchanged if it is float64 (which parity tests run in)."""
    return x if x.dtype == torch.float64 else x.float()
