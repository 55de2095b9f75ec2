"""Finds the targets of "all-linear": the linear layers of a model, without its output head and its references."""

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
    """The targets among `there`; the output head, if it is among them (it is left out); and the references that are
    left out (see references.py), each with how to adapt it. `everything` is `there` and the modules trained whole."""
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
    """The modules with a method `get_output_embeddings`. Classes are asked first, since hasattr on a module is slow."""
    method = "get_output_embeddings"
    own = nn.Module.__getattr__
    may = {c for c in tree.classes if hasattr(c, method) or getattr(c, "__getattr__", None) is not own}
    return ((name, m) for name, m in tree.modules if (type(m) in may and hasattr(m, method)) or method in m.__dict__)


def _inside(body: nn.Module, tree: Tree) -> Callable[[Target], bool]:
    """A test whether a target lies in `body`: one of its names begins with one of the names of `body`."""
    names = [name for name, module in tree.every if module is body]
    if not names:  # `body` itself is not registered in the model, though its parts may be
        ids = {id(m) for m in body.modules()}
        return lambda target: id(target.module) in ids
    if "" in names:
        return lambda target: True
    stems = tuple(f"{name}." for name in names)
    return lambda target: target.module is body or any(n.startswith(stems) for n in (target.name, *target.aliases))


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
