"""Names, patterns and configs mean what PEFT means by them: for trees and configs that hypothesis draws, not us."""

from __future__ import annotations

import copy
import math
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import nn

from lightning_lora import LoRAConfig, adapter_state_dict, inject, load_adapter, pairs, remove, save_adapter
from lightning_lora.engine import injection_of
from lightning_lora.errors import AdapterFormatError, ConfigError, TargetError
from lightning_lora.format.peft import adapted_names, plain_key
from tests.hub.models import shake

# PEFT warns of a pattern that matches nothing, and we of a rank above a layer's smaller side.
pytestmark = pytest.mark.filterwarnings("ignore")

# The same examples in every run: a failure here is a fault of the change, and no luck of the day.
each = settings(
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=100,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate],  # to make an example smaller takes minutes
)
some = settings(each, max_examples=40)
NAMES = ["q", "v", "xq", "q_proj", "layers", "h", "0", "1", "2", "mlp", "head", "embed", "lora_A", "default", "model"]


def leaf(kind: str) -> nn.Module:
    return {"linear": lambda: nn.Linear(6, 6), "words": lambda: nn.Embedding(7, 6), "conv": lambda: nn.Conv1d(6, 6, 1)}[
        kind
    ]()


def built(tree: Any) -> nn.Module:
    """A module with the children of `tree`: name -> subtree, or the kind of a leaf."""
    if isinstance(tree, str):
        return leaf(tree)
    module = nn.Module()
    for name, inside in tree.items():
        module.add_module(name, built(inside))
    return module


leaves = st.sampled_from(["linear", "linear", "linear", "words", "conv"])
names = st.sampled_from(NAMES)
blocks = st.dictionaries(
    names, st.one_of(leaves, st.dictionaries(names, leaves, min_size=1, max_size=2)), min_size=2, max_size=3
)
stacks = st.lists(blocks, min_size=1, max_size=3).map(lambda all: {str(i): block for i, block in enumerate(all)})
trees = st.dictionaries(names, st.one_of(leaves, blocks, stacks, stacks), min_size=2, max_size=4)


@st.composite
def targeted(draw: Any) -> tuple[nn.Module, dict[str, Any]]:
    """A model, and fields of PEFT's config that select some of its layers."""
    torch.manual_seed(0)
    model = built(draw(trees))
    layers = [name for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Embedding, nn.Conv1d))]
    own = st.sampled_from(layers).flatmap(
        lambda name: st.integers(1, name.count(".") + 1).map(lambda n: name.split(".")[-n:])
    )
    endings = own.map(".".join)
    expressions = st.one_of(
        st.sampled_from([r".*\.q", r"(.*\.)?(q|v|h)", r".*\.\d+\..*", r".*\.[^.]*q.*"]),
        endings.map(lambda end: rf"(?:.*\.)?{end}"),
    )
    entries = st.one_of(
        endings, endings.map(lambda end: f"^{end}"), st.sampled_from([r".*", r"\d", r".*\.q.*", r"\d\..*"])
    )
    fields: dict[str, Any] = {
        "target_modules": draw(st.one_of(st.lists(endings, min_size=1, max_size=4, unique=True), expressions))
    }
    fields["rank_pattern"] = draw(st.dictionaries(entries, st.integers(1, 4), max_size=2))
    fields["alpha_pattern"] = draw(st.dictionaries(entries, st.integers(1, 9), max_size=2))
    fields["use_rslora"] = draw(st.booleans())
    more = draw(st.sampled_from(["nothing", "nothing", "excluded", "layers"]))
    if more == "excluded":
        fields["exclude_modules"] = draw(st.one_of(st.lists(endings, min_size=1, max_size=2), expressions))
    if more == "layers" and isinstance(fields["target_modules"], list):
        fields["layers_to_transform"] = draw(st.one_of(st.integers(0, 2), st.lists(st.integers(0, 3), min_size=1)))
        patterns = st.sampled_from(NAMES + [r"(layers|h)", "[^.]*"])
        fields["layers_pattern"] = draw(st.one_of(st.none(), patterns, st.lists(patterns, min_size=1, max_size=2)))
    return model, fields


