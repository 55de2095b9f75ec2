"""The examples in the docstrings of public names run, and print what they say."""

from __future__ import annotations

import doctest
import inspect
from typing import Any

import pytest

import lightning_lora
from lightning_lora import engine

PUBLIC = {name: getattr(engine, name) for name in engine.__all__}
TOP = [name for name in lightning_lora.__all__ if name in PUBLIC and name not in ("Adapter", "InjectionReport")]


def examples_of(name: str) -> list[doctest.DocTest]:
    return [test for test in doctest.DocTestFinder().find(PUBLIC[name], name, globs={}) if test.examples]


@pytest.mark.parametrize("name", sorted(filter(examples_of, PUBLIC)))
def test_the_example_of_a_public_name_prints_what_it_says(name: str):
    said: list[str] = []
    runner: Any = doctest.DocTestRunner()
    for example in examples_of(name):
        assert runner.run(example, out=said.append).failed == 0, "".join(said)


@pytest.mark.parametrize("name", TOP)
def test_a_public_name_says_its_arguments_and_errors_and_has_an_example(name: str):
    text = inspect.getdoc(PUBLIC[name]) or ""
    assert [part for part in ("Args:", "Raises:", "Example:") if part not in text] == []
    assert examples_of(name)
    if not isinstance(PUBLIC[name], type):
        arguments = text.partition("Args:")[2].partition("\n\n")[0]
        signature = inspect.signature(PUBLIC[name])
        assert [own for own in signature.parameters if f"{own}: " not in arguments] == []
        is_block = "Iterator" in signature.return_annotation  # what a `with` block gives is told in the first lines
        assert ("Returns:" in text) == (signature.return_annotation != "None" and not is_block)
