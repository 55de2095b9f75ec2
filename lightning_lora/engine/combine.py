"""Combines the pairs that several adapters have for one module into one pair.

Adapter i changes the weight by dW_i = s_i B_i A_i. It enters with a weight w_i, as the task vector w_i dW_i (Ilharco et
al. 2023, arXiv:2212.04089: to add them is task arithmetic, w = -1 is negation). All methods work on these products.
None adds up the factors themselves, as PEFT's "linear" does: (B_1 + B_2)(A_1 + A_2) has the terms B_1 A_2 and B_2 A_1,
which no adapter learned.

    sum         sum w_i dW_i, exact, of rank sum r_i
    svd         the best approximation of that sum of rank r (Eckart and Young 1936); no dW is formed
    ties        trim, elect sign, disjoint mean (Yadav et al. 2023, arXiv:2306.01708), cut to rank r
    dare        drop and rescale, then add (Yu et al. 2024, arXiv:2311.03099), cut to rank r
    dare_ties   drop and rescale, then elect sign and disjoint mean, cut to rank r

An adapter that does not adapt the module has no term: it adds zero to a sum, and is not counted in a disjoint mean, as
the paper does not count an entry that was trimmed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from lightning_lora.engine.low_rank import Spectrum, product_norm, spectrum, spectrum_of_product


@dataclass(frozen=True)
class Term:
    """The change that one adapter makes to a module's weight: weight * scale * B A. Leading dimensions, the groups of a
    convolution, have a product each."""

    A: Tensor  # (..., r, in)
    B: Tensor  # (..., out, r)
    scale: float
    weight: float

    def dense(self) -> Tensor:  # (..., out, in)
        """The product, in float32 or wider."""
        dtype = torch.promote_types(torch.promote_types(self.A.dtype, self.B.dtype), torch.float32)
        return self.weight * self.scale * (self.B.to(dtype) @ self.A.to(dtype))


@dataclass(frozen=True)
class Combined:
    """The combination as one pair; B A includes the scale."""

    A: Tensor  # (..., r, in)
    B: Tensor  # (..., out, r)
    norm: float
    """Frobenius norm of the combination before it was cut to rank r."""
    error: float
    """Frobenius norm of the part that was cut off, relative to `norm`."""


def combine(
    terms: Sequence[Term],
    method: str,
    *,
    rank: int | None = None,
    density: float = 1.0,
    generator: Generator | None = None,
) -> Combined:
    """The combination of `terms`, of one module, by a method of METHODS.

    `rank` is the highest rank of the result, by default the largest among the terms; "sum" ignores it. `density` is the
    share of the entries of each dW that "ties" and "dare" keep. `generator` (on the CPU) draws the dropped entries.
    """
    if method == "sum":
        return concatenated(terms)
    rank = rank or max(term.A.shape[-2] for term in terms)
    if method == "svd":
        return compressed(terms, rank)
    return _cut(spectrum(DENSE[method](terms, density, generator)), rank)


# These work on the factors, in float64, since factors are small.


def concatenated(terms: Sequence[Term]) -> Combined:
    """sum w s B A = [w_1 s_1 B_1, w_2 s_2 B_2, ...] [A_1; A_2; ...]: exact."""
    A = torch.cat([term.A.double() for term in terms], dim=-2)
    B = torch.cat([term.weight * term.scale * term.B.double() for term in terms], dim=-1)
    return Combined(A, B, product_norm(B, A), error=0.0)


def compressed(terms: Sequence[Term], rank: int) -> Combined:
    """The best approximation of the sum of rank `rank`."""
    whole = concatenated(terms)
    return _cut(spectrum_of_product(whole.B, whole.A), rank)


# These work on dW itself, one module at a time, in float32 or wider.


def ties(terms: Sequence[Term], density: float, generator: Generator | None = None) -> Tensor:
    """Trim each w_i dW_i, then `disjoint_mean` (arXiv:2306.01708, algorithm 1).

    The paper's lambda is a factor in the weights of all terms. Entries are trimmed module by module, not over the
    whole model.
    """
    return disjoint_mean(torch.stack([trimmed(term.dense(), density) for term in terms]))


def dare(terms: Sequence[Term], density: float, generator: Generator | None = None) -> Tensor:
    """The sum of w_i dW_i with entries dropped at random and the others rescaled (arXiv:2311.03099)."""
    return torch.stack([dropped(term.dense(), density, generator) for term in terms]).sum(0)


def dare_ties(terms: Sequence[Term], density: float, generator: Generator | None = None) -> Tensor:
    """As `ties`, with `dropped` in the place of `trimmed`: DARE before another method of merging (arXiv:2311.03099)."""
    return disjoint_mean(torch.stack([dropped(term.dense(), density, generator) for term in terms]))


DENSE: dict[str, Callable[[Sequence[Term], float, Generator | None], Tensor]] = {
    "ties": ties,
    "dare": dare,
    "dare_ties": dare_ties,
}
"""The methods that work on dW itself and take a density."""
METHODS = ("sum", "svd", *DENSE)


def trimmed(matrix: Tensor, density: float) -> Tensor:
    """`matrix` with all but the share `density` of its entries, the largest in magnitude, set to zero."""
    entries = matrix.flatten()
    kept = entries.abs().topk(max(1, round(density * len(entries)))).indices
    return torch.zeros_like(entries).index_copy_(0, kept, entries[kept]).view_as(matrix)


def dropped(matrix: Tensor, density: float, generator: Generator | None = None) -> Tensor:
    """`matrix` with each entry kept with probability `density` and divided by it, else zero: the same on average."""
    kept = torch.rand(matrix.shape, generator=generator) < density
    return torch.where(kept, matrix / density, 0.0)


def disjoint_mean(matrices: Tensor) -> Tensor:  # (terms, ...) -> (...)
    """For each entry, the mean over those matrices whose value has the sign of the sum over all matrices; zero where
    that sum is zero (arXiv:2306.01708, algorithm 1)."""
    agrees = matrices.sign() == matrices.sum(0).sign()
    return torch.where(agrees, matrices, 0.0).sum(0) / agrees.sum(0).clamp(min=1)


def _cut(whole: Spectrum, rank: int) -> Combined:
    cut = whole.cut(rank)
    return Combined(cut.A, cut.B, whole.norm, cut.error)
