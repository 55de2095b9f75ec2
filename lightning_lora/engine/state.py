"""Reads and loads an adapter's tensors apart from the base, and recognises a base by the fingerprint of its weights."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lightning_lora.engine.layers import adapters
from lightning_lora.engine.layers.base import is_adapter
from lightning_lora.engine.layers.embedding import TokenRows
from lightning_lora.engine.layers.pair import FACTORS
from lightning_lora.engine.memory import largest, largest_in, too_large
from lightning_lora.engine.present import check_as_injected, check_some_of_ours, foreign_layout_of, injections
from lightning_lora.engine.tree import Tree, name_in, unwrapped
from lightning_lora.engine.weights import check_complete, dtype_of, fill, is_quantized, is_sharded, whole
from lightning_lora.engine.witness import witness_of
from lightning_lora.errors import AdapterFormatError, AdapterStateError, BaseMismatchError, listed

_SAMPLE = 1 << 20
_SAME_ONCE_ROUNDED = {"torch.float32", "torch.float64", "torch.bfloat16"}

_DESCRIBED: WeakKeyDictionary[nn.Module, tuple[Any, dict[str, Any]]] = WeakKeyDictionary()
"""Module -> the witness of its base weights (witness.py) and the description that `describe_base` returned for them."""


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The live tensors of the adapter of `model`, by name: `<module>.lora_A`, `<module>.lora_B`, those of a variant
    (DoRA's m), and the tensors that are trained whole, under their own names.

    Raises AdapterStateError if the model has no adapters, or not all that `inject` gave it."""
    tensors: dict[str, Tensor] = {}
    tree = Tree.of(model)
    check_some_of_ours(model, tree)
    check_as_injected(model, tree)
    layers: Any = tree.of_classes(is_adapter)
    for name, module in layers:
        tensors |= {name_in(name, own): getattr(module, own) for own in module.lora_names}
    check_complete(tensors)
    for root, injection in injections(model, tree):
        if not injection.trained_whole:
            continue
        there = dict(Tree.of(tree.by_name[root]).tensors)
        if absent := [name for name in injection.trained_whole if name not in there]:
            raise AdapterStateError(
                f"{listed(name_in(root, name) for name in absent)} of {type(model).__name__} was trained whole, and "
                "does not exist any more: its module was replaced or deleted since inject. Put it back, or call remove "
                "first."
            )
        tensors |= {name_in(root, name): there[name] for name in injection.trained_whole}
    return tensors


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The adapter of `model` as a state dict.

    Args:
        model: An adapted model, with or without wrappers (DDP, torch.compile).

    Returns:
        Name -> tensor, detached, in the memory of the model, as in `model.state_dict()`. The names are those of the
        plain model without wrappers: `<module>.lora_A` (rank, in), `<module>.lora_B` (out, rank), and, for
        modules_to_save and biases, the parameter's own name.

    Raises:
        AdapterStateError: The model has no adapters, or not all that `inject` gave it.

    Example:
        >>> import torch
        >>> from lightning_lora import LoRAConfig, adapter_state_dict, inject
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3))
        >>> report = inject(model, LoRAConfig(rank=2, target_modules=["0"]))
        >>> {name: tuple(t.shape) for name, t in adapter_state_dict(model).items()}
        {'0.lora_A': (2, 4), '0.lora_B': (3, 2)}
    """
    return {name: tensor.detach() for name, tensor in adapter_tensors(model).items()}


def load_adapter_state_dict(model: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Copy an `adapter_state_dict` into the adapters of `model`, in place. A call that raises changes nothing.

    Args:
        model: A model with an adapter of the same shape.
        state_dict: Name -> tensor, exactly the names of `adapter_state_dict(model)`. Names in which wrappers are
            mentioned, as in `model.state_dict()`, are accepted too.

    Raises:
        AdapterFormatError: A tensor is missing, unexpected, of another shape, not finite, or so large that it would
            overflow in its layer; the message names them all.
        AdapterStateError: The model has no adapters, or is on the meta device.

    Example:
        >>> import torch
        >>> from lightning_lora import LoRAConfig, adapter_state_dict, inject, load_adapter_state_dict
        >>> models = [torch.nn.Sequential(torch.nn.Linear(4, 3)) for _ in range(2)]
        >>> reports = [inject(model, LoRAConfig(rank=2, target_modules=["0"])) for model in models]
        >>> load_adapter_state_dict(models[1], adapter_state_dict(models[0]))
        >>> torch.equal(models[0][0].lora_A, models[1][0].lora_A)
        True
    """
    own = adapter_tensors(model)
    given = by_plain_name(model, state_dict) if isinstance(state_dict, Mapping) else state_dict
    check_fits(own, given, what="the adapter")
    fill_adapter(model, own, given)


