# make demo, make test, make lint, make bench, make notebooks, make clean
# Each makes the virtual environment .venv first, where there is none.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint bench notebooks clean
.DEFAULT_GOAL := test

demo: .venv/ready
	$(BIN)/python -m gift.demo

test: lint
	$(BIN)/python -m pytest -n auto --maxprocesses 2 --dist worksteal

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/ready
	for script in benchmarks/[!_]*.py; do $(BIN)/python $$script || exit 1; done

# Runs the notebooks again and stores their outputs.
notebooks: .venv/ready
	$(BIN)/python -m tests.test_notebooks

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache gift_demo
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One call to pip, so that torch and torchvision are chosen as a pair.
.venv/ready: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "gift needs Python 3.11 or newer; make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -e ".[dev]"
	touch $@
