# `make demo` and `make test` do all their own set-up: Python 3.11 and make are enough.
PYTHON ?= python3.11
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test test-all fuzz lint docs clean

demo: .venv/run.stamp
	$(BIN)/python demo/run.py

# One BLAS thread a worker: tests run on all cores side by side.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m "not slow"

# Damaged inputs for longer: more seeds of the fuzz tests.
fuzz: .venv/dev.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto tests/files/test_fuzz.py

test-all: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

lint: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python scripts/reference.py --check

docs: .venv/dev.stamp
	$(BIN)/python scripts/reference.py

.venv/python.stamp:
	$(PYTHON) -m venv .venv
	touch $@

.venv/run.stamp: .venv/python.stamp pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/dev.stamp: .venv/python.stamp pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@ .venv/run.stamp

clean:
	rm -rf .venv demo/out .mypy_cache .pytest_cache .ruff_cache .hypothesis
