"""What an update loses when it is written in another way: exact norms of products of thin factors, and truncated SVD.

Everything is computed in float64; a product B A of thin factors is never formed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_lora.engine.layers.dora import gains


@dataclass(frozen=True)
class Truncated:
    """The best rank-r approximation B A of a matrix (Eckart and Young 1936), and what it leaves out."""

    A: Tensor  # (r, in)
    B: Tensor  # (out, r)
    error: float
    """Frobenius norm of what is left out, relative to the whole."""
    worst: float
    """Most by which an output can be off, relative to the most that the matrix can change one, over inputs of one
    length: the first singular value left out over the largest."""


@dataclass(frozen=True)
class Spectrum:
    """The singular value decomposition of an update (out, in)."""

    U: Tensor
    S: Tensor
    Vh: Tensor

    @property
    def norm(self) -> float:
        """The Frobenius norm."""
        return float(self.S.norm())

    def left_out(self, rank: int) -> float:
        """The relative Frobenius error at `rank`."""
        return float(self.S[rank:].norm()) / self.norm if self.norm else 0.0

    def rank_for(self, tolerance: float) -> int:
        """The smallest rank, at least 1, whose relative error is at most `tolerance`."""
        tails = self.S.square().flip(0).cumsum(0).flip(0).sqrt()  # tails[r] is left out at rank r
        return max(1, int((tails > tolerance * self.norm).sum()))

    def cut(self, rank: int) -> Truncated:
        """At `rank`, or at the rank that the matrix has where that is less."""
        root = self.S[:rank].sqrt()  # shared evenly, so that neither factor loses more when it is rounded
        worst = float(self.S[rank] / self.S[0]) if rank < len(self.S) and self.S[0] > 0 else 0.0
        return Truncated(root[:, None] * self.Vh[:rank], self.U[:, :rank] * root, self.left_out(rank), worst)


def spectrum(matrix: Tensor) -> Spectrum:
    """The decomposition of `matrix` (out, in)."""
    U, S, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return Spectrum(U, S, Vh)


def dora_update(W: Tensor, A: Tensor, B: Tensor, scale: float, magnitude: Tensor) -> Tensor:
    """m (W + s B A) / ||W + s B A|| - W, norms over each row (Liu et al. 2024, arXiv:2402.09353, equation 5).

    W (out, in), A (r, in), B (out, r), magnitude (out,). Of full rank in general: the rows of W are rescaled, but for
    those that are zero once adapted, which have no direction.
    """
    W = W.double()
    adapted = W + scale * B.double() @ A.double()
    return gains(magnitude.double(), adapted.norm(dim=1))[:, None] * adapted - W


def norm_of_product(B: Tensor, A: Tensor) -> float:
    """||B A||_F of B (out, r) and A (r, in): the r x r Gram matrices are enough."""
    B, A = B.double(), A.double()
    return math.sqrt(max(0.0, float(((B.T @ B) * (A @ A.T).T).sum())))


def relative_change(B: Tensor, A: Tensor, new_B: Tensor, new_A: Tensor) -> float:
    """||B A - B' A'||_F / ||B A||_F, where B' A' has the rank of B A or is padded with zeros; 0 where B A is 0."""
    r = A.shape[0]
    B, A, new_B, new_A = B.double(), A.double(), new_B[:, :r].double(), new_A[:r].double()
    whole = norm_of_product(B, A)
    # B A - B' A' = (B - B') A + B' (A - A'): no difference of large products.
    difference = norm_of_product(torch.cat([B - new_B, new_B], 1), torch.cat([A, A - new_A]))
    return difference / whole if whole else difference
