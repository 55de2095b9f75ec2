"""The fused step beside the formula, for the tests of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from rounding import Rounded
from torch import Tensor
from torch.nn import functional as F

from lightning_lora.engine import fused

SCALE = 0.7
RATES = [
    pytest.param((0.0, 0), id="none"),
    pytest.param((0.2, 0), id="positions"),
    pytest.param((0.4, 0), id="mask"),
    pytest.param((0.7, 0), id="mask-of-kept"),
    pytest.param((0.3, 4096), id="few"),
]
"""Dropout with what is drawn: nothing, positions, a mask, a mask from the positions that are kept, a mask at once."""
every_rate = pytest.mark.parametrize("p", RATES, indirect=True)
jvp_imports = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # what torch itself imports
both = pytest.mark.parametrize("way", ["linear", "add_update", "update"])


def tensors(*shape: int, dtype: torch.dtype = torch.float64, wants: str = "x base b A B", rank: int = 3) -> dict:
    """x of the given shape, and what goes with it: 6 outputs."""
    generator = torch.Generator().manual_seed(len(shape))
    size = {
        "x": shape,
        "base": (*shape[:-1], 6),
        "W": (6, shape[-1]),
        "b": (6,),
        "A": (rank, shape[-1]),
        "B": (6, rank),
    }
    made = {name: torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for name, s in size.items()}
    return {name: t.requires_grad_(name in wants.split()) for name, t in made.items()}


def call(way: str, t: dict[str, Tensor], p: float = 0.0) -> Tensor:
    if way == "linear":
        return fused.linear(t["x"], t["W"], t["b"], t["A"], t["B"], SCALE, p)
    if way == "update":
        return fused.update(t["x"], t["A"], t["B"], p)
    return fused.add_update(t["base"], t["x"], t["A"], t["B"], SCALE, p)


def formula(way: str, t: dict[str, Tensor], kept: Tensor | float = 1.0) -> Tensor:
    """By torch's own functions; `kept` is 0 where x is dropped and 1 / (1 - p) elsewhere."""
    update = (t["x"] * kept) @ t["A"].T @ t["B"].T
    base = F.linear(t["x"], t["W"], t["b"]) if way == "linear" else t["base"]
    return update if way == "update" else base + SCALE * update


USES = {"linear": ("x", "b", "A", "B"), "add_update": ("x", "base", "A", "B"), "update": ("x", "A", "B")}


def kept_by(seed: int, shape: tuple[int, ...], p: float) -> Tensor:
    """What dropout multiplies an input of that shape with, seen through identities."""
    torch.manual_seed(seed)
    ones, eye = torch.ones(shape, dtype=torch.float64), torch.eye(shape[-1], dtype=torch.float64)
    return fused.add_update(torch.zeros_like(ones), ones, eye, eye, 1.0, p)


def gradients(way: str, t: dict[str, Tensor], y: Tensor) -> dict[str, Tensor]:
    used = [n for n in USES[way] if t[n].requires_grad]
    return dict(zip(used, torch.autograd.grad(y, [t[n] for n in used], ramp(y))))


def ramp(y: Tensor) -> Tensor:
    """The gradient of y that `gradients` starts from."""
    return torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype)


def rounded(
    way: str, t: dict[str, Tensor], dtype: torch.dtype, weights: Tensor, kept: Tensor | float = 1.0
) -> dict[str, Rounded]:
    """The output "y" and the gradients of <weights, y>, as they may be where all is computed and stored in `dtype`.

    This is the formula, operation by operation: W x, with the bias; H = A x and B H, each rounded; its product with the
    scale; the sum. Backward, with G for the weights: G B, scaled, rounded, and its products with A and x.
    """
    given = {name: Rounded.of(t[name].flatten(0, -2) if name in ("x", "base") else t[name], dtype) for name in t}
    G, s = Rounded.of(weights.reshape(-1, weights.shape[-1]), dtype), 1.0 if way == "update" else SCALE
    kept = kept.double().reshape(given["x"].exact.shape) if isinstance(kept, Tensor) else kept
    x, A, B = given["x"] * kept, given["A"], given["B"]
    H, grad_H = x @ A.T, (G @ B) * s
    made = {
        "y": (H @ B.T) * s,
        "x": (grad_H @ A) * kept,
        "A": grad_H.T @ x,
        "B": (G.T @ H) * s,
        "base": G,
        "b": G.sum(0),
    }
    if way == "linear":
        base = given["x"] @ given["W"].T
        made["y"] += base + given["b"] if "b" in given else base
        made["x"] += G @ given["W"]
    elif way == "add_update":
        made["y"] += given["base"]
    shapes = {name: t[name].shape for name in t} | {"y": weights.shape}
    return {name: made[name].view(shapes[name]) for name in ("y", *USES[way]) if name in shapes}


def saved_by(function: Callable[[], Tensor], *apart_from: Tensor) -> int:
    """Elements of the tensors that autograd keeps."""
    kept: dict[int, int] = {}
    known = {t.data_ptr() for t in apart_from}

    def pack(t: Tensor) -> Tensor:
        if t.data_ptr() not in known:
            kept[t.data_ptr()] = t.untyped_storage().nbytes() // 4
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = function()
    del y
    return sum(kept.values())
