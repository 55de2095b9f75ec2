"""Intruder dimensions: strong directions of an adapted weight that its base does not have.

Shuttleworth et al. 2024, "LoRA vs full fine-tuning: an illusion of equivalence" (arXiv:2410.21228, algorithm 1), count
how many of the first left singular vectors of W + dW have a small cosine with every left singular vector of W. In their
models, adapters with more of them had forgotten more of what the base knew, and scaling them down gave some of it back.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_lora.engine.layers import Pair
from lightning_lora.engine.weights import can_be_dense
from lightning_lora.engine.weights import whole as gathered

COUNT = 10
"""How many of the first singular vectors of an adapted weight are looked at."""
THRESHOLD = 0.5
"""One is an intruder if its cosine with each of the base's is smaller."""
LIMIT = 1024
"""Weights whose smaller side is at most this are looked at: each takes two full SVDs."""


@dataclass(frozen=True)
class Intruders:
    """The intruder dimensions of one adapted weight (out, in)."""

    U: Tensor
    """Their left singular vectors (out, k), in float64; orthonormal to the rounding of float32."""
    S: Tensor
    """Their singular values (k), in float64, the largest first."""

    def __len__(self) -> int:
        return len(self.S)

    def scaled_in(self, B: Tensor, strength: float) -> Tensor:
        """B (out, r) with `strength` of what it writes along the intruders: B - (1 - strength) U U^T B, in float64."""
        B = B.double()
        return B - (1 - strength) * (self.U @ (self.U.mT @ B))


def directions(W: Tensor) -> Tensor:
    """The left singular vectors (out, n) of W (out, in) with a singular value above zero, in float32 on the CPU.

    They are the same for as long as the base is frozen, so a caller who asks again keeps them. A full SVD: 576 x 1536
    takes 0.4 s on one core, 2048 x 2048 takes 12 s, and eight times that for twice the size.
    """
    return _left(W)[0].cpu()


def intruders(base: Tensor, changed: Tensor, *, count: int = COUNT, threshold: float = THRESHOLD) -> Intruders:
    """Those of the first `count` left singular vectors of `changed` = W + dW (out, in) whose cosine with every one of
    `base`, the `directions` of W, is below `threshold`."""
    U, S = (t[..., :count].cpu().double() for t in _left(changed))
    cosines = torch.cat([U.new_zeros(1, len(S)), (base.double().mT @ U).abs()]).amax(0)
    return Intruders(U[:, cosines < threshold], S[cosines < threshold])


def intruder_dimensions(W: Tensor, changed: Tensor, *, count: int = COUNT, threshold: float = THRESHOLD) -> int:
    """How many intruder dimensions `changed` = W + dW (out, in) has among its first `count` left singular vectors.

    >>> import torch
    >>> from lightning_lora.engine.intruders import intruder_dimensions
    >>> W = torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.5]))
    >>> x = torch.tensor([[0.5], [0.5], [-0.5], [0.5]])  # at 60 degrees to each singular vector of W
    >>> intruder_dimensions(W, W + 20 * x @ x.T, count=1, threshold=0.6)
    1
    """
    return len(intruders(directions(W), changed, count=count, threshold=threshold))


def _left(M: Tensor) -> tuple[Tensor, Tensor]:
    """The left singular vectors of M whose singular values are more than the rounding of zeros, and these values."""
    U, S, _ = torch.linalg.svd((M if M.is_cuda else M.cpu()).float(), full_matrices=False)
    used = S.gt(max(M.shape) * torch.finfo(S.dtype).eps * S.max())
    return U[:, used], S[used]


# The weights of a model's pairs.


def is_one_matrix(pair: Pair) -> bool:
    """True if the pair changes one matrix whose numbers are known; not for groups of a convolution, for experts, or
    where a layer lays its weight out otherwise than its update."""
    W = pair.module.own(pair.parameter)
    if W is None or not can_be_dense(W):
        return False
    A, B = pair.module.matrices(pair.parameter)
    return A.shape[:-2].numel() == 1 and matrix_of_pair(pair).shape == (B.shape[-2], A.shape[-1])


def matrix_of_pair(pair: Pair, *, adapted: bool = False) -> Tensor:
    """The weight of a pair's layer as a matrix (out, in), without the adapter or with it, on the weight's device."""
    read = pair.module.adapted_weight if adapted else pair.module.dense_weight
    W: Tensor = pair.module.matrix(pair.module, gathered(read(pair.parameter).detach()))
    return W
