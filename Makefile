# make run          train a small GPT, live in the terminal (installs everything first)
# make test         make check and every test; TESTS=tests/cli runs some of them
# make test-fast    the quick tests: no real terminals, ssh, packaging or long trainings; no checks
# make oracle       generated loops and scalar expressions against references: LOOPS=2000, SEED=0
# make test-frameworks  the tests with Hugging Face's Trainer, accelerate and Lightning, PEFT; installs them
# make check        ruff, mypy --strict and the import contracts
# make format       sort imports and format the sources
# make bench        the cost of watching a training; see docs/performance.md
# make screenshots  the pictures of README and docs, from real runs
# make clean        remove what was built, except .venv
# make help         this list
#
# TORCH is the build of PyTorch to install, PYTHON the interpreter that creates the environment:
#   make run TORCH=torch PYTHON=python3.12

PYTHON ?= python3
TORCH ?= torch==2.13.0

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALLED := $(VENV)/installed.stamp
DEVELOPED := $(VENV)/developed.stamp
BENCHED := $(VENV)/benched.stamp
SOURCES := tui_trainer models tests benchmarks screenshots

# Without bytecode every process of the tests would compile each module again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help run test test-fast test-frameworks oracle check lint types contracts format bench screenshots clean

run: $(INSTALLED)
	$(BIN)/tui-trainer gpt

help:
	@sed -n 's/^# make /make /p' Makefile

# The checks run while the tests do: alone they leave a core idle for half a minute.
test: $(DEVELOPED)
	@mkdir -p build
	@{ $(MAKE) --no-print-directory check >build/check.txt 2>&1 || { cat build/check.txt; false; }; } & checks=$$!; \
	    $(BIN)/python -m pytest $(TESTS); tests=$$?; \
	    wait $$checks && echo "checks passed" && exit $$tests

test-fast: $(DEVELOPED)
	$(BIN)/python -m pytest -m "not slow" $(TESTS)

# A failure prints a Python program that reproduces it.
LOOPS ?= 2000
SEED ?= 0
oracle: $(DEVELOPED)
	TUI_TRAINER_ORACLE_LOOPS=$(LOOPS) TUI_TRAINER_ORACLE_SEED=$(SEED) TUI_TRAINER_SCALAR_EXPRESSIONS=$(LOOPS) \
	    $(BIN)/python -m pytest tests/oracle tests/learn/test_scalar_oracle.py

# `make test` runs these too, where the frameworks are installed.
FRAMEWORKS := $(VENV)/frameworks.stamp
test-frameworks: $(FRAMEWORKS)
	$(BIN)/python -m pytest tests/integrations

$(FRAMEWORKS): $(DEVELOPED) pyproject.toml
	$(PIP) install "$(TORCH)" -e ".[frameworks]"
	touch $@

check: lint types contracts

lint: $(DEVELOPED)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

# mypy and import-linter look for packages on disk, where models/ is not inside tui_trainer/ as it is
# once installed: a tree of links gives them the installed layout.
CHECKED := build/checked
types: $(DEVELOPED) link-tree
	cd $(CHECKED) && ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache

contracts: $(DEVELOPED) link-tree
	cd $(CHECKED) && PYTHONPATH=. ../../$(BIN)/lint-imports --config ../../pyproject.toml --no-cache

.PHONY: link-tree
link-tree:
	@rm -rf $(CHECKED) && mkdir -p $(CHECKED)/tui_trainer
	@for entry in tui_trainer/*; do ln -s ../../../$$entry $(CHECKED)/$$entry; done
	@ln -s ../../../models $(CHECKED)/tui_trainer/models

format: $(DEVELOPED)
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

# Every table of docs/performance.md, in its order: about eleven minutes, with fewer pairs, shorter turns
# and fewer keys than the figures there. `make bench FIGURES=1` uses the same numbers as those figures: a
# little over half an hour, twenty minutes of it for slowdown. MEASURED="frames startup" runs only those.
# Run it on a quiet machine: a table says when others used it. RESULTS is the folder of the JSON files.
RESULTS ?= build/benchmarks
MEASURED := slowdown gpu frames keys terminal_bytes startup scale history
ifndef FIGURES
BRIEF_slowdown := --launches 1 --seconds 1 --settle 4
BRIEF_keys := --presses 20
BRIEF_terminal_bytes := --seconds 8
BRIEF_startup := --times 3
BRIEF_scale := --layers 5 50 250 --times 10
endif
bench: $(BENCHED)
	@mkdir -p $(RESULTS)
	@failed=; $(foreach each,$(MEASURED),echo; echo "== $(each)"; \
	    $(BIN)/python -m benchmarks.$(each) $(BRIEF_$(each)) --json $(RESULTS)/$(each).json || failed="$$failed $(each)"; \
	) [ -z "$$failed" ] || { echo "failed:$$failed"; exit 1; }

screenshots: $(DEVELOPED)
	$(BIN)/python screenshots/make.py $(ONLY)

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis $(INSTALLED) $(DEVELOPED) $(BENCHED)
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

# PyTorch comes first and alone: once the requested build is installed, the other packages accept it.
$(INSTALLED): pyproject.toml | $(BIN)/python
	$(PIP) install --quiet "$(TORCH)"
	$(PIP) install --quiet --editable .
	@touch $@

# What is imported is compiled then: a fraction of the packages, and pip takes half the time.
$(DEVELOPED): pyproject.toml | $(BIN)/python
	$(PIP) install --quiet --no-compile "$(TORCH)"
	$(PIP) install --quiet --no-compile --editable ".[test,check]"
	@touch $@ $(INSTALLED)

# Where TensorBoard or wandb cannot be installed, their rows are left out of the comparison.
$(BENCHED): pyproject.toml | $(DEVELOPED)
	-$(PIP) install --quiet --editable ".[bench]"
	@touch $@
