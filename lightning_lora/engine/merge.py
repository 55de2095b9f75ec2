"""Merges adapters into the base weights, for good (`merge`) or for a while (`merged`).

At the end of `merged` the untouched base weights are put back. The update is never subtracted, since that would drift
in half precision.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.engine.forwards import swapping
from lightning_lora.engine.inject import release
from lightning_lora.engine.judged import SURVIVES, project
from lightning_lora.engine.layers.base import Adapter, adapters, unadapt
from lightning_lora.engine.layers.embedding import TokenRows
from lightning_lora.engine.layers.pair import BIAS, FACTORS
from lightning_lora.engine.memory import Memory, largest_in, repeats
from lightning_lora.engine.present import check_as_injected, check_removable, check_some_of_ours, injections
from lightning_lora.engine.tree import Tree, name_in, submodule, unwrapped, weight_users
from lightning_lora.engine.weights import dense, is_plain, stored
from lightning_lora.errors import AdapterStateError, listed


def merge(model: nn.Module) -> None:
    """Add the adapters to the base weights of `model` for good: each adapted W becomes W + scale * B A.

    The adapters are gone afterwards, and parameters are trainable as before `inject`. A call that raises changes
    nothing.

    A weight that is tied, or that shares memory with another tensor, is untied first, with a warning, so that parts
    that were not adapted stay as they are. A quantized weight is quantized again, with a warning that says how much of
    the update is lost; a weight of torchao's becomes a plain one. If a 16-bit weight keeps less than nine tenths of its
    update, a warning names the layer and the share.

    Args:
        model: The module that `inject` was called on, or a module around it.

    Raises:
        AdapterStateError: There are no adapters, or a layer cannot be merged; the message says why.

    Example:
        >>> import torch
        >>> from lightning_lora import LoRAConfig, inject, merge
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3))
        >>> report = inject(model, LoRAConfig(rank=2, target_modules=["0"]))
        >>> with torch.no_grad():
        ...     _ = model[0].lora_B.fill_(1.0)  # as if it had been trained
        >>> adapted = model(torch.ones(1, 4))
        >>> merge(model)
        >>> torch.allclose(model(torch.ones(1, 4)), adapted)
        True
        >>> sorted(model.state_dict())
        ['0.bias', '0.weight']
    """
    mergeable = _mergeable(model)
    records = [(submodule(model, name), injection) for name, injection in injections(model)][::-1]
    if not records:
        raise AdapterStateError(
            f"inject was called on a module around this {type(model).__name__}: call merge on that module."
        )
    shared = _shared(model, mergeable)
    changed = {
        id(module._parameters.get(parameter))
        for name, module in mergeable.items()
        for parameter in (
            *(pair.parameter for pair in module.lora_pairs(name)),
            *(["bias"] if BIAS in module.lora_names else []),
        )
    }
    names = dict.fromkeys(name for key in changed for name in shared.get(key, ()))
    if names:  # warn before anything is changed, since a user may turn warnings into errors
        warnings.warn(
            f"Merging unties a weight that is shared with {listed(names)} (one parameter, or one memory), so that each "
            "computes what it did before. The config of a transformers model says tie_word_embeddings=False from now "
            "on; build other models untied where you load the merged weights.",
            stacklevel=2,
        )
    _check_rounding(mergeable)
    _warn_of_growth(mergeable)
    tied = tied_models(model)
    with swapping([owner for owner, _ in records], mergeable.values()):
        for module in mergeable.values():
            values, attributes = _merged(module)
            for name, value in values.items():
                own = module._parameters[name]
                assert own is not None
                in_place = is_plain(own) and own.shape == value.shape and not repeats(own)
                if in_place and not shared[id(own)]:  # else a new parameter: others keep the shared one
                    with torch.no_grad():
                        values[name] = own.copy_(value)
            _put(module, values, attributes)
    say_what_is_true(tied)
    for owner, injection in records:
        release(owner, injection)


@contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """Merge the adapters of `model` inside a `with` block, where its layers are the base's and as fast as those.

    The merged weights are new tensors. After the block the model is as before, bit for bit. It warns of lost precision
    as `merge` does. Threads that share the model take `AdapterBank.folded`, which keeps them apart: here none may call
    it while the block is entered or left.

    Args:
        model: The module that `inject` was called on, or a module around it.

    Raises:
        AdapterStateError: There are no adapters, or a layer cannot be merged; the message says why. Or the model runs
            in another thread as the block is entered (nothing is changed then) or left; a forward that runs there
            meanwhile raises it as well.

    Example:
        >>> import torch
        >>> from lightning_lora import LoRAConfig, inject, merged
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3))
        >>> report = inject(model, LoRAConfig(rank=2, target_modules=["0"]))
        >>> with merged(model):
        ...     type(model[0]).__name__
        'Linear'
        >>> type(model[0]).__name__
        'LoRALinear'
    """
    mergeable = _mergeable(model)
    owners = [submodule(model, name) for name, _ in injections(model)]
    _check_rounding(mergeable)
    _warn_of_growth(mergeable)
    tied = tied_models(model)
    merged_layers = [(module, *_merged(module)) for module in mergeable.values()]
    undo = []
    with swapping(owners, mergeable.values()):
        for module, values, attributes in merged_layers:
            before = {name: module._parameters[name] for name in values}, {n: getattr(module, n) for n in attributes}
            undo.append((module, *before, _put(module, values, attributes)))
        said = say_what_is_true(tied)
    raised: type[BaseException] | None = None
    try:
        yield
    except BaseException as error:
        raised = type(error)
        raise
    finally:
        with swapping(owners, mergeable.values(), refuses=False) as is_running:
            for config, value in said:
                setattr(config, _FIELD, value)
            for module, parameters, attributes, adapt_again in undo:
                module._parameters.update(parameters)
                vars(module).update(attributes)
                adapt_again()
                module.parameters_replaced(module)
        if is_running and raised in (None, GeneratorExit):
            raise AdapterStateError(
                f"`with merged(...)` was left while the {type(model).__name__} ran in another thread, which found some "
                "layers merged and others not. It is unmerged now: call it there again, and keep threads apart."
            )


def _mergeable(model: nn.Module) -> dict[str, Adapter]:
    """Name -> adapted layer. Raises AdapterStateError if one cannot be merged; nothing is changed here."""
    tree = Tree.of(model)
    check_some_of_ours(model, tree)
    check_as_injected(model, tree)
    check_removable(model)
    found = {}
    for name, module in adapters(model):
        try:
            module.check_mergeable()
        except AdapterStateError as error:
            raise AdapterStateError(f"{name!r}: {error}") from None
        found[name] = module
    # Layers without adapter tensors of their own read those of another layer (TokenLogits), so they are merged first.
    return dict(sorted(found.items(), key=lambda entry: bool(entry[1].lora_names)))


def _shared(model: nn.Module, mergeable: Mapping[str, Adapter]) -> dict[int, list[str]]:
    """id(parameter of an adapted layer) -> the names of other modules and tensors that share it or its memory."""
    modules = Tree.of(model).modules
    users, memory = weight_users(modules), Memory(modules)
    return {
        id(p): [name for name, user in users[id(p)] if user is not module and not module.shares_with(user)]
        + [name_in(name, other) for other, q in module._parameters.items() if q is p and other != own]
        + [held.name for held in memory.sharing(p)]
        for name, module in mergeable.items()
        for own, p in module._parameters.items()
        if p is not None
    }


def _merged(module: Adapter) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The merged parameters and the changed attributes of the layer, by name, stored as the base's are."""
    values: dict[str, Tensor] = {}
    attributes: dict[str, Any] = {}
    with torch.no_grad():
        for name, value in module.merged_parameters().items():
            own = module._parameters[name]
            assert own is not None
            values[name], of_storage = stored(module, value, own)
            attributes |= of_storage
        return values, attributes | module.merged_attributes()


