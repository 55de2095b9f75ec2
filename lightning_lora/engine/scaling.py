"""The scale s in W x + s * B A x."""

from __future__ import annotations

import math


def scale_of(alpha: float, rank: int, *, rank_stabilised: bool = False) -> float:
    """alpha / rank (Hu et al. 2021, section 4.1); rank-stabilised: alpha / sqrt(rank) (arXiv:2312.03732, section 3)."""
    return alpha / (math.sqrt(rank) if rank_stabilised else rank)
