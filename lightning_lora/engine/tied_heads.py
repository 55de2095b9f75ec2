"""What a model's config says of the tie between its input embedding and its head, once a merge has cut it.

transformers' models say `config.tie_word_embeddings`, and tie the two again when they are loaded with it. Asked by
methods and attributes, so transformers is not imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from lightning_lora.engine.tree import Tree
from lightning_lora.engine.wrappers import unwrapped

_FIELD = "tie_word_embeddings"


def tied_models(model: nn.Module) -> list[Any]:
    """The models in `model` whose head has the weight of their input embedding."""
    return [m for _, m in Tree.of(model).modules if hasattr(m, "config") and _is_tied(m)]


def say_what_is_true(models: list[Any]) -> list[tuple[Any, Any]]:
    """Set the field to False in the configs of those of `models`, all tied before, that are so no more. Returns the
    configs with what they said."""
    before = [(config, getattr(config, _FIELD)) for m in models if not _is_tied(m) for config in _saying_tied(m.config)]
    for config, _ in before:
        setattr(config, _FIELD, False)
    return before


def say_again(before: list[tuple[Any, Any]]) -> None:
    """Undo `say_what_is_true`."""
    for config, value in before:
        setattr(config, _FIELD, value)


def output_embeddings(model: nn.Module) -> Iterator[nn.Module]:
    """The heads that the models in `model` name as theirs."""
    for _, module in Tree.of(model).modules:
        head = _asked(module, "get_output_embeddings")
        if isinstance(head, nn.Module):
            yield unwrapped(head)


def _is_tied(model: nn.Module) -> bool:
    # Their own parameters: an adapted layer shows its adapted weight.
    tables = [_asked(model, f"get_{which}_embeddings") for which in ("input", "output")]
    weights = [t._parameters.get("weight") if isinstance(t, nn.Module) else None for t in tables]
    return weights[0] is not None and weights[0] is weights[1]


def _asked(model: Any, method: str) -> Any:
    """What the method of a transformers model returns; None where there is none, or it does not say."""
    try:
        return getattr(model, method)()
    except (AttributeError, NotImplementedError, TypeError):
        return None


def _saying_tied(config: Any) -> Iterator[Any]:
    """`config` and those inside of it, as a model of several parts has them, that say so."""
    if getattr(config, _FIELD, False):
        yield config
    for name in getattr(config, "sub_configs", ()):
        inner = getattr(config, name, None)
        if inner is not None and inner is not config:
            yield from _saying_tied(inner)
