# Everything runs in .venv, made here. PYTHON is only used to create it: make test PYTHON=python3.12
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test slow lint bench zoo

demo: .venv/.demo
	$(BIN)/python examples/demo.py

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=auto

lint: .venv/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: .venv/.dev
	$(BIN)/python benchmarks/compile_time.py
	$(BIN)/python benchmarks/throughput.py

slow: .venv/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=auto -m slow

zoo: .venv/.dev
	$(BIN)/python benchmarks/zoo.py --isotropic --elsewhere --out docs/zoo.md

.venv/bin/python:
	$(PYTHON) -m venv .venv

# torch and torchvision in one command, from one index: a torch built for another index installs
# beside torchvision without complaint and then lacks its operators, which the import shows.
.venv/.demo .venv/.dev: .venv/.%: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --editable '.[$*]'
	$(BIN)/python -c 'import torchvision'
	touch $@
