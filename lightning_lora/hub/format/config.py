"""Translates the fields of `adapter_config.json`, as PEFT spells them, to a LoRAConfig and back.

The fields were read in the source of peft 0.21.2 (tuners/lora/config.py), and checked by running it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from lightning_lora.checked import closest
from lightning_lora.engine import LoRAConfig
from lightning_lora.engine.config import exact_pattern, usual
from lightning_lora.errors import AdapterFormatError, ConfigError, listed

log = logging.getLogger(__name__)

# Every field that PEFT writes, with its default.
_DEFAULTS: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "kasa_config": None,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 8,
    "lora_bias": False,
    "lora_dropout": 0.0,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "monteclora_config": None,
    "peft_type": "LORA",
    "peft_version": "0.21.2",
    "qalora_group_size": 16,
    "r": 8,
    "rank_pattern": {},
    "revision": None,
    "target_modules": None,
    "target_parameters": None,
    "task_type": None,
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
    "velora_config": None,
}

# Their fields -> ours.
_OURS = {
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "target_modules",
    "target_parameters": "target_parameters",
    "exclude_modules": "exclude_modules",
    "layers_to_transform": "layers_to_transform",
    "layers_pattern": "layers_pattern",
    "rank_pattern": "rank_pattern",
    "alpha_pattern": "alpha_pattern",
    "modules_to_save": "modules_to_save",
    "bias": "bias",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
    "lora_bias": "lora_bias",
    "trainable_token_indices": "trainable_token_indices",
    "alora_invocation_tokens": "alora_invocation_tokens",
}

# Our fields that PEFT's config does not have: they change how an adapter is trained further, and no output.
_OURS_ALONE = ("freeze_a", "rank_dropout", "module_dropout")
_OURS_SOMETIMES = ("dropout",)
"""Our fields that PEFT's config has, but not for some kinds of layer."""

# Fields that say where an adapter comes from or how it started, and change no output -> the types that they may have.
_WITHOUT_EFFECT: dict[str, tuple[type, ...]] = {
    "auto_mapping": (dict,),
    "base_model_name_or_path": (str,),
    "corda_config": (dict,),
    "ensure_weight_tying": (bool,),  # the file has the tensors of both layers
    "eva_config": (dict,),
    "fan_in_fan_out": (bool,),
    "inference_mode": (bool,),
    "init_lora_weights": (bool, str),
    "loftq_config": (dict,),
    "lora_ga_config": (dict,),
    "megatron_core": (str,),
    "peft_type": (str,),
    "peft_version": (str,),
    "qalora_group_size": (int,),
    "revision": (str,),
    "runtime_config": (dict,),
    "task_type": (str,),
    # Written by PEFT before 0.4.
    "enable_lora": (),
    "merge_weights": (bool,),
}

# Fields whose feature is used, with its default settings, where they are {}.
_USED_IF_EMPTY = ("arrow_config", "kasa_config", "monteclora_config", "use_bdlora", "velora_config")

# Initialisers that change the weights of the base: PEFT changes them again when it loads such an adapter.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")

# Initialisers that leave the base as it is. One that is not known here may change it.
_KEEPS_BASE = ("gaussian", "eva", "orthogonal", "mica")

TASK_TYPES = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")

# With these task types PEFT trains the named modules whole, and fails to load an adapter that lacks them.
HEADS_OF_TASK = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def from_peft(data: Any, where: str, ignore_fields: Collection[str] = ()) -> LoRAConfig:
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
    ours: dict[str, Any] = {}
    passed_over = []
    for key, value in data.items():
        if key in _OURS:
            ours[key] = value
        elif key in _WITHOUT_EFFECT:
            types = _WITHOUT_EFFECT[key]
            if value is not None and (type(value) not in types):
                names = " or ".join(t.__name__ for t in types) or "null"
                raise AdapterFormatError(f"{where}: {key} is {value!r}, not a {names}.")
        elif key not in _DEFAULTS:
            if not (_is_empty(value) or key in ignore_fields):
                raise AdapterFormatError(_unknown(key, value, where))
            passed_over.append(f"{key} ({_shown(value)})")
        elif value or (value == {} and key in _USED_IF_EMPTY):
            raise AdapterFormatError(
                f"{where}: {key} is {value!r}. That changes what the adapter computes, and is not supported here. PEFT "
                "loads it; its merge_and_unload() makes a plain model of the two."
            )
    if passed_over:
        log.debug("%s: fields that are not known here are passed over: %s", where, ", ".join(passed_over))
    _check_init(data.get("init_lora_weights", True), where, ignored="init_lora_weights" in ignore_fields)
    return _config({**ours, "peft_version": data.get("peft_version")}, where)


