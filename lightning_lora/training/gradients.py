"""The gradients of an open accumulation window: a checkpoint that is saved inside one has to hold them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lightning_lora.engine.sharded import is_sharded


class Trained:
    """The trained parameters of a module, found once: walking a large model takes a millisecond."""

    def __init__(self, module: nn.Module) -> None:
        self._parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}

    def version(self) -> int:
        """A number that changes when one of them does."""
        return sum(p._version for p in self._parameters.values())

    def gradients(self) -> dict[str, Tensor]:
        """Copies of all gradients; of a sharded one, of this process's part."""
        present = ((name, p.grad) for name, p in self._parameters.items() if p.grad is not None)
        return {name: (g.to_local() if is_sharded(g) else g).detach().clone() for name, g in present}  # type: ignore[attr-defined]

    def set_gradients(self, gradients: dict[str, Tensor]) -> None:
        """Put back what `gradients` returned."""
        for name, saved in gradients.items():
            if (parameter := self._parameters.get(name)) is None:
                continue
            gradient = saved.to(parameter.device).clone()
            if is_sharded(parameter):
                sharded: Any = parameter
                gradient = type(sharded.data).from_local(gradient, sharded.device_mesh, sharded.placements)
            parameter.grad = gradient
