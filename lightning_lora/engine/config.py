"""LoRAConfig says what to adapt, and how: one frozen object, checked when it is made."""

from __future__ import annotations

import copy
import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeVar, get_args

from lightning_lora.checked import flag, number, one_of, probability, whole
from lightning_lora.engine.inits import INITS
from lightning_lora.engine.peft_names import in_our_names, unknown_name
from lightning_lora.errors import ConfigError

# The scale s in W x + s * B A x.


def scale_of(alpha: float, rank: int, *, rank_stabilised: bool = False) -> float:
    """alpha / rank (Hu et al. 2021, section 4.1); rank-stabilised: alpha / sqrt(rank) (arXiv:2312.03732, section 3)."""
    return alpha / (math.sqrt(rank) if rank_stabilised else rank)


Bias = Literal["none", "all", "lora_only"]
AdapterDtype = Literal["float32", "base"]
C = TypeVar("C")


@dataclass(frozen=True)
class AdapterSpec:
    """The rank, the scale and the dropouts of one adapted layer."""

    rank: int
    alpha: float
    scale: float
    dropout: float = 0.0
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    keeps_precision: bool = True
    """A and B stay in float32 when the model is cast to a narrower dtype (master weights)."""
    parameters: Mapping[str, AdapterSpec] = field(default_factory=dict)
    """Parameter name -> its own spec, where single parameters of the module are adapted and not its output."""


class _UnknownFieldError(ConfigError, TypeError):
    """An unknown field: a ConfigError, and also a TypeError, as Python raises for an unknown argument."""


def _says_names(cls: type[C]) -> type[C]:
    """Make the constructor of `cls` raise ConfigError for an unknown field, and say which field was likely meant."""
    init = cls.__init__

    @functools.wraps(init)
    def checked_init(self: Any, *args: Any, **given: Any) -> None:
        known = [f.name for f in fields(cls)]  # type: ignore[arg-type]
        if args:
            raise _UnknownFieldError(
                f"{cls.__name__} takes its fields by name, such as rank=8; {args[0]!r} was given without a name."
            )
        for name in given:
            if name not in known:
                raise _UnknownFieldError(f"{cls.__name__} has no field {name!r}. {unknown_name(name, known)}")
        init(self, **given)

    cls.__init__ = checked_init  # type: ignore[method-assign]
    return cls


_ALWAYS_SHOWN = ("rank", "alpha", "target_modules")


