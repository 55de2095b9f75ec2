"""Makes the value that code outside an adapted layer gets when it reads `layer.weight` or `layer.bias`.

It is a shown weight (shown.py), or the adapted value itself where torch must see every step."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.nn.utils.parametrize import ParametrizationList

from lightning_lora.engine import fused
from lightning_lora.engine.forwards import SCOPE
from lightning_lora.engine.shown import ShownWeight, counted_twice, hidden, made
from lightning_lora.engine.torch_private import version, without_torch_function
from lightning_lora.errors import AdapterStateError


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


_GIVEN: WeakKeyDictionary[nn.Module, dict[str, ShownWeight]] = WeakKeyDictionary()
"""Layer -> the ShownWeights that it gave last, by name. Kept outside the modules, so that copies and pickles of modules
do not contain them."""


def show(
    module: Any, name: str, own: Tensor, leaves: tuple[Tensor, ...], *, is_drawn: bool, to_kernels: bool
) -> Tensor:
    """The value that a reader of the attribute `name` of the adapted layer `module` gets in place of the base's `own`.

    It is a ShownWeight. It is the adapted value itself (`module.value_read(name)`) where torch must see every step
    (compiling, tracing, functional transforms, tensor subclasses), and in a forward if the reader hands it
    `to_kernels`. `leaves` are the tensors that gradients reach. `is_drawn`: each computation draws random numbers.
    """
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
    as_value = to_kernels and (SCOPE.get() is not None or own.is_cuda)
    if shown is not None and shown.lora_key == key:
        return shown.lora_shown() if as_value else shown

    twin, layer, called = _twin(module), weakref.ref(module), f"The {name} of {module.lora_path!r}"
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


def _twin(module: nn.Module) -> Any:
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
