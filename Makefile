# Needs python3 (3.11 or newer) and make; everything else is installed into .venv.
#   make train                    train the byte-level model with DualPipe on 8 virtual CPU devices
#   make test                     lint, types, and every test
#   make test-fast                the tests that take seconds
#   make docs                     build the documentation's site into site/
#   make notebooks                execute the notebooks in place
# Another Python: make test-fast VENV=.venv-3.12 PYTHON=python3.12

PYTHON ?= python3
VENV ?= .venv
CONFIG ?= configs/tiny.py
WORKERS ?= 2

# Large arrays in pages of 2 MiB: a step on CPU devices takes 16 % less time. Linux's
# C library reads it; others do not.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
# Tests start dozens of processes, each of which would compile every module again.
unexport PYTHONDONTWRITEBYTECODE

BIN := $(VENV)/bin
PYTEST := JAX_PLATFORMS=cpu $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal
# Tests compile quickly, but those marked as_users, and keep what they compiled
# (conftest.py). The runs of tests/commands/test_train.py compile as users do, too.

.DEFAULT_GOAL := help
.PHONY: help train test test-fast lint format docs notebooks bench clean

help:
	@sed -n 's/^# *//p' $(firstword $(MAKEFILE_LIST))

# One stamp for each extra that is installed. It is written last, so that an install
# which failed is tried again, and is made anew when pyproject.toml changes. Bytecode is
# compiled when it is first imported: most of it never is.
$(VENV)/.installed-%: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "python3 must be 3.11 or newer: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --editable '.[$*]'
	touch $@

train: $(VENV)/.installed-train
	$(BIN)/python -m dualpipe_jax train $(CONFIG) $(ARGS)

test: lint
	$(PYTEST) $(ARGS)

test-fast: $(VENV)/.installed-dev
	$(PYTEST) -m 'not slow' $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

bench: $(VENV)/.installed-dev
	set -e; for file in $(filter-out %/profiles.py,$(wildcard benchmarks/*.py)); do JAX_PLATFORMS=cpu $(BIN)/python $$file; done

notebooks: $(VENV)/.installed-dev
	$(BIN)/python notebooks/execute.py $(ARGS)

clean:
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .ruff_cache
