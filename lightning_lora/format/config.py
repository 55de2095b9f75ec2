"""Translates the fields of `adapter_config.json`, as PEFT spells them, to a LoRAConfig and back.

The fields were read in the source of peft 0.21.2 (tuners/lora/config.py), and checked by running it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from lightning_lora.checked import did_you_mean
from lightning_lora.engine import LoRAConfig
from lightning_lora.engine.config import exact_pattern, usual
from lightning_lora.errors import AdapterFormatError, ConfigError, listed

log = logging.getLogger(__name__)

# The fields that LoRAConfig has too: PEFT's name -> ours, and PEFT's default.
_OURS: dict[str, tuple[str, Any]] = {
    "alora_invocation_tokens": ("alora_invocation_tokens", None),
    "alpha_pattern": ("alpha_pattern", {}),
    "bias": ("bias", "none"),
    "exclude_modules": ("exclude_modules", None),
    "layers_pattern": ("layers_pattern", None),
    "layers_to_transform": ("layers_to_transform", None),
    "lora_alpha": ("alpha", 8),
    "lora_bias": ("lora_bias", False),
    "lora_dropout": ("dropout", 0.0),
    "modules_to_save": ("modules_to_save", None),
    "r": ("rank", 8),
    "rank_pattern": ("rank_pattern", {}),
    "target_modules": ("target_modules", None),
    "target_parameters": ("target_parameters", None),
    "trainable_token_indices": ("trainable_token_indices", None),
    "use_dora": ("use_dora", False),
    "use_rslora": ("use_rslora", False),
}

# Fields that say where an adapter comes from or how it started, and change no output -> PEFT's default, and the types
# that they may have.
_WITHOUT_EFFECT: dict[str, tuple[Any, tuple[type, ...]]] = {
    "auto_mapping": (None, (dict,)),
    "base_model_name_or_path": (None, (str,)),
    "corda_config": (None, (dict,)),
    "ensure_weight_tying": (False, (bool,)),  # the file has the tensors of both layers
    "eva_config": (None, (dict,)),
    "fan_in_fan_out": (False, (bool,)),
    "inference_mode": (True, (bool,)),
    "init_lora_weights": (True, (bool, str)),
    "loftq_config": ({}, (dict,)),
    "lora_ga_config": (None, (dict,)),
    "megatron_core": ("megatron.core", (str,)),
    "peft_type": ("LORA", (str,)),
    "peft_version": ("0.21.2", (str,)),
    "qalora_group_size": (16, (int,)),
    "revision": (None, (str,)),
    "task_type": (None, (str,)),
}

# Such fields that PEFT does not write any more, or only while it runs -> the types that they may have.
_WITHOUT_EFFECT_NOW: dict[str, tuple[type, ...]] = {
    "enable_lora": (),
    "merge_weights": (bool,),
    "runtime_config": (dict,),
}

# Fields that change the output in a way that is not supported -> PEFT's default.
_UNSUPPORTED: dict[str, Any] = {
    "arrow_config": None,
    "kasa_config": None,
    "layer_replication": None,
    "megatron_config": None,
    "monteclora_config": None,
    "use_bdlora": None,
    "use_qalora": False,
    "velora_config": None,
}

_DEFAULTS = _UNSUPPORTED | {key: default for key, (_, default) in _OURS.items()}
_DEFAULTS |= {key: default for key, (default, _) in _WITHOUT_EFFECT.items()}
"""Every field that PEFT writes, with its default."""
_TYPES = _WITHOUT_EFFECT_NOW | {key: types for key, (_, types) in _WITHOUT_EFFECT.items()}

# Our fields that PEFT's config does not have: they change how an adapter is trained further, and no output.
_OURS_ALONE = ("freeze_a", "rank_dropout", "module_dropout")
_OURS_SOMETIMES = ("dropout",)
"""Our fields that PEFT's config has, but not for some kinds of layer."""

# Fields whose feature is used, with its default settings, where they are {}.
_USED_IF_EMPTY = ("arrow_config", "kasa_config", "monteclora_config", "use_bdlora", "velora_config")

# Initialisers that change the weights of the base: PEFT changes them again when it loads such an adapter.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")

