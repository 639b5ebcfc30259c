# `make sample` draws pictures with the bundled digits model, `make test` runs the tests; both make the environment they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: sample test lint digits shapes clean

sample: $(VENV)/.installed
	rm -rf outputs/digits
	$(BIN)/vargen sample digits --num 40 --output outputs/digits

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest

lint: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# the bundled models, made anew into outputs/train/
digits shapes: $(VENV)/.installed
	$(BIN)/vargen train $@/tokenizer
	$(BIN)/vargen train $@/generator

clean:
	rm -rf $(VENV) build dist outputs *.egg-info

# Debian without python3-venv has no ensurepip: the system's pip then installs one into the environment
$(BIN)/python:
	$(PYTHON) -m venv $(VENV) || { $(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install pip; }

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@ $(VENV)/.installed
