"""Fields of adapter_config.json that a later PEFT adds, and nulls, as PEFT reads them."""

from __future__ import annotations

import logging
import shutil

import pytest
import torch

from lightning_lora import (
    AdapterBank,
    combine_adapters,
    export_adapter,
    load_adapter,
    pull_adapter,
    push_adapter,
)
from lightning_lora.errors import AdapterFormatError, ConfigError
from tests.hub.models import Linears, assert_same, edit_config, state, trained

EMPTY = (None, False, {}, [], "")
FULL = ({"alpha": 2}, True, 3, 0, 0.0, [0], "yes")


@pytest.fixture
def folder(files, tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def pulled(hub, folder, **options):
    hub.create_repo("user/later", files={path.name: path.read_bytes() for path in folder.iterdir()})
    return pull_adapter("user/later", **options)


READERS = {
    "load_adapter": lambda hub, folder, out, **o: load_adapter(Linears(), folder, check_base=False, **o),
    "a bank": lambda hub, folder, out, **o: AdapterBank(Linears()).add("it", folder, check_base=False, **o),
    "a bank from folders": lambda hub, folder, out, **o: AdapterBank.from_folders(
        Linears(), {"it": folder}, check_base=False, **o
    ),
    "export": lambda hub, folder, out, **o: export_adapter(folder, out, consumer="vllm", **o),
    "export to PEFT": lambda hub, folder, out, **o: export_adapter(folder, out, consumer="peft", **o),
    "combine": lambda hub, folder, out, **o: combine_adapters([folder], out, weights=[2.0], **o),
    "push": lambda hub, folder, out, **o: push_adapter(folder, "user/name", dry_run=True, **o),
    "pull": lambda hub, folder, out, **o: pulled(hub, folder, **o),
}


@pytest.mark.parametrize("reader", READERS)
def test_an_unknown_field_that_is_empty_is_passed_over_with_one_debug_line(reader, hub, folder, tmp_path, caplog):
    edit_config(folder, **{f"later{i}_config": value for i, value in enumerate(EMPTY)})
    with caplog.at_level(logging.DEBUG, logger="lightning_lora"):
        READERS[reader](hub, folder, tmp_path / "out")
    lines = {record.getMessage() for record in caplog.records if "passed over" in record.getMessage()}
    assert len({line.partition(": ")[2] for line in lines}) == 1
    assert all(f"later{i}_config" in next(iter(lines)) for i in range(len(EMPTY)))
    assert {record.levelno for record in caplog.records if record.getMessage() in lines} == {logging.DEBUG}


@pytest.mark.parametrize("value", FULL, ids=repr)
@pytest.mark.parametrize("reader", READERS)
def test_an_unknown_field_with_a_value_is_refused_until_it_is_named(reader, value, hub, folder, tmp_path):
    edit_config(folder, later_config=value, other=None)
    with pytest.raises(AdapterFormatError, match=r"unknown field 'later_config'.*ignore_fields=\['later_config'\]"):
        READERS[reader](hub, folder, tmp_path / "out")
    with pytest.raises(AdapterFormatError, match="unknown field 'later_config'"):
        READERS[reader](hub, folder, tmp_path / "out", ignore_fields=["another"])
    assert not (tmp_path / "out").exists()
    READERS[reader](hub, folder, tmp_path / "out", ignore_fields=["later_config"])


@pytest.mark.parametrize("reader", READERS)
def test_an_initialiser_that_is_not_known_may_have_changed_the_base_and_is_refused_until_it_is_named(
    reader, hub, folder, tmp_path
):
    edit_config(folder, init_lora_weights="lora-ga")  # as others spell it; PEFT itself refuses what it does not know
    with pytest.raises(AdapterFormatError, match=r"init_lora_weights is 'lora-ga'.*ignore_fields="):
        READERS[reader](hub, folder, tmp_path / "out")
    READERS[reader](hub, folder, tmp_path / "out", ignore_fields=["init_lora_weights"])


@pytest.mark.parametrize("names", [["r"], ["use_qalora"], ["layer_replication"], ["later", "lora_alpha"], "later", [1]])
def test_what_is_known_to_matter_cannot_be_ignored(names, folder):
    model = Linears()
    before = state(model)
    with pytest.raises(ConfigError, match="ignore_fields"):
        load_adapter(model, folder, ignore_fields=names, check_base=False)
    assert_same(before, state(model))


def test_a_refused_field_leaves_the_model_as_it_was_and_an_ignored_one_changes_nothing_that_is_loaded(
    source, folder, tmp_path
):
    edit_config(folder, later_config={"alpha": 2})
    model = Linears()
    before = state(model)
    with pytest.raises(AdapterFormatError):
        load_adapter(model, folder, check_base=False)
    assert_same(before, state(model))
    load_adapter(model, folder, check_base=False, ignore_fields=("later_config",))
    assert all(torch.equal(t, trained(source)[name]) for name, t in trained(model).items())


def test_an_export_says_which_fields_it_left_out_and_needs_no_override_to_be_read(folder, tmp_path):
    edit_config(folder, later_config={"alpha": 2}, empty=None)
    report = export_adapter(folder, tmp_path / "out", consumer="peft", ignore_fields=["later_config"])
    assert any("left out" in change and "later_config" in change for change in report.changes)
    load_adapter(Linears(), tmp_path / "out", check_base=False)


@pytest.mark.parametrize("field", ["use_dora", "use_rslora", "lora_bias", "fan_in_fan_out", "inference_mode"])
def test_a_null_boolean_is_false_as_peft_reads_it(field, source, folder, tmp_path):
    from peft import PeftModel

    torch.manual_seed(0)
    base = Linears()
    x = torch.randn(3, 6)
    edit_config(folder, **{field: None})
    copied = tmp_path / "for-peft"
    shutil.copytree(folder, copied)
    ours, theirs = Linears(), Linears()
    ours.load_state_dict(base.state_dict())
    theirs.load_state_dict(base.state_dict())
    load_adapter(ours, folder, check_base=False)
    theirs = PeftModel.from_pretrained(theirs, copied)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    for consumer in ("peft", "vllm"):
        export_adapter(folder, tmp_path / consumer, consumer=consumer)
