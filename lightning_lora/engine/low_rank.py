"""Computes norms, singular values and ranks of a low-rank product B A, and cuts it to a lower rank.

The product itself is never formed. With B = Q_B R_B and A^T = Q_A R_A (QR), the singular values of B A are those of
R_B R_A^T, a matrix as small as the rank. Gram matrices B^T B would be cheaper, and lose half of the digits where parts
of a product cancel. Leading dimensions, the groups of a convolution, are blocks of one large matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Cut:
    """The best approximation B A, of some rank r, of a matrix (Eckart and Young 1936), and what it leaves out."""

    A: Tensor  # (..., r, in)
    B: Tensor  # (..., out, r)
    error: float
    """Frobenius norm of the part that is left out, relative to that of the whole; 0 for a matrix of zeros."""
    worst: float
    """The largest singular value that is left out, relative to the largest of all: the largest error of an output over
    all inputs of one length, relative to the largest output."""


@dataclass(frozen=True)
class Spectrum:
    """The singular value decomposition of a matrix (..., out, in)."""

    U: Tensor
    S: Tensor
    Vh: Tensor

    @property
    def norm(self) -> float:
        """The Frobenius norm."""
        return float(self.S.norm())

    def left_out(self, rank: int) -> float:
        """Frobenius norm of what a cut at `rank` leaves out, relative to that of the whole; 0 for a matrix of zeros."""
        return float(self.S[..., rank:].norm()) / (self.norm or 1.0)

    def rank_for(self, tolerance: float) -> int:
        """The smallest rank, at least 1, at which a cut leaves out at most the share `tolerance` of the norm."""
        return rank_for(self.S, tolerance)

    def cut(self, rank: int) -> Cut:
        """Cut the matrix at `rank`, or at its own rank if that is smaller."""
        root = self.S[..., :rank].sqrt()  # A and B share S evenly, so that neither loses more when it is rounded
        tail = self.S[..., rank:]
        return Cut(
            A=root[..., :, None] * self.Vh[..., :rank, :],
            B=self.U[..., :, :rank] * root[..., None, :],
            error=self.left_out(rank),
            worst=float(tail.max() / self.S.max()) if bool(tail.any()) else 0.0,
        )


def spectrum(matrix: Tensor) -> Spectrum:
    """The decomposition of `matrix` (..., out, in), in its own precision.

    By a full SVD (4096 x 4096: about 15 s on one core). A randomised SVD is faster, but its error is unknown for a
    spectrum as flat as trimming and dropping make it.
    """
    return Spectrum(*torch.linalg.svd(matrix, full_matrices=False))


def spectrum_of_product(B: Tensor, A: Tensor) -> Spectrum:
    """The decomposition of B A, for B (..., out, r) and A (..., r, in)."""
    Q_B, R_B = torch.linalg.qr(B)
    Q_A, R_A = torch.linalg.qr(A.mT)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.mT, full_matrices=False)
    return Spectrum(Q_B @ U, S, Vh @ Q_A.mT)


def rank_for(S: Tensor, tolerance: float) -> int:
    """The smallest rank, at least 1, at which cuts leave out at most the share `tolerance` of the Frobenius norm. S
    (..., r) has the singular values of one matrix, or of several that get one rank, each from the largest down."""
    squares = S.square().reshape(-1, S.shape[-1]).sum(0)
    tails = squares.flip(0).cumsum(0).flip(0).sqrt()  # tails[r] is left out at rank r
    return max(1, int((tails > tolerance * S.norm()).sum()))


def singular_values(B: Tensor, A: Tensor) -> Tensor:
    """The singular values of B A, the largest first, in float64; of all blocks if B and A are stacks."""
    return block_singular_values(B, A).flatten().sort(descending=True).values


def block_singular_values(B: Tensor, A: Tensor) -> Tensor:
    """The singular values (..., r) of each product B A of a stack, the largest first, in float64."""
    return torch.linalg.svdvals(_core(B.double(), A.double()))


def product_norm(B: Tensor, A: Tensor) -> float:
    """||B A||_F."""
    return float(_core(B.double(), A.double()).norm())


def product_change(B: Tensor, A: Tensor, new_B: Tensor, new_A: Tensor) -> float:
    """||B A - B' A'||_F. If B' A' has more ranks than B A, the further ones must be zero, as in a padded file."""
    missing = A.shape[-2] - new_A.shape[-2]  # where it is negative, `pad` takes the further ranks away
    new_B, new_A = F.pad(new_B.double(), (0, missing)), F.pad(new_A.double(), (0, 0, 0, missing))
    B, A = B.double(), A.double()
    # (B - B') A + B' (A - A'): no difference of products, so factors that are equal give 0.
    return product_norm(torch.cat([B - new_B, new_B], dim=-1), torch.cat([A, A - new_A], dim=-2))


def effective_rank(singular_values: Tensor) -> float:
    """exp of the entropy of the singular values as shares of their sum (Roy and Vetterli 2007, "The effective rank",
    EUSIPCO). It is r if r of them are equal and the others 0; 0 for a matrix of zeros.

    >>> import torch
    >>> from lightning_lora.engine import effective_rank
    >>> round(effective_rank(torch.tensor([2.0, 2.0, 2.0, 0.0])), 6)
    3.0
    """
    return float(effective_ranks(singular_values))


def stable_rank(singular_values: Tensor) -> float:
    """||M||_F^2 / ||M||_2^2, from the singular values of M (Rudelson and Vershynin 2007, arXiv:math/0503442); 0 for a
    matrix of zeros.

    >>> import torch
    >>> from lightning_lora.engine import stable_rank
    >>> stable_rank(torch.tensor([2.0, 1.0, 0.0]))
    1.25
    """
    return float(stable_ranks(singular_values))


# The same for many products at once, each a row of singular values.


def effective_ranks(S: Tensor) -> Tensor:
    """`effective_rank` of each row of S (..., r)."""
    shares = S / S.sum(-1, keepdim=True)
    return torch.where(S.sum(-1) == 0, 0.0, torch.exp(-torch.xlogy(shares, shares).sum(-1)))


def stable_ranks(S: Tensor) -> Tensor:
    """`stable_rank` of each row of S (..., r)."""
    return torch.where(S.sum(-1) == 0, 0.0, (S / S.amax(-1, keepdim=True)).square().sum(-1))


def energy_shares(S: Tensor) -> Tensor:
    """The share of the squared Frobenius norm that each singular value has, for rows S (..., r); 0 for zeros."""
    energy = S.square()
    return torch.where(energy.sum(-1, keepdim=True) == 0, 0.0, energy / energy.sum(-1, keepdim=True))


def quarter_shares(S: Tensor) -> tuple[Tensor, Tensor]:
    """The shares of the squared Frobenius norm in the largest quarter of the singular values, and in the smallest one,
    for rows S (..., r)."""
    shares, count = energy_shares(S), max(1, S.shape[-1] // 4)
    return shares[..., :count].sum(-1), shares[..., -count:].sum(-1)


def stacked_singular_values(B: Tensor, A: Tensor) -> Tensor:
    """The singular values (n, r) of each product of the stacks B (n, out, r) and A (n, r, in), the largest first, on
    the CPU, in the precision of the factors (float32 at least); NaN for a product that is not finite.

    For many products at once this takes a quarter of the time of as many calls of `singular_values`.
    """
    dtype = torch.promote_types(A.dtype, torch.float32)
    core = _core(B.detach().to("cpu", dtype), A.detach().to("cpu", dtype))
    is_finite = core.isfinite().all(-1).all(-1)
    values = torch.linalg.svdvals(core.where(is_finite[:, None, None], 0.0))
    return values.where(is_finite[:, None], torch.nan)


# Compares an update with another one, and with the weight that it changes.


def product_cosine(B: Tensor, A: Tensor, B2: Tensor, A2: Tensor) -> float:
    """The cosine of the angle between B A and B2 A2 as vectors: <B A, B2 A2> / (||B A|| ||B2 A2||); 0 where one of them
    is zero. The products themselves are not formed."""
    B, A, B2, A2 = B.double(), A.double(), B2.double(), A2.double()
    norms = product_norm(B, A) * product_norm(B2, A2)
    return float(((B.mT @ B2) * (A @ A2.mT)).sum()) / norms if norms else 0.0


def subspace_similarity(U: Tensor, V: Tensor) -> Tensor:
    """phi(i, j) = ||U_i^T V_j||_F^2 / min(i, j) for the first i columns of U (d, I) and the first j of V (d, J), which
    are orthonormal: 1 if the smaller span lies in the larger one, 0 if they are at right angles (Hu et al. 2021,
    arXiv:2106.09685, section 7.2). Returns (I, J); two random subspaces give max(i, j) / d.

    >>> import torch
    >>> from lightning_lora.engine.low_rank import subspace_similarity
    >>> subspace_similarity(torch.eye(4)[:, :2], torch.eye(4)[:, [0, 2]]).tolist()
    [[1.0, 1.0], [1.0, 0.5]]
    """
    overlap = (U.mT @ V).square().cumsum(0).cumsum(1)
    i, j = (torch.arange(1, n + 1, device=U.device) for n in overlap.shape)
    return overlap / torch.minimum(i[:, None], j[None, :])


def strength_within(W: Tensor, U: Tensor, Vh: Tensor) -> float:
    """||U^T W V||_F: how strong W (out, in) is along the directions U (out, r) and Vh (r, in) of an update (Hu et al.
    2021, section 7.3). Random directions give about r ||W||_F / sqrt(out * in)."""
    return float((U.mT.double() @ W.double() @ Vh.mT.double()).norm())


def _core(B: Tensor, A: Tensor) -> Tensor:
    """R_B R_A^T, whose singular values are those of B A."""
    return torch.linalg.qr(B, mode="r").R @ torch.linalg.qr(A.mT, mode="r").R.mT