def _put(module: Adapter, values: Mapping[str, Tensor], attributes: Mapping[str, Any]) -> Callable[[], None]:
    """Take the adapter of `module` away and give it these parameters and attributes. Returns a function that adapts it
    again."""
    kind = type(module)
    adapt_again = unadapt(module)
    for name, value in values.items():
        p = value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False)
        module._parameters[name] = p
    vars(module).update(attributes)
    kind.parameters_replaced(module)
    return adapt_again


def _warn_of_growth(mergeable: Mapping[str, Adapter]) -> None:
    """Warn of weights that get another shape, before anything is changed."""
    grown = [
        f"{name} from {'x'.join(map(str, module._parameters['weight'].shape))} to {'x'.join(map(str, shape))}"  # type: ignore[union-attr]
        for name, module in mergeable.items()
        if (shape := module.merged_shape()) is not None
    ]
    if grown:
        warnings.warn(
            f"Merged, a convolution with groups becomes one with groups=1, since its adapter reads all channels, and "
            f"its weight grows: {listed(grown)}. To load it elsewhere, build it with groups=1; or use the adapter "
            "unmerged.",
            stacklevel=3,
        )


def shares_kept(model: nn.Module) -> dict[str, tuple[float, float]]:
    """Name of an adapted weight -> the share of its update that is left once the merged weight is rounded to the base's
    dtype, and the Frobenius norm of the update. Raises as `merge` does; nothing is changed."""
    with torch.no_grad():
        return {
            changed: (share_kept(before, wanted), float((wanted.double() - before.double()).norm()))
            for name, module in _mergeable(model).items()
            for changed, own, before, wanted in _changes(name, module)
            if is_plain(own)
        }


