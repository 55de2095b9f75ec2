"""PEFT's spelling of tensors, in this module alone: the keys in its files, and how it matches names.

Read in peft 0.21.2 (tuners/lora, utils/save_and_load.py) and checked by running it. A module that PEFT adapts is
wrapped, so what the module held lies under `base_layer` from then on. The fields of its config are in peft_config.py.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from lightning_lora.engine.layers.pair import BIAS, MAGNITUDE
from lightning_lora.engine.layers.tokens import TOKENS

PREFIX = "base_model.model."

# The tensors of an adapted module: ours -> theirs.
_TENSORS = {
    "lora_A": "lora_A.weight",
    "lora_B": "lora_B.weight",
    BIAS: "lora_B.bias",
    MAGNITUDE: "lora_magnitude_vector",
    TOKENS: "token_adapter.trainable_tokens_delta",
}
_TENSORS_OF_EMBEDDING = {**_TENSORS, "lora_A": "lora_embedding_A", "lora_B": "lora_embedding_B"}


def tensor_key(
    name: str,
    wrapped: Collection[str],
    embeddings: Collection[str],
    parameters: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> str:
    """PEFT's key of the tensor that the engine calls `name` (`<module>.lora_A`, or a parameter's own name).

    `wrapped` names the modules that PEFT wraps, `embeddings` those among them that are embeddings. `parameters` are
    those that are adapted of a wrapped module, in the order in which it holds them: PEFT wraps it once for each, the
    last one outermost. Their tensors are `<module>.lora_A_<parameter>`.
    """
    module, _, last = name.rpartition(".")
    path = _expanded(module, wrapped, parameters)
    if module in wrapped:
        kinds = _TENSORS_OF_EMBEDDING if module in embeddings else _TENSORS
        own = parameters.get(module, ())
        outside = path[: -max(1, len(own))] if module else path
        for inside, parameter in enumerate(reversed(own)):
            if last.removesuffix(f"_{parameter}") in kinds and last not in kinds:
                return PREFIX + ".".join(
                    [*outside, *["base_layer"] * inside, kinds[last.removesuffix(f"_{parameter}")]]
                )
        if not own and last in kinds:
            return PREFIX + ".".join([*outside, kinds[last]])
    return PREFIX + ".".join([*path, last])


def shape_in_file(last: str, shape: tuple[int, ...], of_A: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in which PEFT writes the tensor that a module holds as `last`; `of_A` is that of the module's A."""
    if last == MAGNITUDE and len(of_A) > 2:
        return (1, *shape, *(1,) * (len(of_A) - 2))  # as the output of the convolution
    return shape


def _expanded(module: str, wrapped: Collection[str], parameters: Mapping[str, Sequence[str]]) -> list[str]:
    path: list[str] = []
    parts = module.split(".") if module else []
    outer = ""
    for i, part in enumerate(parts):
        path.append(part)
        outer = f"{outer}.{part}" if i else part
        if outer in wrapped:
            path += ["base_layer"] * max(1, len(parameters.get(outer, ())))
    return path


_LEFT_IN = (
    (re.compile(r"\.(lora_(?:embedding_)?[AB])\.default(?=\.|$)"), r".\1"),
    (re.compile(r"\.trainable_tokens_delta\.default$"), ".trainable_tokens_delta"),
    (re.compile(rf"\.{MAGNITUDE}(?:\.default)?(?:\.weight)?$"), f".{MAGNITUDE}"),
    (re.compile(r"\.modules_to_save(?:\.default)?\."), "."),
)
_ADAPTED = re.compile(rf"{re.escape(PREFIX)}(?:(.*)\.)?(?:lora_(?:embedding_)?[AB]|token_adapter)(?:\.|$)")
_WRAPPED = re.compile(r"\.base_layer(?=\.|$)")


def plain_key(key: str) -> str:
    """`key` without what some writers leave in: the adapter's name "default", the infix of modules_to_save."""
    for pattern, plain in _LEFT_IN:
        key = pattern.sub(plain, key)
    return key


def adapted_names(keys: Iterable[str]) -> set[str]:
    """The names, in the base model, of the modules that the tensors called `keys` adapt."""
    found = {match[1] or "" for match in map(_ADAPTED.match, keys) if match}
    return set(map(base_name, found))


def base_name(key: str) -> str:
    """The name in the base model of the parameter or module that PEFT calls `key`, prefix or not."""
    return _WRAPPED.sub("", key.removeprefix(PREFIX))


def is_untrained_original(key: str) -> bool:
    """Whether `key` is the copy that PEFT keeps of a module in modules_to_save (it gets into files with bias="all")."""
    return ".original_module." in key


def is_saved_by_peft(bias_name: str) -> bool:
    """Whether PEFT writes the bias called `bias_name` when it trains all biases: not `in_proj_bias`, for one."""
    return bias_name.rpartition(".")[2] == "bias"


def is_in_layers(targets: Collection[str], layers: Any, pattern: str | Sequence[str] | None, name: str) -> bool:
    """PEFT's rule for layers_to_transform: whether `targets` mean the module called `name`.

    One that is named by its whole name is adapted in whichever layer. Layers that match nothing are no error."""
    if name in targets:
        return True
    if not any(name.endswith(f".{entry}") for entry in targets):
        return False
    if pattern:
        patterns = [pattern] if isinstance(pattern, str) else pattern
        found = (re.match(rf"(?:^|.*?\.){p}\.(\d+)\.", name) for p in patterns)
        match = next(filter(None, found), None)
    else:
        match = re.match(r".*?\.[^.]*\.(\d+)\.", name)
    wanted = [layers] if isinstance(layers, int) else layers
    return match is not None and int(match[1]) in wanted


def ends_with(entries: Collection[str], name: str) -> bool:
    """PEFT's rule for modules_to_save, which does not ask for a dot before the entry."""
    return any(name.endswith(entry) for entry in entries)
