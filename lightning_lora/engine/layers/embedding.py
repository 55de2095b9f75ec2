"""nn.Embedding: A is looked up where the base looks up its rows, B takes what was found to the embedding's width."""

from __future__ import annotations

from collections.abc import Callable
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

    @staticmethod
    def initialise(A: Tensor, B: Tensor, init: Callable[[Tensor], object]) -> None:
        # As the reference code and PEFT: here A takes the place of the factor that starts at zero.
        nn.init.zeros_(A)
        nn.init.normal_(B)

    def update(self, x: Tensor) -> Tensor:  # (...) of indices -> (..., width)
        base: Any = self
        found = F.embedding(x, self.lora_A.T, base.padding_idx, scale_grad_by_freq=base.scale_grad_by_freq)
        update = F.linear(found, self.lora_B)
        # transformers' scaled embeddings (Gemma, BART) multiply what they look up; the update is scaled with it.
        factor = getattr(self, "embed_scale", None)
        return update if factor is None else update * factor

    def delta_weight(self) -> Tensor:  # (vocabulary, width)
        A, B = self.factors()
        return self.lora.scale * (B @ A).T
