# Every target sets up what is missing first (tools/setup.py); once set up, that takes a fraction of a second.
# PYTHON=/path/to/python3.11 chooses the interpreter of the virtual environment.
PYTHON ?=
BIN := .venv/bin
# NEMO_GYM_PYTHON=/path/to/python3.13 chooses the interpreter of NeMo Gym's own virtual environment.
NEMO_GYM_PYTHON ?=
# TRL_PYTHON=/path/to/python3.11 chooses that of TRL's.
TRL_PYTHON ?=
# `make bench BENCH_ARGS="--only serving rollout"` for a part; `.venv/bin/python benchmarks/suite run --help` has the rest.
BENCH_ARGS ?=

PURE := not ray and not vllm and not slow
WHOLE := ray or vllm or slow

# DeepSpeed looks for ninja on the PATH; last, for the reason given in tools/setup.py.
export PATH := $(PATH):$(CURDIR)/$(BIN)

.PHONY: setup nemo-gym trl demo test test-long test-pure lint bench bench-full bench-pages bench-compare bench-agree docs \
	clean

setup:
	@python3 tools/setup.py $(if $(PYTHON),--python "$(PYTHON)")

nemo-gym: setup
	@$(BIN)/python tools/nemo_gym.py --python "$(NEMO_GYM_PYTHON)"

# What benchmarks/learner.py measures beside.
trl: setup
	@$(BIN)/python tools/trl.py --python "$(TRL_PYTHON)"

demo: setup
	$(BIN)/raygym train configs/demo.yaml

# The tests of the pure part share the cores; the others each want them all. Both are run, whatever becomes of the first.
test: setup
	@pure=0; $(BIN)/python -m pytest -n auto --maxprocesses 8 --durations=10 -m "$(PURE)" || pure=1; \
	$(BIN)/python -m pytest --durations=40 -m "$(WHOLE)" && exit $$pure

# Every parameter, 200 conversations each way, 5,000 fuzzed bodies, 2,000 requests at once.
test-long: setup
	RAYGYM_LONG=1 $(BIN)/python -m pytest

# Seconds instead of minutes: no Ray cluster, no engine.
test-pure: setup
	$(BIN)/python -m pytest -n auto --maxprocesses 8 -m "$(PURE)"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# All benchmarks in quick mode, at most 20 minutes: one table, and the results in runs/bench.
bench: setup
	@$(BIN)/python benchmarks/suite run $(BENCH_ARGS)

# Hours. Writes benchmarks/results, which are committed; then `make bench-pages`.
bench-full: setup
	@$(BIN)/python benchmarks/suite run --full $(BENCH_ARGS)

# benchmarks/README.md, its plots and the README's figures, made of benchmarks/results. BENCH_ARGS=--check only looks.
bench-pages: setup
	@$(BIN)/python benchmarks/suite pages $(BENCH_ARGS)

# Fails if a ratio of the last `make bench` is worse than the committed one by more than noise, or its benchmark failed.
bench-compare: setup
	@$(BIN)/python benchmarks/suite compare $(BENCH_ARGS)

# BENCH_ARGS="folder other": fails if two runs differ by more than noise.
bench-agree: setup
	@$(BIN)/python benchmarks/suite agree $(BENCH_ARGS)

# The API reference, made of the docstrings.
docs: setup
	@$(BIN)/python tools/api_reference.py

# Leaves .venv and runs/ alone.
clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find raygym actors tests benchmarks tools -name __pycache__ -type d -prune -exec rm -rf {} +
