# Everything sets itself up from a bare clone: the environment is made from the pins when it is missing (3 to 4 minutes).
PYTHON ?= python3
# cu13: Turing and newer GPUs, and CPUs; v100: Volta.
STACK ?= cu13
VENV := $(if $(filter v100,$(STACK)),.venv-v100,.venv)
BIN := $(VENV)/bin

.PHONY: setup demo test lint bench

setup: $(VENV)/ready

demo: setup
	$(BIN)/python -m pcl_fast.demo --output runs/demo

test: setup
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: setup
	$(BIN)/python -m pytest bench/loss.py --benchmark-enable --benchmark-sort=name --benchmark-columns=min,median,max,rounds

$(VENV)/ready: requirements/$(STACK).txt requirements/tools.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements/$(STACK).txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@
