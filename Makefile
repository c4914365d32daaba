# Everything runs in .venv; make creates it on first use.
PYTHON ?= python3
BIN := .venv/bin
SEEDS ?= 0,1,2
ROUNDS ?= 30
WORKERS ?= 2
FOREIGN := anomalib chemprop pytorch-forecasting scvi-tools torch-uncertainty
LOWEST := lightning\|torchmetrics\|timm\|hydra-core\|omegaconf

.PHONY: demo test test-fast test-lowest test-foreign soak format lint typecheck clean

demo: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/lightning-dist train -m experiment=digits_300 \
		distill=none,kd,dist seed=$(SEEDS) print_config=false callbacks.progress=null

test: .venv/installed-test lint typecheck
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test-fast: .venv/installed-test
	$(BIN)/python -m pytest -m "not slow"

# The suite with the lowest versions that setup.cfg declares of what it builds on, but for torch.
test-lowest: .venv-lowest/installed
	OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest -n $(WORKERS) --dist worksteal

# The callback on modules of other packages, in an environment of its own.
test-foreign: .venv-foreign/installed
	OMP_NUM_THREADS=1 .venv-foreign/bin/python -m pytest tests/foreign/packages.py

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

.venv-lowest/installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/pip install --quiet --upgrade pip
	sed -n 's/^ *\($(LOWEST)\)>=/\1==/p' setup.cfg > .venv-lowest/lowest.txt
	.venv-lowest/bin/pip install --quiet --editable ".[test]" --constraint .venv-lowest/lowest.txt
	touch $@

.venv-foreign/installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv-foreign
	.venv-foreign/bin/pip install --quiet --upgrade pip
	.venv-foreign/bin/pip install --quiet --editable . hypothesis psutil pytest $(FOREIGN)
	touch $@

clean:
	rm -rf .venv .venv-lowest .venv-foreign build dist *.egg-info

.venv/installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable .
	touch $@

.venv/installed-test: .venv/installed
	$(BIN)/pip install --quiet --editable ".[test]"
	touch $@
