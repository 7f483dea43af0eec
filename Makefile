# Everything runs from a fresh clone: each target sets up what it needs, in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test lint docs format bench dist setup clean help

help:
	@echo "make demo    set up, then adapt to real questions and report (browser: demo/report.html)"
	@echo "make test    set up, then lint, types, docs and every test"
	@echo "make docs    write the reference anew, and build the site into site/ (warnings are errors)"
	@echo "make bench   compare adaptation with a PEFT loop and with the arithmetic's floor"
	@echo "make dist    build the wheel and the sdist into dist/"
	@echo "make format  format the code"

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch==2.13.0 hatchling editables
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-build-isolation --editable ".[dev]"
	@touch $(STAMP)

setup: $(STAMP)

demo: $(STAMP)
	$(BIN)/python -m ephemera demo --output demo

test: lint # the docs are built by tests/docs
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

docs: $(STAMP)
	$(BIN)/python docs/generate.py
	$(BIN)/mkdocs build --strict

bench: $(STAMP)
	$(BIN)/python -m benchmarks.adapt

dist: $(STAMP)
	$(BIN)/python -m hatchling build --directory dist

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) demo runs site dist
