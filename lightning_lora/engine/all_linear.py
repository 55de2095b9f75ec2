"""What target_modules="all-linear" means: the linear layers of a model but its output head and its references."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterator
from typing import Any

import torch
from torch import nn

from lightning_lora.engine.candidates import Candidates, Target, name_in
from lightning_lora.engine.layers import LinearLoRA, geometry_of
from lightning_lora.engine.references import lies_in, references
from lightning_lora.engine.tree import Tree, submodule
from lightning_lora.engine.wrappers import unwrapped


def all_linear(there: Candidates, everything: Candidates) -> tuple[list[Target], str | None, dict[str, str]]:
    """The targets among `there`; the output head, if it is one of them and left out; and the references that are left
    out (see references.py) -> how to adapt them. `everything` is `there` and what is trained whole."""
    tree = there.tree
    targets = there.of_classes(is_linear)
    linear = targets if everything is there else everything.of_classes(is_linear)
    left_out = references(tree, targets, lambda: output_head(tree, linear))
    if left_out:
        targets = [t for t in targets if not lies_in(t.name, left_out)]
        linear = [t for t in linear if not lies_in(t.name, left_out)]
    head = output_head(tree, linear, left_out)
    if all(t.name != head for t in reversed(targets)):
        head = None  # trained whole, so there is nothing to say about it
    return [t for t in targets if t.name != head] if head is not None else targets, head, left_out


def is_linear(cls: type[nn.Module]) -> bool:
    """Whether "all-linear" means modules of that class: nn.Linear, what derives from it, and transformers' Conv1D."""
    geometry = geometry_of(cls)
    return geometry is not None and issubclass(geometry, LinearLoRA)


def output_head(tree: Tree, linear: list[Target], left_out: Container[str] = ()) -> str | None:
    """The name of the layer that turns features into outputs, or None where the model has none that one can tell.

    A transformers model says it itself (get_output_embeddings), or it is the last linear layer outside of its
    `base_model`. Elsewhere it is the last linear layer, unless that is the only one, or lies in a stack of blocks (a
    ModuleList, or numbered siblings of one class). What lies in a part that is `left_out` says nothing.
    """
    saying = (m for name, m in _saying_their_head(tree) if not lies_in(name, left_out) and hasattr(m, "base_model"))
    hf: Any = next(saying, None)
    outside = iter(reversed(linear))
    if hf is not None:
        try:
            embeddings = hf.get_output_embeddings()
            embeddings = unwrapped(embeddings) if isinstance(embeddings, nn.Module) else None
        except (NotImplementedError, AttributeError):
            embeddings = None
        for target in linear:
            if target.module is embeddings:
                return target.name
        is_inside = _inside(unwrapped(hf.base_model) if isinstance(hf.base_model, nn.Module) else hf, tree)
        outside = (t for t in outside if not is_inside(t))
    last = next(outside, None)
    if last is None or len(linear) == 1 or _in_stack(tree.root, last.name):
        return None
    return last.name


def _saying_their_head(tree: Tree) -> Iterator[tuple[str, nn.Module]]:
    """The modules with a method `get_output_embeddings`. Asked of the class first: nn.Module is slow to say no."""
    method = "get_output_embeddings"
    own = nn.Module.__getattr__
    may = {c for c in tree.classes if hasattr(c, method) or getattr(c, "__getattr__", None) is not own}
    return ((name, m) for name, m in tree.modules if (type(m) in may and hasattr(m, method)) or method in m.__dict__)


def _inside(body: nn.Module, tree: Tree) -> Callable[[Target], bool]:
    """Whether a target is a part of `body`: then one of its names begins with one of the body's."""
    names = [name for name, module in tree.every if module is body]
    if not names:  # not registered, though its parts may be
        ids = {id(m) for m in body.modules()}
        return lambda target: id(target.module) in ids
    if "" in names:
        return lambda target: True
    stems = tuple(f"{name}." for name in names)
    return lambda target: target.module is body or any(n.startswith(stems) for n in (target.name, *target.aliases))


def _in_stack(model: nn.Module, name: str) -> bool:
    """Whether the module called `name` lies inside a block of a stack."""
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
    """What "all-linear" does not mean, though it multiplies like a linear layer, outside of `references`."""
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
    """Whether one may take a parameter of a layer that cannot be adapted by itself for a linear layer's: a stack of
    matrices, or a matrix that is called a weight. What torch's own layers have as a matrix is no such weight: that of a
    norm is multiplied element by element."""
    if p.dim() not in (2, 3) or min(p.shape) < 2 or p.layout is not torch.strided:
        return False
    is_called_so = _WEIGHT.fullmatch(name) is not None and p.is_floating_point()
    return p.dim() == 3 or (is_called_so and not kind.__module__.startswith("torch."))


def parameters_of(module: nn.Module) -> tuple[str, ...]:
    """The parameters that stand for `module` as a target, where it is they that are adapted."""
    geometry = geometry_of(type(module))
    return () if geometry is None else geometry.parameters_of(module)
