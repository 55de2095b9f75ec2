"""ShownWeight: the value of `layer.weight` for code outside an adapted layer. It stands for W + s B A.

Most code calls a layer, and the layer adds its update. Some code reads the weight instead (a tied head, a penalty, a
flow's determinant), and should see W + s B A as well. A ShownWeight computes W + s B A only when it is needed; the
operation on it decides:

    metadata    (shape, dtype, device, data_ptr, ...) is the base parameter's: nothing is computed
    views       (t(), [..], view, detach, data, ...) are shown weights themselves
    writes      (nn.init, copy_, fill_, mul_, `.data = ...`) go to the base parameter, as they did before adaptation
    ties        (`head.weight = embed.weight`, nn.Parameter(layer.weight)) share the base parameter itself
    copies      (copy.deepcopy, pickle, `other.weight.copy_(...)`, `other.weight.data[:n] = ...data[:n]`) are of the
                base parameter
    all else    computes with W + s B A; gradients reach A and B

A value that was computed from the adapted weight must not become the base weight, since the adapter would then count
twice: this raises AdapterStateError (`torch.nn.utils.fuse_conv_bn_eval` does so, for example). A write in a forward,
such as a mask or a clamp, raises it too, since it would change the base and not the adapter.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_lora.engine.forwards import SCOPE
from lightning_lora.engine.torch_private import schema, stand_in, without_torch_function
from lightning_lora.errors import AdapterStateError

# Names of torch's functions: a method, the function in `torch` and the operator have the same name.
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


class ShownWeight(nn.Parameter):
    """Stands for the adapted weight of a layer, or for a view of it (see the top of this file).

    Calls from Python arrive at `__torch_function__`; calls of torch's operators from C++ (TorchScript, functional
    transforms, extensions) at `__torch_dispatch__`. Its memory is the base parameter's: a kernel that takes a pointer
    sees the base weight.
    """

    lora_own: Tensor
    """The base parameter, or the same view of it."""
    lora_shown: Callable[[], Tensor]
    """Computes the adapted weight, or the same view of it."""
    lora_root: ShownWeight
    """The ShownWeight that the layer gave, if this is a view of it; else this one itself."""
    lora_is_data: bool
    """True if it was reached through `.data`: a copy from it then copies the base parameter's values."""
    lora_is_free: bool
    """True if it was made a parameter of its own (nn.Parameter(layer.weight)): it is then the base's memory alone."""
    lora_was_used: bool
    """True on the root if something was computed from the adapted weight."""
    lora_name: str
    lora_is_trained: bool
    lora_key: Any

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return copy.deepcopy(self.lora_own, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.lora_own.__reduce_ex__(protocol)

    # Attributes that libraries set on a parameter (transformers' `_is_hf_initialized`, DeepSpeed's `ds_id`) are kept on
    # the base parameter.

    def __getattr__(self, name: str) -> Any:
        if name.startswith("lora_"):
            raise AttributeError(name)
        return getattr(self.lora_own, name)

    def __setattr__(self, name: str, value: Any) -> None:
        is_noted = not (name.startswith("lora_") or name == "_is_param" or hasattr(Tensor, name))
        object.__setattr__(self.lora_own if is_noted else self, name, value)

    def __delattr__(self, name: str) -> None:
        object.__delattr__(self if hasattr(Tensor, name) else self.lora_own, name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        getter = name == "__get__"
        if getter:
            name = func.__self__.__name__
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller == "torch.nn.init":  # it initialises the base parameter itself
            return func(*_each(args, _own), **_each(kwargs, _own))
        first = args[0] if args else kwargs.get("tensor", kwargs.get("input"))
        mine = isinstance(first, ShownWeight)
        if getter and name == "requires_grad":
            return first.lora_own.requires_grad or (first.lora_is_trained and torch.is_grad_enabled())
        if name in _VIEWS and mine:
            return _view(func, name, first, args, kwargs)
        if getter or (mine and (name in METADATA or (name == "type" and len(args) == 1 and not kwargs))):
            return func(*_each(args, _own), **_each(kwargs, _own))
        if mine and (name == "requires_grad_" or (name == "__set__" and func.__self__.__name__ == "requires_grad")):
            return _set_requires_grad(func, first, args, kwargs, makes_parameter=caller.startswith("torch.nn."))
        written = _written(func, name, args, kwargs)
        if any(True for _ in _all(written)):
            return _write(func, name, written, args, kwargs)
        if name in _COPIES and isinstance(first, Tensor):
            return func(*_each(args, _copied_into(first)), **_each(kwargs, _copied_into(first)))
        result = func(*_each(args, _shown), **_each(kwargs, _shown))
        if name == "numpy":  # the array is a computed copy, so a write to it would be lost
            result.setflags(write=False)
        return result

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, ShownWeight) and _is_view(func):
            return _view_of(func, first, args, kwargs)
        name = schema(func).name.rpartition(":")[2]
        written = _written(func, name, args, kwargs)
        if any(True for _ in _all(written)):
            return _write(func, name, written, args, kwargs)
        with torch.no_grad():  # autograd records above this level
            return func(*_each(args, _shown), **_each(kwargs, _shown))


def base_parameter(p: Any) -> Any:
    """The base parameter, if `p` is a ShownWeight that stands for it (and not for a view); else `p`."""
    return p.lora_own if isinstance(p, ShownWeight) and p is p.lora_root else p


def _own(w: ShownWeight) -> Tensor:
    return w.lora_own


def _shown(w: ShownWeight) -> Tensor:
    if w.lora_is_free:
        return w.lora_own
    w.lora_root.lora_was_used = True
    return w.lora_shown()


def _copied_into(target: Tensor) -> Callable[[ShownWeight], Tensor]:
    """A function that gives the values to copy into `target`: the base's if `target` is a parameter or the source was
    reached through `.data`; else the adapted ones."""
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


def _all(value: Any) -> Iterator[ShownWeight]:
    """The shown weights in `value`."""
    if isinstance(value, ShownWeight):
        yield value
    elif isinstance(value, (tuple, list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _all(item)


# Views.


def _is_view(func: Any) -> bool:
    """True if an operator of torch returns a view of its first argument."""
    return any(r.alias_info is not None and not r.alias_info.is_write for r in schema(func).returns)


def _view(func: Any, name: str, w: ShownWeight, args: Any, kwargs: Any) -> Any:
    if name == "__iter__":
        return iter(w.unbind(0))
    if w.lora_is_free:
        return func(*_each(args, _own), **kwargs)
    if any(a is not w for a in _all((args, kwargs))) or not _shares(func(*_each(args, _own), **kwargs), w.lora_own):
        return func(*_each(args, _shown), **_each(kwargs, _shown))  # no view but a copy: a reshape after a transpose
    with without_torch_function():
        views = func(*args, **kwargs)  # this arrives at __torch_dispatch__, which calls `_view_of`
    for view in _all(views) if name in ("data", "detach") else ():
        view.lora_is_trained = False
        view.lora_is_data = w.lora_is_data or name == "data"
    return views


def _shares(result: Any, own: Tensor) -> bool:
    some = result if isinstance(result, Tensor) else next(iter(result), own)
    return some.untyped_storage().data_ptr() == own.untyped_storage().data_ptr()


def _view_of(func: Any, w: ShownWeight, args: Any, kwargs: Any) -> Any:
    own = func(w.lora_own, *args[1:], **kwargs)

    def shown() -> Any:
        return func(w.lora_shown(), *args[1:], **kwargs)

    if isinstance(own, Tensor):
        return made(own, shown, w)
    return type(own)(made(part, lambda i=i: shown()[i], w) for i, part in enumerate(own))  # type: ignore[misc]


def made(own: Tensor, shown: Callable[[], Tensor], of: ShownWeight | None) -> ShownWeight:
    """Make a ShownWeight that stands for `own` and computes `shown()`; `of` is the one that it is a view of, if any."""
    with without_torch_function(), torch.inference_mode(False):  # it may be used outside inference mode
        # Its memory is the base's: torch runs `other.weight.data = layer.weight` without calling our methods.
        it: Any = stand_in(ShownWeight, own.detach(), False)
    it.__dict__.update(
        lora_own=own,
        lora_shown=shown,
        lora_root=it if of is None else of.lora_root,
        lora_is_data=of is not None and of.lora_is_data,
        lora_is_free=of is not None and of.lora_is_free,
        lora_was_used=False,
        lora_name="" if of is None else of.lora_name,
        lora_is_trained=of is not None and of.lora_is_trained,
    )
    return cast("ShownWeight", it)


# Writes.


def _written(func: Any, name: str, args: Any, kwargs: Any) -> dict[Any, Any]:
    """The arguments that `func` writes to, by their position or name."""
    operator = func.default if hasattr(func, "overloads") and func.overloads() == ["default"] else func
    known = schema(operator)
    if known is not None:
        of = enumerate(known.arguments)
        places = {k for i, a in of if a.alias_info is not None and a.alias_info.is_write for k in (i, a.name)}
    elif name in _WRITES or (name.endswith("_") and not name.endswith("__")):
        places = {0, "self", "tensor", "input", "out"}
    else:
        places = {"out"}
    given = {**dict(enumerate(args)), **kwargs}
    return {place: given[place] for place in places if place in given}


def _write(func: Any, name: str, written: dict[Any, Any], args: Any, kwargs: Any) -> Any:
    """Run `func`, which writes to shown weights, on their base parameters. Raises AdapterStateError if it would write
    values that include the adapter, or write in a forward."""
    attribute = func.__self__.__name__ if name == "__set__" else ""
    copies = name in _COPIES and attribute in ("", "data")
    others = [a for i, a in enumerate(args) if i not in written], {k: v for k, v in kwargs.items() if k not in written}
    for w in _all(written):
        if attribute == "data" and w is not w.lora_root:
            raise AdapterStateError(
                f"{w.lora_name} is adapted: assign to .data of the weight itself, not to .data of a view of it."
            )
        if w.lora_is_free or name in _KEEPS_VALUES or attribute not in ("", "data"):
            continue
        if SCOPE.get() is not None:
            raise AdapterStateError(
                f"{w.lora_name} is changed in a forward, as masks, clipping and codebooks do. The write reaches the "
                "base's weight and not the adapter, so the adapted weight would not be the one that the code wants: "
                "leave the layer out with exclude_modules."
            )
        mixed = not copies and any(True for _ in _all(others))
        if mixed or (w.lora_root.lora_was_used and _has_values(others)):
            raise AdapterStateError((hidden if name == "set_" else counted_twice)(w.lora_name))
    source = _copied_into(next(_all(written)).lora_root.lora_own) if copies else _shown
    changed = [_each(a, _own if i in written else source) for i, a in enumerate(args)]
    result = func(*changed, **{k: _each(v, _own if k in written else source) for k, v in kwargs.items()})
    given = next(_all(written))
    return (
        given if result is given.lora_own else written.get(0, result) if isinstance(result, (list, tuple)) else result
    )


_KEEPS_VALUES = frozenset(("share_memory_", "retain_grad", "rename_", "resize_as_"))


def _has_values(others: Any) -> bool:
    """True if `others` contains tensors that may have been computed from an adapted weight."""
    if isinstance(others, Tensor):
        return others.is_floating_point() and not isinstance(others, ShownWeight)
    if isinstance(others, (tuple, list, dict)):
        return any(map(_has_values, others.values() if isinstance(others, dict) else others))
    return False


def _set_requires_grad(func: Any, w: ShownWeight, args: Any, kwargs: Any, *, makes_parameter: bool) -> Any:
    if (
        w is not w.lora_root
        and not makes_parameter
        and (args[1] if len(args) > 1 else kwargs.get("requires_grad", True))
    ):
        raise AdapterStateError(
            f"{w.lora_name} is adapted, and a view of it cannot be a leaf of its own: call .detach().clone() "
            "before requires_grad_()."
        )
    of = w.lora_own
    if makes_parameter:  # nn.Parameter(layer.weight)
        w.lora_is_free = True
    result = func(*_each(args, _own), **kwargs)
    return w if result is of else result


def hidden(name: str) -> str:
    return (
        f"{name} is adapted, and a parametrization would compute its value from the base's weight alone, without the "
        "adapter. Register parametrizations before inject, or call merge(model) first."
    )


def counted_twice(name: str) -> str:
    return (
        f"{name} was read with its adapter added, and is replaced or changed now: a new value that was computed from "
        "it would get the adapter a second time. Call merge(model) first, or remove(model). If the new value is the "
        "base's alone, write it through load_state_dict."
    )
