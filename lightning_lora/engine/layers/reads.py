"""Answers reads of an adapted layer's weight and bias: the base class's forward gets the base weight, other code
gets the adapted weight."""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.nn.utils.parametrize import ParametrizationList

from lightning_lora.engine import fused, switch
from lightning_lora.engine.forwards import SCOPE
from lightning_lora.engine.layers.frozen import original
from lightning_lora.engine.layers.pair import BIAS, FACTORS, AdapterSpec
from lightning_lora.engine.shown import ShownWeight, counted_twice, hidden, made
from lightning_lora.engine.swap import Host
from lightning_lora.engine.torch_private import version, without_torch_function
from lightning_lora.engine.weights import dense, is_plain, is_wrapper
from lightning_lora.errors import AdapterStateError

_INSIDE: ContextVar[dict[int, dict[str, Any]] | None] = ContextVar("lora_inside", default=None)
"""id(layer) -> what the base class's forward of that layer has read so far, while it runs in this thread or task."""


def _handles_parameters() -> bool:
    """True if the reading code, three frames up (past the property of swap.py), needs the parameter itself: libraries
    that shard, move or store parameters, and nn.Module.get_parameter."""
    if torch.compiler.is_compiling():
        return False
    reader = sys._getframe(3)
    return reader.f_code is _GET_PARAMETER or reader.f_globals.get("__name__", "").startswith(_HANDLERS)


_HANDLERS = ("torch.distributed.", "accelerate.", "deepspeed.", "safetensors.")
_GET_PARAMETER = nn.Module.get_parameter.__code__


class Reading(NamedTuple):
    """How a parent module uses a child of a given name."""

    weight_alone: bool
    """True if the parent has a fast path that uses the child's weight without calling the child."""
    at_times: bool
    """True if the parent may never call the child, an ordinary Linear, and reads its weight instead."""
    besides: bool
    """True if the parent sometimes calls the child, a depthwise convolution, and sometimes reads its weight."""


def keeps_attributes(cls: Any) -> bool:
    """False if a class that was put in front after the swap hides weight, bias, A or B: a parametrization's class does,
    FSDP2's does not."""
    swapped = next((parent for parent in cls.__mro__ if "base_class" in parent.__dict__), cls)
    if swapped is cls:
        return True
    return all(getattr(cls, name, None) is getattr(swapped, name, None) for name in ("weight", "bias", *FACTORS))


