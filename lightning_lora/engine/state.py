"""An adapter's tensors, apart from its base: what a checkpoint holds and a file carries."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lightning_lora.engine.as_injected import check_as_injected
from lightning_lora.engine.foreign import foreign_layout_of
from lightning_lora.engine.inject import injections
from lightning_lora.engine.layers import adapters
from lightning_lora.engine.layers.base import is_adapter
from lightning_lora.engine.layers.pair import FACTORS
from lightning_lora.engine.layers.tokens import TokenRows
from lightning_lora.engine.overflow import largest, largest_in, too_large
from lightning_lora.engine.present import check_some_of_ours
from lightning_lora.engine.sharded import check_complete, fill, is_sharded, whole
from lightning_lora.engine.storage import dtype_of, is_quantized
from lightning_lora.engine.tree import Tree
from lightning_lora.engine.witness import witness_of
from lightning_lora.engine.wrappers import unwrapped
from lightning_lora.errors import AdapterFormatError, AdapterStateError, BaseMismatchError, listed

_SAMPLE = 1 << 20
_SAME_ONCE_ROUNDED = {"torch.float32", "torch.float64", "torch.bfloat16"}

_DESCRIBED: WeakKeyDictionary[nn.Module, tuple[Any, dict[str, Any]]] = WeakKeyDictionary()
"""What `describe_base` said last of a module, and the witness of the weights that it said it of."""


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The live tensors that make up the adapter of `model`, by name: `<module>.lora_A`, `<module>.lora_B` (and what its
    variant has besides), and what is trained whole under its own name.

    Raises AdapterStateError where the model has no adapters, or not all that `inject` gave it."""
    tensors: dict[str, Tensor] = {}
    tree = Tree.of(model)
    check_some_of_ours(model, tree)
    check_as_injected(model, tree)
    layers: Any = tree.of_classes(is_adapter)
    for name, module in layers:
        prefix = f"{name}." if name else ""
        for own in module.lora_names:
            tensors[prefix + own] = getattr(module, own)
    check_complete(tensors)
    for root, injection in injections(model, tree):
        if not injection.trained_whole:
            continue
        there = dict(Tree.of(tree.by_name[root]).tensors)
        prefix = f"{root}." if root else ""
        if absent := [name for name in injection.trained_whole if name not in there]:
            raise AdapterStateError(
                f"{listed(prefix + name for name in absent)} of {type(model).__name__} was trained whole, and is not "
                "there any more: its module was replaced or deleted since inject. Put it back, or call remove first."
            )
        for name in injection.trained_whole:
            tensors[prefix + name] = there[name]
    return tensors


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The adapter of `model` as a state dict: detached, sharing memory with the model, as `model.state_dict()` does.

    Keys are `<module>.lora_A`, `<module>.lora_B`, and, for modules_to_save and biases, the parameter's own name.
    Raises AdapterStateError where the model has no adapters.
    """
    return {name: tensor.detach() for name, tensor in adapter_tensors(model).items()}


def load_adapter_state_dict(model: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Copy an `adapter_state_dict` into the adapters of `model`, in place.

    It may be of a model of which other parts are compiled, or wrapped otherwise. Strict both ways: raises
    AdapterFormatError naming every tensor that is missing, unexpected, of another shape or not finite, or so large that
    it would overflow in its layer, and AdapterStateError for a model on the meta device; nothing is changed then.
    """
    own = adapter_tensors(model)
    given = by_plain_name(model, state_dict) if isinstance(state_dict, Mapping) else state_dict
    check_fits(own, given, what="the adapter")
    fill_adapter(model, own, given)


def names_in_state_dict(model: nn.Module) -> dict[str, str]:
    """The names that tensors of `model` have in `model.state_dict()`, where wrappers may be mentioned -> their own.

    Only those that differ."""
    tree = Tree.of(model)
    if not tree.wrappers:
        return {}
    plain = {id(t): name for name, t in reversed(tree.tensors)}
    state = model.state_dict(keep_vars=True)
    return {name: own for name, t in state.items() if (own := plain.get(id(t), name)) != name}


