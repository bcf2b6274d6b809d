# Two commands: `make run` compresses and evaluates the demo zoo, `make test` runs the tests.
# Both set up .venv first and reuse it while pyproject.toml and constraints.txt stay as they are.

PYTHON ?= python3
PIP_INSTALL = -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
CORE_TESTS = pytest pytest-timeout pytest-xdist hypothesis beartype

.PHONY: run test test-slow test-core lint

run: .venv/installed
	.venv/bin/python -m jobs.cli run examples/demo.yaml

test: .venv/installed
	.venv/bin/python -m pytest -m "not slow"

# only what takes more than 10 seconds
test-slow: .venv/installed
	.venv/bin/python -m pytest -m slow

# lorc_core and its tests in an environment without Ray and MLflow, every call checked against its annotations
test-core: .venv-core/installed
	.venv-core/bin/python -m pytest -m "not slow" --jaxtyping-packages=lorc_core,beartype.beartype tests/core

lint: .venv/installed
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .
	.venv/bin/python -m mypy
	.venv/bin/lint-imports --no-logo

# torch first and alone, so that pip takes one build of it for everything that follows
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python $(PIP_INSTALL) torch
	.venv/bin/python $(PIP_INSTALL) --editable '.[pipeline,dev]'
	touch $@

.venv-core/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-core
	.venv-core/bin/python $(PIP_INSTALL) torch
	.venv-core/bin/python $(PIP_INSTALL) --editable . $(CORE_TESTS)
	touch $@
