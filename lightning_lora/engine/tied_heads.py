"""Corrects `config.tie_word_embeddings` of a transformers model when a merge has untied its input embedding and head.

A model that is loaded with tie_word_embeddings=True ties the two again, and would lose one of them. Only methods and
attributes are used here, so transformers is not imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from lightning_lora.engine.tree import Tree
from lightning_lora.engine.wrappers import unwrapped

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


def say_again(before: list[tuple[Any, Any]]) -> None:
    """Undo `say_what_is_true`."""
    for config, value in before:
        setattr(config, _FIELD, value)


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