# Initialisers that leave the base as it is. One that is not known here may change it.
_KEEPS_BASE = ("gaussian", "eva", "orthogonal", "mica")


def from_peft(data: Any, where: str, ignore_fields: Collection[str]) -> LoRAConfig:
    """The config in `data`, the content of an `adapter_config.json`. How the adapter was initialised is left out, since
    its tensors replace the initial ones.

    A later PEFT has further fields. An empty one says that its feature was not used, and is ignored; so is a field that
    `ignore_fields` names. Raises AdapterFormatError, with a message that begins with `where`, for another PEFT method,
    an unknown field with a value, a field with an effect that is not supported, and an invalid value; ConfigError for a
    name in `ignore_fields` whose effect is known.
    """
    _check_ignored(ignore_fields)
    if not isinstance(data, Mapping):
        raise AdapterFormatError(f"{where} holds a {type(data).__name__}, not an object with PEFT's fields.")
    if "peft_type" not in data:
        hint = " It looks like an adapter of mlx-lm." if "lora_parameters" in data else ""
        raise AdapterFormatError(f"{where} has no field peft_type, so it is not a config of PEFT's.{hint}")
    if data["peft_type"] != "LORA":
        raise AdapterFormatError(
            f"{where}: peft_type is {data['peft_type']!r}; only 'LORA' can be loaded here. PEFT may load it."
        )
    passed_over = []
    for key, value in data.items():
        if key in _TYPES:
            if value is not None and type(value) not in _TYPES[key]:
                names = " or ".join(t.__name__ for t in _TYPES[key]) or "null"
                raise AdapterFormatError(f"{where}: {key} is {value!r}, not a {names}.")
        elif key not in _DEFAULTS:
            if not (_is_empty(value) or key in ignore_fields):
                raise AdapterFormatError(_unknown(key, value, where))
            passed_over.append(f"{key} ({_shown(value)})")
        elif key in _UNSUPPORTED and (value or (value == {} and key in _USED_IF_EMPTY)):
            raise AdapterFormatError(
                f"{where}: {key} is {value!r}. That changes what the adapter computes, and is not supported here. PEFT "
                "loads it; its merge_and_unload() makes a plain model of the two."
            )
    if passed_over:
        log.debug("%s: fields that are not known here are passed over: %s", where, ", ".join(passed_over))
    _check_init(data.get("init_lora_weights", True), where, ignored="init_lora_weights" in ignore_fields)
    return _config(data, where)


def _check_ignored(names: Any) -> None:
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"ignore_fields is a list of names, such as ['new_config'], not {names!r}.")
    if known := [name for name in names if name in _OURS or name in _UNSUPPORTED]:
        raise ConfigError(
            f"ignore_fields names {listed(map(repr, known))}, which is known and changes what an adapter computes: "
            "without it the adapter would be another. Only fields that are not known here can be passed over."
        )


def _is_empty(value: Any) -> bool:
    """True if a field with this value says that its feature was not used. A number may mean something, even 0."""
    return value is None or value is False or (isinstance(value, (str, list, dict)) and not value)


def _unknown(key: str, value: Any, where: str) -> str:
    hint = did_you_mean(key, _DEFAULTS)
    return (
        f"{where} has the unknown field {key!r} ({_shown(value)}).{hint} A later PEFT may write it, and it may change "
        f"what the adapter computes. If you know that it does not, pass ignore_fields=[{key!r}]."
    )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def own_fields(config: LoRAConfig, *, dropout: bool) -> dict[str, Any]:
    """The fields of `config` that PEFT's config does not hold, for the metadata of the tensors. `dropout` says that the
    dropout is one of them."""
    fields = (*_OURS_ALONE, *(_OURS_SOMETIMES if dropout else ()))
    return {field: getattr(config, field) for field in fields if getattr(config, field)}


