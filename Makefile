# Everything runs in .venv, made here. PYTHON is only used to create it: make test PYTHON=python3.12
PYTHON ?= python3
BIN := .venv/bin
# What installs. With uv it is quicker: make test PIP='uv pip'
PIP ?= $(BIN)/python -m pip
OLDEST := .venv-oldest/bin

.PHONY: demo test test-oldest slow lint bench zoo docs dist

demo: .venv/.demo
	$(BIN)/python examples/demo.py

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=auto --dist=loadfile

# The quick tests, with the oldest torch that pyproject.toml allows.
test-oldest: .venv-oldest/.dev
	OMP_NUM_THREADS=1 $(OLDEST)/python -m pytest --numprocesses=auto --dist=loadfile

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

# The pages, at out/site/index.html.
docs: .venv/.docs
	$(BIN)/python -m sphinx --fresh-env --fail-on-warning --keep-going --quiet docs out/site

# The wheel is tried where there is nothing else: a fresh environment, outside the checkout.
dist: .venv/.build
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*
	set -e; away=$$(mktemp -d); trap 'rm -rf "$$away"' EXIT; \
	cp README.md tests/readme_example.py "$$away"; \
	$(PYTHON) -m venv "$$away/venv"; \
	"$$away/venv/bin/python" -m pip install "$$(echo "$$PWD"/dist/*.whl)[timm]"; \
	cd "$$away" && venv/bin/python -P readme_example.py README.md

.venv/bin/python:
	$(PYTHON) -m venv .venv

# torch and torchvision in one command, from one index: a torch built for another index installs
# beside torchvision without complaint and then lacks its operators, which the import shows.
.venv/.demo .venv/.dev: .venv/.%: pyproject.toml | .venv/bin/python
	$(PIP) install --editable '.[$*]'
	$(BIN)/python -c 'import torchvision'
	touch $@

.venv/.docs: pyproject.toml | .venv/bin/python
	$(PIP) install --editable '.[docs]'
	touch $@

.venv/.build: pyproject.toml | .venv/bin/python
	$(PIP) install build twine
	touch $@

.venv-oldest/.dev: pyproject.toml tests/oldest.txt
	$(PYTHON) -m venv .venv-oldest
	$(OLDEST)/python -m pip install --editable '.[dev]' --constraint tests/oldest.txt
	$(OLDEST)/python -c 'import torchvision'
	touch $@
