# `make help` lists the targets. Everything is installed into .venv from the package registry; nothing else is touched.
PYTHON ?= python3
BIN := .venv/bin
comma := ,
WORKERS := -n 2 --dist loadfile --no-loadscope-reorder
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help demo test test-fast test-lowest gpu-check install lab export readme docs wheel clean distclean

help: ## say what the targets do
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  PYTHON=...       the Python 3.10 to 3.14 that makes .venv (default: python3)"

demo: .venv/.installed-offline ## install and run the whole pipeline on simulated images (2 minutes)
	$(BIN)/kdoct demo

test: .venv/.installed-dev ## install and run every test: ruff, the notebooks, pytest (13 minutes)
	$(BIN)/ruff check
	OMP_NUM_THREADS=1 MPLBACKEND=agg $(BIN)/nbdev-test --n-workers 2 --do-print --timing
	$(BIN)/python -m pytest $(WORKERS)

test-fast: .venv/.installed-dev ## ruff and the tests that are not marked slow (4 minutes)
	$(BIN)/ruff check
	$(BIN)/python -m pytest $(WORKERS) -m "not slow"

test-lowest: .venv/.installed-dev ## the fast tests with the lowest versions that settings.ini allows (30 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python tools/lowest.py

gpu-check: ## the tests and timings that need a GPU, with the Python that has torch (8 minutes; PYTHON=...)
	$(PYTHON) tools/gpu_check.py

install: .venv/.installed-dev ## make .venv with all that demo, test and lab need

lab: .venv/.installed-dev ## open the notebooks in JupyterLab
	$(BIN)/jupyter lab --notebook-dir=nbs

export: .venv/.installed-dev ## notebooks -> kdoct/, README.md, clean notebooks
	$(BIN)/python -c "from configparser import ConfigParser as C; from nbdev.config import set_version; \
	c = C(); c.read('settings.ini', encoding='utf-8'); set_version('kdoct', c['DEFAULT']['version'])"
	$(BIN)/nbdev-export
	$(BIN)/nbdev-clean
	$(BIN)/python tools/readme.py

readme: .venv/.installed-dev ## nbs/index.ipynb -> README.md
	$(BIN)/python tools/readme.py

docs: .venv/.installed-dev ## the documentation as a site: build/docs/index.html
	$(BIN)/python tools/house.py picture docs/house.svg
	$(BIN)/python tools/docs.py

wheel: .venv/.installed-dev ## dist/*.whl and dist/*.tar.gz
	rm -rf build dist
	$(BIN)/python -m build --no-isolation

clean: ## remove what builds and tests leave behind; .venv and outputs/ stay
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis nbs/.last_checked
	find . -path ./.venv -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -print0 | xargs -0 rm -rf

distclean: clean ## remove .venv too
	rm -rf .venv

# The stamps are as old as the installation: it is repeated only when what it depends on has changed.
# uv needs half a minute for what pip needs three and a half for; where it is not to be had, pip alone is enough.
.venv/.installed-dev: EXTRAS := offline,deploy,volumes,app,tune,tracking,explain,lab,dev
.venv/.installed-offline: EXTRAS := offline
.venv/.installed-%: settings.ini setup.py pyproject.toml
	@$(PYTHON) -c "import sys; ok = sys.version_info >= (3, 10); \
	sys.exit(None if ok else 'kdoct needs Python 3.10 or newer, not %d.%d: make PYTHON=python3.11 ...' % sys.version_info[:2])"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet 'uv>=0.9,<1' && $(BIN)/uv pip install --compile-bytecode --python $(BIN)/python -e '.[$(EXTRAS)]' || \
	{ echo 'uv did not install it, so pip does: minutes instead of seconds'; $(BIN)/python -m pip install -e '.[$(EXTRAS)]'; }
	@touch $(addprefix .venv/.installed-,$(filter offline dev,$(subst $(comma), ,$(EXTRAS))))
