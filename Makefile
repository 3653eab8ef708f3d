# `make demo` and `make test` do everything on a machine with only Python >= 3.11 and a package index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test check bench-help clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Bitwright needs Python 3.11 or later; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,dev]'
	@touch $@

demo: $(VENV)/.installed  ## quantize, search, repair, export and prove two small networks
	$(BIN)/bitwright demo -o demo_out

check: $(VENV)/.installed  ## format, lint, types
	$(BIN)/ruff format --check src tests benchmarks examples
	$(BIN)/ruff check src tests benchmarks examples
	$(BIN)/mypy

test: check  ## everything CI runs
	$(BIN)/python -m pytest

clean:
	rm -rf $(VENV) demo_out build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
