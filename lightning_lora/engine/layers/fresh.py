"""The tensors of a layer that is about to be adapted: drawn, or computed from its weight, by its initialiser."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.engine.config import LoRAConfig
from lightning_lora.engine.inits import INITS, Factors
from lightning_lora.engine.layers.base import BIAS, MAGNITUDE, START, Adapter, AdapterSpec
from lightning_lora.engine.layers.dora import output_norms
from lightning_lora.engine.storage import dense


def fresh_tensors(
    module: nn.Module,
    geometry: type[Adapter],
    spec: AdapterSpec,
    config: LoRAConfig,
    measured: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The parameters and buffers that `swap` gives to `module`, with an update of zero.

    `measured` are this layer's C and G, where the initialiser asks for them (see `inits`).
    """
    if not spec.parameters:
        return _fresh(module, geometry, "weight", spec, config, measured or {})
    made = (_fresh(module, geometry, name, part, config, measured or {}) for name, part in spec.parameters.items())
    return {name: tensor for tensors in made for name, tensor in tensors.items()}


def _fresh(
    module: nn.Module,
    geometry: type[Adapter],
    parameter: str,
    spec: AdapterSpec,
    config: LoRAConfig,
    measured: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    weight = getattr(module, parameter)
    assert isinstance(weight, Tensor)
    # A quantized weight is stored as integers; its adapters are float32.
    dtype = weight.dtype if weight.dtype.is_floating_point and weight.dtype.itemsize > 1 else torch.float32
    if config.adapter_dtype == "float32":
        dtype = torch.promote_types(dtype, torch.float32)
    shape_A, shape_B = geometry.shapes_of(module, parameter, spec.rank)
    with torch.inference_mode(False), torch.no_grad(), _drawing_on(weight.device):
        # What is made in inference mode can never be trained.
        start = _start(module, geometry, parameter, spec, config, measured)
        if isinstance(start, Factors):
            A, B = start.A.reshape(shape_A).to(dtype), start.B.reshape(shape_B).to(dtype)
        elif geometry.draws_b and not config.freeze_a:
            A, B = torch.zeros(shape_A, dtype=dtype), torch.randn(shape_B).to(dtype)
        else:
            A, B = start.reshape(shape_A).to(dtype), torch.zeros(shape_B, dtype=dtype)
        tensors: dict[str, Tensor] = {"lora_A": nn.Parameter(A, not config.freeze_a), "lora_B": nn.Parameter(B)}
        if isinstance(start, Factors):
            tensors |= {name: t.clone() for name, t in zip(START, (A, B))}
        if config.lora_bias:
            tensors[BIAS] = nn.Parameter(torch.zeros(shape_B[0], dtype=dtype))
        if config.use_dora:
            tensors[MAGNITUDE] = nn.Parameter(output_norms(geometry, module, dense(module, weight).detach()).to(dtype))
    suffix = geometry.suffix_of(parameter)
    return {name + suffix: tensor for name, tensor in tensors.items()}


def tensor_shapes(
    module: nn.Module, geometry: type[Adapter], rank: int, config: LoRAConfig
) -> dict[str, tuple[int, ...]]:
    """The shapes of what `fresh_tensors` makes where the update starts at zero by itself, without making it."""
    A, B = geometry.shapes(module, rank)
    shapes = {"lora_A": A, "lora_B": B}
    if config.lora_bias:
        shapes[BIAS] = B[:1]
    if config.use_dora:
        shapes[MAGNITUDE] = B[:1]
    return shapes


def _start(
    module: nn.Module,
    geometry: type[Adapter],
    parameter: str,
    spec: AdapterSpec,
    config: LoRAConfig,
    measured: Mapping[str, Tensor],
) -> Tensor | Factors:
    init = INITS[config.init]
    A, B = geometry.shapes_of(module, parameter, spec.rank)
    known: dict[str, Any] = {
        "rank": spec.rank,
        "scale": spec.scale,
        "d_in": torch.Size(A[1:]).numel(),
        "d_out": B[0],
        **measured,
    }
    if "W" in init.wants:
        known["W"] = geometry.matrix(module, getattr(module, parameter).detach()).to(torch.float32)
    count = A[0] // spec.rank
    if count == 1:
        return init.function(**{name: known[name] for name in init.wants})
    # A stack of matrices: each starts by itself.
    stack = known.pop("W", [None] * count)
    starts = [init.function(**{name: {**known, "W": W}[name] for name in init.wants}) for W in stack]
    if isinstance(starts[0], Factors):
        return type(starts[0])(A=torch.cat([f.A for f in starts]), B=torch.stack([f.B for f in starts], dim=-1))
    return torch.cat(starts)


@contextmanager
def _drawing_on(device: torch.device) -> Iterator[None]:
    """Lightning adapts models inside contexts that change the default device and precision; initialisers draw here."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)
