# One word per act. `make help` lists them; CI uses the same words.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DATA ?=
TASKS ?=

.DEFAULT_GOAL := help
.PHONY: help setup check fix proto proto-check test test-optimized test-slow test-clients test-gpu test-triton bench demo up down docs dist lock audit compose-check clean

help: ## list the words
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t16

setup: $(VENV)/.installed ## make the virtual environment

# torch first and pinned: a looser requirement would pull the CUDA build on a machine without a GPU.
$(VENV)/.installed: pyproject.toml
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

check: setup proto-check compose-check ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

fix: setup ## format and mend what can be mended
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

proto: setup ## write the stubs from protos/
	$(BIN)/python protos/build.py

proto-check: setup ## lint protos/ and compare the stubs
	$(BIN)/python protos/build.py --check

compose-check: setup ## check docker-compose.yml against the compose schema
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec docker-compose.yml

test: setup ## the test-suite
	$(BIN)/pytest

# pytest rewrites the asserts of tests, so they hold here too; those of the services are gone, which is the point.
test-optimized: setup ## the test-suite under `python -O`
	PYTHONOPTIMIZE=1 $(BIN)/pytest -W ignore::pytest.PytestConfigWarning

test-slow: setup ## tests that take minutes
	$(BIN)/pytest -m slow --timeout 1800

# Each client in an environment of its own under .cache/clients: their requirements clash with ours.
test-clients: setup ## stock clients of others against a real fleet; installs them
	$(BIN)/pytest -m 'not gpu' --timeout 1800 tests/clients

# Triton 3.9 warns unless it is told whether to fuse multiplications and additions; tests fail on warnings.
test-gpu: setup ## tests that need a CUDA device
	TRITON_DEFAULT_FP_FUSION=1 $(BIN)/pytest -m gpu --timeout 1800

# Triton comes with a CUDA build of torch; without one it is 300 MB more, for these tests alone.
TRITON := .cache/triton-3.9.0

$(TRITON)/.installed:
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $(TRITON) triton==3.9.0
	touch $@

test-triton: setup $(TRITON)/.installed ## tests of the GPU kernels in Triton's interpreter, on a CPU
	TRITON_INTERPRET=1 TRITON_DEFAULT_FP_FUSION=1 PYTHONPATH=$(TRITON) \
		$(BIN)/pytest --timeout 1800 tests/unit/inference/test_triton_*.py

bench: setup ## every benchmark; the last line of each is JSON
	for script in bench/*.py; do $(BIN)/python -m bench.$$(basename $$script .py) || exit 1; done

demo: setup ## fine-tune six adapters, serve them mixed, print the tables and write a report
	$(BIN)/lorafleet demo $(if $(DATA),--data $(DATA)) $(if $(TASKS),--tasks $(TASKS))

up: setup ## start the fleet on this machine
	$(BIN)/lorafleet up

down: setup ## stop it
	$(BIN)/lorafleet down

docs: setup ## build the documentation into build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "open build/site/index.html"

dist: setup ## build wheel and source distribution into dist/
	$(BIN)/python -m build

# In an environment of their own: what they bring is none of ours.
TOOLS := .cache/lock-tools
$(TOOLS)/.installed:
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/pip install --quiet --disable-pip-version-check pip-tools==7.6.2 pip-audit==2.10.1
	touch $@

lock: $(TOOLS)/.installed ## write requirements/ from the pins of pyproject.toml
	$(TOOLS)/bin/python requirements/lock.py

audit: $(TOOLS)/.installed ## ask the database of vulnerabilities about every locked version
	$(TOOLS)/bin/pip-audit --no-deps --disable-pip --requirement requirements/full.txt

clean: ## remove what was built
	rm -rf $(VENV) .cache build dist *.egg-info
