# Every target sets itself up: on a fresh machine with Python 3.11 or newer, `make run` is enough.
# Set-up runs once, and again when pyproject.toml changes (the stamps in .venv).

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: run test test-clients lint style format docs soak gpu clean

PYTHON ?= python3
BIN := .venv/bin
CLIENTS := .venv-clients/bin
# One BLAS thread per process: the tests run side by side, and small matrices only lose by sharing.
# A word problem as the bundled model knows them.
PROMPT := "Lucy has 4 boxes with 9 pencils each. Then she buys 12 more pencils. She puts the pencils into 6 bags, \
the same number in each. How many pencils are in each of the bags?"
TESTS := OMP_NUM_THREADS=1 $(BIN)/pytest
# Some images set it. Each process would then compile torch again: 7.7 s of a core for an import that takes 2.7.
unexport PYTHONDONTWRITEBYTECODE
# Not compiled: most of 11,000 modules are never imported; Python compiles the others when they are.
INSTALL := -m pip install --quiet --no-compile

run: .venv/.run  ## the main job on the bundled checkpoint
	$(BIN)/saccade check
	$(BIN)/saccade plan
	$(BIN)/saccade generate --looked-at 8 --prompt $(PROMPT)

# Types take 68 s of a core where nothing is in mypy's cache: they are checked beside the tests, not before them.
test: style  ## lint, types and every test that needs no GPU
	mkdir -p build
	$(BIN)/mypy > build/types.log 2>&1 & types=$$!; failed=0; \
	  $(TESTS) -n 2 --dist worksteal -m "not gpu and not soak" || failed=$$?; \
	  wait $$types || failed=$$?; cat build/types.log; exit $$failed

test-clients: .venv/.test .venv-clients/.done  ## other people's clients against `saccade serve`
	OMP_NUM_THREADS=1 SACCADE_PYTHON=$(CURDIR)/$(BIN)/python $(CLIENTS)/pytest -n 2 --dist loadfile \
	  -c tests/clients/pytest.ini --confcutdir=tests/clients tests/clients

lint: style
	$(BIN)/mypy

style: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: .venv/.docs  ## these pages and the API reference, into build/docs; fails on broken links
	$(BIN)/python -m tools.docs

soak: .venv/.test  ## long searches; the log is build/soak.log
	mkdir -p build
	$(TESTS) -v -m soak --timeout 0 --durations=0 | tee build/soak.log

gpu: .venv/.test  ## what needs a CUDA device, ranks apart: they share one; the log is build/gpu.log
	mkdir -p build
	$(BIN)/pytest -v -n 8 -m gpu --durations=0 --ignore-glob '*/test_gpu_rank*' | tee build/gpu.log
	$(BIN)/pytest -v -m gpu --durations=0 tests/gpu/test_gpu_rank*.py | tee -a build/gpu.log

clean:
	rm -rf .venv .venv-clients build

.venv/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Saccade needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>/dev/null || echo not there)." \
	       "Name a newer one: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv .venv
	touch $@

.venv/.run: pyproject.toml | .venv/.python
	$(BIN)/python $(INSTALL) -e '.[run]'
	touch $@

.venv/.test: pyproject.toml | .venv/.python
	$(BIN)/python $(INSTALL) -e '.[test]'
	touch $@ .venv/.run

.venv-clients/.done: tests/clients/requirements.txt | .venv/.python
	$(PYTHON) -m venv .venv-clients
	$(CLIENTS)/python $(INSTALL) -r $<
	touch $@

.venv/.docs: pyproject.toml | .venv/.python
	$(BIN)/python $(INSTALL) -e '.[docs]'
	touch $@ .venv/.run
