"""What an injection did, as a table and as numbers."""

from __future__ import annotations

from collections import OrderedDict

import pytest
from torch import nn

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