def by_plain_name(model: nn.Module, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """`tensors`, named as in an `adapter_state_dict` of `model` or as in its state dict, by the former names."""
    plain = names_in_state_dict(model)
    return {plain.get(name, name): value for name, value in tensors.items()}


def fill_adapter(model: nn.Module, own: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copy `values`, which fit, into `own`, the `adapter_tensors` of `model`. Raises AdapterStateError, with nothing
    changed, for a model on the meta device, and AdapterFormatError for numbers that would overflow in its layers."""
    absent = [name for name, tensor in own.items() if tensor.is_meta]
    if absent:
        raise AdapterStateError(
            f"{listed(absent)} of {type(model).__name__} is on the meta device, where nothing can be loaded: "
            "materialise the model first, with to_empty, or with load_state_dict(..., assign=True) and start_adapters."
        )
    _check_sizes(model, own, values)
    with torch.no_grad():
        for name, tensor in own.items():
            if is_sharded(tensor):
                fill(tensor, values[name])
            else:
                tensor.copy_(values[name])
    for _, injection in injections(model):
        injection.awaits_start = False


def _check_sizes(model: nn.Module, own: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Raise AdapterFormatError for finite numbers that would overflow in the precision in which their layers compute:
    A, B, scale * B and scale * B A, and what is trained besides."""
    problems = []
    rest = dict(own)
    for name, module in adapters(model):
        prefix = f"{name}." if name else ""
        for pair in module.lora_pairs(name):
            A, B = (values[prefix + factor + pair.suffix] for factor in FACTORS)
            found = too_large(A, B, pair.spec.scale, dtype_of(module.own(pair.parameter)))
            problems += [f"{pair.name} has {found}"] if found else []
            for factor in FACTORS:
                del rest[prefix + factor + pair.suffix]
    for name, tensor in rest.items():
        if tensor.is_floating_point():
            # A buffer may hold the lowest number that there is, as masks do.
            is_trained = isinstance(tensor, nn.Parameter)
            most = largest(tensor.dtype) if is_trained else torch.finfo(tensor.dtype).max
            size = largest_in(values[name])
            if not size <= most:
                problems.append(
                    f"{name} has {size:.3g}, where {str(tensor.dtype).removeprefix('torch.')} allows {most:.3g}"
                )
    if problems:
        raise AdapterFormatError(
            f"The adapter holds numbers that are finite and yet too large for the model: {listed(problems)}. It is "
            "broken, or its alpha is, or it was trained in a wider precision. Nothing was loaded."
        )


def check_fits(own: Mapping[str, Tensor], given: Mapping[str, Any], *, what: str, are_finite: bool = False) -> None:
    """Raise AdapterFormatError unless `given` holds exactly the tensors of `own`, in shape, and finite, which need not
    be looked at again where it is known (`are_finite`)."""
    if not isinstance(given, Mapping):
        raise AdapterFormatError(f"{what[0].upper()}{what[1:]} is a {type(given).__name__}, not a state dict.")
    problems = []
    missing = [name for name in own if name not in given]
    unexpected = [name for name in given if name not in own]
    if missing:
        problems.append(f"missing: {listed(missing)}")
    if unexpected:
        problems.append(f"unexpected: {listed(map(str, unexpected))}")
    for name, tensor in own.items():
        value = given.get(name)
        if value is None:
            continue
        if not isinstance(value, Tensor):
            problems.append(f"{name} is a {type(value).__name__}, not a tensor")
        elif value.shape != tensor.shape:
            problems.append(f"{name} has shape {tuple(value.shape)} where the model has {tuple(tensor.shape)}")
        elif value.is_floating_point() != tensor.is_floating_point():
            problems.append(f"{name} is {value.dtype} where the model has {tensor.dtype}")
        elif not (are_finite or is_finite(value)):
            problems.append(f"{name} holds values that are not finite")
    if unexpected and (foreign := foreign_layout_of(unexpected, beside=own)):
        raise AdapterFormatError(f"{what[0].upper()}{what[1:]} is {foreign}. Nothing was loaded.")
    if problems:
        raise AdapterFormatError(
            f"{what[0].upper()}{what[1:]} does not fit the model: {listed(problems)}. Nothing was loaded."
        )


def is_finite(tensor: Tensor) -> bool:
    """Whether every number in it is."""
    if not tensor.is_floating_point():
        return True
    # One that is not makes the sum so too, in a fifth of the time; a sum may also overflow.
    if tensor.dtype.itemsize > 1 and math.isfinite(tensor.detach().sum().item()):
        return True
    return bool(torch.isfinite(tensor).all())


def base_fingerprint(model: nn.Module, root: nn.Module | None = None) -> str:
    """A short hash of the frozen weights of `model`, or of the module `root` in it, by name, shape and value.

    Names are relative to `root`, so a base has one fingerprint whether it was adapted by itself or inside of another
    module. Values enter as bfloat16, so the same base loaded in float32 and in bfloat16 has one, too. Tensors of up to
    2^20 elements enter whole, larger ones by 2^20 evenly spaced elements; buffers do not, since training moves some,
    nor do quantized weights, whose bytes depend on the device that quantized them.
    """
    return _fingerprint(model, base_parameters(model, root))


def _fingerprint(model: nn.Module, base: Iterable[tuple[str, nn.Parameter]]) -> str:
    digest = hashlib.sha256()
    replaced = {id(m.dense_weight()): m.lora_rows for _, m in adapters(model) if isinstance(m, TokenRows)}
    for name, p in sorted(base, key=lambda item: item[0]):
        if is_quantized(p):
            continue
        W = whole(p.detach())
        if id(p) in replaced:  # the adapter brings these rows, whatever a resized embedding was filled with
            W = W.index_fill(0, replaced[id(p)], 0)
        digest.update(f"{name}{tuple(p.shape)}".encode())
        for part in _parts(W):
            values = part.reshape(-1)
            if values.is_floating_point():
                # By way of float32: a base of float64 that was loaded in float32 was rounded twice as well.
                values = values[:: max(1, values.numel() // _SAMPLE)].to(torch.float32).to(torch.bfloat16)
            else:
                values = values[:_SAMPLE]
            digest.update(values.contiguous().cpu().view(torch.uint8).numpy().data if values.numel() else b"")
    return digest.hexdigest()[:16]


_OF_SPARSE: dict[torch.layout, tuple[str, ...]] = {
    torch.sparse_csr: ("crow_indices", "col_indices", "values"),
    torch.sparse_bsr: ("crow_indices", "col_indices", "values"),
    torch.sparse_csc: ("ccol_indices", "row_indices", "values"),
    torch.sparse_bsc: ("ccol_indices", "row_indices", "values"),
    torch.sparse_coo: ("indices", "values"),
}


def _parts(W: Tensor) -> list[Tensor]:
    """The tensors that hold the numbers of `W`: itself, but for one that is sparse."""
    if W.layout is torch.strided:
        return [W]
    if W.layout not in _OF_SPARSE:
        return [W.to_dense()]
    W = W.coalesce() if W.layout is torch.sparse_coo else W
    return [getattr(W, part)() for part in _OF_SPARSE[W.layout]]


def describe_base(
    model: nn.Module, root: nn.Module | None = None, without: Collection[nn.Module] = ()
) -> dict[str, Any]:
    """What `check_same_base` needs to know the base of `model` again (or of `root` in it), as plain values; modules
    `without` whose parameters an adapter that is not there yet will bring.

    It is remembered while the base is seen to be what it was (witness.py says how): reading all of it takes longer than
    reading or writing an adapter. `base_fingerprint` always reads it.
    """
    root = unwrapped(root or model)
    brought = {id(p) for module in without for p in module.parameters()}
    base = [(name, p) for name, p in base_parameters(model, root) if id(p) not in brought]
    now = witness_of(base)
    if now is not None:
        now += tuple(
            (id(m._parameters["weight"]), m.lora.tokens) for _, m in adapters(model) if isinstance(m, TokenRows)
        )
    then, description = _DESCRIBED.get(root, (None, {}))
    if now is None or now != then:
        dtypes = sorted({type(p).__name__ if is_quantized(p) else str(p.dtype) for _, p in base})
        description = {"base_fingerprint": _fingerprint(model, base), "base_dtypes": dtypes}
        _DESCRIBED[root] = now, description
    return dict(description)


def check_same_base(
    model: nn.Module, description: Mapping[str, Any], root: nn.Module | None = None, *, what: str = "The adapter"
) -> None:
    """Raise BaseMismatchError where the base of `model` (or of `root` in it) is not the one that `description` is of.

    Where it cannot be told, because one of them was rounded to float16 or quantized, nothing is raised.
    """
    if description.get("base_fingerprint") is not None:
        compare_bases(description, describe_base(model, root), what=what, model=type(root or model).__name__)


def compare_bases(then: Mapping[str, Any], now: Mapping[str, Any], *, what: str, model: str) -> None:
    """Raise BaseMismatchError where two descriptions are not of one base, as `check_same_base` does."""
    theirs, ours = then.get("base_fingerprint"), now["base_fingerprint"]
    dtypes = then.get("base_dtypes")
    after = set(now["base_dtypes"])
    before = set(map(str, dtypes)) if isinstance(dtypes, list) else after
    # The fingerprint is of values rounded to bfloat16; a base rounded to float16 first, or quantized, has others. What
    # is quantized in both is left out.
    floating = {dtype for dtype in before | after if dtype.startswith("torch.") or dtype not in before & after}
    if theirs is None or (before != after and not floating <= _SAME_ONCE_ROUNDED):
        return
    if ours != theirs:
        raise BaseMismatchError(
            f"{what} was trained on another base: the fingerprint of its weights is {theirs}, that of this "
            f"{model} is {ours}. Load the base that it was trained on, or, if you know that "
            "this one will do, pass check_base=False."
        )


def base_parameters(model: nn.Module, root: nn.Module | None) -> list[tuple[str, nn.Parameter]]:
    """The parameters of `root` that are no part of the adapter of `model`, by name."""
    adapted = any(True for _ in adapters(model))
    tables = {
        f"{at}.{name}" if at else name for at, injection in injections(model) for name in injection.tables
    }  # are weights of the base all the same
    tensors = adapter_tensors(model) if adapted else {}
    ours = {id(t) for name, t in tensors.items() if name not in tables}
    first = {id(p): (name, p) for name, p in reversed(Tree.of(root or model).parameters)}
    return [named for key, named in reversed(first.items()) if key not in ours]
