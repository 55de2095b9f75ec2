"""Checks that the adapted layers of a model are where `inject` left them, before an adapter is saved or merged."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_lora.engine.inject import injections
from lightning_lora.engine.layers.base import is_adapter
from lightning_lora.engine.tree import Tree
from lightning_lora.errors import AdapterStateError, listed


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
