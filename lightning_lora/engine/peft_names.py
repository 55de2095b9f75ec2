"""What PEFT calls the fields of a LoRAConfig: for the messages to those who know its names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lightning_lora.errors import closest, listed

PEFT_NAMES = {
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "init_lora_weights": "init",
    "lora_r": "rank",
    "lora_rank": "rank",
    "lora_target_modules": "target_modules",
    "lora_modules_to_save": "modules_to_save",
}
"""The names of PEFT, and of the scripts around it -> ours."""
NOT_NEEDED = {
    "task_type": "it is not needed: the model says what it is",
    "peft_type": "it is not needed: this is LoRA",
    "inference_mode": "it is not needed: load_adapter and the bank serve, LoRACallback trains",
    "fan_in_fan_out": "it is not needed: each layer says how its weight lies",
    "base_model_name_or_path": "it is not needed: the model says what it is",
    "loftq_config": "init='loftq' is what it stands for",
    "eva_config": "init='eva' is what it stands for",
    "corda_config": "init='corda' is what it stands for",
    "lora_ga_config": "init='lora_ga' is what it stands for",
}
"""Fields of PEFT's that have no counterpart -> what there is to know."""


def unknown_name(name: str, known: Iterable[str]) -> str:
    """What to say after a name that is none of `known`."""
    known = list(known)
    if PEFT_NAMES.get(name) in known:
        return f"{name!r} of PEFT is {PEFT_NAMES[name]!r} here."
    if name in NOT_NEEDED and "rank" in known:
        return f"Leave it out; {NOT_NEEDED[name]}."
    near = closest(name, known)
    return f"Did you mean {listed(map(repr, near))}?" if near else f"It has: {listed(known, 99)}."


def in_our_names(theirs: Any, default: Mapping[str, Any]) -> str | None:
    """What a peft.LoraConfig says, as a LoRAConfig; None for any other object.

    Fields that are as in `default`, or that have no counterpart, are left out.
    """
    if type(theirs).__name__ != "LoraConfig" or not hasattr(theirs, "lora_alpha"):
        return None
    untouched = vars(type(theirs)())
    arguments, without = [], []
    for name, value in vars(theirs).items():
        ours = PEFT_NAMES.get(name, name)
        if ours == "init" and value is True:  # PEFT's word for what is the default here
            continue
        if ours not in default:
            without += [name] if value != untouched.get(name) and name not in NOT_NEEDED else []
        elif ours in ("rank", "alpha") or (value not in (None, [], {}) and value != default[ours]):
            arguments.append(f"{ours}={sorted(value) if isinstance(value, set) else value!r}")
        elif ours == "target_modules" and value is None:  # PEFT then goes by the kind of model
            arguments.append("target_modules=[...]")
    lost = f" There is nothing here for {listed(without)}." if without else ""
    return f"LoRAConfig({', '.join(arguments)}).{lost}"
