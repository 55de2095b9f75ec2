"""PEFT's spelling, in this module alone: the keys of its tensors and the fields of its config; dict to dict.

Read in peft 0.21.2 (tuners/lora, utils/save_and_load.py) and checked by running it. A module that PEFT adapts is
wrapped, so what the module held lies under `base_layer` from then on.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from lightning_lora.engine import LoRAConfig
from lightning_lora.engine.layers.pair import BIAS, MAGNITUDE
from lightning_lora.engine.layers.tokens import TOKENS
from lightning_lora.errors import AdapterFormatError, ConfigError, closest, listed

PREFIX = "base_model.model."

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

# What PEFT has no field for: it changes how an adapter is trained on, and no output.
_OURS_ALONE = ("freeze_a", "rank_dropout", "module_dropout")
_OURS_SOMETIMES = ("dropout",)
"""What it does not know for some layers."""

# What says where an adapter comes from, or how it started, and changes no output: field -> the types that it may have.
_WITHOUT_EFFECT: dict[str, tuple[type, ...]] = {
    "auto_mapping": (dict,),
    "base_model_name_or_path": (str,),
    "corda_config": (dict,),
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

# Initial weights that are taken out of the base's: PEFT changes the base again when it loads such an adapter.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")

TASK_TYPES = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")

# With these task types PEFT trains the named modules whole, and fails to load an adapter that lacks them.
HEADS_OF_TASK = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


# Tensor keys.

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
    found = map(_ADAPTED.match, keys)
    return {base_name(match[1] or "") for match in found if match}


def base_name(key: str) -> str:
    """The name in the base model of the parameter or module that PEFT calls `key`, prefix or not."""
    return _WRAPPED.sub("", key.removeprefix(PREFIX))


def is_untrained_original(key: str) -> bool:
    """Whether `key` is the copy that PEFT keeps of a module in modules_to_save (it gets into files with bias="all")."""
    return ".original_module." in key


def is_saved_by_peft(bias_name: str) -> bool:
    """Whether PEFT writes the bias called `bias_name` when it trains all biases: not `in_proj_bias`, for one."""
    return bias_name.rpartition(".")[2] == "bias"


# Config.


def from_peft(data: Any, where: str) -> LoRAConfig:
    """The config in an `adapter_config.json`; how the adapter started is left out, since its tensors replace that.

    Raises AdapterFormatError, beginning with `where`, for another PEFT method, an unknown field, one with an effect
    that is not supported, and a value that cannot be.
    """
    if not isinstance(data, Mapping):
        raise AdapterFormatError(f"{where} holds a {type(data).__name__}, not an object with PEFT's fields.")
    if "peft_type" not in data:
        hint = " It looks like an adapter of mlx-lm." if "lora_parameters" in data else ""
        raise AdapterFormatError(f"{where} has no field peft_type, so it is not a config of PEFT's.{hint}")
    if data["peft_type"] != "LORA":
        raise AdapterFormatError(f"{where}: peft_type is {data['peft_type']!r}; only 'LORA' can be loaded.")
    ours: dict[str, Any] = {}
    for key, value in data.items():
        if key in _OURS:
            ours[key] = value
        elif key in _WITHOUT_EFFECT:
            types = _WITHOUT_EFFECT[key]
            if value is not None and (type(value) not in types):
                names = " or ".join(t.__name__ for t in types) or "null"
                raise AdapterFormatError(f"{where}: {key} is {value!r}, not a {names}.")
        elif key not in _DEFAULTS:
            near = closest(key, _DEFAULTS)
            hint = f" Did you mean {listed(map(repr, near))}?" if near else ""
            raise AdapterFormatError(f"{where} has the unknown field {key!r} ({value!r}).{hint}")
        elif value:
            raise AdapterFormatError(
                f"{where}: {key} is {value!r}. That changes what the adapter computes, and is not supported."
            )
    _check_init(data.get("init_lora_weights", True), where)
    return _config({**ours, "peft_version": data.get("peft_version")}, where)


def own_fields(config: LoRAConfig, *, dropout: bool = False) -> dict[str, Any]:
    """What `config` says that is not written for PEFT, `dropout` among it or not, for the metadata of the tensors."""
    fields = (*_OURS_ALONE, *(_OURS_SOMETIMES if dropout else ()))
    return {field: getattr(config, field) for field in fields if getattr(config, field)}


def with_own_fields(config: LoRAConfig, own: Any, where: str) -> LoRAConfig:
    """`config` with the `own_fields` that a file has; None are none. Raises AdapterFormatError for others."""
    own = {} if own is None else own
    if not isinstance(own, Mapping) or not set(own) <= {*_OURS_ALONE, *_OURS_SOMETIMES}:
        raise AdapterFormatError(f"{where}: the metadata of its tensors holds {own!r} for a config of this package.")
    try:
        return replace(config, **own)
    except ConfigError as error:
        raise AdapterFormatError(f"{where}: the metadata of its tensors: {error}") from error


def _check_init(init: Any, where: str) -> None:
    if isinstance(init, str) and init.lower().startswith(_CHANGES_BASE):
        raise AdapterFormatError(
            f"{where}: init_lora_weights is {init!r}, so the adapter belongs to a base whose weights were changed. "
            "Convert it in PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...)."
        )


def _check_stacks(version: Any, where: str) -> None:
    """Up to 0.18 PEFT wrote the factors of a stack, such as the experts of a mixture, the other way round."""
    numbers = re.match(r"(\d+)\.(\d+)", version) if isinstance(version, str) else None
    if numbers is None or (int(numbers[1]), int(numbers[2])) < (0, 19):
        raise AdapterFormatError(
            f"{where}: target_parameters of peft_version {version!r} are laid out as before PEFT 0.19, and which way "
            "round cannot be told from their shapes alone. Load it in PEFT 0.19 or later, and save it there."
        )


def _config(data: Mapping[str, Any], where: str) -> LoRAConfig:
    values = {"rank": _DEFAULTS["r"], "alpha": _DEFAULTS["lora_alpha"]}
    for key, value in ((key, data[key]) for key in _OURS if key in data):
        # PEFT reads an absent value and an empty one alike.
        is_empty = value is None or (not value and isinstance(value, (str, list, dict)))
        if is_empty and (_DEFAULTS[key] is None or isinstance(_DEFAULTS[key], dict)):
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
    """The fields of an `adapter_config.json`, sorted. `ranks` and `alphas` are those of the modules and parameters that
    PEFT wraps."""
    rank = _usual(config.rank, ranks)
    alpha = _usual(config.alpha, alphas)
    return dict(
        sorted(
            {
                **_DEFAULTS,
                "r": rank,
                "lora_alpha": _number(alpha),
                "lora_dropout": 0.0 if without_dropout else config.dropout,
                "rank_pattern": exact_pattern(ranks, rank),
                "alpha_pattern": {k: _number(v) for k, v in exact_pattern(alphas, alpha).items()},
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


def _usual(default: Any, values: Mapping[str, Any]) -> Any:
    """`default` if some module has it, else what most have: consumers that ignore patterns read this one alone."""
    if not values or default in values.values():
        return default
    return Counter(values.values()).most_common(1)[0][0]


def _number(value: float) -> int | float:
    return int(value) if float(value).is_integer() else value


def exact_pattern(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """A rank or alpha pattern that gives every module of `values` its value, whatever order its entries are read in."""
    return {f"^{re.escape(name)}": value for name, value in values.items() if value != default}


def ends_with(entries: Collection[str], name: str) -> bool:
    """PEFT's rule for modules_to_save, which does not ask for a dot before the entry."""
    return any(name.endswith(entry) for entry in entries)
