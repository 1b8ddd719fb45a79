# `make demo` and `make test` set everything up by themselves on a fresh machine with Python >= 3.11.
# Another interpreter: `PYTHON=python3.12 make test`.
PYTHON ?= python3
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
VENV ?= .venv-$(VERSION)
BIN := $(VENV)/bin
ARGS ?=

.PHONY: demo test lint types check docs release-check clean

demo: $(VENV)/experiments.stamp
	$(BIN)/python -m experiments.quickstart $(ARGS)

test: lint types check

lint: $(VENV)/dev.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-cache

types: $(VENV)/dev.stamp
	$(BIN)/mypy

check: $(VENV)/dev.stamp
	$(BIN)/pytest --numprocesses 2 --dist worksteal $(ARGS)

# The site, in build/site. Warnings are errors: links that lead nowhere, names that do not exist.
docs: $(VENV)/dev.stamp
	JAX_PLATFORMS=cpu $(BIN)/sphinx-build -W --keep-going -n -q -j auto -d build/doctrees docs build/site

# Builds sdist and wheel into dist/, and runs the README in a clean environment with the wheel.
release-check: $(VENV)/dev.stamp
	$(BIN)/python .ci/release_check.py $(ARGS)

$(VENV)/%.stamp: setup.cfg pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Python >= 3.11 is needed: PYTHON=python3.12 make") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	touch $@

clean:
	rm -rf .venv* .cache .hypothesis .mypy_cache .pytest_cache .ruff_cache build *.egg-info
