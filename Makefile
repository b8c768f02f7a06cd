# Every target works where there is only make and Python 3.11 or newer: `setup` makes .venv on the first call.
#   PYTHON=python3.12   the Python to make .venv with (otherwise the first suitable one is found)
#   WORKERS=4           processes that run tests, one thread each

WORKERS ?= 2
PY := .venv/bin/python
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS)

# Whatever environment is active where make is called must not reach into ours.
unexport VIRTUAL_ENV CONDA_PREFIX __PYVENV_LAUNCHER__ MYPYPATH PYTEST_PLUGINS
unexport PYTHONHOME PYTHONPATH PYTHONPLATLIBDIR PYTHONUSERBASE PYTHONOPTIMIZE PYTHONWARNINGS
unexport PYTHONDONTWRITEBYTECODE
unexport PIP_PREFIX PIP_PYTHON PIP_ROOT PIP_TARGET
unexport PIP_DRY_RUN PIP_EDITABLE PIP_IGNORE_INSTALLED PIP_NO_BUILD_ISOLATION PIP_NO_DEPS PIP_REQUIREMENT
export PYTHONNOUSERSITE := 1
export PIP_USER := 0

.DEFAULT_GOAL := help
.PHONY: help setup demo docs wheel test test-slow test-ray test-zoo lint types format clean clean-all

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

setup: ## make .venv with everything in it (the other targets call this)
	@sh tools/setup.sh

demo: setup ## train, calibrate and run a small model on digits; writes demo/
	$(PY) -m miaformer demo --out demo

test: lint types ## lint, check types, run the tests
	$(PYTEST)

test-slow: setup ## the tests marked slow: more cases of what the others show
	$(PYTEST) -m slow

test-ray: setup ## check prediction and serving on a Ray cluster of two workers on this machine
	OMP_NUM_THREADS=1 $(PY) -m pytest -m ray

docs: setup ## build the documentation site in site/
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

wheel: setup ## build the package, to be installed elsewhere: dist/miaformer-VERSION-py3-none-any.whl
	$(PY) -m pip wheel --quiet --no-deps --wheel-dir dist .

test-zoo: setup ## check every supported timm ViT
	$(PYTEST) -m zoo

lint: setup ## ruff: rules and formatting; import-linter: imports point down
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	.venv/bin/lint-imports --no-cache

types: setup ## mypy
	$(PY) -m mypy

format: setup ## let ruff mend what it can
	$(PY) -m ruff check --fix
	$(PY) -m ruff format

clean: ## remove caches and built packages
	rm -rf build dist site .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -path ./.venv -prune -o -type d -name __pycache__ -exec rm -rf {} +

clean-all: clean ## clean, and remove .venv
	rm -rf .venv
