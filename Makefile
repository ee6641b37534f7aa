# Developer entry points. `make` alone lists them.
#
#   PYTHON    interpreter that makes .venv (3.11 or newer)
#   TORCH     what pip installs as torch; any torch>=2.11 with its torchvision works. Changing it
#             takes effect in a new environment: make distclean first
#   ARGS      extra arguments of test, demo, bench, gate and gpu:  make test ARGS="-k masking -x"
#   MAX_JOBS  how many files the extension build compiles at once
# PIP_* variables (index, cache, proxy) reach pip as they are.

PYTHON ?= python3
TORCH ?= torch==2.14.1 torchvision==0.29.1
ARGS ?=

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
# [build-system] requires, less torch: the extension is built against the torch of this environment,
# not against a second copy in pip's isolated one.
BUILD_REQUIRES := "setuptools>=77" wheel ninja pybind11

BUILD_INPUTS := pyproject.toml setup.py $(wildcard MANIFEST.in fastfisher/_build.py) \
                $(shell find csrc -type f)
CXX_FILES := find csrc tests/emulation -type f \( -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' -o -name '*.inc' \)

# A copy of the package with an instrumented module, and the tests that run native code.
SANITIZED := build/sanitized
NATIVE_TESTS := tests/test_ops.py tests/test_matrix_unit.py tests/test_topr.py tests/test_recurrent_steps.py tests/test_fisher_layers.py

# Empty files in .venv that say which step was done last, and when.
ENVIRONMENT := $(VENV)/.stamp-environment
INSTALLED := $(VENV)/.stamp-installed
BENCH_INSTALLED := $(VENV)/.stamp-bench

.DEFAULT_GOAL := help
.PHONY: help install demo test sanitize lint format bench gate gpu clean distclean

help: ## list the targets
	@awk 'BEGIN {FS = ":.*## "} /^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo 'Variables: PYTHON=$(PYTHON)  TORCH="$(TORCH)"  ARGS="..."  MAX_JOBS=N'

install: $(INSTALLED) ## make .venv, install everything, build the extension (again when csrc changed)

demo: $(INSTALLED) ## unlearn one class of scikit-learn's digits
	$(VENV)/bin/fastfisher demo $(ARGS)

test: $(INSTALLED) ## run the tests
	$(PY) -m pytest -q $(ARGS)

sanitize: $(INSTALLED) ## run the native tests under the address and undefined-behaviour sanitizers
	rm -rf $(SANITIZED) && mkdir -p $(SANITIZED)
	cp -r fastfisher tests pyproject.toml $(SANITIZED) && rm -f $(SANITIZED)/fastfisher/*.so
	FASTFISHER_SANITIZE=address,undefined $(PY) setup.py -q build_ext --build-lib $(SANITIZED) --build-temp $(SANITIZED)/temp
	cd $(SANITIZED) && LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so.6)" \
	    ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=. $(abspath $(PY)) -m pytest -q -p no:cacheprovider $(NATIVE_TESTS) $(ARGS)

lint: $(INSTALLED) ## check style, formatting and types; changes nothing
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(CXX_FILES) -exec $(VENV)/bin/clang-format --dry-run -Werror {} +

format: $(INSTALLED) ## rewrite Python and C++ in the project's format
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(CXX_FILES) -exec $(VENV)/bin/clang-format -i {} +

bench: $(BENCH_INSTALLED) ## compare speed, memory and error with the alternatives
	$(PY) benchmarks/run.py $(ARGS)

gate: $(INSTALLED) ## fail if a kernel became slower than its baseline (ARGS=--record writes one)
	$(PY) -m pytest -q benchmarks --benchmark-columns=median,iqr,rounds --benchmark-name=short $(ARGS)

gpu: $(BENCH_INSTALLED) ## on a machine with a GPU: prove, test, sanitize, measure (ARGS=--dry-run without)
	$(PY) benchmarks/gpu.py $(ARGS)

clean: ## remove what was built and cached; keeps .venv, data and runs
	rm -rf build dist *.egg-info fastfisher/*.so $(INSTALLED)
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find fastfisher tests benchmarks -type d -name __pycache__ -exec rm -rf {} +

distclean: clean ## also remove .venv
	rm -rf $(VENV)

$(ENVIRONMENT):
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else \
	    f"$(PYTHON) is Python {sys.version.split()[0]}; development needs 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	@echo 'Installing $(TORCH): a few GB the first time.'
	$(PIP) install -q $(TORCH) $(BUILD_REQUIRES)
	@touch $@

$(INSTALLED): $(ENVIRONMENT) $(BUILD_INPUTS)
	$(PIP) install -q --no-build-isolation -e '.[dev]'
	@touch $@

$(BENCH_INSTALLED): pyproject.toml | $(INSTALLED)
	$(PIP) install -q --no-build-isolation -e '.[bench]'
	@touch $@
