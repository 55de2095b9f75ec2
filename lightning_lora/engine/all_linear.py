"""Finds the targets of "all-linear": the linear layers of a model, without its output head and its references."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Container, Iterator, Sequence, Set
from typing import Any, NamedTuple

import torch
from torch import nn

from lightning_lora.engine.layers import LinearLoRA, geometry_of
from lightning_lora.engine.tree import Candidates, Target, Tree, name_in, submodule, unwrapped
from lightning_lora.engine.weights import is_plain


def all_linear(there: Candidates, everything: Candidates) -> tuple[list[Target], str | None, dict[str, str]]:
    """The targets among `there`; the output head, if it is among them (it is left out); and the references that are
    left out (see below), each with how to adapt it. `everything` is `there` and the modules trained whole."""
    tree = there.tree
    targets = there.of_classes(is_linear)
    linear = targets if everything is there else everything.of_classes(is_linear)
    left_out = references(tree, targets, lambda: output_head(tree, linear))
    if left_out:
        targets = [t for t in targets if not lies_in(t.name, left_out)]
        linear = [t for t in linear if not lies_in(t.name, left_out)]
    head = output_head(tree, linear, left_out)
    if all(t.name != head for t in reversed(targets)):
        head = None  # it is trained whole, so the report need not mention it
    return [t for t in targets if t.name != head] if head is not None else targets, head, left_out


def is_linear(cls: type[nn.Module]) -> bool:
    """True if "all-linear" means modules of that class: nn.Linear, classes derived from it, transformers' Conv1D."""
    geometry = geometry_of(cls)
    return geometry is not None and issubclass(geometry, LinearLoRA)


def output_head(tree: Tree, linear: list[Target], left_out: Container[str] = ()) -> str | None:
    """The name of the output head, the layer that turns features into outputs; None if there is none that one can find.

    In a transformers model it is what get_output_embeddings returns, or the last linear layer outside `base_model`. In
    other models it is the last linear layer, unless that is the only one, or lies in a stack of blocks (a ModuleList,
    or numbered siblings of one class). Modules inside parts that are `left_out` are not asked.
    """
    saying = (m for name, m in tree.modules if hasattr(m, "get_output_embeddings") and not lies_in(name, left_out))
    hf: Any = next((m for m in saying if hasattr(m, "base_model")), None)
    outside = list(reversed(linear))
    if hf is not None:
        try:
            embeddings = hf.get_output_embeddings()
            embeddings = unwrapped(embeddings) if isinstance(embeddings, nn.Module) else None
        except (NotImplementedError, AttributeError):
            embeddings = None
        for target in linear:
            if target.module is embeddings:
                return target.name
        inside = {id(m) for m in (hf.base_model if isinstance(hf.base_model, nn.Module) else hf).modules()}
        outside = [target for target in outside if id(target.module) not in inside]
    last = next(iter(outside), None)
    if last is None or len(linear) == 1 or _in_stack(tree.root, last.name):
        return None
    return last.name


def _in_stack(model: nn.Module, name: str) -> bool:
    """True if the module called `name` lies inside a block of a stack."""
    *path, _ = name.split(".")
    node = model
    for part in path:
        child = submodule(node, part)
        siblings = [s for s in map(unwrapped, node.children()) if type(s) is type(child)]
        if part.isdigit() and (isinstance(node, nn.ModuleList) or len(siblings) > 1):
            return True
        node = child
    return False


def left_out_weights(there: Candidates, targets: list[Target], references: Container[str]) -> dict[str, str]:
    """Weights that "all-linear" does not adapt though they multiply as a linear layer's do: name -> how to adapt it.
    Those inside `references` are left out."""
    left: dict[str, str] = {}
    adapted = {id(t.module) for t in targets}
    attention = {cls for cls in there.tree.classes if issubclass(cls, nn.MultiheadAttention)}
    unknown = {cls for cls in there.tree.classes if geometry_of(cls) is None}
    for name, module in there.modules:
        kind = type(module)
        if id(module) in adapted or not (kind in attention or (kind in unknown and module._parameters)):
            continue
        if references and lies_in(name, references):
            continue
        if kind in attention:
            for own in parameters_of(module):
                left[name_in(name, own)] = "name the nn.MultiheadAttention in target_modules"
        else:
            for own, p in module._parameters.items():
                if p is not None and _multiplies(kind, own, p):
                    left[name_in(name, own)] = "name it in target_parameters"
    return left


_WEIGHT = re.compile(r"[wW]\d*|[wW]_.*|.*(weight|kernel).*")


