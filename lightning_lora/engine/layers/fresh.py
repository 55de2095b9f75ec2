"""The tensors of a layer that is about to be adapted: drawn, or computed from its weight, by its initialiser."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.engine.config import LoRAConfig
from lightning_lora.engine.inits import INITS, Factors, Init, kaiming
from lightning_lora.engine.layers.base import BIAS, MAGNITUDE, START, Adapter, AdapterSpec
from lightning_lora.engine.layers.dora import output_norms
from lightning_lora.engine.sharded import whole
from lightning_lora.engine.storage import can_be_dense, dense, shape_of
from lightning_lora.errors import ConfigError, DataError, TargetError, listed

Measured = Mapping[str, Mapping[str, Tensor]]
"""What initialisers ask for that is measured: layer -> letter -> matrix (see `inits`)."""


def fresh_tensors(
    module: nn.Module,
    geometry: type[Adapter],
    spec: AdapterSpec,
    config: LoRAConfig,
    measured: Mapping[str, Tensor] | None = None,
    *,
    start: bool = True,
) -> dict[str, Tensor]:
    """The parameters and buffers that `swap` gives to `module`: an update of zero, but for an initialiser of `Whole`.

    Called inside of `drawing_on`, for the device of the layer. `measured` is what the initialiser asks for of this
    layer that is measured (see `inits`). Without `start` nothing is drawn or computed: A and B are zero, to be loaded
    or started later.
    """
    given = (measured or {}) if start else None
    if not spec.parameters:
        return _fresh(module, geometry, "weight", spec, config, given)
    made = (_fresh(module, geometry, name, part, config, given) for name, part in spec.parameters.items())
    return {name: tensor for tensors in made for name, tensor in tensors.items()}


def _fresh(
    module: nn.Module,
    geometry: type[Adapter],
    parameter: str,
    spec: AdapterSpec,
    config: LoRAConfig,
    measured: Mapping[str, Tensor] | None,
) -> dict[str, Tensor]:
    weight = _read(module, parameter)
    # A quantized weight is stored as integers; its adapters are float32.
    dtype = weight.dtype if weight.dtype.is_floating_point and weight.dtype.itemsize > 1 else torch.float32
    if config.adapter_dtype == "float32":
        dtype = torch.promote_types(dtype, torch.float32)
    shape_A, shape_B = geometry.shapes_of(module, parameter, spec.rank)
    if measured is None:
        A, B = torch.zeros(shape_A), torch.zeros(shape_B)
    else:
        A, B = _start(module, geometry, parameter, spec, config, measured)
    A, B = A.reshape(shape_A).to(dtype).contiguous(), B.reshape(shape_B).to(dtype).contiguous()
    tensors: dict[str, Tensor] = {"lora_A": nn.Parameter(A, not config.freeze_a), "lora_B": nn.Parameter(B)}
    if INITS[config.init].gives == "Factors":
        tensors |= {name: t.clone() for name, t in zip(START, (A, B))}
    if config.lora_bias:
        tensors[BIAS] = nn.Parameter(torch.zeros(shape_B[0], dtype=dtype))
    if config.use_dora:
        norms = output_norms(geometry, module, whole(dense(module, weight).detach()))
        tensors[MAGNITUDE] = nn.Parameter(norms.to(dtype))
    suffix = geometry.suffix_of(parameter)
    return {name + suffix: tensor for name, tensor in tensors.items()}


def tensor_shapes(
    module: nn.Module, geometry: type[Adapter], spec: AdapterSpec, config: LoRAConfig
) -> dict[str, tuple[int, ...]]:
    """The shapes of what `fresh_tensors` makes where the update starts at zero by itself, without making it."""
    shapes: dict[str, tuple[int, ...]] = {}
    for parameter, part in (spec.parameters or {"weight": spec}).items():
        suffix = geometry.suffix_of(parameter)
        A, B = geometry.shapes_of(module, parameter, part.rank)
        shapes |= {f"lora_A{suffix}": A, f"lora_B{suffix}": B}
        if config.lora_bias:
            shapes[BIAS + suffix] = B[:1]
        if config.use_dora:
            weight = module._parameters[parameter]
            assert weight is not None
            W = torch.empty(shape_of(weight), device="meta")
            shapes[MAGNITUDE + suffix] = tuple(geometry.by_output(module, W).shape[:-1])
    return shapes


def check_measured(config: LoRAConfig, names: Iterable[str], measured: Measured) -> None:
    """Raise ConfigError unless `measured` has what the initialiser asks for, of each layer in `names`, and DataError
    where that is not finite."""
    wants = INITS[config.init].measures
    names = list(names)
    lacking = [name for name in names if not wants <= measured.get(name, {}).keys()]
    if lacking:
        what, how = _MEASURED_BY[min(wants)]
        raise ConfigError(
            f"init={config.init!r} starts from {what}, which measured does not have for {listed(lacking)}. "
            f"LoRACallback measures it by itself; elsewhere, call inject(model, config, measured={how})."
        )
    broken = [name for name in names if not all(bool(measured[name][letter].isfinite().all()) for letter in wants)]
    if broken:
        raise DataError(f"What was measured at {listed(broken)} is not finite: the data, or the loss, is not.")


_MEASURED_BY = {
    "C": ("the inputs of each layer on some data", "calibrate(model, config, step, batches)"),
    "E": ("what quantization took from each weight", "residuals(model, config, weight_of)"),
    "G": ("the gradient of each weight on some data", "calibrate(model, config, step, batches)"),
}


def check_init(module: nn.Module, geometry: type[Adapter], spec: AdapterSpec, config: LoRAConfig) -> None:
    """Raise TargetError where the initialiser has no meaning for `module`; called before anything is changed."""
    init = INITS[config.init]
    if getattr(module, "groups", 1) != 1 and (init.computes or init.gives != "Tensor"):
        raise TargetError(
            f"init={config.init!r} starts from the matrix of a layer, and a convolution with groups={module.groups} "
            "has none that its A and B could change: leave it out with exclude_modules, or choose init='kaiming'"
        )
    if geometry.draws_b and init.measures & {"C", "G"}:
        raise TargetError(
            f"init={config.init!r} is measured on what goes into a layer, and into an embedding go indices: leave it "
            "out with exclude_modules"
        )
    if "W" in init.wants and not all(can_be_dense(module._parameters.get(p)) for p in spec.parameters or ("weight",)):
        raise TargetError(
            f"init={config.init!r} starts from the layer's weight, which is stored in a way that is not known here: "
            "choose one that draws, such as init='kaiming'"
        )


def _start(
    module: nn.Module,
    geometry: type[Adapter],
    parameter: str,
    spec: AdapterSpec,
    config: LoRAConfig,
    measured: Mapping[str, Tensor],
) -> tuple[Tensor, Tensor]:
    init = INITS[config.init]
    A, B = geometry.shapes_of(module, parameter, spec.rank)
    d_in, d_out = torch.Size(A[1:]).numel(), B[0]
    known: dict[str, Any] = {"rank": spec.rank, "scale": spec.scale, "d_in": d_in, "d_out": d_out, **measured}
    if "W" in init.wants:
        weight = module._parameters[parameter]
        assert weight is not None
        known["W"] = geometry.matrix(module, whole(dense(module, weight).detach())).to(torch.float32)
    if init.gives == "Tensor" and geometry.draws_b and not config.freeze_a:
        return torch.zeros(A), torch.randn(B)
    if init.gives == "Tensor" and not init.computes and A[0] == spec.rank:
        drawn = init.function(**{name: known[name] for name in init.wants})
        assert isinstance(drawn, Tensor)
        return drawn, torch.zeros(B)
    # One matrix, or a stack of them, of which each starts by itself.
    count = A[0] // spec.rank
    stack = [known.get("W")] if count == 1 else known.get("W", [None] * count)
    starts = [_started(init, {**known, "W": W}) for W in stack]
    each_A = starts[0][0] if count == 1 else torch.cat([A for A, _ in starts])
    if init.gives == "Tensor":
        return each_A, torch.zeros(B)  # in the shape of the geometry, which may have groups or a kernel
    return each_A, torch.stack([B for _, B in starts], dim=-1)


def _started(init: Init, known: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """A (rank, d_in) and B (d_out, rank) of one matrix."""
    rank, d_in, d_out = known["rank"], known["d_in"], known["d_out"]
    found = init.function(**{name: known[name] for name in init.wants})
    if not isinstance(found, Factors):
        found = Factors(A=found, B=torch.zeros(d_out, 0))
    missing = rank - found.A.shape[0]
    if not missing:
        return found.A, found.B
    more = torch.zeros(d_out, rank - found.B.shape[1])
    return torch.cat([found.A, kaiming(missing, d_in)]), torch.cat([found.B, more], dim=1)


def device_of(module: nn.Module, spec: AdapterSpec) -> torch.device:
    """Where the adapter of `module` comes into being: beside its weight."""
    return _read(module, next(iter(spec.parameters), "weight")).device


def _read(module: nn.Module, parameter: str) -> Tensor:
    """The parameter, or what a parametrization computes in its place."""
    p = module._parameters.get(parameter)
    weight = p if p is not None else getattr(module, parameter)
    assert isinstance(weight, Tensor)
    return weight


@contextmanager
def drawing_on(device: torch.device) -> Iterator[None]:
    """Lightning adapts models inside contexts that change the default device and precision, and in inference mode, in
    which nothing can be made that is trained; initialisers draw here."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    # A context that changes nothing would still slow every call in it down.
    there = nullcontext() if torch.get_default_device() == device else device
    try:
        with torch.inference_mode(False), torch.no_grad(), there:
            yield
    finally:
        torch.set_default_dtype(before)
