# The words of the house. Each makes .venv when it is missing; nothing but python3 >= 3.11 and make is needed.
#
#   make demo     the whole story on the bundled model, into demo/
#   make test     all tests
#   make lint     ruff: rules and format
#   make types    mypy --strict
#   make bench    tests/perf: speed and memory, as ratios within one run
#   make fmt      let ruff mend what it can

PYTHON ?= python3
BIN := .venv/bin

.PHONY: help demo test lint types bench fmt
.DEFAULT_GOAL := help

help:
	@sed -n 's/^#   make/make/p' Makefile

demo: .venv/lab
	$(BIN)/havoc run --out demo

test: .venv/dev
	$(BIN)/pytest

lint: .venv/dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: .venv/dev
	mkdir -p .venv/typing
	ln -sfn "$(CURDIR)" .venv/typing/havoc_core
	$(BIN)/mypy

bench: .venv/dev
	$(BIN)/pytest tests/perf --benchmark-only --benchmark-columns=median,iqr,rounds

fmt: .venv/dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# A stamp per group of dependencies; a changed pyproject.toml installs again (what fits already stays).
.venv/lab .venv/dev: pyproject.toml | $(BIN)/pip
	$(BIN)/pip install --disable-pip-version-check -e ".[$(@F)]"
	@touch $@

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "HAVOC needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	@$(PYTHON) -m venv .venv || { echo "no venv: install your system's python3-venv package"; exit 1; }
	@echo "installing HAVOC and its libraries into .venv, once"
