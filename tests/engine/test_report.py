"""What an injection did, as a table and as numbers."""

from __future__ import annotations

from collections import OrderedDict

import pytest
from torch import nn

from lightning_lora import AdapterBank
from lightning_lora.engine import LoRAConfig, inject

TABLE = """\
module  kind       weight   rank  scale  parameters
------  ---------  -------  ----  -----  ----------
tokens  Embedding  50x8        2      8         116
mix     Conv2d     4x3x3x3     2      8          62
a       Linear     16x8        4      4          96
trained whole: out.weight, out.bias
3 modules adapted; 308 parameters trained (32.49 %), 640 frozen"""


def model() -> nn.Module:
    return nn.Sequential(
        OrderedDict(
            tokens=nn.Embedding(50, 8), mix=nn.Conv2d(3, 4, 3), a=nn.Linear(8, 16, bias=False), out=nn.Linear(16, 2)
        )
    )


def test_the_report_is_an_aligned_table_with_totals():
    config = LoRAConfig(rank=2, target_modules=["tokens", "mix", "a"], rank_pattern={"a": 4}, modules_to_save=["out"])
    assert str(inject(model(), config)) == TABLE


def test_the_totals_are_those_of_the_model():
    adapted = model()
    report = inject(adapted, LoRAConfig(rank=2))
    trained = [p.numel() for p in adapted.parameters() if p.requires_grad]
    assert report.trainable == sum(trained) == sum(m.parameters for m in report.modules)
    assert report.frozen == sum(p.numel() for p in model().parameters())
    assert report.trainable_share == pytest.approx(report.trainable / (report.trainable + report.frozen))
    assert "1 module adapted" in str(report)
    assert "taken for the output head, and so not adapted: out" in str(report)


def test_a_module_that_is_the_model_itself_has_a_name_in_the_table():
    assert "(root)" in str(inject(nn.Linear(4, 4), LoRAConfig(rank=2)))


GROUPED = """\
module                  number  kind    weight  rank  scale  parameters
----------------------  ------  ------  ------  ----  -----  ----------
layers.0-2,4-5.q             5  Linear  8x8        2      8         160
layers.0-5.experts.0-1      12  Linear  4x8        2      8         288
layers.3.q                   1  Linear  8x8        4      4          64
18 modules adapted; 512 parameters trained (40.00 %), 768 frozen"""


def layered() -> nn.Module:
    model = nn.Module()
    model.layers = nn.ModuleList()
    for _ in range(6):
        layer = nn.Module()
        layer.q = nn.Linear(8, 8, bias=False)
        layer.experts = nn.ModuleList(nn.Linear(8, 4, bias=False) for _ in range(2))
        model.layers.append(layer)
    return model


def test_rows_that_differ_in_numbers_of_their_names_alone_are_one_row_with_their_number():
    config = LoRAConfig(rank=2, target_modules=r".*(\.q|experts\.\d)", rank_pattern={"layers.3.q": 4})
    report = inject(layered(), config)
    assert str(report) == GROUPED
    assert len(report.modules) == 18, "as data, every module has its row"


def test_a_group_names_no_module_that_is_not_adapted():
    config = LoRAConfig(rank=2, target_modules=["layers.0.experts.0", "layers.1.experts.1", "layers.2.experts.1"])
    names = [line.split()[0] for line in str(inject(layered(), config)).splitlines()[2:-1]]
    assert names == ["layers.0.experts.0", "layers.1-2.experts.1"]


@pytest.mark.filterwarnings("ignore:A rank above")
def test_a_note_that_many_rows_share_is_one_line():
    report = inject(layered(), LoRAConfig(rank=6, target_modules=r".*experts\.\d"))
    assert str(report).count("rank 6 is above the smaller side") == 1
    assert "layers.0-5.experts.0-1: rank 6" in str(report)


def test_a_representation_says_what_is_in_it_on_one_line():
    report = inject(model(), LoRAConfig(rank=2))
    assert repr(report) == f"InjectionReport({str(report).splitlines()[-1]})"


def test_the_representation_of_a_config_has_what_was_chosen_and_makes_an_equal_one():
    config = LoRAConfig(rank=4, use_dora=True, rank_pattern={"a": 2})
    written = "LoRAConfig(rank=4, alpha=16.0, target_modules='all-linear', rank_pattern={'a': 2}, use_dora=True)"
    assert repr(config) == written
    assert eval(written) == config


def test_the_representation_of_a_bank_says_how_full_it_is():
    with_bank = model()
    bank = AdapterBank(with_bank, capacity=3, max_rank=4)
    assert repr(bank).startswith("AdapterBank(0 adapters in 3 slots of ")
    assert "rank up to 4" in repr(bank)
