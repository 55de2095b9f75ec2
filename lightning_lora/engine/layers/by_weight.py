"""Layers that are adapted by their weight: the base class's forward reads W + s B A in place of W.

That is right for every forward, and costs the memory and the time of one more weight. So it is used only where an
update added to the output might be something else: for a Linear that masks or normalises its weight, for example.
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_lora.engine.layers.base import Adapter
from lightning_lora.errors import TargetError


class ByWeight(Adapter):
    """A variant of a geometry. Dropout zeroes columns of A, drawn once per forward, since the layer's input is not
    known here; the mean is that of dropout on the input."""

    lora_by_weight = True

    def factors(self, parameter: str = "weight", *, dropped: bool = True) -> tuple[Tensor, Tensor]:
        A, B = super().factors(parameter, dropped=dropped)
        return (A * kept_columns(A[:1], self.lora.dropout) if dropped and self.training and self.lora.dropout else A), B

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_forward(*args, **kwargs)


@functools.lru_cache(maxsize=64)
def by_weight(geometry: Any) -> Any:
    """`geometry`, adapted by its weight."""
    if geometry.lora_by_weight:
        return geometry
    return type(f"{geometry.__name__}ByWeight", (ByWeight, geometry), {"__module__": geometry.__module__})


def kept_columns(row: Tensor, p: float) -> Tensor:
    """Draw this forward's dropout of A's columns: a factor for each, in the shape of `row`, a row of A. It is 0 if the
    column is dropped, else above 1 so that the mean is 1."""
    return F.dropout(torch.ones_like(row), p)


def adds_its_update(module: nn.Module, multiply: Any, width: int) -> bool:
    """True if adding D to the weight adds the product of x and D to the output: tried in a copy of `module`.

    False if it cannot be tried, and for a forward with further arguments, of which the trial sees the defaults alone.
    The class's other tensors (a mask, a gain) are tried with other values too. Raises TargetError if the weight makes
    no difference to the output. `multiply(x, D)` is the product for weights laid out as in this class; x is (...,
    width).
    """
    forward: Any = type(module).forward
    device = module._parameters["weight"].device  # type: ignore[union-attr]
    if device.type == "meta":
        return False
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), torch.no_grad(), torch.inference_mode(False):
        try:
            tried: Any = copy.deepcopy(module).float()
        except Exception:  # what cannot be copied cannot be tried
            return False
        W = tried._parameters["weight"]
        own = (*tried.named_parameters(), *tried.named_buffers())
        others = [tensor for name, tensor in own if name not in ("weight", "bias")]
        generator = torch.Generator(W.device).manual_seed(0)
        draw = functools.partial(torch.randn, generator=generator, device=W.device)
        direction = draw(W.shape) * W.abs().amax().clamp(min=1.0)
        for shape in ((2, width), (2, 3, width)):
            x = draw(shape)
            for training, are_changed in itertools.product((False, True), (False, True) if others else (False,)):
                tried.train(training)
                if are_changed:  # a mask, or a gain, of ones says nothing of what it will do
                    _change(others, draw)

                def output(change: Tensor, x: Tensor = x) -> Tensor:
                    torch.default_generator.manual_seed(0)
                    for own in cuda:
                        torch.cuda.default_generators[own.index or 0].manual_seed(0)
                    tried._parameters["weight"] = nn.Parameter(W + change, requires_grad=False)
                    with torch.autocast(W.device.type, enabled=False):
                        y: Tensor = forward(tried, x)
                    return y

                try:
                    base = output(torch.zeros_like(W))
                    # A D as large as W shows masks and norms, a small one shows that the weight is rounded. Rounding in
                    # float32, of about sqrt(k) eps |W| |x|, is 1e-6 of the change that the large D makes and 1e-4 of
                    # the change by the small one; a single masked number of W makes a larger difference.
                    for size, share in ((1.0, 2e-4), (2.0**-6, 2e-3)):
                        D = size * direction
                        expected, changed = multiply(x, D), output(D) - base
                        if size == 1.0 and not are_changed and not bool(changed.any()):
                            raise TargetError(
                                f"the forward of {type(module).__name__} gives the same output with another weight, so "
                                "an adapter of its weight would have no effect: leave it out with exclude_modules"
                            )
                        if changed.shape != expected.shape:
                            return False
                        if not (changed - expected).abs().amax() <= share * expected.abs().amax():
                            return False
                except TargetError:
                    raise
                except Exception:  # it does not take an input of this shape
                    break
            else:
                return len(inspect.signature(forward).parameters) == 2  # self and x
    return False


def _change(tensors: list[Tensor], draw: Any) -> None:
    """Scale each number by 0.5 to 1.5; set about half of those that are no floats to zero."""
    for tensor in tensors:
        noise = draw(tensor.shape)
        tensor.data.mul_(0.5 + noise.sigmoid() if tensor.is_floating_point() else (noise > 0).to(tensor.dtype))
