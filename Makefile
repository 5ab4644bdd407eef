# make train: the main job; make test: the quick tests; make test-slow: the others; make lint. Each
# makes the virtual environment if need be. More flags: make train ARGS="--epochs 3",
# make test ARGS="tests/test_model.py -x".

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Idle threads spin for a moment, then sleep: always spinning stalls a machine that does other work
# too, never spinning makes a training step on an idle one about 1.4 times slower.
export OMP_WAIT_POLICY ?= PASSIVE
export GOMP_SPINCOUNT ?= 10000

WORKERS ?= 2
# A file's tests stay in one process, which makes its fixtures once; a thread for each process.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile

.PHONY: train test test-slow lint venv clean

train: venv
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-$$(getconf _NPROCESSORS_ONLN)} \
	$(BIN)/accelerate launch --config_file accelerate_config.yaml trainer/train.py $(ARGS)

test: venv
	$(PYTEST) -m "not slow" $(ARGS)

test-slow: venv
	$(PYTEST) -m slow $(ARGS)

lint: venv
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]' --constraint constraints.txt
	touch $@

clean:
	rm -rf build *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -not -path '*/site-packages/*' -prune -exec rm -rf {} +