def names_in_state_dict(model: nn.Module) -> dict[str, str]:
    """Name in `model.state_dict()`, where wrappers may be mentioned -> plain name, for the names that differ."""
    tree = Tree.of(model)
    if not tree.wrappers:
        return {}
    plain = {id(t): name for name, t in reversed(tree.tensors)}
    state = model.state_dict(keep_vars=True)
    return {name: own for name, t in state.items() if (own := plain.get(id(t), name)) != name}


def by_plain_name(model: nn.Module, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """`tensors` under plain names, those of `adapter_state_dict(model)`; given under these, or as in its state dict."""
    plain = names_in_state_dict(model)
    return {plain.get(name, name): value for name, value in tensors.items()}


def fill_adapter(model: nn.Module, own: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copy `values`, checked by `check_fits`, into `own`, the `adapter_tensors` of `model`. Raises AdapterStateError
    for a model on the meta device, AdapterFormatError for numbers that would overflow; nothing is changed then."""
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
    """Raise AdapterFormatError for finite numbers that would overflow in the dtype in which their layer computes: in A,
    B, scale * B and scale * B A, and in the other tensors of the adapter."""
    problems = []
    rest = dict(own)
    for name, module in adapters(model):
        for pair in module.lora_pairs(name):
            A, B = (values[name_in(name, factor + pair.suffix)] for factor in FACTORS)
            found = too_large(A, B, pair.spec.scale, dtype_of(module.own(pair.parameter)))
            problems += [f"{pair.name} has {found}"] if found else []
            for factor in FACTORS:
                del rest[name_in(name, factor + pair.suffix)]
    for name, tensor in rest.items():
        if tensor.is_floating_point():
            # A buffer may hold the lowest number of its dtype, as masks do.
            is_trained = isinstance(tensor, nn.Parameter)
            most = largest(tensor.dtype) if is_trained else torch.finfo(tensor.dtype).max
            size = largest_in(values[name])
            if not size <= most:
                problems.append(
                    f"{name} has {size:.3g}, where {str(tensor.dtype).removeprefix('torch.')} allows {most:.3g}"
                )
    if problems:
        raise AdapterFormatError(
            f"The adapter holds numbers that are finite and yet too large for the model: {listed(problems)}. The "
            "adapter or its alpha is broken, or it was trained in a wider precision. Nothing was loaded."
        )


def check_fits(own: Mapping[str, Tensor], given: Mapping[str, Any], *, what: str, are_finite: bool = False) -> None:
    """Raise AdapterFormatError unless `given` has exactly the names and shapes of `own`, and finite values. With
    `are_finite` the values are known to be finite and are not checked."""
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
    """True if every number in `tensor` is finite."""
    if not tensor.is_floating_point():
        return True
    # Fast path, in a fifth of the time: a finite sum means finite values. The sum may overflow, so else check each.
    if tensor.dtype.itemsize > 1 and math.isfinite(tensor.detach().sum().item()):
        return True
    return bool(torch.isfinite(tensor).all())


def base_fingerprint(model: nn.Module, root: nn.Module | None = None) -> str:
    """A short hash of the frozen weights of `model`, or of the module `root` in it, by name, shape and value.

    Names are relative to `root`, so a base has the same fingerprint whether it was adapted by itself or inside another
    module. Values are hashed as bfloat16, so a base loaded in float32 and in bfloat16 has the same fingerprint, too.
    Tensors of up to 2^20 elements are hashed whole, larger ones by 2^20 evenly spaced elements. Buffers are left out,
    since training changes some, and so are quantized weights, whose bytes depend on the device that quantized them.

    >>> import torch
    >>> from lightning_lora.engine import LoRAConfig, base_fingerprint, inject
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3))
    >>> before = base_fingerprint(model)
    >>> _ = inject(model, LoRAConfig(rank=2, target_modules=["0"]))
    >>> base_fingerprint(model) == before
    True
    """
    return _fingerprint(model, base_parameters(model, root))


def _fingerprint(model: nn.Module, base: Iterable[tuple[str, nn.Parameter]]) -> str:
    digest = hashlib.sha256()
    replaced = {id(m.dense_weight()): m.lora_rows for _, m in adapters(model) if isinstance(m, TokenRows)}
    for name, p in sorted(base, key=lambda item: item[0]):
        if is_quantized(p):
            continue
        W = whole(p.detach())
        if id(p) in replaced:  # the adapter replaces these rows, so the base's values in them do not matter
            W = W.index_fill(0, replaced[id(p)], 0)
        digest.update(f"{name}{tuple(p.shape)}".encode())
        for part in _parts(W):
            values = part.reshape(-1)
            if values.is_floating_point():
                # Through float32: a float64 base that was once loaded in float32 has been rounded twice, too.
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
    """The tensors that hold the numbers of `W`: W itself, or the parts of a sparse W."""
    if W.layout is torch.strided:
        return [W]
    if W.layout not in _OF_SPARSE:
        return [W.to_dense()]
    W = W.coalesce() if W.layout is torch.sparse_coo else W
    return [getattr(W, part)() for part in _OF_SPARSE[W.layout]]


def describe_base(
    model: nn.Module, root: nn.Module | None = None, without: Collection[nn.Module] = ()
) -> dict[str, Any]:
    """A description of the base of `model` (or of `root` in it), as plain values, for `check_same_base`. It leaves out
    the modules `without`, whose parameters an adapter will bring.

    It is cached while the base is seen to be unchanged (witness.py says how), since to read the whole base takes longer
    than to read or write an adapter. `base_fingerprint` always reads the base.
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
    """Raise BaseMismatchError if `description` describes another base than that of `model` (or of `root` in it).

    Nothing is raised if they cannot be compared, because one of them was rounded to float16 or quantized.
    """
    if description.get("base_fingerprint") is not None:
        compare_bases(description, describe_base(model, root), what=what, model=type(root or model).__name__)