class Reads(Host):
    """The part of every adapted layer that answers reads of its weight and bias."""

    mixin: ClassVar[Any]
    base_class: ClassVar[type[nn.Module]]

    lora: AdapterSpec
    lora_names: tuple[str, ...]
    """The names of the layer's adapter tensors."""
    lora_path: str
    """The layer's name in the model, for messages."""
    lora_by_weight: ClassVar[bool] = False
    """True if the base class's forward reads the adapted weight; else it reads W, and the update is added after."""
    lora_inside: dict[str, Any] | None = None
    """The layer's entry of `_INSIDE`, for code that torch.compile traces: it cannot read a ContextVar."""

    def base_forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the base class's forward. It reads the base weight, or the adapted one if `lora_by_weight`."""
        return self.own_forward(False, args, kwargs)

    def bare_forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the base class's forward without the adapter: it reads the base weight in any case."""
        return self.own_forward(True, args, kwargs)

    def own_forward(self, is_bare: bool, args: Any, kwargs: Any) -> Any:
        """Run the base class's forward, for the two methods above."""
        # An adapted weight is computed once per forward: a mixture of experts reads its stack once for each expert.
        so_far = {"grad": torch.is_grad_enabled(), "bare": is_bare}
        if torch.compiler.is_compiling():
            self.lora_inside = so_far
            try:
                return super().forward(*args, **kwargs)
            finally:
                self.lora_inside = None
        token = _INSIDE.set({**(_INSIDE.get() or {}), id(self): so_far})
        self.__dict__["lora_inside"] = so_far  # for compiled code inside, which cannot read the ContextVar
        try:
            return super().forward(*args, **kwargs)
        finally:
            _INSIDE.reset(token)
            self.__dict__.pop("lora_inside", None)

    # Reads of a weight or a bias by its name, from outside the layer or by the base class's forward.

    def read_attribute(self, name: str) -> Any:
        """The value of `self.<name>`. The base class's forward gets the base's tensor (the adapted one if
        `lora_by_weight`); all other code gets the adapted one (see `show`)."""
        own = self.own(name)
        so_far = self.lora_inside if torch.compiler.is_compiling() else (_INSIDE.get() or {}).get(id(self))
        # Inside the base class's forward, `own_forward` has noted whether the adapter is off.
        if so_far["bare"] if so_far is not None else switch.used and switch.is_off(self):
            own = original(self, name, own)
            if own is None and name != "bias":
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            return own
        is_adapted = name in (self.lora.parameters or ("weight",)) or (name == "bias" and BIAS in self.lora_names)
        if (so_far is not None and not self.lora_by_weight) or not is_adapted:
            return own
        if fused.is_symbolic():
            raise AdapterStateError(
                f"The {name} of {self.lora_path!r} was read while torch.fx traces the model. It is adapted, and a "
                "graph of torch.fx cannot hold W + s B A: call merge(model) first, or use torch.export."
            )
        if own is not None and _handles_parameters():
            return own  # fully_shard, for one, shards the very parameter that it reads here
        if own is not None and not is_plain(own) and not is_wrapper(own):
            if so_far is not None:
                raise AdapterStateError(
                    f"The {name} of {self.lora_path!r} was quantized after it was adapted, and the forward of its "
                    "class reads it: quantize before inject, or leave it out with exclude_modules."
                )
            return own  # whoever reads packed numbers knows how they are stored, and needs them as they are
        if own is not None and not own.is_meta and any(getattr(self, n).is_meta for n in self.lora_names):
            return own  # A and B are still on the meta device: the model's weights are just being loaded
        if so_far is not None:
            return self._read_inside(name, so_far)
        if own is None and name != "bias":
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        if own is None:
            return self.value_read(name)
        return show(self, name, own)

    def _read_inside(self, name: str, so_far: dict[str, Any]) -> Any:
        """The adapted value for the base class's forward: in one forward every read gives the same tensor, since the
        forward may change it in place."""
        value, has_graph, before = so_far.get(name, (None, False, 0))
        if value is not None and (has_graph or not torch.is_grad_enabled()):
            return value
        if value is not None and version(value) != before:
            raise AdapterStateError(
                f"The forward of {self.lora_path!r} ({type(self).base_class.__name__}) changed its {name} in place "
                "where gradients were off, and reads it where they are on: leave it out with exclude_modules."
            )
        # Computed with gradients if the forward has them, even where this read is under no_grad: a class may change the
        # value in place under no_grad and then use it with gradients.
        with torch.set_grad_enabled(so_far["grad"] or torch.is_grad_enabled()):
            value = self.value_read(name)
            has_graph = torch.is_grad_enabled()
        now = 0
        if value is not None and not torch.compiler.is_compiling():
            is_inference = value.is_inference()
            has_graph, now = has_graph and not is_inference, 0 if is_inference else version(value)
        so_far[name] = value, has_graph, now
        return value

    lora_to_kernels: ClassVar[bool] = False
    """True if a parent hands the weight to kernels that read its memory: they need a plain tensor."""

    def value_read(self, name: str) -> Any:
        """The adapted weight or bias, in the base's dtype. Raises AdapterStateError as `check_shown` does."""
        if name == "bias":
            bias, mine = self.own("bias"), self._parameters.get(BIAS)
            if mine is None:
                return bias
            update = self.lora.scale * mine
            return update.to(self.dense_weight().dtype) if bias is None else (bias + update).to(bias.dtype)
        self.check_shown(name)
        return self.adapted_weight(name, dropped=self.lora_by_weight).to(self.dense_weight(name).dtype)

    def check_shown(self, name: str) -> None:
        """Raise AdapterStateError if no weight of the base's shape would compute what this layer computes."""

    def shown_leaves(self) -> tuple[Tensor, ...]:
        """The parameters from which the adapted weight is computed; gradients reach those that train."""
        return tuple(p for p in self._parameters.values() if p is not None)

    def dense_weight(self, parameter: str = "weight") -> Tensor:
        """The base weight in floating point, dequantized if it is quantized."""
        W = self.own(parameter)
        assert W is not None
        return dense(self, W)

    def own(self, parameter: str) -> Tensor | None:
        """The base's weight or bias: a parameter, a plain attribute (in replicas of nn.DataParallel, after pruning), or
        a value that its class computes (parametrizations). None if there is none."""
        p: Tensor | None = self._parameters.get(parameter)
        if p is not None:
            return p
        p = self.__dict__.get(parameter, self._buffers.get(parameter))
        if p is None and parameter not in self._parameters:
            computed = getattr(type(self).base_class, parameter, None)
            p = computed.__get__(self, type(self)) if computed is not None else None
        return p

    def adapted_weight(self, parameter: str = "weight", *, dropped: bool = False) -> Tensor:
        """The adapted weight, in float32 or wider, also under autocast."""
        raise NotImplementedError


# Makes the value that code outside the layer gets: a shown weight (shown.py), or the adapted value itself where torch
# must see every step.


class _Show(torch.autograd.Function):
    """Computes the adapted weight (or, if `own` is given, a ShownWeight), and passes gradients to `leaves`.

    Nothing is kept for the backward pass, which computes the weight again from the layer. So the result may be read in
    any number of checkpointed regions and backward passes.
    """

    @staticmethod
    def forward(ctx: Any, compute: Callable[[], Tensor], own: Tensor | None, key: Any, *leaves: Tensor) -> Tensor:
        ctx.compute, ctx.leaves, ctx.key = compute, leaves, key
        return compute().detach() if own is None else made(own, compute, None)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        if _versions(ctx.leaves) != ctx.key:
            raise AdapterStateError(
                "A and B of an adapter were changed in place between the forward pass that read an adapted weight and "
                "its backward pass: call backward before the optimizer's step."
            )
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            W = ctx.compute()
            grads = torch.autograd.grad(W, ctx.leaves, g, create_graph=again, allow_unused=True)
        return (None, None, None, *grads)


