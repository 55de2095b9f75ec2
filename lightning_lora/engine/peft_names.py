"""PEFT's names for the fields of a LoRAConfig, for messages to users who know those."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lightning_lora.checked import did_you_mean
from lightning_lora.errors import listed

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
"""A name in PEFT, or in scripts that use it -> the name here."""
NOT_NEEDED = {
    "task_type": "it is not needed: the model says what it is",
    "peft_type": "it is not needed: this is LoRA",
    "inference_mode": "it is not needed: load_adapter and the bank serve, LoRACallback trains",
    "fan_in_fan_out": "it is not needed: each type of layer knows whether its weight is transposed",
    "base_model_name_or_path": "it is not needed: the model says what it is",
    "loftq_config": "init='loftq' takes its place",
    "eva_config": "init='eva' takes its place",
    "corda_config": "init='corda' takes its place",
    "lora_ga_config": "init='lora_ga' takes its place",
}
"""A field of PEFT's without a counterpart here -> why, in words."""


def unknown_name(name: str, known: Iterable[str]) -> str:
    """A sentence of advice on `name`, which is none of the `known` names."""
    known = list(known)
    if PEFT_NAMES.get(name) in known:
        return f"{name!r} of PEFT is {PEFT_NAMES[name]!r} here."
    if name in NOT_NEEDED and "rank" in known:
        return f"Leave it out; {NOT_NEEDED[name]}."
    return did_you_mean(name, known, f"It has: {listed(known, 99)}.").lstrip()


def in_our_names(theirs: Any, default: Mapping[str, Any]) -> str | None:
    """The code of a LoRAConfig that says the same as the peft.LoraConfig `theirs`; None if it is another object.

    Fields that equal `default` are left out. Fields without a counterpart are named after it.
    """
    if type(theirs).__name__ != "LoraConfig" or not hasattr(theirs, "lora_alpha"):
        return None
    untouched = vars(type(theirs)())
    arguments, without = [], []
    for name, value in vars(theirs).items():
        ours = PEFT_NAMES.get(name, name)
        if ours == "init" and value is True:  # in PEFT, True is the start that is the default here
            continue
        if ours not in default:
            without += [name] if value != untouched.get(name) and name not in NOT_NEEDED else []
        elif ours in ("rank", "alpha") or (value not in (None, [], {}) and value != default[ours]):
            arguments.append(f"{ours}={sorted(value) if isinstance(value, set) else value!r}")
        elif ours == "target_modules" and value is None:  # PEFT then has a default for each type of model
            arguments.append("target_modules=[...]")
    lost = f" There is nothing here for {listed(without)}." if without else ""
    return f"LoRAConfig({', '.join(arguments)}).{lost}"
