"""What a config trains besides pairs: modules and biases as a whole, and single rows of embeddings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.checked import did_you_mean
from lightning_lora.engine.config import LoRAConfig
from lightning_lora.engine.layers.embedding import TokenLogits, TokenRows, TokenSpec
from lightning_lora.engine.memory import Memory
from lightning_lora.engine.targets import Selection, name_matches
from lightning_lora.engine.torch_private import persistent_buffers
from lightning_lora.engine.tree import Tree, last_part, name_in, unwrapped
from lightning_lora.engine.weights import is_plain
from lightning_lora.errors import TargetError, listed

Vocabulary = list[tuple[str, nn.Module, type[TokenRows], TokenSpec]]
"""Name, module, geometry and spec, for each module with trained rows; an embedding comes before heads that share it."""


def trained_besides(
    config: LoRAConfig, selection: Selection
) -> tuple[dict[str, Tensor], Vocabulary, list[dict[str, Tensor]]]:
    """The tensors that `config` trains whole, by name; the modules of which it trains rows; and the tensors that
    `adapt` gives to each of these. Raises TargetError for what cannot be trained, or is used elsewhere too."""
    rows = vocabulary(config, selection)
    whole = tensors_trained_whole(config, selection)
    check_shared(config, selection, whole, rows)
    return whole, rows, [token_tensors(module, spec, config) for _, module, _, spec in rows]


def vocabulary(config: LoRAConfig, selection: Selection) -> Vocabulary:
    """The embeddings of which `config` trains rows, and the modules that share their weights (tied heads).

    A list of indices is for the model's input embedding; a dict names the embeddings (as in PEFT). Raises TargetError
    if there is no such embedding, or if it is also adapted or trained whole; nothing is changed here.
    """
    indices = config.trainable_token_indices
    if not indices:
        return []
    tree = selection.tree
    named = indices if isinstance(indices, dict) else {_input_embedding(tree): indices}
    plan: Vocabulary = []
    given: dict[int, list[int]] = {}
    for entry, tokens in named.items():
        hits = [(name, module) for name, module in tree.modules if name_matches([entry], name)]
        if not hits:
            names = [name for name, m in tree.modules if isinstance(m, nn.Embedding)]
            guess = did_you_mean(entry, map(last_part, names))
            raise TargetError(
                f"trainable_token_indices: {entry!r} matches no module of {tree.kind}.{guess} "
                f"Its embeddings are: {listed(names)}."
            )
        for name, module in hits:
            if given.setdefault(id(module._parameters.get("weight")), tokens) != tokens:
                raise TargetError(
                    f"trainable_token_indices: {name!r} is given other tokens than a module with which it shares its "
                    "weight: give both the same, or name one of them."
                )
            if not any(module is other for _, other, _, _ in plan):
                plan += _steps(tree, name, module, tuple(tokens), config)
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


def _steps(tree: Tree, name: str, module: nn.Module, tokens: tuple[int, ...], config: LoRAConfig) -> Iterator[Any]:
    W = module._parameters.get("weight")
    users = [(n, m) for n, m in tree.modules if m is not module and m._parameters.get("weight") is W]
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
            kind.check(other, spec)
        except TargetError as error:
            raise TargetError(f"{what}: {error}.") from None
        yield user, other, kind, spec


def _check_free(plan: Vocabulary, selection: Selection) -> None:
    """Raise TargetError if a module in `plan` is also adapted or trained whole."""
    adapted = {id(target.module) for target in selection.targets}
    for name, module, _, _ in plan:
        if id(module) in adapted:
            raise TargetError(
                f"{name!r} is a target, and trainable_token_indices trains rows of it, which would replace its adapted "
                "rows: leave it out with exclude_modules, or train no rows of it."
            )
        if id(module) in selection.inside:
            raise TargetError(
                f"{name!r} is trained whole (modules_to_save), and its rows with it: take it out of "
                "trainable_token_indices."
            )


def _input_embedding(tree: Tree) -> str:
    """The name of the model's input embedding. Raises TargetError if it cannot be found."""
    embeddings = {id(m): name for name, m in tree.modules if isinstance(m, nn.Embedding)}
    for _, module in tree.modules:
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
            f"trainable_token_indices: {tree.kind} does not say which of its embeddings is for tokens. Name "
            f"it: trainable_token_indices={{name: [...]}}. Its embeddings are: {listed(embeddings.values())}."
        )
    return names[0]