def _check_rounding(mergeable: Mapping[str, Adapter]) -> None:
    """Warn of the part of the updates that is lost when the merged weights are rounded, before anything is changed.
    Raises AdapterStateError if a merged weight would not be finite."""
    broken: list[str] = []
    lost: dict[str, float] = {}
    kept: dict[str, float] = {}
    with torch.no_grad():
        for name, module in mergeable.items():
            if _keeps_all(module):  # most layers: their update need not be computed
                kept[name] = 1.0
                continue
            for changed, own, before, wanted in _changes(name, module):
                if is_plain(own):
                    kept[changed] = share_kept(before, wanted)
                    if bool((before.isfinite() & ~wanted.to(before.dtype).isfinite()).any()):
                        broken.append(f"{changed} (in {str(before.dtype).removeprefix('torch.')})")
                    continue
                value, _ = stored(module, wanted.float(), own)
                if not is_plain(value):
                    # `value` has its own scales, so `dense` needs no module.
                    got = dense(nn.Module(), value).float()
                    lost[changed] = float((got - wanted).norm() / (wanted - before).norm().clamp(min=1e-30))
    if broken:
        raise AdapterStateError(
            f"Merged, the weights of {listed(broken)} would hold values that are not finite: the adapter diverged, or "
            "its update is too large for that dtype (then call model.float() first)."
        )
    if lost:
        worst = max(lost, key=lost.__getitem__)
        warnings.warn(
            f"Merging quantizes {len(lost)} adapted weights again, which changes them by up to {lost[worst]:.2g} times "
            f"their update (Frobenius norms; at {worst!r}). To lose nothing, save the adapter and merge it into a base "
            "in full precision.",
            stacklevel=3,
        )
    weak = sorted((share, name) for name, share in kept.items() if share < SURVIVES)
    if weak:
        warnings.warn(
            f"Merging rounds weights to a precision in which {len(weak)} of {len(kept)} updates are partly lost. Of "
            f"each this share is left: {listed(f'{name} {share:.2f}' for share, name in weak)}. To lose nothing, use "
            "the adapter unmerged, or merge it into the base in float32: call model.float() before merge.",
            stacklevel=3,
        )


