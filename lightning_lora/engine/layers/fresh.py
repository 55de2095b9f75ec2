"""Plans the adapter of a layer, and makes its A and B: the initialiser draws them or computes them from W."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.engine.config import LoRAConfig
from lightning_lora.engine.inits import INITS, MEASURES, Factors, Init, kaiming
from lightning_lora.engine.layers.base import Adapter
from lightning_lora.engine.layers.dora import output_norms
from lightning_lora.engine.layers.pair import BIAS, FACTORS, MAGNITUDE, START, AdapterSpec
from lightning_lora.engine.memory import largest, too_large
from lightning_lora.engine.tree import Target
from lightning_lora.engine.weights import can_be_dense, dense, dtype_of, is_plain, shape_of, whole
from lightning_lora.errors import ConfigError, DataError, TargetError, listed

Measured = Mapping[str, Mapping[str, Tensor]]
"""Measurements that some initialisers need: layer name -> the measure's name (C, G or E; see inits.py) -> matrix."""


class Recipe:
    """How to make the adapter of one parameter: shapes, dtype and initialiser.

    One recipe serves all layers of one `Kind`."""

    def __init__(
        self, module: nn.Module, geometry: type[Adapter], parameter: str, spec: AdapterSpec, config: LoRAConfig
    ) -> None:
        weight = _read(module, parameter)
        self.device = weight.device
        self.computes_in = dtype_of(weight)
        # A quantized weight is stored as integers; its adapters are float32.
        dtype = weight.dtype if is_plain(weight) else torch.float32
        self.dtype = torch.promote_types(dtype, torch.float32) if config.adapter_dtype == "float32" else dtype
        self.geometry, self.parameter, self.spec, self.config = geometry, parameter, spec, config
        self.init = INITS[config.init]
        self.shape_A, self.shape_B = geometry.shapes_of(module, parameter, spec.rank)
        self.names = [name + geometry.suffix_of(parameter) for name in (*FACTORS, *START, BIAS, MAGNITUDE)]

    @property
    def d_in(self) -> int:
        return math.prod(self.shape_A[1:])

    def is_wasteful(self, groups: int) -> bool:
        """True if the rank is above the smaller side of the matrix (of each group's)."""
        B = self.shape_B
        return self.spec.rank // groups > min(self.d_in, B[0] // groups * math.prod(B[2:]))

    def tensors(self, module: nn.Module, measured: Mapping[str, Tensor] | None, name: str) -> dict[str, Tensor]:
        """Make the adapter tensors of `module`, by name; errors call the module `name`. If `measured` is None, nothing
        is drawn or computed: A and B are zero."""
        config, (name_A, name_B, *start, bias, magnitude) = self.config, self.names
        if measured is None:
            A, B = torch.zeros(self.shape_A), torch.zeros(self.shape_B)
        else:
            A, B = self._start(module, measured)
            if self.init.computes or self.init.gives != "Tensor":
                self._check_start(A, B, name)
        A, B = (t.reshape(s).to(self.dtype).contiguous() for t, s in ((A, self.shape_A), (B, self.shape_B)))
        tensors: dict[str, Tensor] = {name_A: nn.Parameter(A, not config.freeze_a), name_B: nn.Parameter(B)}
        if self.init.gives == "Factors":
            tensors |= {name: t.clone() for name, t in zip(start, (A, B))}
        if config.lora_bias:
            tensors[bias] = nn.Parameter(torch.zeros(self.shape_B[0], dtype=self.dtype))
        if config.use_dora:
            W = whole(dense(module, _read(module, self.parameter)).detach())
            # Not in 16 bits: a rounded magnitude, divided by the norm, would not be 1.
            wide = torch.promote_types(self.dtype, torch.float32)
            tensors[magnitude] = nn.Parameter(output_norms(self.geometry, module, W).to(wide))
        return tensors

    def shapes(self, module: nn.Module) -> dict[str, tuple[int, ...]]:
        """The shapes of what `tensors` makes for `module`, by name, without a frozen start; makes no tensor."""
        name_A, name_B, *_, bias, magnitude = self.names
        shapes = {name_A: self.shape_A, name_B: self.shape_B}
        if self.config.lora_bias:
            shapes[bias] = self.shape_B[:1]
        if self.config.use_dora:
            W = torch.empty(shape_of(_read(module, self.parameter)), device="meta")
            shapes[magnitude] = tuple(self.geometry.by_output(module, W).shape[:-1])
        return shapes

    def _check_start(self, A: Tensor, B: Tensor, name: str) -> None:
        """Raise if A or B is not finite, or if scale * B A overflows in the dtype of the layer or of the factors."""
        narrow = min((self.computes_in, self.dtype), key=largest)
        found = too_large(A, B if B.numel() else B.new_zeros(1, 1), self.spec.scale, narrow)
        if found is not None:
            error, whence = (DataError, "what was measured") if self.init.measures else (TargetError, "its weight")
            raise error(
                f"init={self.config.init!r} gives {name!r} {found}: check {whence}, or choose init='kaiming', which "
                "draws A and needs no data or weight."
            )

    def _start(self, module: nn.Module, measured: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        init, spec, A, B = self.init, self.spec, self.shape_A, self.shape_B
        if init.gives == "Tensor" and self.geometry.draws_b and not self.config.freeze_a:
            return torch.zeros(A), torch.randn(B)
        known: dict[str, Any] = {"rank": spec.rank, "scale": spec.scale, "d_in": self.d_in, "d_out": B[0], **measured}
        if "W" in init.wants:
            weight = module._parameters[self.parameter]
            assert weight is not None
            known["W"] = self.geometry.matrix(module, whole(dense(module, weight).detach())).to(torch.float32)
        # One matrix, or a stack of matrices (experts), each started by itself.
        count = A[0] // spec.rank
        stack = [known.get("W")] if count == 1 else known.get("W", [None] * count)
        starts = [_started(init, {**known, "W": W}) for W in stack]
        each_A = starts[0][0] if count == 1 else torch.cat([A for A, _ in starts])
        if init.gives == "Tensor":
            return each_A, torch.zeros(B)  # B as the geometry shapes it, which may have groups or a kernel
        return each_A, torch.stack([B for _, B in starts], dim=-1)


@dataclass(frozen=True, eq=False)
class Kind:
    """The plan for a group of targets that differ only in their names and in the values of their tensors."""

    geometry: type[Adapter]
    mixin: Any
    """What `adapt` puts in front of the module's class: the geometry, or variants and the geometry."""
    spec: AdapterSpec
    recipes: Sequence[Recipe]
    """One for the module's output, or one for each parameter that is adapted."""
    device: torch.device
    """The device on which A and B are made: that of the weight."""
    is_on_meta: bool
    """True if a parameter of the targets is on the meta device."""
    wasteful: tuple[str | None, ...]
    """The parameters whose rank is above their smaller side; None stands for the module's output."""

    @staticmethod
    def of(
        module: nn.Module,
        geometry: type[Adapter],
        spec: AdapterSpec,
        config: LoRAConfig,
        variants: tuple[type[Adapter], ...] = (),
    ) -> Kind:
        """The plan for `module`. Raises TargetError if the initialiser or the scale cannot be used for it."""
        _check_init(module, spec, config)
        parts: dict[str | None, AdapterSpec] = dict(spec.parameters.items()) or {None: spec}
        recipes = {name: Recipe(module, geometry, name or "weight", part, config) for name, part in parts.items()}
        groups: Any = vars(module).get("groups", 1)  # the rank is split over the groups
        return Kind(
            geometry,
            (*variants, geometry) if variants else geometry,
            spec,
            tuple(recipes.values()),
            next(iter(recipes.values())).device,
            any(p.is_meta for p in module._parameters.values() if p is not None),
            tuple(name for name, recipe in recipes.items() if recipe.is_wasteful(groups)),
        )

    def tensors(self, name: str, module: nn.Module, measured: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """Make the parameters and buffers that `adapt` gives to `module`. The update starts at zero, unless the
        initialiser returns `Whole` (inits.py).

        Call it inside `drawing_on(self.device)`. `measured` holds this layer's measurements by letter (see inits.py);
        with None nothing is drawn or computed: A and B are zero, to be loaded or started later. Raises DataError (from
        measurements) or TargetError (from the weight), which call the layer `name`, where the start is not finite or
        overflows.
        """
        return {own: t for recipe in self.recipes for own, t in recipe.tensors(module, measured, name).items()}

    def shapes(self, module: nn.Module) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors that `tensors` makes, by name, without a frozen start; makes no tensor."""
        return {own: shape for recipe in self.recipes for own, shape in recipe.shapes(module).items()}


def fresh_tensors(plan: Sequence[tuple[Target, Kind]], measured: Measured | None) -> list[dict[str, Tensor]]:
    """What `Kind.tensors` makes for each target of a plan; if `measured` is None, nothing is drawn or computed."""
    tensors = []
    for device, steps in groupby(plan, key=lambda step: step[1].device):
        with drawing_on(device):
            for (name, module, *_), kind in steps:
                tensors.append(kind.tensors(name, module, None if measured is None else measured.get(name, {})))
    return tensors


def check_measured(config: LoRAConfig, names: Iterable[str], measured: Measured) -> None:
    """Raise ConfigError if `measured` lacks a matrix that the initialiser needs for a layer in `names`, DataError if
    such a matrix is not finite."""
    wants = INITS[config.init].measures
    if not wants:
        return
    names = list(names)
    lacking = [name for name in names if not wants <= measured.get(name, {}).keys()]
    if lacking:
        measure = MEASURES[min(wants)]
        how = "residuals(model, config, weight_of)" if measure.reads == "weights" else _CALIBRATE
        raise ConfigError(
            f"init={config.init!r} starts from {measure.words}, and `measured` has none for {listed(lacking)}. "
            f"LoRACallback measures them by itself; elsewhere, call inject(model, config, measured={how})."
        )
    broken = [name for name in names if not all(bool(measured[name][letter].isfinite().all()) for letter in wants)]
    if broken:
        raise DataError(f"What was measured at {listed(broken)} is not finite: check the data and the loss.")


_CALIBRATE = "calibrate(model, config, step, batches)"


def _check_init(module: nn.Module, spec: AdapterSpec, config: LoRAConfig) -> None:
    """Raise TargetError if the initialiser or the scale cannot be used for `module`; called before any change."""
    init = INITS[config.init]
    if not abs(spec.scale) <= largest(torch.float32):
        raise TargetError(f"its scale is {spec.scale:.3g}, with which its update would overflow: lower alpha")
    if "W" in init.wants and not all(can_be_dense(module._parameters.get(p)) for p in spec.parameters or ("weight",)):
        raise TargetError(
            f"init={config.init!r} starts from the layer's weight, which is stored in a way that is not known here: "
            "choose an init that draws, such as init='kaiming'"
        )


def _started(init: Init, known: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Run the initialiser for one matrix: A (rank, d_in) and B (d_out, rank). Ranks that it does not give are filled
    up with Kaiming's A and zeros in B. Where it gives A alone, B may have no columns."""
    rank, d_in, d_out = known["rank"], known["d_in"], known["d_out"]
    found = init.function(**{name: known[name] for name in init.wants})
    if not isinstance(found, Factors):
        found = Factors(A=found, B=torch.zeros(d_out, 0))
    missing = rank - found.A.shape[0]
    if not missing:
        return found.A, found.B
    more = torch.zeros(d_out, rank - found.B.shape[1])
    return torch.cat([found.A, kaiming(missing, d_in)]), torch.cat([found.B, more], dim=1)


def _read(module: nn.Module, parameter: str) -> Tensor:
    """The parameter, or the value that a parametrization computes for it."""
    p = module._parameters.get(parameter)
    weight = p if p is not None else getattr(module, parameter)
    assert isinstance(weight, Tensor)
    return weight


@contextmanager
def drawing_on(device: torch.device) -> Iterator[None]:
    """The context in which initialisers run: float32 by default, on `device`, no gradients, no inference mode.

    Lightning may call `inject` where other defaults hold, or in inference mode, whose tensors cannot be trained."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    # Entering a device that is the default already would slow down every call inside.
    there = nullcontext() if torch.get_default_device() == device else device
    try:
        with torch.inference_mode(False), torch.no_grad(), there:
            yield
    finally:
        torch.set_default_dtype(before)
