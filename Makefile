# make demo, make test, make lint, make bench, make notebooks, make stubs, make lanes, make constraints,
# make dist, make clean
# Each makes the virtual environment .venv first, where there is none.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint bench notebooks stubs lanes constraints dist clean
.DEFAULT_GOAL := test

demo: .venv/ready
	$(BIN)/python -m gift.demo

test: lint
	$(BIN)/python -m pytest -n auto --maxprocesses 2 --dist worksteal

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

bench: .venv/ready
	for script in benchmarks/[!_]*.py; do $(BIN)/python $$script || exit 1; done

# Runs the notebooks again and stores their outputs.
notebooks: .venv/ready
	$(BIN)/python -m tests.test_notebooks

# Writes the stub of the strategies that are made from methods.
stubs: .venv/ready
	$(BIN)/python -m tests.strategy_stubs

# The tests that can differ, on the oldest versions, on the newest, and inside of other libraries.
lanes: .venv/ready
	$(BIN)/python -m nox

# Takes the versions of today for all that `make demo` and `make test` install.
constraints: .venv/ready
	$(BIN)/python -m nox -s constraints

dist: .venv/ready
	$(BIN)/python -m build

clean:
	rm -rf .venv .nox build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache gift_demo
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One call to pip for all, so that torch and torchvision are chosen as a pair; setuptools, which
# builds gift, comes before, in a version that is known to do it.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "gift needs Python 3.11 or newer; make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt setuptools
	$(BIN)/python -m pip install -c constraints.txt --no-build-isolation -e ".[dev]"
	touch $@