def _multiplies(kind: type[nn.Module], name: str, p: nn.Parameter) -> bool:
    """True if the parameter `name`, of a class `kind` without a geometry, looks like a linear layer's weight: a stack
    of matrices, or a matrix that is called a weight. Matrices of torch's own layers do not count: the weight of a norm
    is multiplied element by element."""
    if p.dim() not in (2, 3) or min(p.shape) < 2 or p.layout is not torch.strided:
        return False
    is_called_so = _WEIGHT.fullmatch(name) is not None and p.is_floating_point()
    return p.dim() == 3 or (is_called_so and not kind.__module__.startswith("torch."))


def parameters_of(module: nn.Module) -> tuple[str, ...]:
    """Names of the parameters to adapt where `module` is a target; empty if its output is adapted instead."""
    geometry = geometry_of(type(module))
    return () if geometry is None else geometry.parameters_of(module)


# Finds references: parts of a model that were frozen on purpose, and that "all-linear" leaves out.
#
# A reference is a child module of which every parameter was frozen before the injection: a teacher, a reference policy,
# an average of the weights, the network of a perceptual loss. The rule:
#
# 1. If no parameter trains, there is no reference: the whole model was frozen in order to be adapted. Quantized
# weights,
#    which never train, do not count as frozen.
# 2. A torchmetrics metric is left out, frozen or not.
# 3. If only an output head trains, the frozen rest is the backbone under that head, and is adapted. But a frozen part
#    that has the same layers as a part that trains is a copy of it, and is left out.
#    A head is the output layer (or nothing, or embeddings beside it). A head is also a group of up to four layers that
#    has less weight than the frozen rest and reads its output: its first layer takes as many features as the frozen
#    layer
#    before it gives (or all frozen parts together), it does not read the model's own input, and no frozen layer reads
#    its
#    output. Frozen blocks of a stack in which other blocks train are not a backbone.
# 4. Any other frozen part is left out, and the report says so. A layer that target_modules names is adapted in any
# case.

_FROZEN = "name its layers in target_modules; it was frozen before the injection, beside a part that trains"
_METRIC = "name its layers in target_modules; it is part of a metric"


class _Layer(NamedTuple):
    """A layer with a weight."""

    name: str
    kind: int
    """A number for the type of its inputs: features, channels or tokens (`_TOKENS`)."""
    inputs: int
    outputs: int


def references(tree: Tree, linear: Sequence[Target], head_of: Callable[[], str | None]) -> dict[str, str]:
    """Name of a part that "all-linear" leaves out -> how to adapt it. `head_of` finds the output head in `linear`."""
    found = dict.fromkeys(_metrics(tree), _METRIC)
    if all(p.requires_grad for _, p in tree.parameters):
        return found
    linear = [t for t in linear if not lies_in(t.name, found)]
    awake, asleep = _states(tree)
    if not asleep or not awake:
        return found
    head = head_of()
    part_of = {t.name: _outermost(t.name, awake, asleep) for t in linear}
    within = part_of.get(head or "")
    if within is not None and sum(lies_in(layer.name, (within,)) for layer in _layers(tree)) > 1:
        head = None  # it is not the model's output layer, but the last layer of a reference
    parts = list(dict.fromkeys(part for name, part in part_of.items() if part is not None and name != head))
    if not parts:
        return found
    layers = [layer for layer in _layers(tree) if not lies_in(layer.name, found)]
    is_kept = {la.name: lies_in(la.name, parts) or (la.name in asleep and la.name not in awake) for la in layers}
    kept = [layer for layer in layers if is_kept[layer.name]]
    rest = [layer for layer in layers if not is_kept[layer.name]]
    is_only_the_head = all(layer.name == head or layer.kind == _TOKENS for layer in rest)
    if is_only_the_head or _is_head(rest, kept, layers, parts):
        training = {looks for name in awake if name and (looks := tuple(_inside(name, layers)))}
        parts = [
            part
            for part in parts
            if _is_copy(part, tree, layers, training) or (not is_only_the_head and _is_block(part, tree, awake))
        ]
    return found | dict.fromkeys(parts, _FROZEN)


def lies_in(name: str, parts: Any) -> bool:
    """True if the module called `name` is one of `parts`, or lies inside one."""
    return name in parts or any(above in parts for above in _above(name))


def _metrics(tree: Tree) -> Iterator[str]:
    metric: Any = getattr(sys.modules.get("torchmetrics"), "Metric", None)
    if metric is not None:
        for name, module in tree.of_classes(lambda cls: issubclass(cls, metric)):
            if name and next(module.parameters(), None) is not None:  # most metrics have no parameters
                yield name


