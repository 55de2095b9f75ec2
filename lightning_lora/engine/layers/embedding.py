"""nn.Embedding: A is looked up where the base looks up its rows, B takes what was found to the embedding's width."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from lightning_lora.engine.layers.base import Adapter, AdapterSpec, has_own_forward
from lightning_lora.errors import TargetError


class EmbeddingLoRA(Adapter, adapts=nn.Embedding):
    """A is (rank, vocabulary), B is (width, rank); the weight's change is the transpose of B A.

    There is no dropout, as in the reference code: indices cannot be dropped.
    """

    @classmethod
    def check(cls, module: Any, spec: AdapterSpec) -> None:
        if has_own_forward(type(module)) and not hasattr(module, "embed_scale"):
            raise TargetError(
                "its class has a forward of its own, so its input need not be the indices that it looks up (learned "
                "positions in transformers, for example): leave it out with exclude_modules"
            )
        if module.max_norm is not None:
            raise TargetError(
                "an embedding with max_norm rewrites its weight in every forward, so it cannot stay frozen: "
                "leave it out with exclude_modules"
            )

    @staticmethod
    def shapes(module: nn.Embedding, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (rank, module.num_embeddings), (module.embedding_dim, rank)

    # As the reference code and PEFT: here A takes the place of the factor that starts at zero.
    draws_b = True

    @staticmethod
    def matrix(module: Any, W: Tensor) -> Tensor:
        return W.T

    @staticmethod
    def from_matrix(module: Any, M: Tensor) -> Tensor:
        return M.T

    def update(self, x: Tensor) -> Tensor:  # (...) of indices -> (..., width)
        base: Any = self
        A, B = self.factors()
        found = F.embedding(x, A.T, base.padding_idx, scale_grad_by_freq=base.scale_grad_by_freq)
        update = F.linear(found, B)
        # transformers' scaled embeddings (Gemma, BART) multiply what they look up; the update is scaled with it.
        factor = getattr(self, "embed_scale", None)
        return update if factor is None else update * factor
