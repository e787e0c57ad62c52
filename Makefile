PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS := 1
export RAY_USAGE_STATS_ENABLED := 0
# Without its compiled files every pytest would compile the tests anew, and every worker Supple.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo check test nightly lint types contract quick long niced shared alone mutants venv clean

demo: $(VENV)/.installed
	$(BIN)/python examples/demo.py

# Everything that is neither slow nor on Ray, side by side: two idle cores should need 90 seconds.
check: $(VENV)/.installed
	$(MAKE) --no-print-directory -j2 --output-sync lint types contract quick

# All of it, and what CI runs. Ray's processes wait for each other half of their time; what only
# computes takes the cores meanwhile, and gives them back at once (nice).
test: $(VENV)/.installed
	$(MAKE) --no-print-directory -j2 --output-sync shared niced
	$(MAKE) --no-print-directory alone

# For hours at night: twenty times the examples, others each time; then mutations of core/.
nightly: $(VENV)/.installed
	$(BIN)/python -m pytest -q -n 2 -m hypothesis --hypothesis-profile nightly --timeout 3600
	$(MAKE) --no-print-directory mutants

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed
	$(BIN)/pyright

contract: $(VENV)/.installed
	$(BIN)/lint-imports

quick: $(VENV)/.installed
	$(BIN)/python -m pytest -q -n 2 -m "not ray and not slow"

# Tests on Ray, a file at a time in each of two processes.
shared: $(VENV)/.installed
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "ray and not alone"

# Their outcome depends on times that are measured: the cores to themselves.
alone: $(VENV)/.installed
	$(BIN)/python -m pytest -q -m "ray and alone"

niced: $(VENV)/.installed
	nice $(MAKE) --no-print-directory lint types contract long

long: $(VENV)/.installed
	$(BIN)/python -m pytest -q -n 2 -m "not ray"

# MUTATE='supple.core.job.stalls*' for one module; `.venv/bin/mutmut show NAME` shows a survivor.
mutants: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-nightly.txt
	$(BIN)/mutmut run $(MUTATE)
	$(BIN)/mutmut results

venv: $(VENV)/.installed

# torch first and by itself: whatever depends on it would otherwise pull another build of it.
$(VENV)/.installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Supple needs Python 3.11 or newer, $(PYTHON) is $$($(PYTHON) --version 2>&1)." \
	  "Name a newer one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $$(grep '^torch==' requirements.lock)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

clean:
	rm -rf $(VENV) demo-output supple-runs mutants