@_says_names
@dataclass(frozen=True, kw_only=True, repr=False)
class LoRAConfig:
    """Low-rank adaptation of a model: h = W x + scale * B A x, W frozen (Hu et al. 2021, arXiv:2106.09685).

    Names are matched by PEFT's rules: a string is a regular expression that must match a module's whole name; an entry
    of a list matches a module of that name or one whose name ends in ".entry".

    Args:
        rank, alpha, ...: Keywords only. The text under each field says what it means, and its unit.

    Raises:
        ConfigError: A value is not valid, two fields contradict each other, or there is no such field.

    Example:
        >>> from lightning_lora import LoRAConfig
        >>> config = LoRAConfig(rank=8, alpha=16, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 4})
        >>> config.rank_of("layers.0.v_proj"), config.scale_of("layers.0.v_proj")
        (4, 4.0)
    """

    rank: int = 8
    """Rows of A and columns of B."""
    alpha: float = 16.0
    """The update is multiplied by alpha / rank (rsLoRA: alpha / sqrt(rank))."""
    dropout: float = 0.0
    """Probability with which an element of an adapter's input is zeroed in training; the base's input is untouched.
    Where a weight is read and its layer is not called (parameters, attention's projections), a feature is zeroed for a
    whole forward. Embeddings have no dropout, since their input is indices."""
    target_modules: str | list[str] = "all-linear"
    """Modules to adapt: "all-linear" (every linear layer but the output head), a list of name endings, or a regular
    expression. May be empty where `target_parameters` are given.

    "all-linear" leaves out a part that was frozen before the injection beside a part that trains, such as a teacher or
    the network of a perceptual loss, and the report says so; a frozen backbone under a head is adapted (all_linear.py
    has the rule). A list or an expression can name any layer."""
    target_parameters: list[str] | None = None
    """Parameters to adapt, in addition to `target_modules`, such as the experts of a mixture: a list of names or name
    endings. Their module reads P + s B A in place of P."""
    exclude_modules: str | list[str] | None = None
    """Modules to leave out though `target_modules` matches them: a list of name endings, or a regular expression."""
    layers_to_transform: int | list[int] | None = None
    """Numbers of the layers in which targets are adapted. The first number in a module's name is its layer. A target
    that is named by its whole name is adapted in any layer."""
    layers_pattern: str | list[str] | None = None
    """Name of the container of layers ("blocks" in "blocks.3.q_proj"), if the first number in a name is not the layer's
    number."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Other ranks for some modules: name ending (a regular expression) -> rank; the first match counts."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Other alphas for some modules, matched as in `rank_pattern`."""
    modules_to_save: list[str] | None = None
    """Modules that are trained whole and saved with the adapter, such as a new head: a list of name endings."""
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    """Rows of an embedding that are trained, such as those of new tokens: a list of indices into the model's input
    embedding, or a dict from the names of embeddings to such lists. A head that shares the weight has the same rows."""
    bias: Bias = "none"
    """Biases that are trained as well: "none", "all", or "lora_only" (those of adapted layers)."""
    lora_bias: bool = False
    """True gives B a bias, which is trained, and scaled as B is."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank), which keeps large ranks learning (Kalajdzievski 2023, arXiv:2312.03732)."""
    use_dora: bool = False
    """Train the size of each output's weights apart from their direction (Liu et al. 2024, arXiv:2402.09353)."""
    freeze_a: bool = False
    """Train B alone; A stays as it starts (LoRA-FA, Zhang et al. 2023, arXiv:2308.03303). That saves memory."""
    rank_dropout: float = 0.0
    """Probability with which each rank of a pair is left out of a forward in training; the mean update stays."""
    module_dropout: float = 0.0
    """Probability with which a module's whole update is left out of a forward in training; the mean update stays."""
    init: str = "kaiming"
    """How A and B start: a name in `lightning_lora.engine.inits.INITS`, such as "kaiming" (A uniform, as in the
    reference code, B zero). The adapted model starts equal to its base; only with "loftq" it starts closer to the model
    from before quantization."""
    alora_invocation_tokens: list[int] | None = None
    """Activated LoRA, for causal language models (Greenewald et al. 2025, arXiv:2504.12397): ids of a token sequence.
    In each row the adapter acts from the last occurrence of the sequence on; a row without it uses the bare base."""
    adapter_dtype: AdapterDtype = "float32"
    """Precision of A and B on a half-precision base: "float32" master weights, or "base" for the base's own."""

    def __post_init__(self) -> None:
        set_ = object.__setattr__  # the one place where a frozen field may be normalised
        set_(self, "target_parameters", _list_of_names("target_parameters", self.target_parameters))
        set_(self, "trainable_token_indices", _tokens(self.trainable_token_indices))
        if self.target_modules is None and (self.target_parameters or self.trainable_token_indices):
            set_(self, "target_modules", [])
        set_(self, "target_modules", _names("target_modules", self.target_modules))
        if not self.target_modules and not self.target_parameters and not self.trainable_token_indices:
            raise ConfigError(
                f"target_modules is {self.target_modules!r}: nothing would be adapted. "
                "Name modules, or use 'all-linear'."
            )
        set_(self, "exclude_modules", _names("exclude_modules", self.exclude_modules, optional=True))
        set_(self, "layers_pattern", _names("layers_pattern", self.layers_pattern, optional=True, always_regex=True))
        set_(self, "modules_to_save", _list_of_names("modules_to_save", self.modules_to_save))
        set_(self, "layers_to_transform", _layers(self.layers_to_transform))
        whole("rank", self.rank)
        set_(self, "alpha", _alpha("alpha", self.alpha))
        for name in ("dropout", "rank_dropout", "module_dropout"):
            set_(self, name, probability(name, getattr(self, name)))
        set_(self, "rank_pattern", _pattern("rank_pattern", self.rank_pattern))
        for key, rank in self.rank_pattern.items():
            whole(f"rank_pattern[{key!r}]", rank)
        alphas = _pattern("alpha_pattern", self.alpha_pattern)
        set_(self, "alpha_pattern", {k: _alpha(f"alpha_pattern[{k!r}]", v) for k, v in alphas.items()})
        one_of("bias", self.bias, get_args(Bias))
        one_of("init", self.init, INITS)
        one_of("adapter_dtype", self.adapter_dtype, get_args(AdapterDtype))
        for name in ("lora_bias", "use_rslora", "use_dora", "freeze_a"):
            flag(name, getattr(self, name))
        set_(self, "alora_invocation_tokens", _invocation(self.alora_invocation_tokens))
        self._check_combinations()
        if self.layers_to_transform is not None and not self.target_modules:
            raise ConfigError(
                "layers_to_transform chooses among target_modules, and there are none. Name some, or leave it out."
            )
        multiple = INITS[self.init].rank_multiple
        others = [rank for rank in (self.rank, *self.rank_pattern.values()) if rank % multiple]
        if others:
            raise ConfigError(f"init={self.init!r} needs ranks that are multiples of {multiple}, not {others[0]}.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError("layers_pattern has no effect without layers_to_transform. Give both, or neither.")
        is_regex = isinstance(self.target_modules, str) and self.target_modules != "all-linear"
        if is_regex and self.layers_to_transform is not None:
            raise ConfigError(
                "layers_to_transform cannot be combined with a regular expression in target_modules: "
                "put the layer numbers into the expression, or give target_modules as a list."
            )

    def _check_combinations(self) -> None:
        if self.use_dora and self.lora_bias:
            raise ConfigError("lora_bias has no meaning with use_dora, which rescales weights: use one of the two.")
        if self.alora_invocation_tokens and self.use_dora:
            raise ConfigError(
                "use_dora has no meaning with alora_invocation_tokens: it rescales the base's outputs, also where the "
                "adapter must not act. Use one of the two."
            )
        if self.alora_invocation_tokens and self.bias != "none":
            raise ConfigError(
                f"bias={self.bias!r} has no meaning with alora_invocation_tokens: a bias of the base acts everywhere, "
                "also where the adapter must not. lora_bias gives B one of its own."
            )

    def rank_of(self, *names: str) -> int:
        """The rank for the module or the parameter called `names`."""
        return _first_match(self.rank_pattern, names, self.rank)

    def alpha_of(self, *names: str) -> float:
        """The alpha for the module or the parameter called `names`."""
        return _first_match(self.alpha_pattern, names, self.alpha)

    def scale_of(self, *names: str) -> float:
        """The scale for the module or the parameter called `names`: alpha / rank, or alpha / sqrt(rank)."""
        return self.spec_of(*names).scale

    def spec_of(self, *names: str) -> AdapterSpec:
        """The rank, the scale and the dropouts for the module or the parameter called `names`."""
        rank, alpha = self.rank_of(*names), self.alpha_of(*names)
        return AdapterSpec(
            rank=rank,
            alpha=alpha,
            scale=scale_of(alpha, rank, rank_stabilised=self.use_rslora),
            dropout=self.dropout,
            rank_dropout=self.rank_dropout,
            module_dropout=self.module_dropout,
            keeps_precision=self.adapter_dtype == "float32",
        )

    def __repr__(self) -> str:
        """Shows rank, alpha and target_modules, and the fields that differ from their defaults."""
        default = {f.name: f.default_factory() if callable(f.default_factory) else f.default for f in fields(self)}
        shown = [n for n in default if n in _ALWAYS_SHOWN or getattr(self, n) != default[n]]
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in shown)})"

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain Python values; `LoRAConfig(**config.to_dict())` is equal to `config`."""
        return {f.name: copy.copy(getattr(self, f.name)) for f in fields(self)}


def check_is_config(config: object) -> LoRAConfig:
    """Return `config`. Raises ConfigError if it is no LoRAConfig, and says how to write it as one."""
    if isinstance(config, LoRAConfig):
        return config
    default = LoRAConfig().to_dict()
    if (ours := in_our_names(config, default)) is not None:
        raise ConfigError(f"This is PEFT's LoraConfig. Write it as: {ours}")
    if isinstance(config, Mapping):
        raise ConfigError(
            f"config must be a LoRAConfig, not a dict of its fields: write LoRAConfig(**{dict(config)!r})."
        )
    raise ConfigError(f"config must be a LoRAConfig, not a {type(config).__name__}: {config!r}.")


def pattern_matches(key: str, name: str) -> bool:
    """True if the key `key` of rank_pattern or alpha_pattern matches the module called `name` (PEFT's rule)."""
    end, matches = _pattern_of(key)
    return name.endswith(end) and matches(name) is not None


@functools.lru_cache(1 << 13)  # re's own cache holds 512 patterns, and an adapter may have one for each module
def _pattern_of(key: str) -> tuple[str, Callable[[str], re.Match[str] | None]]:
    """A plain ending that all matching names have ("" if none is known), for a quick test, and the full match."""
    end = key.rpartition(".")[2] if re.fullmatch(r"[\w.]*", key) else ""
    return end, re.compile(rf"(.*\.)?({key})$").match


def exact_pattern(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """A rank or alpha pattern that gives every module of `values` its value, whatever order its entries are read in."""
    return {f"^{re.escape(name)}": value for name, value in values.items() if value != default}


def usual(default: Any, values: Mapping[str, Any]) -> Any:
    """`default` if some module has it, else the most common value: consumers that ignore patterns read only this."""
    if not values or default in values.values():
        return default
    return Counter(values.values()).most_common(1)[0][0]


def _first_match(pattern: Mapping[str, Any], names: tuple[str, ...], default: Any) -> Any:
    for key, value in pattern.items():
        if any(pattern_matches(key, name) for name in names):
            return value
    return default


def _alpha(name: str, value: object) -> float:
    return number(name, value, above=0, why="the update is multiplied by alpha / rank")


def _names(name: str, value: Any, *, optional: bool = False, always_regex: bool = False) -> Any:
    """A string as it is (a regular expression that compiles), any collection of strings as a list.

    With `always_regex` the entries of a collection are regular expressions too. If the field is `optional`, None and
    empty values become None.
    """
    if optional and (value is None or value == "" or (isinstance(value, (list, tuple, set)) and not value)):
        return None
    if isinstance(value, str):
        _check_regex(name, value)
        return value
    if isinstance(value, (Mapping, bytes)) or not hasattr(value, "__iter__"):
        raise ConfigError(f"{name} must be a string or a list of strings, not {value!r}.")
    # A set has no order of its own: sorted, the same config always reads the same.
    entries = sorted(value, key=str) if isinstance(value, (set, frozenset)) else list(value)
    for entry in entries:
        if not isinstance(entry, str) or not entry:
            raise ConfigError(f"{name} holds {entry!r}, which is not the name of a module.")
        if always_regex:
            _check_regex(name, entry)
    return entries


def _list_of_names(name: str, value: Any) -> list[str] | None:
    if isinstance(value, str):
        raise ConfigError(f"{name} is a list of names: write [{value!r}], not {value!r}.")
    return _names(name, value, optional=True)


def _tokens(value: Any) -> Any:
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) and key for key in value) or not value:
            raise ConfigError(
                f"trainable_token_indices maps names of embeddings to lists of indices; {value!r} does not."
            )
        return {key: _indices(indices) for key, indices in value.items()}
    return None if value is None else _indices(value)


