"""Finds the embeddings that `trainable_token_indices` names, and the heads that share their weight."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.checked import closest
from lightning_lora.engine.config import LoRAConfig
from lightning_lora.engine.layers.embedding import TokenLogits, TokenRows, TokenSpec
from lightning_lora.engine.swap import check_swappable
from lightning_lora.engine.targets import Selection, name_matches
from lightning_lora.engine.tree import Tree, unwrapped
from lightning_lora.errors import TargetError, listed

Vocabulary = list[tuple[str, nn.Module, type[TokenRows], TokenSpec]]
"""Name, module, geometry and spec, for each module with trained rows; an embedding comes before heads that share it."""


def vocabulary(model: nn.Module, config: LoRAConfig, selection: Selection) -> Vocabulary:
    """The embeddings of which `config` trains rows, and the modules that share their weights (tied heads).

    A list of indices is for the model's input embedding; a dict names the embeddings (as in PEFT). Raises TargetError
    if there is no such embedding, or if it is also adapted or trained whole; nothing is changed here.
    """
    indices = config.trainable_token_indices
    if not indices:
        return []
    named = indices if isinstance(indices, dict) else {_input_embedding(model): indices}
    plan: Vocabulary = []
    given: dict[int, list[int]] = {}
    for entry, tokens in named.items():
        hits = [(name, module) for name, module in Tree.of(model).modules if name_matches([entry], name)]
        if not hits:
            names = [name for name, m in Tree.of(model).modules if isinstance(m, nn.Embedding)]
            near = closest(entry, [name.rpartition(".")[2] for name in names])
            guess = f" Did you mean {listed(map(repr, near))}?" if near else ""
            raise TargetError(
                f"trainable_token_indices: {entry!r} matches no module of {type(model).__name__}.{guess} "
                f"Its embeddings are: {listed(names)}."
            )
        for name, module in hits:
            if given.setdefault(id(module._parameters.get("weight")), tokens) != tokens:
                raise TargetError(
                    f"trainable_token_indices: {name!r} is given other tokens than a module with which it shares its "
                    "weight: give both the same, or name one of them."
                )
            if not any(module is other for _, other, _, _ in plan):
                plan += _steps(model, name, module, tuple(tokens), config)
    _check_free(plan, selection)
    return plan


def token_tensors(module: nn.Module, spec: TokenSpec, config: LoRAConfig) -> dict[str, Tensor]:
    """The tensors that `swap` gives to `module`: for an embedding its trained rows, which start as the base's; none for
    a head that shares them."""
    if spec.owner is not None:
        return {}
    W = module._parameters["weight"]
    assert W is not None
    dtype = torch.promote_types(W.dtype, torch.float32) if config.adapter_dtype == "float32" else W.dtype
    with torch.inference_mode(False), torch.no_grad():
        rows = W[torch.tensor(spec.tokens, device=W.device)]
        return {"lora_tokens": nn.Parameter(rows.to(dtype, copy=True))}


def _steps(
    model: nn.Module, name: str, module: nn.Module, tokens: tuple[int, ...], config: LoRAConfig
) -> Iterator[Any]:
    W = module._parameters.get("weight")
    users = [(n, m) for n, m in Tree.of(model).modules if m is not module and m._parameters.get("weight") is W]
    users = users if W is not None else []
    # If the config names a head that shares an embedding's weight, the embedding holds the rows.
    (name, module), *users = sorted([(name, module), *users], key=lambda user: not isinstance(user[1], nn.Embedding))
    for user, other in ((name, module), *users):
        kind = TokenRows if isinstance(other, nn.Embedding) else TokenLogits
        owner = None if other is module else module
        spec = TokenSpec(
            rank=0,
            alpha=0.0,
            scale=1.0,
            tokens=tokens,
            owner=owner,
            keeps_precision=config.adapter_dtype == "float32",
        )
        what = f"trainable_token_indices: {user!r} ({type(other).__name__})"
        if not isinstance(other, (nn.Embedding, nn.Linear)):
            raise TargetError(
                f"{what} is neither an embedding nor a linear layer, so it has no rows for tokens. Name an embedding."
            )
        try:
            check_swappable(other, kind)
            kind.check(other, spec)
        except TargetError as error:
            raise TargetError(f"{what}: {error}.") from None
        yield user, other, kind, spec


def _check_free(plan: Vocabulary, selection: Selection) -> None:
    """Raise TargetError if a module in `plan` is also adapted or trained whole."""
    targets = {id(target.module) for target in selection.targets}
    whole = {id(m) for saved in selection.saved.values() for m in saved.modules()}
    for name, module, _, _ in plan:
        if id(module) in targets:
            raise TargetError(
                f"{name!r} is a target, and trainable_token_indices trains rows of it, which would replace its adapted "
                "rows: leave it out with exclude_modules, or train no rows of it."
            )
        if id(module) in whole:
            raise TargetError(
                f"{name!r} is trained whole (modules_to_save), and its rows with it: take it out of "
                "trainable_token_indices."
            )


def _input_embedding(model: nn.Module) -> str:
    """The name of the model's input embedding. Raises TargetError if it cannot be found."""
    embeddings = {id(m): name for name, m in Tree.of(model).modules if isinstance(m, nn.Embedding)}
    for _, module in Tree.of(model).modules:
        ask: Any = getattr(module, "get_input_embeddings", None)
        if ask is not None:
            try:
                found = ask()
            except (NotImplementedError, AttributeError):
                continue
            found = unwrapped(found) if isinstance(found, nn.Module) else found
            if id(found) in embeddings:
                return embeddings[id(found)]
    named = [name for name in embeddings.values() if name.rpartition(".")[2] == "embed_tokens"]
    names = named or list(embeddings.values())
    if len(names) != 1:
        raise TargetError(
            f"trainable_token_indices: {type(model).__name__} does not say which of its embeddings is for tokens. Name "
            f"it: trainable_token_indices={{name: [...]}}. Its embeddings are: {listed(embeddings.values())}."
        )
    return names[0]
