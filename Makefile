# Two commands: `make run` compresses and evaluates the demo zoo, `make test` runs the tests.
# Both set up .venv first; it is reused while pyproject.toml and constraints.txt stay as they are.

PYTHON ?= python3
export MLFLOW_DISABLE_TELEMETRY = true
export RAY_USAGE_STATS_ENABLED = 0

.PHONY: run test test-core lint

run: .venv/installed
	.venv/bin/python -m jobs.cli run examples/demo.yaml

test: .venv/installed
	.venv/bin/python -m pytest

lint: .venv/installed
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .
	.venv/bin/python -m mypy

# torch first and by version, so that pip takes one build of it for everything that follows
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	.venv/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[pipeline,dev]'
	touch .venv/installed
