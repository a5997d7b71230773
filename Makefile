# make demo    the whole pipeline on this machine, ending in a table
# make quick   the tests that train nothing and start no process, and ruff: while you edit
# make test    everything a change must pass: ruff, mypy, pytest
# make test-long   the same with whole campaigns (fuzzing, kills)
# make test-torches   the trainer's tests on the oldest torch that is allowed and on that of rented machines, each in a venv
# make bench   measurements, as ratios against named baselines in the same run
# make bench-train   the training speed alone, and that of the Triton kernels where there is a GPU
# make gpu     what the first hours on a rented GPU should run, into OUT (gpu-session); dry where there is no GPU
# make lint    ruff and mypy alone
# make docs    the documentation site, in build/site; strict: a broken link fails
# make clean   remove what the above made, except data/ and checkpoints/

PYTHON ?= python3
BIN := .venv/bin
# Where only one torch build is wanted (a machine without a GPU), constraints.txt names the tested one.
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable

# Tests run in one process a core, each with one thread; a machine with many cores would only fill its memory.
PYTEST := $(BIN)/pytest -n auto --maxprocesses 8 --dist worksteal

.PHONY: demo quick test test-long test-torches bench bench-train gpu lint docs clean

demo: .venv/installed
	$(BIN)/pgolf-post demo

test: lint
	$(PYTEST)

quick: .venv/installed-test
	$(BIN)/ruff check .
	$(PYTEST) --quick

test-long: lint
	$(PYTEST) --long

# constraints.txt pins a newer torch, so it is left out: the other packages are whatever goes with this one.
TORCHES := 2.9.1 2.11.0
# Their Triton (3.5, 3.6) interprets kernels on a NumPy that turns an array of one element into a number: 2.4 does not.
test-torches: $(TORCHES:%=build/torch-%/tested)

build/torch-%/tested: setup.cfg
	$(PYTHON) -m venv build/torch-$*
	build/torch-$*/bin/pip install --quiet --disable-pip-version-check torch==$* 'numpy<2.4' --editable '.[test]'
	build/torch-$*/bin/pytest tests/trainer tests/gpu

lint: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/installed-test
	$(BIN)/python -m benchmarks

.venv/installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) .
	touch $@

.venv/installed-test: .venv/installed
	$(INSTALL) '.[test]'
	touch $@

bench-train: .venv/installed-test
	$(BIN)/python -m benchmarks.bench_train
	$(BIN)/python -m benchmarks.bench_kernels

# A part that fails does not keep the others from running; each goes on where it stopped.
OUT ?= gpu-session
gpu: .venv/installed-test
	failed=0; for part in 1 2 3 4; do $(BIN)/python -m tests.gpu.session --part $$part --out $(OUT) || failed=1; done; exit $$failed

# Run as a module, so that the site documents this folder's code; nothing is read from the network.
docs: .venv/installed-docs
	$(BIN)/python -m mkdocs build --strict --clean

.venv/installed-docs: .venv/installed
	$(INSTALL) '.[docs]'
	touch $@

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
