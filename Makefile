# make test       creates the environment and runs the tests, without GPU or network
# make test-slow  compiles every variant of the Triton kernel for four chips
# make demo       creates the environment, pre-trains a small model (about 5 minutes on two cores)
#                 and lets it fill masks
# make lint       ruff
# TRANSFORMERS=4.57.6 or 5.0.0 chooses another supported version, in an environment of its own.

PYTHON ?= python3
TRANSFORMERS ?= 5.23.0
VENV := .venv-$(TRANSFORMERS)
BIN := $(VENV)/bin
CONSTRAINTS := constraints/$(TRANSFORMERS).txt
DEMO_DIR ?= runs/demo
DEMO_FLAGS ?=
DEMO_FACTOR ?= 4

export HF_HUB_OFFLINE = 1

.PHONY: test test-slow demo lint clean

test: $(VENV)/ready
	$(BIN)/python -m pytest

test-slow: $(VENV)/ready
	$(BIN)/python -m pytest -m slow

demo: $(VENV)/ready
	$(BIN)/accelerate launch train_mlm.py recipes/demo.yaml --output_dir $(DEMO_DIR) --overwrite $(DEMO_FLAGS)
	$(BIN)/python demo.py $(DEMO_DIR) --factor $(DEMO_FACTOR)

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf .venv-* runs

$(VENV)/ready: requirements.txt tests/requirements.txt $(CONSTRAINTS)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "needs Python 3.11: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -r requirements.txt -r tests/requirements.txt -c $(CONSTRAINTS)
	touch $@