def _keeps_all(module: Adapter) -> bool:
    """True if merging loses no bits and stays finite: the weight has 32 bits or more, and the largest numbers of W, A
    and B are small enough."""
    W = module._parameters.get("weight")
    if module.lora_names != FACTORS or W is None or not is_plain(W) or W.dtype.itemsize < 4:
        return False
    A, B = module.lora_A, module.lora_B
    change = abs(module.lora.scale) * largest_in(A) * largest_in(B) * A.shape[0]
    return change + largest_in(W) <= torch.finfo(W.dtype).max


def _changes(name: str, module: Adapter) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """The parameters that merging changes in a layer: name, parameter, its numbers, and the new numbers, unrounded.

    Of an embedding with trained rows, the numbers are those of these rows.
    """
    for pair in module.lora_pairs(name):
        own = module._parameters.get(pair.parameter)
        if own is not None:
            yield pair.name, own, module.dense_weight(pair.parameter), module.adapted_weight(pair.parameter)
    if isinstance(module, TokenRows):
        W = module.dense_weight()
        yield name, W, W[module.lora_rows], module.tokens
    mine, bias = module._parameters.get(BIAS), module._parameters.get("bias")
    if mine is not None and bias is not None:
        yield name_in(name, "bias"), bias, bias, bias.float() + module.lora.scale * mine.float()


def share_kept(before: Tensor, wanted: Tensor) -> float:
    """The share of the change `wanted - before` that is left once `wanted` is rounded to the dtype of `before`: the
    projection of the rounded change on the exact one, relative to that. 1 if nothing changes or nothing is rounded."""
    if before.dtype.itemsize >= wanted.dtype.itemsize:
        return 1.0
    change = wanted - before
    left = wanted.to(before.dtype).to(wanted.dtype) - before
    return project(left, change) if bool(change.any()) else 1.0


# Corrects `config.tie_word_embeddings` of a transformers model when a merge has untied its input embedding and head.
#
# A model that is loaded with tie_word_embeddings=True ties the two again, and would lose one of them. Only methods and
# attributes are used here, so transformers is not imported.

_FIELD = "tie_word_embeddings"


def tied_models(model: nn.Module) -> list[Any]:
    """The models in `model` whose head shares the weight of their input embedding."""
    return [m for _, m in Tree.of(model).modules if hasattr(m, "config") and _is_tied(m)]


def say_what_is_true(models: list[Any]) -> list[tuple[Any, Any]]:
    """Set the field to False in the configs of those `models`, all of them tied before, that are not tied any more.
    Returns each changed config with its former value."""
    before = [(config, getattr(config, _FIELD)) for m in models if not _is_tied(m) for config in _saying_tied(m.config)]
    for config, _ in before:
        setattr(config, _FIELD, False)
    return before


def output_embeddings(model: nn.Module) -> Iterator[nn.Module]:
    """The output heads in `model`, as its models' get_output_embeddings names them."""
    for _, module in Tree.of(model).modules:
        head = _asked(module, "get_output_embeddings")
        if isinstance(head, nn.Module):
            yield unwrapped(head)


def _is_tied(model: nn.Module) -> bool:
    # From `_parameters`, since reading the weight of an adapted layer gives the adapted weight.
    tables = [_asked(model, f"get_{which}_embeddings") for which in ("input", "output")]
    weights = [t._parameters.get("weight") if isinstance(t, nn.Module) else None for t in tables]
    return weights[0] is not None and weights[0] is weights[1]


def _asked(model: Any, method: str) -> Any:
    """The result of the method `method` of a transformers model; None if it has none or the method raises."""
    try:
        return getattr(model, method)()
    except (AttributeError, NotImplementedError, TypeError):
        return None


def _saying_tied(config: Any) -> Iterator[Any]:
    """`config`, and the configs inside it (of a model of several parts), whose field is True."""
    if getattr(config, _FIELD, False):
        yield config
    for name in getattr(config, "sub_configs", ()):
        inner = getattr(config, name, None)
        if inner is not None and inner is not config:
            yield from _saying_tied(inner)
