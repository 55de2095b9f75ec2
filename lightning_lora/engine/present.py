"""What a model has of adapters already: the record that `inject` left, our adapters, a bank's, and other libraries'.

If such a model was adapted once more, its old adapters would be frozen, their own A and B adapted, and none of them
saved. Other libraries are known by the package of their classes, so that none is imported, and by typical names of
parameters.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor, nn

from lightning_lora.engine import switch
from lightning_lora.engine.config import LoRAConfig
from lightning_lora.engine.layers.base import is_adapter
from lightning_lora.engine.report import InjectionReport
from lightning_lora.engine.swap import TAKE_OFF_HOOKS, is_swapped, is_wrapped
from lightning_lora.engine.tree import NAMES as WRAPPERS
from lightning_lora.engine.tree import Tree
from lightning_lora.engine.weights import check_unsharded
from lightning_lora.errors import AdapterStateError, listed

RECORD = "lora_injection"
"""The attribute under which `inject` leaves its record on the module that it was given."""


@dataclass
class Injection:
    """The record that `inject` leaves on the module it was given. Names are relative to it, and without wrappers."""

    config: LoRAConfig
    was_trainable: frozenset[str]
    """Names of the parameters that required grad before."""
    originals: dict[str, Tensor] = field(default_factory=dict)
    """Name -> value before training, of the parameters and buffers that are trained whole: `remove` puts it back."""
    head: str | None = None
    """The layer that "all-linear" took for the output head and left out."""
    frozen_norms: tuple[str, ...] = ()
    """Names of the norms whose running statistics were frozen."""
    kept_in_place: tuple[str, ...] = ()
    """Names of quantized layers without an adapter that may not rearrange their weight (`keep_in_place`)."""
    awaits_start: bool = False
    """True while A and B are neither started nor loaded."""
    adapted: dict[str, nn.Module] = field(default_factory=dict, repr=False)
    """Name -> adapted module, for `check_as_injected`; without the module that holds this record."""
    tables: set[str] = field(default_factory=set)
    """Names in `originals` that are not trained but came with the adapter (`take_tables`)."""
    report: InjectionReport | None = field(default=None, repr=False)
    """The report that `inject` returned."""

    @property
    def trained_whole(self) -> list[str]:
        """Names of the parameters and buffers that are saved beside A and B: trained whole, or loaded with them."""
        return list(self.originals)


def injection_of(model: nn.Module) -> Injection:
    """The record that `inject` left on this module (inside its wrappers). Raises AdapterStateError if there is none."""
    tree = Tree.of(model)
    injection = tree.root.__dict__.get(RECORD)
    if injection is None:
        inside = [name for name, m in tree.modules if RECORD in m.__dict__]
        hint = f" It was called on its submodule {inside[0]!r}: pass that one." if inside else ""
        raise AdapterStateError(f"{type(model).__name__} was not adapted: inject was not called on it.{hint}")
    return injection


def injections(model: nn.Module, tree: Tree | None = None) -> Iterator[tuple[str, Injection]]:
    """The records that `inject` left on `model` and on modules inside it, each with the name of its module. `tree` is
    Tree.of(model), if known."""
    for name, module in (tree or Tree.of(model)).modules:
        if RECORD in module.__dict__:
            yield name, module.__dict__[RECORD]


_PACKAGES = {"peft": "PEFT", "adapters": "the adapters library"}
_PAIRS = (
    ("lora_A", "lora_B"),  # loralib, LitGPT
    ("lora_a", "lora_b"),  # torchtune
    ("lora_down", "lora_up"),  # kohya, LyCORIS, older diffusers
    ("hada_w1_a", "hada_w1_b"),  # LoHa
    ("adapter_down", "adapter_up"),  # bottleneck adapters
)
_PART = re.compile(rf"(?P<owner>(?:.*\.)?)(?P<own>{'|'.join(name for pair in _PAIRS for name in pair)})(?:\.|$)")


def check_none_of_ours(model: nn.Module, tree: Tree) -> None:
    """Raise AdapterStateError if `model`, or a part of it, is adapted by this package, merged, or served by a bank."""
    if present := [name for name, _ in tree.of_classes(is_adapter)]:
        raise AdapterStateError(
            f"{type(model).__name__} has adapters already ({listed(present, 3)}). "
            "Call remove(model) or merge(model) first, or save them and add them to an AdapterBank, which holds "
            "several on one base."
        )
    if hidden := _where_they_are(model, tree):
        raise AdapterStateError(hidden)
    for name, module in tree.modules:
        if "bank_cell" in module.__dict__:
            raise AdapterStateError(f"A bank serves {name or type(model).__name__} already: call bank.close() first.")


def check_some_of_ours(model: nn.Module, tree: Tree) -> None:
    """Raise AdapterStateError, which says why, if `model` has no adapters of this package at the moment."""
    if not tree.of_classes(is_adapter):
        what, why = type(model).__name__, _where_they_are(model, tree)
        if why is None and (found := _of_others(tree)):
            library = next(iter(found.values()))[0]
            why = (
                f"{what} has adapters of {library}, and none of this package: use that library's calls, or save them "
                "there (PEFT: save_pretrained) and pass the folder, or load_adapter(base, folder)."
            )
        raise AdapterStateError(why or f"{what} has no adapters: call inject(model, config) first.")


def check_removable(model: nn.Module, tree: Tree | None = None) -> None:
    """Raise AdapterStateError if the adapters of `model` cannot be taken off just now; `tree` is Tree.of(model), if
    known."""
    tree = tree or Tree.of(model)
    check_unsharded(
        model,
        "To remove or merge its adapter, save it (save_adapter, in every process), and load it into a model that is "
        "not sharded.",
        tree,
    )
    if switch.is_open(frozenset(id(module) for _, module in tree.modules)):
        raise AdapterStateError(
            f"The adapters of {type(model).__name__} are switched off just now: leave `with disabled(model)` first, in "
            "every thread and task."
        )
    changed = {cls for cls in tree.classes if is_adapter(cls) and not is_swapped(cls)}
    for name, module in tree.of_classes(is_adapter):
        if type(module) in changed:
            raise AdapterStateError(
                f"{name!r} changed its class to {type(module).__name__} after it was adapted (a parametrization, for "
                "example). Undo that first, then remove or merge the adapter."
            )
        if is_wrapped(module):
            raise AdapterStateError(
                f"{name!r} was given a forward on the instance after it was adapted, as accelerate's hooks do, which "
                f"calls the adapted one: {TAKE_OFF_HOOKS}, then remove or merge the adapter."
            )


def check_as_injected(model: nn.Module, tree: Tree | None = None) -> None:
    """Raise AdapterStateError if adapted layers of `model` are not where `inject` left them: replaced
    (resize_token_embeddings makes a new lm_head), deleted, copied, of another shape, or under other names. Otherwise
    the layers that are left would be taken for the whole adapter. A model without any adapter passes. `tree` is
    Tree.of(model), if known.
    """
    tree = tree or Tree.of(model)
    present = tree.of_classes(is_adapter)
    records = [(root, injection) for root, injection in injections(model, tree) if injection.adapted]
    known = {id(module) for _, injection in records for module in injection.adapted.values()}
    problems = []
    for root, injection in records if present else ():
        found = present if not root else Tree.of(tree.by_name[root]).of_classes(is_adapter)
        names, there = {id(module): name for name, module in found}, dict(found)
        prefix = f"{root}." if root else ""
        for name, module in injection.adapted.items():
            now, copied = names.get(id(module)), there.get(name)
            if now is not None and now != name:
                problems.append(f"{prefix}{name} is now {prefix}{now}")
            elif now is None and copied is not None and copied.__dict__["lora_path"] == name:
                known.add(id(copied))  # a copy stands in its place: AveragedModel around a part of the model does so
            elif now is None:
                problems.append(f"{prefix}{name} has no adapter any more")
        added = [name for key, name in names.items() if key not in known and name]
        problems += [f"{prefix}{name} has an adapter that inject did not give it" for name in added]
    problems += [what for name, module in present if (what := _changed(name, module)) is not None]
    if problems:
        raise AdapterStateError(
            f"{type(model).__name__} is not as inject left it: {listed(dict.fromkeys(problems))}. Layers were "
            "replaced, deleted, copied, resized or moved since (or a part is merged just now), so what is left is not "
            "the adapter that was trained. Put them back; or save_adapter or merge first, remove(model), change its "
            "layers (resize_token_embeddings, for one), and call inject or load_adapter then."
        )


def _changed(name: str, module: Any) -> str | None:
    """What has changed in the tensors of an adapted layer, in words, or None. It is called for thousands of layers."""
    state = module.__dict__
    parameters, buffers = state["_parameters"], state["_buffers"]
    for own in state["lora_names"]:
        if parameters.get(own) is None and buffers.get(own) is None and state.get(own) is None:
            return f"{name} has lost its {own}"
    A, B, spec = parameters.get("lora_A"), parameters.get("lora_B"), state["lora"]
    if A is None or B is None or A.dim() < 2 or spec.parameters:  # sharded flat, or single parameters are adapted
        return None
    fits = module.shapes(module, spec.rank)
    if (A.shape, B.shape) == fits:
        return None
    shapes = f"{tuple(A.shape)} and {tuple(B.shape)}"
    return f"{name} has A and B of {shapes}, and its layer takes {fits[0]} and {fits[1]} now"


def are_merged(model: nn.Module, tree: Tree) -> bool:
    """True if `model`, on which `inject` was called, is merged: it has no adapters, and still contains a layer that
    was adapted."""
    adapted = model.__dict__[RECORD].adapted.values()
    is_there = not adapted or not {id(m) for m in adapted}.isdisjoint(id(m) for _, m in tree.modules)
    return is_there and not tree.of_classes(is_adapter)


def _where_they_are(model: nn.Module, tree: Tree) -> str | None:
    """Why `model` has no adapters though it has a record of `inject`, in words; None if it has no record."""
    for name, module in tree.modules:
        if RECORD in module.__dict__:
            what = f"{type(model).__name__}{f' ({name!r} in it)' if name else ''}"
            if are_merged(module, Tree.of(module)):
                return f"{what} is merged: leave `with merged(model)` first."
            return f"All adapted layers of {what} were replaced since inject: call remove on it first."
    return None


def check_none_of_others(model: nn.Module, tree: Tree, meant: Callable[[], Iterable[str]] | None = None) -> None:
    """Raise AdapterStateError if another library has put adapters into `model`.

    `meant` gives the names of the modules to adapt. A part with foreign adapters is accepted if it is wholly frozen and
    none of those modules lies inside it: a teacher may have adapters.
    """
    found = _of_others(tree)
    if not found:
        return
    names = None if meant is None else list(meant())
    for name, (library, module) in found.items():
        is_free = names is not None and not any(_lies_in(other, name) for other in names)
        if is_free and not any(p.requires_grad for p in module.parameters()):
            continue
        places = listed((repr(place) if place else "its root" for place in found), 3)
        kind = f"{type(module).__module__}.{type(module).__name__}"
        raise AdapterStateError(
            f"{type(model).__name__} has adapters of {library} already, at {places} ({kind}). They would be adapted "
            "themselves, frozen, and not saved. To go on from a saved PEFT adapter, call load_adapter(base, folder) on "
            "the bare base. To keep them in the base weights, merge them first (PEFT: merge_and_unload()); to drop "
            "them, take the base itself (PEFT: unload()). To leave them as they are (a teacher's, for example), freeze "
            "them (requires_grad_(False)) and name the modules to adapt in target_modules."
        )


def _of_others(tree: Tree) -> dict[str, tuple[str, nn.Module]]:
    """Name of an outermost module that holds adapters of another library -> that library, and the module."""
    libraries = {cls: library for cls in tree.classes if (library := library_of(cls)) is not None}
    found = {name: (libraries[type(m)], m) for name, m in tree.modules if type(m) in libraries} if libraries else {}
    owners: dict[str, set[str]] = {}
    for name, _ in tree.parameters:
        if ("lora_" in name or "hada_" in name or "adapter_" in name) and (part := _PART.match(name)):
            owners.setdefault(part["owner"].removesuffix("."), set()).add(part["own"])
    modules = dict(tree.every) if owners else {}
    for owner, names in owners.items():
        for pair in _PAIRS:
            if names.issuperset(pair):
                found.setdefault(owner, (f"another library ({' and '.join(pair)})", modules[owner]))
    outermost: dict[str, tuple[str, nn.Module]] = {}
    for name in sorted(found):
        if not any(_lies_in(name, outer) for outer in outermost):
            outermost[name] = found[name]
    return outermost


def _lies_in(name: str, outer: str) -> bool:
    return not outer or name == outer or name.startswith(f"{outer}.")


def library_of(cls: type[nn.Module]) -> str | None:
    """The library of adapters that `cls` comes from, if any."""
    for parent in cls.__mro__:
        package, _, rest = parent.__module__.partition(".")
        if package == "peft" or (package == "adapters" and rest.startswith(("model_mixin", "methods."))):
            return _PACKAGES[package]
    return None


# Recognises LoRAs in other layouts than PEFT's by the names of their tensors.
#
# Such files keep the scale of a layer in a tensor beside its factors (`alpha`), in the header of the file, or in a
# config of their own. PEFT's layout has no place for it there, so a reader of A and B alone would lose the scale.

_CONVERT = (
    "Convert it: PEFT's examples/stable_diffusion/convert_sd_adapter_to_peft.py does, and so does loading it with "
    "diffusers and saving its modules with PEFT's save_pretrained, which write each alpha into adapter_config.json"
)


class _Layout(NamedTuple):
    name: str
    pattern: re.Pattern[str]
    """Matches the names of its tensors."""
    scale: str
    """Where it keeps the scale, in words."""
    advice: str = _CONVERT


_LAYOUTS = (
    _Layout(
        "LyCORIS's layout",
        re.compile(r"\.(hada_[wt]\d(_[ab])?|lokr_[wt]\d(_[ab])?|oft_blocks|glora_\w+)$"),
        "its update is no product of one A and one B",
        "Merge it into its base with the program that it was made for",
    ),
    _Layout(
        "kohya's layout",
        re.compile(r"^lora_(unet|te\d*|transformer|prior)_|^lycoris_|(^|\.)lora_(down|up|mid)\.weight$"),
        "the scale of a layer is its alpha / rank",
    ),
    _Layout(
        "diffusers' older layout",
        re.compile(r"(_lora\d*|\.lora|lora_linear_layer)\.(down|up)\.weight$"),
        "the scale of a layer is its alpha (network_alphas) / rank, or 1 where it has none",
    ),
    _Layout(
        "diffusers' layout",
        re.compile(
            r"^(unet|transformer(_2)?|text_encoder(_[23])?|prior|diffusion_model)\.(?!h\.).*\.lora_[AB]\.weight$"
        ),
        "its scales are in the header of its file, or alpha is the rank",
    ),
    _Layout(
        "mlx-lm's layout",
        re.compile(r"\.lora_[ab]$"),
        "the scale is lora_parameters.scale in its config",
        "Load the folder as mlx-lm wrote it, adapter_config.json beside adapters.safetensors; or write the transposed "
        "lora_a and lora_b under PEFT's keys, with scale * rank as lora_alpha",
    ),
)
_PEFT = "base_model.model."
_ALPHA = re.compile(r"(.*?)(?:\.lora_[AB])?\.(?:(?:lora_|network_)?alpha|(?:lora_)?scal(?:e|ing))$")
_FACTOR = re.compile(r"(.*)\.lora_(?:embedding_)?[AB](?:_\w+)?(?:\.\w+)*$")
_IN_HEADER = ("network_alphas", "lora_adapter_metadata")


def other_prefix(given: Iterable[str], wanted: Iterable[str]) -> str | None:
    """A sentence that says what PEFT's keys `given` have more or less than the keys `wanted`, of which they match none.
    None if they differ in another way."""
    names, there = list(given), set(wanted)
    if not names or not there:
        return None
    inside = sorted(part for part in WRAPPERS if any(part in name.split(".") for name in names))
    if inside and {_without(name, inside) for name in names} <= there:
        what = listed(repr(f"{part}.") for part in inside)
        return f"They have {what} in them, which DDP, FSDP or torch.compile puts into the names of what it wraps"
    stem, ending = names[0].removeprefix(_PEFT), ""
    for name in there:
        short = name.removeprefix(_PEFT)
        if stem.endswith(f".{short}") and {n.replace(stem.removesuffix(short), "", 1) for n in names} <= there:
            ending = stem.removesuffix(short)
            return f"They have {ending!r} before the names of this model: they belong to a model around it"
        if names[0] == short and {_PEFT + n for n in names} <= there:
            return f"They lack PEFT's prefix {_PEFT!r}"
        more = short.removesuffix(stem)
        if short.endswith(f".{stem}") and {n.replace(_PEFT, _PEFT + more, 1) for n in names} <= there:
            return f"They lack {more!r}, which this model has before its names: they belong to a part of it"
    return None


def _without(name: str, parts: Collection[str]) -> str:
    return ".".join(part for part in name.split(".") if part not in parts)


def foreign_layout_of(
    keys: Iterable[Any], metadata: Mapping[str, Any] = MappingProxyType({}), *, beside: Iterable[Any] = ()
) -> str | None:
    """If tensors called `keys`, in a file with this `metadata`, are a LoRA in another layout: a clause that names the
    layout, where its scale is and what to do. None if they may be in PEFT's layout or ours. `beside` are names of
    further tensors, which are as they should be."""
    names = [key for key in keys if isinstance(key, str)]
    theirs = [name for name in names if not name.startswith("base_model.")]  # PEFT's own prefix
    for layout in _LAYOUTS:
        example = next(filter(layout.pattern.search, theirs), None)
        if example is not None:
            return f"a LoRA in {layout.name} ({example!r}), which is not read here: {layout.scale}. {layout.advice}"
    layers = {match[1] for match in map(_FACTOR.match, (*names, *map(str, beside))) if match}
    alpha = next((name for name in names if (match := _ALPHA.match(name)) and match[1] in layers), None)
    if alpha is not None:
        return (
            f"a LoRA with a scale beside its factors ({alpha!r}, as kohya and diffusers write it), which would be "
            f"dropped: PEFT's layout has it in lora_alpha and alpha_pattern. {_CONVERT}"
        )
    named = next((name for name in _IN_HEADER if name in metadata), None)
    if named is not None:
        return (
            f"a LoRA of diffusers with scales in the header of its file ({named}), which would be dropped: PEFT's "
            f"layout has them in adapter_config.json. {_CONVERT}"
        )
    return None
