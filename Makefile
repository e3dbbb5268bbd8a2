# Everything sets itself up from a bare clone: the environment is made from the pins when it is missing (3 to 4 minutes).
PYTHON ?= python3
# cu13: Turing and newer GPUs, and CPUs; v100: Volta.
STACK ?= cu13
VENV := $(if $(filter v100,$(STACK)),.venv-v100,.venv)
BIN := $(VENV)/bin
# Up to four at a time: each takes 1 to 2 GB.
PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

.PHONY: setup demo test test-slow test-all lint bench check-v100

setup: $(VENV)/ready

demo: setup
	$(BIN)/python -m pcl_fast.demo --output runs/demo

# The quick tests.
test: setup
	$(PYTEST)

# Those that it leaves out; the first that fails ends them.
test-slow: setup
	$(PYTEST) -m slow -x

# Every test.
test-all: setup
	$(PYTEST) -m ""

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: setup
	$(BIN)/python -m pytest bench/loss.py bench/kmeans.py bench/estep.py bench/data.py bench/features.py bench/step.py bench/linear.py \
		bench/svm.py bench/other_esteps.py bench/sinkhorn.py bench/slow_disk.py --benchmark-enable --benchmark-sort=name --benchmark-columns=min,median,max,rounds

# All tests on the stack for Volta, kernels in Triton's interpreter, and what they take on every architecture, which is
# printed instead of tested, and recorded: `git diff bench/results` shows what changed. Needs no GPU.
check-v100:
	$(MAKE) setup STACK=v100
	.venv-v100/bin/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal -m "" --ignore tests/kernels/test_resources.py
	.venv-v100/bin/python tests/kernels/resources.py 70 --record bench/results
	$(MAKE) setup STACK=cu13
	.venv/bin/python tests/kernels/resources.py 80 90 --record bench/results

$(VENV)/ready: requirements/$(STACK).txt requirements/tools.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements/$(STACK).txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@
