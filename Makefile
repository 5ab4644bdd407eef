# make train: the main job; make test; make lint. Each makes the virtual environment if need be.
# Flags of the trainer: make train ARGS="--epochs 3".

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Idle threads spin for a moment, then sleep: always spinning stalls a machine that does other work
# too, never spinning makes a training step on an idle one about 1.4 times slower.
export OMP_WAIT_POLICY ?= PASSIVE
export GOMP_SPINCOUNT ?= 10000

.PHONY: train test lint venv clean

train: venv
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-$$(getconf _NPROCESSORS_ONLN)} \
	$(BIN)/accelerate launch --config_file accelerate_config.yaml trainer/train.py $(ARGS)

test: venv
	$(BIN)/python -m pytest $(ARGS)

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
