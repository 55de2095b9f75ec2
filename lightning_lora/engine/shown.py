"""What a reader of `layer.weight` gets from an adapted layer: the adapted weight W + s B A, computed where it is used.

An adapted model is the base with W + s B A in place of W, whoever looks. Most code calls a layer, and the layer adds
its update; some code reads the weight instead (a tied head, a penalty, a flow's determinant). `ShownWeight` stands for
the adapted weight there, and decides by what is done with it:

    metadata    (shape, dtype, device, data_ptr, ...) is the base parameter's: nothing is computed
    views       (t(), [..], view, detach, data, ...) are shown weights themselves
    writes      (nn.init, copy_, fill_, mul_, `.data = ...`) go to the base parameter, as they did before adaptation
    ties        (`head.weight = embed.weight`, nn.Parameter(layer.weight)) share the base parameter itself
    copies      (copy.deepcopy, pickle, `other.weight.copy_(...)`, `other.weight.data[:n] = ...data[:n]`) are of the
                base parameter
    all else    computes with W + s B A; gradients reach A and B

A value that was computed from the adapted weight must not become the base weight, or the adapter would count twice:
that is an AdapterStateError (`torch.nn.utils.fuse_conv_bn_eval` does so, for example).
"""

from __future__ import annotations

import copy
import functools
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.nn.utils.parametrize import ParametrizationList

from lightning_lora.engine import fused
from lightning_lora.errors import AdapterStateError

# By the names of torch's functions and methods: a method, its function in `torch` and its operator share one.
# fmt: off
_VIEWS = frozenset(
    (
        "T", "mT", "H", "mH", "data", "real", "imag", "detach", "view", "view_as", "reshape", "t", "transpose",
        "permute", "flatten", "unflatten", "squeeze", "unsqueeze", "narrow", "select", "split", "split_with_sizes",
        "chunk", "tensor_split", "hsplit", "vsplit", "unbind", "expand", "expand_as", "diagonal", "unfold",
        "swapaxes", "swapdims", "movedim", "moveaxis", "ravel", "as_strided", "adjoint", "__getitem__", "__iter__",
    )
)
METADATA = frozenset(
    (
        "size", "dim", "numel", "nelement", "ndimension", "stride", "storage_offset", "is_floating_point",
        "is_complex", "is_signed", "is_contiguous", "data_ptr", "untyped_storage", "storage", "storage_type",
        "_typed_storage", "element_size", "get_device", "__len__", "is_shared", "is_inference", "is_pinned",
        "is_same_size", "is_set_to", "has_names", "dense_dim", "sparse_dim", "is_conj", "is_neg", "_is_view",
        "register_hook", "register_post_accumulate_grad_hook", "retain_grad", "__hash__", "new", "new_empty",
        "new_zeros", "new_ones", "new_full", "new_tensor", "empty_like", "zeros_like", "ones_like", "full_like",
        "rand_like", "randn_like", "randint_like",
    )
)
_WRITES = frozenset(
    (
        "__setitem__", "__iadd__", "__isub__", "__imul__", "__imatmul__", "__itruediv__", "__ifloordiv__",
        "__imod__", "__ipow__", "__iand__", "__ior__", "__ixor__", "__ilshift__", "__irshift__", "__set__",
    )
)
# fmt: on
_COPIES = frozenset(("copy_", "set_", "__setitem__", "__set__"))


def handles_parameters(frame: FrameType) -> bool:
    """Whether the code that reads an attribute asks for the parameter itself, whatever it will do with it: what shards,
    moves or stores the parameters of any module, and nn.Module.get_parameter."""
    if frame.f_code is _GET_PARAMETER:
        return True
    name = frame.f_globals.get("__name__", "")
    return name.startswith(_HANDLES_PARAMETERS)


_HANDLES_PARAMETERS = ("torch.distributed.", "accelerate.", "deepspeed.", "safetensors.")
_GET_PARAMETER = nn.Module.get_parameter.__code__


