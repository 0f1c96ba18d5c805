# Two commands set everything up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= auto

.PHONY: demo test lint types unit install docs site goldens clean

demo: install
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m examples.demo

test: install lint types unit

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/python -m tests.typecheck

unit: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -q

docs: install
	$(BIN)/python -m benchmarks.matrix --write docs/families.md
	$(BIN)/python -m benchmarks.plans --write docs/plans.md
	$(BIN)/python -m benchmarks.targets --write docs/matrix.md
	$(BIN)/python -m benchmarks.pictures
	$(BIN)/python -m benchmarks.knobs

# the documentation as pages, in build/site; a warning fails
site: install
	$(BIN)/python -m mkdocs build --strict

# what the tests compare with; look at what changed before it is committed
goldens: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -q tests/regression/test_goldens.py examples/ci --kvpass-update
	$(BIN)/kvpass check examples/ci/kvpass-lock.toml --update

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
