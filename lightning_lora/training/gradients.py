"""The gradients of an open accumulation window: a checkpoint that is saved inside one has to hold them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lightning_lora.engine.sharded import is_sharded


def _trained(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in module.named_parameters() if p.requires_grad]


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """Copies of all gradients; of a sharded one, of this process's part."""
    present = ((name, p.grad) for name, p in _trained(module) if p.grad is not None)
    return {name: (g.to_local() if is_sharded(g) else g).detach().clone() for name, g in present}  # type: ignore[attr-defined]


def set_gradients(module: nn.Module, gradients: dict[str, Tensor]) -> None:
    for name, parameter in _trained(module):
        if name in gradients:
            gradient = gradients[name].to(parameter.device)
            if is_sharded(parameter):
                p: Any = parameter
                gradient = type(p.data).from_local(gradient, p.device_mesh, p.placements)
            parameter.grad = gradient.clone()


def versions(module: nn.Module) -> int:
    """A number that changes when a trained parameter does."""
    return sum(p._version for _, p in _trained(module))
