# make test       creates the environment and runs the tests, without GPU or network
# make test-slow  compiles every variant of the Triton kernel for four chips, and runs the
#                 benchmarks at toy size
# make fuzz       20 times as many cases of the tests of properties, others in every run; what
#                 fails is kept in .hypothesis and tried first the next time
# make soak       long runs: memory, open files, threads, kills at random, full disks; 25 minutes
# make test-matrix  the tests that versions can break, in environments of their own: other versions
#                 of Python, torch and transformers, and without packages (noxfile.py); gigabytes
# make test-clients  runs the scripts of examples/ with their clients, in environments of their own,
#                 and compares what they compute; needs Node, npm and Debian's chromium
# make demo       creates the environment, pre-trains a small model (7 minutes on two cores
#                 that compute bf16, 10 in float32 on others) and lets it fill masks
# make lint       ruff
# make bench-cpu  speed and memory on a CPU, about 70 minutes on two cores
# make bench-gpu  what fits 10 minutes of a GPU; BENCH_PYTHON=python3 takes what is there
#                 ONLY="attention pretraining" chooses, the plots are drawn from all records
# JOBS=2 runs so many tests at a time; each wants two cores, since some start two processes.
# TRANSFORMERS=4.57.6 or 5.0.0 chooses another supported version, in an environment of its own.

PYTHON ?= python3
TRANSFORMERS ?= 5.23.0
VENV := .venv-$(TRANSFORMERS)
BIN := $(VENV)/bin
NOX := .venv-nox/bin/nox
CONSTRAINTS := constraints/$(TRANSFORMERS).txt
# What involves no transformers need not run with the older ones again.
CHOICE := $(if $(filter 5.23.0,$(TRANSFORMERS)),,-m "not once")
JOBS ?= 0
DEMO_DIR ?= runs/demo
DEMO_FLAGS ?=
DEMO_FACTOR ?= 4
BENCH_PYTHON ?= $(BIN)/python
ON_CPU := pretraining inference memory profile_step serving long_inputs
ON_GPU := pretraining attention profile_step inference memory
# After these minutes a script begins nothing more; what it compiles or runs may take another. A model
# takes up to half a minute to compile for each kind of rows.
GPU_FLAGS_pretraining := --minutes 3.5 --settings mosaic-compiled bert-compiled modernbert-compiled
GPU_FLAGS_attention := --minutes 1.5
GPU_FLAGS_inference := --minutes 0.5
GPU_FLAGS_memory := --minutes 0.5

export HF_HUB_OFFLINE = 1

.PHONY: test test-slow test-matrix test-clients fuzz soak demo lint bench-cpu bench-gpu clean

test: $(VENV)/ready
	$(BIN)/python -m pytest $(CHOICE) -n $(JOBS) --dist worksteal

test-slow: $(VENV)/ready
	$(BIN)/python -m pytest -m slow -n $(JOBS) --dist worksteal

test-matrix: $(NOX)
	$(NOX) $(if $(ONLY),--session $(ONLY))

test-clients: export MOSAIC_PYTHON = $(BIN)/python
test-clients: export MOSAIC_FOLDER = $(DEMO_DIR)
test-clients: $(NOX) $(VENV)/ready $(DEMO_DIR)/model.safetensors
	$(BIN)/python convert_weights.py $(DEMO_DIR) examples/models/fill-mask --onnx --int8 --overwrite
	$(BIN)/python convert_weights.py $(DEMO_DIR) examples/models/embeddings --onnx --int8 --overwrite \
	--task feature-extraction
	$(NOX) $(if $(ONLY),--session $(ONLY),--tags clients)

$(NOX): Makefile
	$(PYTHON) -m venv .venv-nox
	.venv-nox/bin/pip install -q nox==2026.10.20
	touch $@

$(DEMO_DIR)/model.safetensors:
	$(MAKE) demo

fuzz: $(VENV)/ready
	$(BIN)/python -m pytest tests/test_properties.py --hypothesis-profile fuzz -n $(JOBS) --dist worksteal

soak: export ONEDNN_PRIMITIVE_CACHE_CAPACITY = 0
soak: $(VENV)/ready
	$(BIN)/python -m pytest -m soak -v -s -n 0

demo: $(VENV)/ready
	$(BIN)/accelerate launch train_mlm.py recipes/demo.yaml --output_dir $(DEMO_DIR) --overwrite $(DEMO_FLAGS)
	$(BIN)/python demo.py $(DEMO_DIR) --factor $(DEMO_FACTOR)

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench-cpu: export CUDA_VISIBLE_DEVICES =
bench-cpu: $(if $(filter $(BIN)/%,$(BENCH_PYTHON)),$(VENV)/ready)
	$(foreach name,$(or $(ONLY),$(ON_CPU)),$(BENCH_PYTHON) benchmarks/*/$(name).py &&) \
	$(BENCH_PYTHON) benchmarks/plot.py

bench-gpu: $(if $(filter $(BIN)/%,$(BENCH_PYTHON)),$(VENV)/ready)
	$(BENCH_PYTHON) -c 'import torch; print(torch.cuda.get_device_name())'
	$(foreach name,$(or $(ONLY),$(ON_GPU)),$(BENCH_PYTHON) benchmarks/*/$(name).py $(GPU_FLAGS_$(name)) &&) \
	$(BENCH_PYTHON) benchmarks/plot.py

clean:
	rm -rf .venv-* runs

$(VENV)/ready: requirements.txt tests/requirements.txt $(CONSTRAINTS)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "needs Python 3.11: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -r requirements.txt -r tests/requirements.txt -c $(CONSTRAINTS)
	touch $@