def _versions(leaves: tuple[Tensor, ...]) -> tuple[int, ...]:
    return tuple(-1 if t.is_inference() else version(t) for t in leaves)


_GIVEN: weakref.WeakKeyDictionary[nn.Module, dict[str, ShownWeight]] = weakref.WeakKeyDictionary()
"""Layer -> the ShownWeights that it gave last, by name. Kept outside the modules, so that copies and pickles of modules
do not contain them."""


def show(module: Any, name: str, own: Tensor) -> Tensor:
    """The value that a reader of the attribute `name` of the adapted layer `module` gets in place of the base's `own`.

    It is a ShownWeight. It is the adapted value itself (`module.value_read(name)`) where torch must see every step
    (compiling, tracing, functional transforms, tensor subclasses), and in a forward if the reader hands it to kernels.
    """
    leaves, spec = module.shown_leaves(), module.lora.parameters.get(name, module.lora)
    drops = spec.dropout or spec.rank_dropout or spec.module_dropout
    is_drawn = bool(module.lora_by_weight and module.training and drops)  # each computation draws random numbers
    if (
        fused.sees_every_step()
        or type(own) is not nn.Parameter
        or own.layout is not torch.strided
        or any(type(t) not in (Tensor, nn.Parameter) for t in leaves)
    ):
        return module.value_read(name)
    given = _GIVEN.setdefault(module, {})
    shown = given.get(name)
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    trained = tuple(t for t in leaves if t.requires_grad) if grad else ()
    state = id(module.lora), module.training, grad, inference
    key = (id(own), own.data_ptr(), own.shape, *state, tuple(map(id, trained)), _versions(trained))
    as_value = module.lora_to_kernels and (SCOPE.get() is not None or own.is_cuda)
    if shown is not None and shown.lora_key == key:
        return shown.lora_shown() if as_value else shown

    twin, layer, called = _with_present_parameters(module), weakref.ref(module), f"The {name} of {module.lora_path!r}"
    compute = functools.partial(type(module).value_read, twin, name)
    through = trained and not is_drawn and all(any(t is p for p in twin._parameters.values()) for t in trained)

    def computed() -> Tensor:
        live = layer()
        if live is not None and live._parameters.get(name, own) is not own:
            raise AdapterStateError(f"{called} was replaced after it was read: read it again.")
        if fused.sees_every_step():
            return compute()
        # A value that was computed without a graph cannot serve a reader that needs one.
        now = key, torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        scope = SCOPE.get()
        place = id(own), id(live), name, now[1:]
        if scope is not None and place in scope[1]:
            value, noted, then = scope[1][place]
            if version(value) == noted and then == now:
                return value
        value = _Show.apply(compute, None, _versions(trained), *trained) if through else compute()
        # Without `through` the value keeps tensors for its backward pass, so two backward passes cannot share it.
        if scope is not None and not is_drawn and not now[2] and (through or not value.requires_grad):
            scope[1][place] = value, version(value), now
        return value

    with without_torch_function(), torch.inference_mode(False):
        if through:
            weight = _Show.apply(compute, own, _versions(trained), *trained)
        else:
            weight = made(own, computed, None)
    weight.lora_shown, weight.lora_name, weight.lora_key = computed, called, key
    weight.lora_is_trained = any(t.requires_grad for t in leaves)
    given[name] = weight
    return computed() if as_value else weight


def _with_present_parameters(module: nn.Module) -> Any:
    """A copy of `module` that keeps the present parameters when the layer gets others (torch.func.functional_call)."""
    twin = object.__new__(type(module))
    twin.__dict__.update(module.__dict__, _parameters=dict(module._parameters))
    return twin


def forget(module: nn.Module) -> None:
    """Drop what `module` has shown: it gets other weights, which were not computed from that."""
    _GIVEN.pop(module, None)


def _registers(module: nn.Module, name: str, p: nn.Parameter | None) -> Any:
    """torch calls this where a module is given a parameter: in place of a shown weight it gets the base's parameter."""
    given = _GIVEN.get(module)
    if given is not None and name in given and given[name].lora_was_used and p is not given[name].lora_own:
        raise AdapterStateError(counted_twice(given[name].lora_name))
    if not isinstance(p, ShownWeight):
        return None
    if isinstance(module, ParametrizationList):
        raise AdapterStateError(hidden(p.lora_name))
    own = p.lora_own
    return own if isinstance(own, nn.Parameter) else nn.Parameter(own, own.requires_grad)


def _registers_buffer(module: nn.Module, name: str, buffer: Tensor | None) -> None:
    if isinstance(buffer, ShownWeight):
        raise AdapterStateError(
            f"{buffer.lora_name} is adapted, and a buffer in its memory would be saved as the base's: register a "
            ".clone() of it."
        )


register_module_parameter_registration_hook(_registers)
register_module_buffer_registration_hook(_registers_buffer)
