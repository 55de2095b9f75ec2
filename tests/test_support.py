"""The table of what is supported, cell by cell."""

from __future__ import annotations

import pytest
from support import CELLS, KINDS, READ_BY_PEFT, TABLE, VARIANTS, cell


def written() -> dict[tuple[str, str], str]:
    rows = [line.strip("| ").split(" | ") for line in TABLE.read_text(encoding="utf-8").splitlines() if "|" in line]
    (_, *columns), _, *lines = rows
    return {(kind, column): value for kind, *values in lines for column, value in zip(columns, values)}


@pytest.mark.parametrize(("kind", "variant"), CELLS)
def test_what_the_table_says_of_a_layer_and_a_variant_holds(kind: str, variant: str):
    assert written()[kind, variant] == cell(kind, variant)


def test_the_table_has_these_cells_and_no_others():
    # If this fails, a variant or a kind was added: python tests/support.py
    assert set(written()) == {(kind, variant) for kind in KINDS for variant in (*VARIANTS, READ_BY_PEFT)}
