"""The data that every installation has is the same each time, large enough, and not shared between splits."""

from __future__ import annotations

import datasets
import numpy as np
import pytest

from lightning_lora.errors import ConfigError, DataError
from lightning_lora.recipes.data import Shapes, StdlibDocstrings, StdlibSource, embedded


def texts(rows: datasets.Dataset) -> list[str]:
    return rows["text"][:]


def test_source_files_are_split_by_file_within_the_limit():
    first, again = (StdlibSource(max_characters=200_000).load() for _ in range(2))
    assert texts(first.train) == texts(again.train)
    parts = [set(part["path"]) for part in (first.train, first.validation, first.test)]
    assert not set.intersection(*parts)
    assert all(parts)
    assert sum(len(text) for part in first[:3] for text in texts(part)) == 200_000


def test_source_files_leave_out_tests_and_what_the_embedded_base_learned():
    splits = StdlibSource(max_characters=None).load()
    paths = [path for part in splits[:3] for path in part["path"]]
    assert len(paths) > 300
    assert not [path for path in paths if "/test" in path or path.startswith(("test", "pydoc_data", "site-packages"))]


def test_another_seed_is_another_split():
    first, other = (set(StdlibSource(max_characters=500_000, seed=seed).load().validation["path"]) for seed in (0, 1))
    assert first != other


def test_docstrings_are_many_labelled_and_never_in_two_splits():
    splits = StdlibDocstrings().load()
    keys = [[" ".join(text.lower().split()) for text in texts(part)] for part in splits[:3]]
    every = [key for part in keys for key in part]
    assert len(every) == len(set(every)) >= 1500
    assert [len(part) / len(every) for part in keys] == pytest.approx([0.6, 0.2, 0.2], abs=0.01)
    for part in splits[:3]:
        assert set(part["label"]) == set(range(len(embedded.PACKAGES)))


def test_shapes_are_drawn_from_the_seed():
    first, again, other = (Shapes(count=100, seed=seed).load() for seed in (0, 0, 1))
    assert np.array_equal(first.train[3]["image"], again.train[3]["image"])
    assert not np.array_equal(first.train[3]["image"], other.train[3]["image"])
    assert [len(part) for part in first[:3]] == [60, 20, 20]
    assert first.train[0]["image"].size == (32, 32)
    assert set(first.test["label"]) == {0, 1, 2, 3}


def test_a_python_without_its_source_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, "_standard_library", lambda: tmp_path)
    with pytest.raises(DataError, match=r"came without its source"):
        StdlibSource().load()
    with pytest.raises(DataError, match=r"came without all its source"):
        StdlibDocstrings().load()


@pytest.mark.parametrize("source", [StdlibSource, StdlibDocstrings, Shapes])
def test_fractions_that_leave_nothing_are_refused(source):
    with pytest.raises(ConfigError, match=r"together below 1"):
        source(validation_fraction=0.5, test_fraction=0.5)
