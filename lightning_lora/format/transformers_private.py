"""The private names of transformers that we use: each once, with the reason.

transformers is not imported here: a model can be one of its models only if something else has imported it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from lightning_lora.borrowed import found

_RENAMES = "reads adapters that were trained under a model's old names"


def commit_of(config: Any) -> str | None:
    """The commit of the Hub from which the config of a model of transformers was read; None where it does not tell:
    an adapter then does not note the base's revision."""
    return getattr(config, "_commit_hash", None)


def attention_of(config: Any) -> str | None:
    """The attention that a model of transformers computes with, for messages; None where its config does not tell."""
    return getattr(config, "_attn_implementation", None)


def old_prefixes(root: Any) -> dict[str, str]:
    """Pattern of an old name -> what replaces it, in models of transformers before 5.1; empty in others."""
    return getattr(root, "_checkpoint_conversion_mapping", None) or {}


def conversions(root: Any, kind: str) -> list[Any]:
    """The steps of the class `kind` ("WeightRenaming", "WeightConverter") by which transformers reads old weights for
    the model `root`. None where it has no such steps, or keeps them elsewhere: the old names then stay as they are,
    and loading says which of them the model does not have."""
    if "transformers" not in sys.modules or not hasattr(root, "config"):
        return []
    steps_of: Callable[[Any], Any] | None = found(
        "transformers.conversion_mapping:get_model_conversion_mapping", _RENAMES
    )
    cls = found(f"transformers.core_model_loading:{kind}", _RENAMES)
    if steps_of is None or cls is None:
        return []
    return [step for step in steps_of(root) if isinstance(step, cls)]


def renamed(name: str, steps: list[Any]) -> str:
    """The name in the model of a weight that a file calls `name`, by `steps` of the class WeightRenaming; `name`
    itself where transformers no longer has the function for it."""
    rename = found("transformers.core_model_loading:rename_source_key", _RENAMES)
    return name if rename is None else str(rename(name, steps, [])[0])
