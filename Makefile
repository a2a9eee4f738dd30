# `make help` lists the verbs. Each makes or updates the virtual environment that it needs first.

PYTHON ?= python3
VENV := .venv
VENV_LATEST := .venv-latest
TORCH_LATEST := 2.13.0
TORCHVISION_LATEST := 0.28.0
PYTEST_ARGS ?=
REPORT_ARGS ?=
# Tests are given out to processes, one a core: what a test leaves behind in a process must not matter to any other.
PYTEST := -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

PIP_QUIET := -qq --disable-pip-version-check
SOURCES := $(shell find csrc -type f)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-latest sanitize lint bench report clean

help: ## list the verbs
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "  PYTHON=python3.12 chooses the interpreter of a new environment, PYTEST_ARGS='-k lpu' is passed to pytest"

setup: $(VENV)/.installed ## the environment of all the verbs below, with this checkout installed in it

demo: $(VENV)/.installed ## train a small CMT on digits, verify, benchmark; report in demo-report/
	$(VENV)/bin/cmt-fast demo --output demo-report

test: $(VENV)/.installed ## the test suite
	$(VENV)/bin/python $(PYTEST) $(PYTEST_ARGS)

test-latest: $(VENV_LATEST)/.installed ## the test suite on the newest supported torch
	$(VENV_LATEST)/bin/python $(PYTEST) $(PYTEST_ARGS)

sanitize: $(VENV)/.installed ## the CPU kernels of a packed model under AddressSanitizer and UndefinedBehaviorSanitizer
	$(VENV)/bin/python -m pytest tests/native $(PYTEST_ARGS)

lint: $(VENV)/.installed ## ruff (rules and format) and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

bench: $(VENV)/.installed ## cmt_s against the original's order of operations, on this machine
	$(VENV)/bin/cmt-fast bench

report: $(VENV)/.installed ## measure this machine: tests, errors, kernels, whole models, other networks; REPORT_ARGS='--budget 600'
	$(VENV)/bin/python -m benchmarks.report $(REPORT_ARGS)

clean: ## remove what was built and written; the environments stay (rm -r .venv* removes them)
	rm -rf build dist *.egg-info cmt_fast/_C*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks demo-report
	find cmt_fast tests benchmarks -name __pycache__ -prune -exec rm -rf {} +
	rm -f $(VENV)/.installed $(VENV_LATEST)/.installed

# Stamp files: an environment is made once, torch comes before what is built against it, and the checkout is installed again
# when what its installation depends on has changed.

$(VENV)/.made:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.torch: $(VENV)/.made constraints.txt
	@echo "installing torch (this can take minutes)"
	$(VENV)/bin/pip install $(PIP_QUIET) -c constraints.txt setuptools wheel torch torchvision triton
	touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml setup.py $(SOURCES)
	$(VENV)/bin/pip install $(PIP_QUIET) --no-build-isolation -c constraints.txt -e '.[dev]'
	@$(VENV)/bin/python -c "from cmt_fast import _native; print('native backend:', _native.load() or 'built')"
	touch $@

$(VENV_LATEST)/.made:
	$(PYTHON) -m venv $(VENV_LATEST)
	touch $@

$(VENV_LATEST)/.torch: $(VENV_LATEST)/.made constraints.txt
	@echo "installing torch $(TORCH_LATEST) (this can take minutes)"
	grep -vE '^(torch|torchvision|triton)=' constraints.txt > $(VENV_LATEST)/constraints.txt
	$(VENV_LATEST)/bin/pip install $(PIP_QUIET) -c $(VENV_LATEST)/constraints.txt setuptools wheel torch==$(TORCH_LATEST)
	touch $@

# The library stands in the source folder, one for both environments: its ABI is stable from torch 2.10 on.
# torchvision comes in builds of its own for each kind of torch. Where the one to be had does not fit, the tests that need it or
# timm, which imports it, skip and say so.
$(VENV_LATEST)/.installed: $(VENV)/.installed $(VENV_LATEST)/.torch
	$(VENV_LATEST)/bin/pip install $(PIP_QUIET) -c $(VENV_LATEST)/constraints.txt numpy typer rich pillow safetensors \
	  scikit-learn matplotlib pytest pytest-benchmark pytest-xdist hypothesis ninja
	$(VENV_LATEST)/bin/pip install $(PIP_QUIET) -c $(VENV_LATEST)/constraints.txt \
	  torch==$(TORCH_LATEST) torchvision==$(TORCHVISION_LATEST) timm
	$(VENV_LATEST)/bin/python -c "import torchvision" 2>/dev/null || { \
	  echo "torchvision $(TORCHVISION_LATEST) does not fit this torch: testing without torchvision and timm"; \
	  $(VENV_LATEST)/bin/pip uninstall $(PIP_QUIET) --yes torchvision timm; }
	CMT_FAST_BUILD=0 $(VENV_LATEST)/bin/pip install $(PIP_QUIET) --no-build-isolation --no-deps -e .
	touch $@
