# make demo | test | bench | figures | check
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# torch is pinned to a build that installs anywhere without gigabytes of CUDA
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test test-all bench figures peers lint types imports check clean

demo: $(VENV)/.installed
	$(BIN)/kronecker-probe track digits-mlp --out runs/digits-mlp --overwrite

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest

test-all: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m "not gpu"

bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks

figures: $(VENV)/.installed
	$(BIN)/kronecker-probe analyze shampoo-square --preset default --out figures
	$(BIN)/kronecker-probe analyze honest-numbers --preset default --out figures
	$(BIN)/kronecker-probe analyze batch-and-labels --preset default --out figures
	$(BIN)/kronecker-probe analyze adagrad-view --preset default --out figures
	$(BIN)/kronecker-probe analyze purifying --preset default --out figures
	$(BIN)/kronecker-probe analyze root-free --preset default --out figures
	$(BIN)/kronecker-probe analyze overhead --preset default --out figures
	$(BIN)/kronecker-probe analyze training --preset default --out figures
	$(BIN)/kronecker-probe track digits-mlp --out runs/digits-mlp --overwrite
	cp runs/digits-mlp/figures/trajectory.png figures/demo_trajectory.png

# curvlinops and nngeometry, for the optional cross-checks and the side-by-side benchmark
peers: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable ".[peers]"

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev
	$(BIN)/mypy

imports: $(VENV)/.installed-dev
	$(BIN)/lint-imports

check: lint types imports test

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed-test
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV)
