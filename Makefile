# Everything happens inside this checkout: the virtual environment in .venv, every cache in .cache, reports in reports/.
# Three settings may be given on the command line or in the environment:
#   PYTHON   interpreters to try, in order; the first that is 3.11 or later builds the virtual environment
#   WORKERS  processes that run the tests
#   BENCH    options of the benchmark, such as BENCH="--task T1 --quick"
PYTHON ?= python3.11 python3
WORKERS ?= 2

SHELL := /bin/sh
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CACHE := $(CURDIR)/.cache
PIP := $(BIN)/python -m pip --disable-pip-version-check

# The names under which a Chromium that can open a report without a screen is looked for.
BROWSERS := chromium chromium-browser google-chrome google-chrome-stable

# What these tools would otherwise write to the home directory. A pip cache that is already configured is kept.
export PIP_CACHE_DIR ?= $(CACHE)/pip
export MPLCONFIGDIR := $(CACHE)/matplotlib
export IPYTHONDIR := $(CACHE)/ipython
export HYPOTHESIS_STORAGE_DIRECTORY := $(CACHE)/hypothesis
export JUPYTER_CONFIG_DIR := $(CACHE)/jupyter/config
export JUPYTER_DATA_DIR := $(CACHE)/jupyter/data
export JUPYTER_RUNTIME_DIR := $(CACHE)/jupyter/runtime

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install verify conversions accuracy bench test lint style typecheck contracts format notebooks spectra clean

help:  ## Show this menu
	@echo "make TARGET, where TARGET is one of"
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  %-11s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

install: $(STAMP)  ## Build the virtual environment .venv, at the versions of constraints.txt

# torch goes first, by itself: whichever build of the pinned version pip is configured to find is the one that stays.
# neural-tangents and pytorchcv go last, without their dependencies: their metadata ask for TensorFlow and torchvision, which
# nothing here uses.
$(STAMP): pyproject.toml constraints.txt
	@if ! $(BIN)/python -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
		chosen=; \
		for candidate in $(PYTHON); do \
			if $$candidate -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then chosen=$$candidate; break; fi; \
		done; \
		if [ -z "$$chosen" ]; then \
			echo "mimicnorm needs Python 3.11 or later. Tried: $(PYTHON)." >&2; \
			for candidate in $(PYTHON); do echo "  $$candidate: $$($$candidate --version 2>&1 | head -n 1)" >&2; done; \
			echo "Install one, or name it: make PYTHON=/path/to/python3.11 $(or $(MAKECMDGOALS),install)" >&2; \
			exit 1; \
		fi; \
		echo "Building $(VENV) with $$chosen ($$($$chosen --version))"; \
		if ! $$chosen -m venv --clear $(VENV); then \
			echo "$$chosen cannot build virtual environments. On Debian and Ubuntu, install the package python3-venv." >&2; \
			exit 1; \
		fi; \
	fi
	$(PIP) install --quiet -c constraints.txt torch
	$(PIP) install --quiet -c constraints.txt --editable '.[dev]'
	$(PIP) install --quiet --no-deps -c constraints.txt neural-tangents pytorchcv
	@touch $@

verify: $(STAMP)  ## Decide the catalogued claims on embedded data (quick profile) and write the report
	@status=0; $(BIN)/mimicnorm verify --profile quick || status=$$?; \
	report=$$(ls -td reports/verify-*/ 2>/dev/null | head -n 1); \
	if [ -n "$$report" ] && [ -f "$${report}index.html" ] && [ $$status -ne 2 ]; then echo "The report is $(CURDIR)/$${report}index.html"; fi; \
	exit $$status

conversions: $(STAMP)  ## Convert networks of others to every method, and print which survive a training step
	OMP_NUM_THREADS=1 $(BIN)/mimicnorm convert 'benchmarks/third_party.py:*' --method all

accuracy: $(STAMP)  ## Train a narrow VGG11 and ResNet-18 on digits under every method, each at its own recipe
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/digits_accuracy.py

# The peers' packages go where only the processes that measure them look, and without dependencies: they ask for
# torchvision, which nothing here uses.
PEERS := $(CACHE)/peers

bench: $(STAMP) $(PEERS)/.installed  ## Time the empirical NTK against its peers, about an hour; benchmarks/results/
	$(BIN)/python -m benchmarks.empirical_ntk $(BENCH)

$(PEERS)/.installed: benchmarks/empirical_ntk/peers.txt $(STAMP)
	rm -rf $(PEERS)
	$(PIP) install --quiet --no-deps --target $(PEERS) -r $<
	@touch $@

# Numerical libraries get one thread per worker, or the workers would fight over cores. A browser keeps its notes in .cache.
TESTING := OMP_NUM_THREADS=1 XDG_CONFIG_HOME="$(CACHE)/config" XDG_CACHE_HOME="$(CACHE)"

test: lint  ## Everything that must hold: lint, import contracts, all tests, all notebooks
	@mkdir -p $(CACHE)
	@selection=; found=; \
	for browser in $(BROWSERS); do if command -v $$browser >/dev/null 2>&1; then found=$$browser; break; fi; done; \
	if [ -z "$$found" ]; then \
		if [ "$$CI" = true ]; then \
			echo "ERROR: CI=true and no browser was found ($(BROWSERS)). Install chromium." >&2; exit 1; \
		fi; \
		echo "**********************************************************************" >&2; \
		echo "WARNING: no browser was found ($(BROWSERS))." >&2; \
		echo "The tests that open a report in a browser are NOT run." >&2; \
		echo "Install chromium to run them." >&2; \
		echo "**********************************************************************" >&2; \
		selection='not browser'; \
	fi; \
	$(TESTING) $(BIN)/python -m pytest -n $(WORKERS) -m "$$selection" tests
	$(TESTING) $(BIN)/python -m pytest -n $(WORKERS) --nbmake notebooks/

lint: style typecheck contracts  ## Style, types and import contracts, without changing a file

style: $(STAMP)  ## Only the style and the format (ruff)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: $(STAMP)  ## Only the types (mypy)
	$(BIN)/python -m mypy

contracts: $(STAMP)  ## Only the direction of imports between the packages (import-linter)
	$(BIN)/lint-imports

format: $(STAMP)  ## Format the code and apply the safe fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

notebooks: $(STAMP)  ## Execute every notebook and save it with its new outputs
	@mkdir -p $(CACHE)
	$(BIN)/python -m pytest --nbmake --overwrite notebooks/

# --force-regen fails every test whose spectrum moved, so that a recording is never mistaken for a passing run; the second
# run is the one that must pass. Only files that use the fixture are run.
spectra: $(STAMP)  ## Record the spectra that the tests hold kernels against; then look at git diff tests/spectra
	@files=$$(grep -rl --include='*.py' spectrum_regression tests); \
	if [ -z "$$files" ]; then echo "No test under tests/ uses the fixture spectrum_regression." >&2; exit 1; fi; \
	$(BIN)/python -m pytest --force-regen $$files; \
	$(BIN)/python -m pytest $$files

clean:  ## Remove the virtual environment, caches and build leftovers; reports stay
	rm -rf $(VENV) .cache .*_cache .import_linter_cache build dist *.egg-info
	find mimicnorm ntk diagnostics tests benchmarks notebooks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
