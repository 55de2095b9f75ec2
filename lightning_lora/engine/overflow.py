"""Finds numbers that are finite but too large: a layer that computes with them gives inf or NaN."""

from __future__ import annotations

import torch
from torch import Tensor


def largest(dtype: torch.dtype) -> float:
    """The largest absolute value that a number of an adapter may have, for a layer that computes in `dtype`.

    In float16 it is the dtype's largest number. In dtypes of a wider range it is the root of that, since outputs are
    squared in norms and multiplied by each other in attention; no training gives a weight of 2^64.
    """
    return max(torch.finfo(dtype).max ** 0.5, torch.finfo(torch.float16).max)


def largest_in(*tensors: Tensor) -> float:
    """The largest absolute value in the tensors; NaN if one of them contains NaN."""
    ends = [end for t in tensors if t.numel() for end in t.detach().aminmax()]
    return max((abs(end.item()) for end in ends), key=lambda size: (size != size, size), default=0.0)


def too_large(A: Tensor, B: Tensor, scale: float, dtype: torch.dtype, *besides: Tensor | None) -> str | None:
    """The number in A, B or scale * B A that is too large for a layer that computes in `dtype`, in words; None if all
    fit. `besides` are further tensors to check: DoRA's m and the bias of B.

    The product is not formed: no number of B A is larger than the largest norm of a row of B times the largest norm of
    a column of A (Cauchy and Schwarz). This bound also holds for each matrix of a stack, and for groups.
    """
    most, a, b = largest(dtype), largest_in(A), largest_in(B)
    sizes = {"an A": a, "a B": b, "a scale * B": abs(scale) * b}
    if not abs(scale) * a * b * A.shape[0] <= most:
        rows, columns = (t.detach().flatten(1).double().norm(dim=dim).max() for t, dim in ((B, 1), (A, 0)))
        sizes["a change scale * B A"] = abs(scale) * float(rows * columns)
    sizes["another number"] = largest_in(*(t for t in besides if t is not None))
    found = next((f"{what} of up to {size:.3g}" for what, size in sizes.items() if not size <= most), None)
    return found and f"{found}, where {str(dtype).removeprefix('torch.')} allows {most:.3g}"
