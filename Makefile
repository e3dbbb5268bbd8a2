# Everything sets itself up from a bare clone: .venv is made from the pins when it is missing (about 3 minutes).
PYTHON ?= python3
STACK ?= cu13
BIN := .venv/bin

.PHONY: demo test lint bench

demo: .venv/ready
	$(BIN)/python -m pcl_fast.demo --output runs/demo

test: .venv/ready
	$(BIN)/python -m pytest

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: .venv/ready
	$(BIN)/python -m pytest bench/loss.py --benchmark-enable --benchmark-sort=name --benchmark-columns=min,median,max,rounds

.venv/ready: requirements/$(STACK).txt requirements/tools.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements/$(STACK).txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@