# Tensors that are trained as a whole.


def tensors_trained_whole(config: LoRAConfig, selection: Selection) -> dict[str, Tensor]:
    """Name -> tensor, of the parameters and persistent buffers that `config` trains whole."""
    is_trained = _trained_whole(config, selection)
    whole: dict[str, Tensor] = {}
    seen: set[int] = set()
    for prefix, module in selection.tree.modules if selection.saved or config.bias != "none" else ():
        for name, p in module.named_parameters(recurse=False):
            if is_trained(module, name) and id(p) not in seen:
                full = name_in(prefix, name)
                if not is_plain(p):
                    why = "complex numbers" if p.is_complex() else "quantized weights"
                    raise TargetError(
                        f"{full!r} cannot be trained: it holds {why} ({p.dtype}). Take it out of modules_to_save, or "
                        "set bias='none' if it is a bias."
                    )
                seen.add(id(p))
                whole[full] = p
        if id(module) in selection.inside:
            whole |= {name_in(prefix, name): buffer for name, buffer in persistent_buffers(module)}
    if config.bias != "none" and not any("bias" in last_part(name) for name in whole):
        raise TargetError(
            f"bias={config.bias!r} trains no parameter: {selection.tree.kind} has no such bias. Set bias='none'."
        )
    return whole


def _trained_whole(config: LoRAConfig, selection: Selection) -> Callable[[nn.Module, str], bool]:
    """A test whether a parameter of a module is trained whole."""
    adapted = {id(target.module) for target in selection.targets}

    def is_trained(module: nn.Module, name: str) -> bool:
        biases = config.bias == "all" or (config.bias == "lora_only" and id(module) in adapted)
        return id(module) in selection.inside or (biases and "bias" in name)

    return is_trained


def check_shared(config: LoRAConfig, selection: Selection, whole: Mapping[str, Tensor], rows: Vocabulary) -> None:
    """Raise TargetError if a tensor that is trained whole, or a weight of which `rows` are trained, is also used
    elsewhere (the tensor or its memory): the other use would change unasked."""
    if not whole and not rows:
        return
    is_trained, modules = _trained_whole(config, selection), selection.tree.modules
    memory = Memory(modules)
    trained = {id(t): name for name, t in whole.items()}
    uses = [
        (trained[id(p)], [name_in(prefix, own)])
        for prefix, module in modules
        for own, p in module._parameters.items()
        if id(p) in trained and not is_trained(module, own)
    ]
    of_rows = ((name_in(name, "weight"), module._parameters["weight"]) for name, module, _, _ in rows)
    uses += [
        (name, [held.name for held in memory.sharing(t) if not held.is_attribute and id(held.tensor) not in trained])
        for name, t in (*whole.items(), *of_rows)
        if isinstance(t, nn.Parameter)  # a buffer is often a constant, or a view of one
    ]
    for name, others in uses:
        if others:
            asked = [o for o in ("modules_to_save", "trainable_token_indices") if getattr(config, o)]
            asked += [f"bias={config.bias!r}"] * (config.bias != "none")
            shared = listed(repr(other.removesuffix(".weight")) for other in others)
            raise TargetError(
                f"{' and '.join(asked)}: {name.removesuffix('.weight')!r} shares its weight with {shared} (they are "
                "one parameter, or two in the same memory), which would be trained with it. Name both, or untie them "
                "first: give each a weight in memory of its own."
            )