def _check_ignored(names: Any) -> None:
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"ignore_fields is a list of names, such as ['new_config'], not {names!r}.")
    if known := [name for name in names if name in _DEFAULTS and name not in _WITHOUT_EFFECT]:
        raise ConfigError(
            f"ignore_fields names {listed(map(repr, known))}, which is known and changes what an adapter computes: "
            "without it the adapter would be another. Only fields that are not known here can be passed over."
        )


def _is_empty(value: Any) -> bool:
    """True if a field with this value says that its feature was not used. A number may mean something, even 0."""
    return value is None or value is False or (isinstance(value, (str, list, dict)) and not value)


def _unknown(key: str, value: Any, where: str) -> str:
    near = closest(key, _DEFAULTS)
    hint = f" Did you mean {listed(map(repr, near))}?" if near else ""
    return (
        f"{where} has the unknown field {key!r} ({_shown(value)}).{hint} A later PEFT may write it, and it may change "
        f"what the adapter computes. If you know that it does not, pass ignore_fields=[{key!r}]."
    )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def own_fields(config: LoRAConfig, *, dropout: bool = False) -> dict[str, Any]:
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
    for key, value in ((key, data[key]) for key in _OURS if key in data):
        # PEFT reads an absent value and an empty one alike, and null as false.
        # But of layers_to_transform, "" and {} would mean no layer.
        is_empty = value is None or value == [] or (value in ("", {}) and key != "layers_to_transform")
        if is_empty and (_DEFAULTS[key] is None or isinstance(_DEFAULTS[key], dict)):
            continue
        if value is None and _DEFAULTS[key] is False:
            continue
        values[_OURS[key]] = value
    if "target_parameters" in values:
        values.setdefault("target_modules", [])
        _check_stacks(data.get("peft_version"), where)
    if "trainable_token_indices" in values:
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
    target_modules: str | list[str],
    target_parameters: list[str] | None = None,
    trainable_token_indices: dict[str, list[int]] | None = None,
    without_dropout: bool = False,
    modules_to_save: list[str] | None,
    fan_in_fan_out: bool = False,
    task_type: str | None = None,
    base_model: str | None = None,
    revision: str | None = None,
) -> dict[str, Any]:
    """The fields of an `adapter_config.json`, sorted. `ranks` and `alphas` have an entry for each module and parameter
    that PEFT wraps."""
    rank = usual(config.rank, ranks)
    alpha = usual(config.alpha, alphas)
    return dict(
        sorted(
            {
                **_DEFAULTS,
                "r": rank,
                "lora_alpha": plain_number(alpha),
                "lora_dropout": 0.0 if without_dropout else config.dropout,
                "rank_pattern": exact_pattern(ranks, rank),
                "alpha_pattern": {k: plain_number(v) for k, v in exact_pattern(alphas, alpha).items()},
                "target_modules": target_modules,
                "target_parameters": target_parameters,
                "trainable_token_indices": trainable_token_indices,
                "modules_to_save": modules_to_save,
                "bias": config.bias,
                "use_rslora": config.use_rslora,
                "use_dora": config.use_dora,
                "lora_bias": config.lora_bias,
                "alora_invocation_tokens": config.alora_invocation_tokens,
                "fan_in_fan_out": fan_in_fan_out,
                "task_type": task_type,
                "base_model_name_or_path": base_model,
                "revision": revision,
            }.items()
        )
    )


def plain_number(value: float) -> int | float:
    """`value` as JSON shows it best: without a fraction where it has none."""
    return int(value) if float(value).is_integer() else value