def _indices(value: Any) -> list[int]:
    name = "trainable_token_indices"
    indices = _numbers(value, f"{name} is a list of indices, or a dict of them by name, not {value!r}.")
    if not indices or len(set(indices)) < len(indices):
        raise ConfigError(f"{name} is {value!r}: give at least one index, and each index once.")
    return indices


def _invocation(value: Any) -> list[int] | None:
    if value is None:
        return None
    wrong = (
        f"alora_invocation_tokens are the ids of one or more tokens, such as [5, 17], not {value!r}: "
        "tokenizer.encode(text, add_special_tokens=False) gives them."
    )
    if not (tokens := _numbers(value, wrong)):
        raise ConfigError(wrong)
    return tokens


def _layers(value: Any) -> list[int] | None:
    if value is None:
        return None
    wrong = f"layers_to_transform is a layer number or a list of them, not {value!r}."
    layers = _numbers([value] if isinstance(value, int) else value, wrong)
    if not layers:
        raise ConfigError(f"layers_to_transform is {value!r}: nothing would be adapted.")
    return layers


def _numbers(value: Any, wrong: str) -> list[int]:
    """`value`, a collection of whole numbers from 0 on, as a list. Raises ConfigError (`wrong`) for others."""
    if isinstance(value, (str, bytes, Mapping)) or not hasattr(value, "__iter__"):
        raise ConfigError(wrong)
    numbers = list(value)
    for one in numbers:
        if isinstance(one, bool) or not isinstance(one, int) or one < 0:
            raise ConfigError(f"{wrong} {one!r} is no whole number from 0 on.")
    return numbers


def _pattern(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name} maps name endings to values, such as {{'q_proj': 16}}; {value!r} does not.")
    for key in value:
        if not isinstance(key, str) or not key:
            raise ConfigError(f"{name} has the key {key!r}, which is not a name ending.")
        _check_regex(name, key)
    return dict(value)


def _check_regex(name: str, expression: str) -> None:
    try:
        re.compile(expression)
    except re.error as error:
        raise ConfigError(f"{name} holds {expression!r}, which is not a regular expression: {error}.") from error