def by_peft(model: nn.Module, fields: dict[str, Any]) -> nn.Module | None:
    """`model` adapted by PEFT; None where it refuses."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return get_peft_model(copy.deepcopy(model), LoraConfig(r=2, lora_alpha=3, **fields))
    except (ValueError, TypeError, AttributeError, KeyError):
        return None


def of_peft(adapted: nn.Module) -> dict[str, tuple[int, float]]:
    layers = ((n, m) for n, m in adapted.named_modules() if isinstance(m, LoraLayer))
    return {n.removeprefix("base_model.model."): (m.r["default"], m.scaling["default"]) for n, m in layers}


def of_ours(model: nn.Module) -> dict[str, tuple[int, float]]:
    return {pair.name: (pair.spec.rank, pair.spec.scale) for pair in pairs(model)}


@each
@given(targeted())
def test_patterns_select_the_layers_ranks_and_scales_that_peft_selects(drawn: Any) -> None:
    model, fields = drawn
    theirs = by_peft(model, fields)
    try:
        inject(model, LoRAConfig(rank=2, alpha=3, **fields))
    except TargetError as error:
        # Stricter on purpose: an entry that has no effect is an error, and so is a layer that cannot be adapted.
        said = str(error)
    else:
        said = ""
    if said:
        assert any(field in said for field in fields)
        return
    assert theirs is not None
    assert of_ours(model) == of_peft(theirs)


@some
@given(targeted())
def test_what_peft_saves_is_loaded_as_peft_loads_it_and_saved_again_under_the_same_keys(drawn: Any) -> None:
    model, fields = drawn
    trained = by_peft(model, fields)
    assume(trained is not None)
    assert trained is not None
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trained.save_pretrained(folder, save_embedding_layers=False)
        try:
            theirs = PeftModel.from_pretrained(copy.deepcopy(model), folder)
        except RuntimeError:  # PEFT sorts the entries of a pattern when it saves them: then the shapes may not fit
            with pytest.raises(AdapterFormatError, match="has shape"):
                load_adapter(model, folder, check_base=False)
            return
        load_adapter(model, folder, check_base=False)
        assert of_ours(model) == of_peft(theirs)
        save_adapter(model, Path(folder, "again"))
        first, again = (load_file(Path(folder, name, "adapter_model.safetensors")) for name in ("", "again"))
        # A key of PEFT's -> ours -> PEFT's is the key that it was.
        assert first.keys() == again.keys()
        assert all(torch.equal(tensor, again[key]) for key, tensor in first.items())
        assert adapted_names(first) == set(of_ours(model))
        assert [plain_key(key) for key in first] == list(first)
        remove(model)
        assert of_peft(PeftModel.from_pretrained(model, Path(folder, "again"))) == of_peft(theirs)


numbers = st.floats(0.01, 300, allow_nan=False)
FREE: dict[str, st.SearchStrategy[Any]] = {
    "rank": st.integers(1, 6),
    "alpha": numbers,
    "dropout": st.floats(0, 0.9),
    "rank_dropout": st.floats(0, 0.9),
    "module_dropout": st.floats(0, 0.9),
    "use_rslora": st.booleans(),
    "use_dora": st.booleans(),
    "lora_bias": st.booleans(),
    "freeze_a": st.booleans(),
    "bias": st.sampled_from(["none", "all", "lora_only"]),
    "init": st.sampled_from(["kaiming", "gaussian", "olora", "orthogonal"]),
}


@some
@given(targeted(), st.fixed_dictionaries({}, optional=FREE))
def test_a_config_of_ours_means_the_same_after_it_was_written_to_ourselves_and_to_peft(drawn: Any, free: Any) -> None:
    model, fields = drawn
    torch.manual_seed(0)
    fresh = copy.deepcopy(model)
    try:
        config = LoRAConfig(**{**fields, **free})
        inject(model, config)
    except (ConfigError, TargetError):
        assume(False)
    shake(model)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save_adapter(model, folder)
        again, theirs = copy.deepcopy(fresh), PeftModel.from_pretrained(copy.deepcopy(fresh), folder)
        load_adapter(again, folder)
    assert of_peft(theirs).keys() == of_ours(again).keys() == of_ours(model).keys()
    doubled = 2 if config.init == "olora" else 1  # a frozen start is written as further ranks
    for (name, (rank, scale)), pair in zip(of_ours(model).items(), pairs(again)):
        assert pair.name == name
        assert pair.spec.rank == of_peft(theirs)[name][0] == doubled * rank
        for read in (pair.spec.scale, of_peft(theirs)[name][1]):
            assert math.isclose(read, scale, rel_tol=1e-12)  # alpha is written, and divided by the rank again
    for field in (
        "dropout",
        "rank_dropout",
        "module_dropout",
        "use_dora",
        "lora_bias",
        "use_rslora",
        "bias",
        "freeze_a",
    ):
        assert getattr(injection_of(again).config, field) == getattr(config, field)
    if doubled == 1:
        first, second = adapter_state_dict(model), adapter_state_dict(again)
        assert first.keys() == second.keys()
        assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
