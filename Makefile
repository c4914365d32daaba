# Everything runs in .venv; make creates it on first use.
PYTHON ?= python3
BIN := .venv/bin
SEEDS ?= 0,1,2,3,4
ROUNDS ?= 30

.PHONY: demo test test-fast soak format lint typecheck clean

demo: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/lightning-dist train -m experiment=digits \
		distill=none,kd,dist seed=$(SEEDS) print_config=false callbacks.progress=null

test: .venv/installed-test lint typecheck
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

test-fast: .venv/installed-test
	$(BIN)/python -m pytest -m "not slow"

# Interrupts runs at random and resumes them: the end must be the same to the last bit.
soak: .venv/installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.soak --rounds $(ROUNDS)

format: .venv/installed-test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: .venv/installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

typecheck: .venv/installed-test
	$(BIN)/mypy

clean:
	rm -rf .venv build dist *.egg-info

.venv/installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable .
	touch $@

.venv/installed-test: .venv/installed
	$(BIN)/pip install --quiet --editable ".[test]"
	touch $@