class ShownWeight(nn.Parameter):
    """The adapted weight of a layer, or a view of it, as the opening of this file says.

    Its own memory is the base parameter's. Functions that torch dispatches compute with the adapted weight.
    """

    lora_own: Tensor
    """The base parameter, or the same view of it."""
    lora_shown: Callable[[], Tensor]
    """Gives the adapted weight, or the same view of it."""
    lora_root: ShownWeight
    """What the layer showed, where this is a view of it; else itself."""
    lora_is_data: bool = False
    """Whether it was reached by way of `.data`, which stands for the parameter's memory where it is copied."""
    lora_was_used: bool = False
    """Whether something was computed from the adapted weight (asked of the root)."""
    lora_name: str
    lora_is_trained: bool
    lora_key: Any

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return copy.deepcopy(self.lora_own, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.lora_own.__reduce_ex__(protocol)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        getter = name == "__get__"
        if getter:
            name = func.__self__.__name__
        if sys._getframe(1).f_globals.get("__name__") == "torch.nn.init":  # which works on the parameter itself
            return func(*_each(args, _own), **_each(kwargs, _own))
        first = args[0] if args else kwargs.get("tensor", kwargs.get("input"))
        mine = isinstance(first, ShownWeight)
        if getter and name == "requires_grad":
            return first.lora_own.requires_grad or (first.lora_is_trained and torch.is_grad_enabled())
        if name in _VIEWS and mine:
            return _view(func, name, first, args, kwargs)
        if getter or (mine and (name in METADATA or (name == "type" and len(args) == 1 and not kwargs))):
            return func(*_each(args, _own), **_each(kwargs, _own))
        is_write = name in _WRITES or (name.endswith("_") and not name.endswith("__"))
        if is_write and mine:
            return _write(func, name, first, args, kwargs)
        if isinstance(kwargs.get("out"), ShownWeight):
            out = kwargs["out"]
            func(*_each(args, _shown), **{**_each(kwargs, _shown), "out": out.lora_own})
            return out
        if name in _COPIES and isinstance(first, Tensor):
            return func(*_each(args, _copied_into(first)), **_each(kwargs, _copied_into(first)))
        return func(*_each(args, _shown), **_each(kwargs, _shown))


def _own(w: ShownWeight) -> Tensor:
    return w.lora_own


def _shown(w: ShownWeight) -> Tensor:
    w.lora_root.lora_was_used = True
    return w.lora_shown()


def _copied_into(target: Tensor) -> Callable[[ShownWeight], Tensor]:
    """What is copied into `target`: into a parameter, or by way of `.data`, the base's own; else the values shown."""
    is_parameter = isinstance(target, nn.Parameter)
    return lambda w: w.lora_own.detach() if is_parameter or w.lora_is_data else _shown(w)


def _each(value: Any, of: Callable[[ShownWeight], Tensor]) -> Any:
    """`value` with `of(w)` in place of each shown weight w, in nested tuples, lists and dicts as torch takes them."""
    if isinstance(value, ShownWeight):
        return of(value)
    if isinstance(value, (tuple, list)):
        changed = [_each(item, of) for item in value]
        return type(value)(*changed) if hasattr(value, "_fields") else type(value)(changed)
    if isinstance(value, dict):
        return {key: _each(item, of) for key, item in value.items()}
    return value


def _view(func: Any, name: str, w: ShownWeight, args: Any, kwargs: Any) -> Any:
    if name == "__iter__":
        return iter(w.unbind(0))
    own = func(*_each(args, _own), **_each(kwargs, _own))
    with torch._C.DisableTorchFunctionSubclass():
        raw = func(*args, **kwargs)  # of W's memory, with the way of gradients to A and B

    def shown() -> Any:
        return func(*(w.lora_shown() if a is w else _each(a, _shown) for a in args), **_each(kwargs, _shown))

    is_data = w.lora_is_data or name == "data"
    if isinstance(own, Tensor):
        return _made(raw, own, shown, w.lora_root, is_data)
    return type(own)(
        _made(raw[i], part, lambda i=i: shown()[i], w.lora_root, is_data)  # type: ignore[misc]
        for i, part in enumerate(own)
    )


def _made(raw: Tensor, own: Tensor, shown: Callable[[], Tensor], root: ShownWeight | None, is_data: bool) -> Any:
    made: Any = raw.as_subclass(ShownWeight)
    made.lora_own, made.lora_shown, made.lora_is_data = own, shown, is_data
    made.lora_root = made if root is None else root
    if root is not None:
        made.lora_name, made.lora_is_trained = root.lora_name, root.lora_is_trained and not is_data
    return made


def _write(func: Any, name: str, w: ShownWeight, args: Any, kwargs: Any) -> Any:
    """Write to the base parameter."""
    root, of = w.lora_root, w.lora_own
    attribute = func.__self__.__name__ if name == "__set__" else ""
    if attribute == "data" and w is not root:
        raise AdapterStateError(f"{root.lora_name}: assign to .data of the weight itself, not of a view of it.")
    replaces = name in ("copy_", "set_") or attribute == "data"
    if replaces and root.lora_was_used and of.numel() == root.lora_own.numel():
        raise AdapterStateError(_counted_twice(root.lora_name))
    if name == "requires_grad_" and w is not root:  # nn.Parameter(layer.weight): a parameter that shares the memory
        w.lora_shown = lambda: of
    source = _copied_into(root.lora_own) if name in _COPIES else _shown
    changed = [of if a is w else _each(a, source) for a in args]
    result = func(*changed, **{k: of if v is w else _each(v, source) for k, v in kwargs.items()})
    return w if result is of else result


def _counted_twice(name: str) -> str:
    return (
        f"{name} was read with its adapter in it, and is replaced now: what was computed from it would get the adapter "
        "a second time. Call merge(model) first, or remove(model). If the new value is the base's alone, write it "
        "through load_state_dict."
    )


class _Show(torch.autograd.Function):
    """The adapted weight (or, as an alias, the base's memory under its name), with the way of gradients to `leaves`.

    Nothing is kept for the backward pass: it is computed again from the layer, so the result may be read in any number
    of checkpointed regions and backward passes.
    """

    @staticmethod
    def forward(ctx: Any, compute: Callable[[], Tensor], alias: Tensor | None, key: Any, *leaves: Tensor) -> Tensor:
        ctx.compute, ctx.leaves, ctx.key = compute, leaves, key
        return compute().detach() if alias is None else alias

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
    return tuple(-1 if t.is_inference() else t._version for t in leaves)


_SCOPE: ContextVar[tuple[Any, dict[Any, tuple[Tensor, int]]] | None] = ContextVar("lora_forward", default=None)
"""The forward of an adapted model that runs here: the one around it, and the weights that were shown in it so far."""
_GIVEN: WeakKeyDictionary[nn.Module, dict[str, ShownWeight]] = WeakKeyDictionary()
"""What each layer showed last. Outside of the modules, so that copies and pickles of them hold none of it."""


def forward_begins(module: nn.Module, args: Any) -> None:
    """A forward pre-hook of an adapted model: what its forward reads several times is computed once."""
    if not torch.compiler.is_compiling():
        _SCOPE.set((_SCOPE.get(), {}))


def forward_ends(module: nn.Module, args: Any, output: Any) -> None:
    """The forward hook to it, which is called where the forward raised as well."""
    if not torch.compiler.is_compiling():
        scope = _SCOPE.get()
        _SCOPE.set(None if scope is None else scope[0])


def listen_for_forwards(model: nn.Module) -> None:
    """Compute once what a forward of `model` reads several times."""
    # Under a key that is the same each time: torch.compile's guards look at the keys.
    model._forward_pre_hooks[_HOOK] = forward_begins
    model._forward_hooks[_HOOK] = forward_ends
    model._forward_hooks_always_called[_HOOK] = True


def unlisten_for_forwards(model: nn.Module) -> None:
    """Undo `listen_for_forwards`."""
    for hooks in (model._forward_pre_hooks, model._forward_hooks, model._forward_hooks_always_called):
        hooks.pop(_HOOK, None)


_HOOK: Any = "lightning_lora"


@contextmanager
def one_forward() -> Iterator[None]:
    """The same for a function that calls the parts of an adapted model, such as a training step."""
    token = _SCOPE.set((_SCOPE.get(), {}))
    try:
        yield
    finally:
        _SCOPE.reset(token)


def show(
    module: Any, name: str, own: Tensor, leaves: tuple[Tensor, ...], *, is_drawn: bool, to_kernels: bool
) -> Tensor:
    """What a reader of the attribute `name` of the adapted layer `module` gets in place of the base's `own`.

    That is a ShownWeight; or `module.value_read(name)` itself, where torch must see every step (compiling, tracing,
    functional transforms, tensors of other kinds), and in a forward for readers that hand it `to_kernels`. `leaves` are
    what gradients reach; `is_drawn` says that each computation draws random numbers.
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
    as_value = to_kernels and (_SCOPE.get() is not None or own.is_cuda)
    if shown is not None and shown.lora_key == key:
        return shown.lora_shown() if as_value else shown

    twin, layer, called = _twin(module), weakref.ref(module), f"The {name} of {module.lora_path!r}"
    compute = functools.partial(type(module).value_read, twin, name)
    through = trained and not is_drawn and all(any(t is p for p in twin._parameters.values()) for t in trained)

    def computed() -> Tensor:
        live = layer()
        if live is not None and live._parameters.get(name, own) is not own:
            raise AdapterStateError(f"{called} was replaced after it was read: read it again.")
        scope = _SCOPE.get()
        place = (id(own), id(live), name, key)
        if scope is not None and place in scope[1]:
            value, version = scope[1][place]
            if value._version == version:
                return value
        if through:
            value = _Show.apply(compute, None, _versions(trained), *trained)
        else:
            value = compute()
        if scope is not None and not is_drawn and not inference:
            scope[1][place] = value, value._version
        return value

    with torch._C.DisableTorchFunctionSubclass(), torch.inference_mode(False):
        alias: Any = torch.Tensor._make_subclass(ShownWeight, own.data, False)
        if through:
            alias = _Show.apply(compute, alias, _versions(trained), *trained)
    made = _made(alias, own, computed, None, False)
    made.lora_name = called
    made.lora_is_trained = any(t.requires_grad for t in leaves)
    made.lora_key = key
    given[name] = made
    return computed() if as_value else made


def _twin(module: nn.Module) -> Any:
    """`module` as it is now: it keeps these parameters when the layer gets others (torch.func.functional_call)."""
    twin = object.__new__(type(module))
    twin.__dict__.update(module.__dict__, _parameters=dict(module._parameters))
    return twin


def parameter_itself(p: Any) -> Any:
    """The base's parameter where `p` is what a layer showed of it; else `p`."""
    return p.lora_own if isinstance(p, ShownWeight) else p


def forget(module: nn.Module) -> None:
    """`module` gets other weights, which owe nothing to what it showed."""
    _GIVEN.pop(module, None)


def _registers(module: nn.Module, name: str, p: nn.Parameter | None) -> Any:
    """torch calls this where a module is given a parameter: a shown weight is the base's parameter there."""
    given = _GIVEN.get(module)
    if given is not None and name in given and given[name].lora_was_used and p is not given[name].lora_own:
        raise AdapterStateError(_counted_twice(given[name].lora_name))
    if not isinstance(p, ShownWeight):
        return None
    if isinstance(module, ParametrizationList):
        raise AdapterStateError(
            f"{p.lora_name} is adapted, and what a parametrization computed from the base's alone would hide the "
            "adapter from all who read it. Register parametrizations before inject, or call merge(model) first."
        )
    own = p.lora_own
    return own if isinstance(own, nn.Parameter) else nn.Parameter(own, own.requires_grad)


register_module_parameter_registration_hook(_registers)
