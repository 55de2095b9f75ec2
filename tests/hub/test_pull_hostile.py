"""Pulling what somebody else made to do harm, or broke: refused at once, by name, and not kept."""

from __future__ import annotations

import json

import pytest
import torch
from hanging import no_hang

from lightning_lora import adapter_state_dict, load_adapter, pull_adapter, save_adapter
from lightning_lora.errors import AdapterFormatError
from tests.hub.models import Linears, changed_tensors

pytestmark = pytest.mark.usefixtures("short_waits")
ID = "user/adapter"
FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors"]


def config_with(files, **changes):
    config = {**json.loads(files["adapter_config.json"]), **changes}
    return {"adapter_config.json": json.dumps(config).encode()}


def header_with(files, change):
    """Edit the header alone, so that it lies about what follows."""
    content = files["adapter_model.safetensors"]
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    return {"adapter_model.safetensors": len(text).to_bytes(8, "little") + text + content[8 + size :]}


A = "base_model.model.fc.lora_A.weight"
B = "base_model.model.fc.lora_B.weight"
HOSTILE = {
    "an initialiser that changes the base": (
        lambda f: config_with(f, init_lora_weights="pissa"),
        "init_lora_weights is 'pissa'",
    ),
    "a later one": (lambda f: config_with(f, init_lora_weights="corda"), "init_lora_weights is 'corda'"),
    "a huge rank": (lambda f: config_with(f, r=2**20), "has rank 1048576 for .*tensors have at most 2"),
    "a huge rank in a pattern": (lambda f: config_with(f, rank_pattern={"fc": 2**20}), "has rank 1048576 for fc"),
    "no rank": (lambda f: config_with(f, r=0), "whole number from 1"),
    "a rank that is no number": (lambda f: config_with(f, r="8"), "whole number from 1"),
    "a huge alpha": (lambda f: config_with(f, lora_alpha=1e30), "lora_alpha is 1e\\+30"),
    "a huge alpha in a pattern": (lambda f: config_with(f, alpha_pattern={"fc": 1e30}), "alpha_pattern is 1e\\+30"),
    "an infinite alpha": (lambda f: config_with(f, lora_alpha=float("inf")), "finite number"),
    "an unknown field": (lambda f: config_with(f, run_this="rm"), "unknown field 'run_this'"),
    "another method": (lambda f: config_with(f, peft_type="LOHA"), "peft_type is 'LOHA'"),
    "a rank that no layer has": (lambda f: config_with(f, r=10**400), "larger than any layer"),
    "a list without an end": (lambda f: config_with(f, modules_to_save=["fc"] * 20_000), "has 20,000 entries"),
    "a note that is nested": (
        lambda f: header_with(f, lambda h: h["__metadata__"].update(lightning_lora="[" * 100_000)),
        "entry 'lightning_lora' of its metadata",
    ),
    "more patterns than modules": (
        lambda f: config_with(f, rank_pattern={f"fc{i}": 2 for i in range(1000)}),
        "1,000 patterns for 1 adapted",
    ),
    "a config that is a list": (lambda f: {"adapter_config.json": b"[]"}, "holds a list"),
    "a config that is no JSON": (lambda f: {"adapter_config.json": b"{"}, "is not JSON"),
    "a config that is nested": (lambda f: {"adapter_config.json": b"[" * 100_000}, "not JSON|nested too deeply"),
    "a config of 100 MB": (lambda f: {"adapter_config.json": b" " * 100_000_000}, "100,000,000 bytes, more than"),
    "no config": (lambda f: {"adapter_config.json": None}, "lacks adapter_config.json"),
    "only a pickle": (
        lambda f: {"adapter_model.safetensors": None, "adapter_model.bin": b"cos\nsystem\n(S'false'\ntR."},
        "lacks adapter_model.safetensors. It looks like an adapter saved as a pickle",
    ),
    "an adapter of diffusers": (
        lambda f: {"adapter_model.safetensors": None, "pytorch_lora_weights.safetensors": b""},
        "diffusers",
    ),
    "a name that leaves the folder": (
        lambda f: {"adapter_config.json": None, "../adapter_config.json": b"{}", "/etc/adapter_config.json": b"{}"},
        "lacks adapter_config.json",
    ),
    "a link": (lambda f: {"adapter_model.safetensors": b"../../../../etc/passwd"}, "no safetensors file"),
    "a weight of the base": (
        lambda f: changed_tensors(f, lambda t: t.update({"base_model.model.head.weight": torch.zeros(3, 8)})),
        "no part of an adapter: base_model.model.head.weight",
    ),
    "a weight below an adapted layer": (
        lambda f: changed_tensors(f, lambda t: t.update({"base_model.model.fc.base_layer.weight": torch.zeros(8, 8)})),
        "no part of an adapter",
    ),
    "a name without the prefix": (
        lambda f: changed_tensors(f, lambda t: t.update({"fc.lora_A.weight": t[A].clone()})),
        "no part of an adapter: fc.lora_A.weight",
    ),
    "values that are not finite": (
        lambda f: changed_tensors(f, lambda t: t[B].fill_(torch.nan)),
        f"not finite, in {B}",
    ),
    "infinite values": (lambda f: changed_tensors(f, lambda t: t[A].fill_(torch.inf)), f"not finite, in {A}"),
    "whole numbers": (lambda f: changed_tensors(f, lambda t: t.update({A: t[A].long()})), "of a type or a shape"),
    "no tensors": (lambda f: changed_tensors(f, lambda t: t.clear()), "holds no tensor"),
    "a cut file": (
        lambda f: {"adapter_model.safetensors": f["adapter_model.safetensors"][:-1]},
        "cut short",
    ),
    "a header that promises more": (lambda f: header_with(f, lambda h: h[A].update(shape=[2**40, 8])), "cut short"),
    "a header with other offsets": (
        lambda f: header_with(f, lambda h: h[A].update(data_offsets=[0, 2**50])),
        "cut short",
    ),
    "a header without an end": (
        lambda f: {"adapter_model.safetensors": (2**62).to_bytes(8, "little") + b"{}"},
        "cut short",
    ),
    "an expression that hangs": (lambda f: config_with(f, target_modules=r"(\w+\.?)*!"), "for ever to match"),
    "another one": (lambda f: config_with(f, exclude_modules=r"(.*a){25}"), "for ever to match"),
    "one among the patterns": (lambda f: config_with(f, rank_pattern={r"(a|aa)+$": 2}), "for ever to match"),
    "one of layers": (
        lambda f: config_with(f, target_modules=["fc"], layers_to_transform=[0], layers_pattern=r"(h+)+x"),
        "for ever to match",
    ),
    "one that refers back": (lambda f: config_with(f, target_modules=r"(.*)\1+x"), "for ever to match"),
    "one that is none": (lambda f: config_with(f, target_modules="("), "not a regular expression"),
    "one that is too deep": (lambda f: config_with(f, target_modules="(" * 5000 + ")" * 5000), "not a regular expr"),
    "one that only breaks in its place": (lambda f: config_with(f, rank_pattern={"(?i)fc": 2}), "not a regular expr"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_repository_is_refused_at_once_and_not_kept(hub, cached, files, kind):
    change, said = HOSTILE[kind]
    hub.create_repo(ID, files={**files, **change(files)})
    hub.commit(ID, {name: None for name, content in change(files).items() if content is None} or {"x": b""})
    with no_hang(), pytest.raises(AdapterFormatError, match=f"(?s){said}") as raised:
        pull_adapter(ID)
    assert ".tmp" not in str(raised.value)
    assert not cached()


def test_a_config_that_is_refused_costs_no_download_of_tensors(hub, files):
    hub.create_repo(ID, files={**files, **config_with(files, init_lora_weights="pissa")})
    with pytest.raises(AdapterFormatError):
        pull_adapter(ID)
    assert not hub.requested("adapter_model.safetensors", "GET")


def test_tensors_above_the_limit_are_not_fetched_unless_told_so(hub, repository, files):
    size = len(files["adapter_model.safetensors"])
    with pytest.raises(AdapterFormatError, match=f"has {size:,} bytes, more than the {size - 1:,}.*larger max_bytes="):
        pull_adapter(ID, max_bytes=size - 1)
    assert not hub.requested("/resolve/")
    assert sorted(path.name for path in pull_adapter(ID, max_bytes=size).iterdir()) == FILES


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.update(target_modules=r".*\.(q_proj|fc)|fc"),
        lambda c: c.update(
            target_modules=r"(?:.*?(?:text|mlp).*?(?:fc|fd).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:fc))|fc"
        ),
        lambda c: c.update(target_modules="^(?!.*vision).*fc$"),
        lambda c: c.update(rank_pattern={"^fc": 2}, r=64),
        lambda c: c.update(init_lora_weights="gaussian", base_model_name_or_path="/home/somebody/model"),
    ],
)
def test_what_people_write_is_accepted(hub, files, change):
    config = json.loads(files["adapter_config.json"])
    change(config)
    hub.create_repo(ID, files={**files, "adapter_config.json": json.dumps(config).encode()})
    model = Linears()
    load_adapter(model, ID, check_base=False)
    assert adapter_state_dict(model)


def test_an_expression_that_hangs_is_refused_from_a_folder_too(source, tmp_path):
    folder = save_adapter(source, tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "target_modules": r"(\w+\.?)*!"}))
    with pytest.raises(AdapterFormatError, match="for ever to match"):
        load_adapter(Linears(), folder)
