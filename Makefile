# make demo | test | bench | figures | lint | check
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test test-all bench figures lint types imports check peers clean

demo: $(VENV)/installed
	$(BIN)/kronecker-probe track digits-mlp --out runs/digits-mlp --overwrite

test: $(VENV)/installed
	$(BIN)/python -m pytest

test-all: $(VENV)/installed
	$(BIN)/python -m pytest -m "not gpu"

bench: $(VENV)/installed
	$(BIN)/python -m benchmarks

figures: $(VENV)/installed
	$(BIN)/kronecker-probe analyze shampoo-square --preset default --out figures

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed
	$(BIN)/mypy

imports: $(VENV)/installed
	$(BIN)/lint-imports

check: lint types imports test

# curvlinops for the optional cross-check and the side-by-side benchmark
peers: $(VENV)/installed
	$(BIN)/python -m pip install --quiet ".[peers]"

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) runs