def with_own_fields(config: LoRAConfig, own: Any, where: str) -> LoRAConfig:
    """`config` with `own`, the `own_fields` that a file holds (None: it holds none). Raises AdapterFormatError where
    `own` holds other fields or an invalid value."""
    own = {} if own is None else own
    if not isinstance(own, Mapping) or not set(own) <= {*_OURS_ALONE, *_OURS_SOMETIMES}:
        raise AdapterFormatError(f"{where}: the metadata of its tensors holds {own!r} for a config of this package.")
    try:
        return replace(config, **own)
    except ConfigError as error:
        raise AdapterFormatError(f"{where}: the metadata of its tensors: {error}") from error


def _check_init(init: Any, where: str, *, ignored: bool) -> None:
    if isinstance(init, str) and init.lower().startswith(_CHANGES_BASE):
        raise AdapterFormatError(
            f"{where}: init_lora_weights is {init!r}, so the adapter belongs to a base whose weights were changed. "
            "Convert it in PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...)."
        )
    if isinstance(init, str) and init.lower() not in _KEEPS_BASE and not ignored:
        raise AdapterFormatError(
            f"{where}: init_lora_weights is {init!r}, which is not known here. Some initialisers change the weights of "
            "the base, and the adapter then belongs to those. If you know that this one does not, pass "
            "ignore_fields=['init_lora_weights']."
        )


def _check_stacks(version: Any, where: str) -> None:
    """Raise AdapterFormatError unless `version` is PEFT 0.19 or later: before that, PEFT wrote the factors of a stack,
    such as the experts of a mixture, the other way round."""
    numbers = re.match(r"(\d+)\.(\d+)", version) if isinstance(version, str) else None
    if numbers is None or (int(numbers[1]), int(numbers[2])) < (0, 19):
        raise AdapterFormatError(
            f"{where}: target_parameters of peft_version {version!r} are laid out as before PEFT 0.19, and which way "
            "round cannot be told from their shapes alone. Load it in PEFT 0.19 or later, and save it there."
        )


def _config(data: Mapping[str, Any], where: str) -> LoRAConfig:
    values = {"rank": _DEFAULTS["r"], "alpha": _DEFAULTS["lora_alpha"]}
    for key, (name, default) in _OURS.items():
        if key not in data:
            continue
        value = data[key]
        # PEFT reads an absent value and an empty one alike, and null as false.
        # But of layers_to_transform, "" and {} would mean no layer.
        is_empty = value is None or value == [] or (value in ("", {}) and key != "layers_to_transform")
        stands_for_default = is_empty if default is None or default == {} else value is None and default is False
        if not stands_for_default:
            values[name] = value
    if "target_parameters" in values:
        _check_stacks(data.get("peft_version"), where)
    if "target_parameters" in values or "trainable_token_indices" in values:
        values.setdefault("target_modules", [])
    if "target_modules" not in values:
        raise AdapterFormatError(f"{where}: target_modules is {data.get('target_modules')!r}, so it adapts nothing.")
    try:
        return LoRAConfig(**values)
    except ConfigError as error:
        renamed = " (rank, alpha and dropout are r, lora_alpha and lora_dropout there.)"
        raise AdapterFormatError(f"{where}: {error}{renamed}") from error


def to_peft(
    config: LoRAConfig,
    *,
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    without_dropout: bool = False,
    **fields: Any,
) -> dict[str, Any]:
    """The fields of an `adapter_config.json`. `ranks` and `alphas` have an entry for each module and parameter that
    PEFT wraps; `fields` are those that depend on the model, by PEFT's names."""
    assert fields.keys() <= _DEFAULTS.keys()
    rank, alpha = usual(config.rank, ranks), usual(config.alpha, alphas)
    same = ("bias", "use_rslora", "use_dora", "lora_bias", "alora_invocation_tokens")
    return {
        **_DEFAULTS,
        **{field: getattr(config, field) for field in same},
        "r": rank,
        "lora_alpha": plain_number(alpha),
        "lora_dropout": 0.0 if without_dropout else config.dropout,
        "rank_pattern": exact_pattern(ranks, rank),
        "alpha_pattern": {k: plain_number(v) for k, v in exact_pattern(alphas, alpha).items()},
        **fields,
    }


def plain_number(value: float) -> int | float:
    """`value` as JSON shows it best: without a fraction where it has none."""
    return int(value) if float(value).is_integer() else value