def compare_bases(then: Mapping[str, Any], now: Mapping[str, Any], *, what: str, model: str) -> None:
    """Raise BaseMismatchError if two descriptions are of different bases, as `check_same_base` does."""
    theirs, ours = then.get("base_fingerprint"), now["base_fingerprint"]
    dtypes = then.get("base_dtypes")
    after = set(now["base_dtypes"])
    before = set(map(str, dtypes)) if isinstance(dtypes, list) else after
    # The fingerprint is of values rounded to bfloat16, so a base that was rounded to float16 before, or quantized, has
    # another one. Dtypes that are quantized in both descriptions do not matter.
    floating = {dtype for dtype in before | after if dtype.startswith("torch.") or dtype not in before & after}
    if theirs is None or (before != after and not floating <= _SAME_ONCE_ROUNDED):
        return
    if ours != theirs:
        raise BaseMismatchError(
            f"{what} was trained on another base: the fingerprint of its weights is {theirs}, that of this "
            f"{model} is {ours}. Load the base that it was trained on, or, if you know that "
            "this base fits as well, pass check_base=False."
        )


def base_parameters(model: nn.Module, root: nn.Module | None) -> list[tuple[str, nn.Parameter]]:
    """The parameters of `root` that do not belong to the adapter of `model`, with their names."""
    adapted = any(True for _ in adapters(model))
    # Tables come with the adapter, but are weights of the base.
    tables = {name_in(at, name) for at, injection in injections(model) for name in injection.tables}
    tensors = adapter_tensors(model) if adapted else {}
    ours = {id(t) for name, t in tensors.items() if name not in tables}
    first = {id(p): (name, p) for name, p in reversed(Tree.of(root or model).parameters)}
    return [named for key, named in reversed(first.items()) if key not in ours]
