# make demo, make test, make lint, make docs, make docs-serve, make bench, make notebooks, make stubs,
# make lanes, make constraints, make dist, make clean
# Each makes the virtual environment .venv first, where there is none.

PYTHON ?= python3
BIN := .venv/bin
SITE := DISABLE_MKDOCS_2_WARNING=true NO_MKDOCS_2_WARNING=1 .docs/bin/mkdocs

.PHONY: demo test lint docs docs-serve bench notebooks stubs lanes constraints dist clean
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

# The site, built strictly into site/: a broken link or an undocumented public name fails. The tests run
# the code in it.
docs: .docs/ready
	$(SITE) build

# The site while its pages are written.
docs-serve: .docs/ready
	$(SITE) serve

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
	rm -rf .venv .docs site .nox build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache gift_demo
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One call to pip for all, so that torch and torchvision are chosen as a pair; setuptools, which
# builds gift, comes before, in a version that is known to do it.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "gift needs Python 3.11 or newer; make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt setuptools
	$(BIN)/python -m pip install -c constraints.txt --no-build-isolation -e ".[dev]"
	touch $@

# The site needs the extra `docs` alone: pages are made from the source, which nothing imports.
.docs/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "gift needs Python 3.11 or newer; make PYTHON=python3.11")'
	$(PYTHON) -m venv .docs
	$(PYTHON) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")' > .docs/requirements.txt
	.docs/bin/python -m pip install -c constraints.txt -r .docs/requirements.txt
	touch $@
