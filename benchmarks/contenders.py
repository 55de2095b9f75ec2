"""The same model, adapted in the ways that are compared: the same layers, rank, scale and first values everywhere."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import peft
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_lora.engine import LoRAConfig, adapters, inject

Step = Callable[[], Tensor]


@dataclass(frozen=True)
class Workload:
    """What is trained: a base, one batch that the base computes a loss from, and where the adapters go."""

    name: str
    base: Callable[[], nn.Module]
    """Makes the base in float32; its parameters are random."""
    loss: Callable[[nn.Module], Tensor]
    """Makes the loss of its batch; the first activations must require grad, or the limit has no backward pass."""
    targets: tuple[str, ...]
    """Endings of the names of the layers that are adapted."""
    dtype: torch.dtype = torch.float32
    rank: int = 8
    dropout: float = 0.0

    linear: bool = True
    """Whether all that is adapted is nn.Linear."""

    def with_(self, **changes: object) -> Workload:
        return replace(self, **changes)  # type: ignore[arg-type]

    def frozen_base(self) -> nn.Module:
        torch.manual_seed(0)
        return self.base().to(self.dtype).requires_grad_(False).train()

    def target_names(self, model: nn.Module) -> list[str]:
        return [name for name, _ in model.named_modules() if name.rpartition(".")[2] in self.targets]


# Ways to adapt: each takes a frozen base and returns what is trained. B is not zero, so that no gradient is.


def limit(base: nn.Module, workload: Workload) -> nn.Module:
    """No adapters: the base frozen, gradients flowing through its activations. Nothing that adapts it can be faster."""
    return base


def ours(base: nn.Module, workload: Workload, **config: object) -> nn.Module:
    inject(
        base,
        LoRAConfig(
            rank=workload.rank,
            alpha=2.0 * workload.rank,
            dropout=workload.dropout,
            target_modules=list(workload.targets),
            **config,  # type: ignore[arg-type]
        ),
    )
    for name, module in adapters(base):
        _fill(name, module.lora_A, module.lora_B)
    return base


def peft_default(base: nn.Module, workload: Workload, *, narrow: bool = False) -> nn.Module:
    config = peft.LoraConfig(
        r=workload.rank,
        lora_alpha=2 * workload.rank,
        lora_dropout=workload.dropout,
        target_modules=list(workload.targets),
    )
    model = peft.get_peft_model(base, config, autocast_adapter_dtype=not narrow)
    for name, module in model.base_model.model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            _fill(name, module.lora_A["default"].weight, module.lora_B["default"].weight)
    return model.train()


def peft_narrow(base: nn.Module, workload: Workload) -> nn.Module:
    """PEFT with autocast_adapter_dtype=False: adapters stored and trained in the base's dtype."""
    return peft_default(base, workload, narrow=True)


class TwoProducts(nn.Module):
    """LoRA as one writes it down: two more products, and a sum."""

    def __init__(self, layer: nn.Linear, name: str, workload: Workload) -> None:
        super().__init__()
        self.layer, self.dropout = layer, workload.dropout
        like = {"dtype": layer.weight.dtype, "device": layer.weight.device}
        self.A = nn.Parameter(torch.empty(workload.rank, layer.in_features, **like))
        self.B = nn.Parameter(torch.empty(layer.out_features, workload.rank, **like))
        _fill(name, self.A, self.B)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + 2.0 * F.linear(F.linear(F.dropout(x, self.dropout, self.training), self.A), self.B)


def two_products(base: nn.Module, workload: Workload) -> nn.Module:
    return _with_layers(base, workload, lambda name, layer: TwoProducts(layer, name, workload))


def litgpt(base: nn.Module, workload: Workload) -> nn.Module:
    from litgpt.lora import LoRALinear

    def adapted(name: str, layer: nn.Linear) -> nn.Module:
        sizes = layer.in_features, layer.out_features, workload.rank, 2 * workload.rank, workload.dropout
        new = LoRALinear(*sizes).to(layer.weight.dtype)
        new.linear = layer
        _fill(name, new.lora_A, new.lora_B)
        return new

    return _with_layers(base, workload, adapted)


def _with_layers(base: nn.Module, workload: Workload, adapted: Callable[[str, nn.Linear], nn.Module]) -> nn.Module:
    for name in workload.target_names(base):
        parent, _, child = name.rpartition(".")
        layer = base.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        setattr(base.get_submodule(parent), child, adapted(name, layer))
    return base


@torch.no_grad()
def _fill(name: str, A: Tensor, B: Tensor) -> None:
    """The same values for the layer called `name` whoever adapts it."""
    generator = torch.Generator().manual_seed(sum(name.encode()))
    for factor in (A, B):
        factor.copy_(torch.randn(factor.shape, generator=generator).mul_(0.02))


def training_step(model: nn.Module, workload: Workload) -> Step:
    """Forward, backward, and a step of AdamW on what is trained."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True) if trained else None

    def step() -> Tensor:
        loss = workload.loss(model)
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        return loss.detach()

    return step


def copies(workload: Workload, ways: dict[str, Callable[[nn.Module, Workload], nn.Module]]) -> dict[str, nn.Module]:
    """The base of `workload` adapted in each way."""
    base = workload.frozen_base()
    return {name: way(copy.deepcopy(base), workload) for name, way in ways.items()}
