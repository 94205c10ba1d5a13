# make demo | test | test-rest | test-all | bench | figures | check | lock | test-newest | test-lowest
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# every package at a version that was run; `make lock` renews the file
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test test-rest test-all test-newest test-lowest bench figures peers lint types imports dependencies check lock clean

demo: $(VENV)/.installed
	$(BIN)/kronecker-probe track digits-mlp --steps 2000 --out runs/digits-mlp --overwrite

PARALLEL := -n auto --dist worksteal

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest $(PARALLEL)

# what the default leaves out and every change must pass: all cases on all routes, four times as many
# examples of each property, and the analyses
test-rest: $(VENV)/.installed-test
	HYPOTHESIS_PROFILE=full $(BIN)/python -m pytest $(PARALLEL) -m "(grid or figures or hypothesis) and not slow and not gpu"

test-all: $(VENV)/.installed-test
	$(BIN)/python -m pytest $(PARALLEL) -m "not gpu"

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
	$(BIN)/kronecker-probe track digits-mlp --steps 2000 --out runs/digits-mlp --overwrite
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

dependencies: $(VENV)/.installed-dev
	$(BIN)/deptry . --ignore DEP004
	$(BIN)/deptry kronecker_probe analyses

check: lint types imports dependencies test

# torch stays at this version: what else installs may bring gigabytes of CUDA
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)

lock:
	rm -rf $(VENV)-lock && $(PYTHON) -m venv $(VENV)-lock
	echo "torch==$(TORCH)" > $(VENV)-lock/constraints.txt
	PIP_CONSTRAINT=$(VENV)-lock/constraints.txt $(VENV)-lock/bin/python -m pip install --quiet --editable ".[dev,peers]"
	(echo "# Written by 'make lock': every package that demo, tests and checks install, at versions that were run."; \
	 echo "# Use it as: PIP_CONSTRAINT=constraints.txt pip install ..."; \
	 $(VENV)-lock/bin/python -m pip freeze --exclude-editable | sed 's/^\(torch==[^+]*\)+.*/\1/') > constraints.txt
	rm -rf $(VENV)-lock

# the default tests with the newest and with the lowest versions that pyproject.toml allows
test-newest test-lowest: test-%:
	rm -rf $(VENV)-$* && $(PYTHON) -m venv $(VENV)-$*
	if [ $* = lowest ]; then $(PYTHON) .ci/lowest.py; else echo "torch==$(TORCH)"; fi > $(VENV)-$*/constraints.txt
	PIP_CONSTRAINT=$(VENV)-$*/constraints.txt $(VENV)-$*/bin/python -m pip install --quiet --editable ".[test]"
	$(VENV)-$*/bin/python -m pytest $(PARALLEL)

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