def _states(tree: Tree) -> tuple[set[str], set[str]]:
    """The names of the modules that contain parameters that train, and the names of those that contain frozen ones."""
    awake: set[str] = set()
    asleep: set[str] = set()
    for name, p in tree.parameters:
        # Weights of bitsandbytes' never train: those that are not quantized yet will be when they are moved.
        if p.requires_grad or (is_plain(p) and not type(p).__module__.startswith("bitsandbytes.")):
            states = awake if p.requires_grad else asleep
            owner = name.rpartition(".")[0]
            while owner not in states:
                states.add(owner)
                owner = owner.rpartition(".")[0]
    return awake, asleep


def _outermost(name: str, awake: set[str], asleep: set[str]) -> str | None:
    """The name of the largest wholly frozen part that contains the module called `name`, or is it; None if there is
    none."""
    return next((part for part in (*_above(name), name) if part not in awake and part in asleep), None)


def _above(name: str) -> Iterator[str]:
    """The names of the modules that contain the module called `name`, the outermost first, without the model itself."""
    at = name.find(".")
    while at >= 0:
        yield name[:at]
        at = name.find(".", at + 1)


_SIZES = (
    ("in_features", "out_features"),
    ("nx", "nf"),  # transformers' Conv1D
    ("in_channels", "out_channels"),
    ("num_embeddings", "embedding_dim"),
    ("input_size", "hidden_size"),
    ("embed_dim", "embed_dim"),
)
_TOKENS = 3


def _layers(tree: Tree) -> Iterator[_Layer]:
    for name, module in tree.modules:
        own = module.__dict__
        for kind, (inputs, outputs) in enumerate(_SIZES):
            if own["_parameters"] and isinstance(own.get(inputs), int) and isinstance(own.get(outputs), int):
                yield _Layer(name, max(kind, 1), own[inputs], own[outputs])
                break


_LAYERS_OF_A_HEAD = 4


def _is_head(rest: Sequence[_Layer], kept: Sequence[_Layer], layers: Sequence[_Layer], parts: Sequence[str]) -> bool:
    """True if the layers that train, `rest`, are a head on the frozen layers, `kept`, which lie in `parts`. `layers`
    are all layers in the model's order."""
    if not kept or not 0 < len(rest) <= _LAYERS_OF_A_HEAD:
        return False
    first, last = layers.index(rest[0]), layers.index(rest[-1])
    before = layers[first - 1] if first else kept[-1]
    after = layers[last + 1] if last + 1 < len(layers) else None
    is_small = sum(r.inputs * r.outputs for r in rest) < sum(k.inputs * k.outputs for k in kept)
    reads_the_input = (rest[0].kind, rest[0].inputs) == (kept[0].kind, kept[0].inputs)
    is_read = after is not None and after.inputs == rest[-1].outputs
    last_of = {part: layer for layer in kept for part in parts if lies_in(layer.name, (part,))}
    is_fed = rest[0].inputs in (before.outputs, sum(layer.outputs for layer in last_of.values()))
    return is_small and is_fed and not reads_the_input and not is_read


def _is_copy(part: str, tree: Tree, layers: Sequence[_Layer], training: Set[tuple[Any, ...]]) -> bool:
    """True if `part` (or each entry of it, if it is a ModuleList or ModuleDict) has the same layers as a part that
    trains."""
    if tuple(_inside(part, layers)) in training:
        return True
    if not isinstance(tree.by_name[part], (nn.ModuleList, nn.ModuleDict)):
        return False
    children = [f"{part}.{name}" for name in tree.by_name[part]._modules]
    weighty = [child for child in children if _inside(child, layers)]
    return bool(weighty) and all(_is_copy(child, tree, layers, training) for child in weighty)


def _inside(part: str, layers: Sequence[_Layer]) -> list[tuple[str, int, int, int]]:
    start = len(part)
    return [(la.name[start:], *la[1:]) for la in layers if la.name == part or la.name.startswith(f"{part}.")]


def _is_block(part: str, tree: Tree, awake: set[str]) -> bool:
    """True if `part` is a block of a stack in which other blocks train."""
    stack, _, own = part.rpartition(".")
    if not own.isdigit():
        return False
    parent, block = tree.by_name[stack], tree.by_name[part]
    prefix = f"{stack}." if stack else ""
    alike = [n for n, m in parent._modules.items() if type(m) is type(block) and prefix + n in awake]
    return bool(alike) and not isinstance(block, (nn.Sequential, nn.Linear))
