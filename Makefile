# `make demo` shows the main job, `make test` runs every test; both make their own environment.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS := constraints.txt
DEMO := calibration/demo/checkpoint
BUNDLE := demo.ojfa

.PHONY: demo serve test slow ray triton coverage engines lint bench clean
.DELETE_ON_ERROR:

$(VENV)/python.stamp:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than Python 3.11"; echo "hint: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/demo.stamp: $(VENV)/python.stamp $(CONSTRAINTS) pyproject.toml
	@echo "installing (a few minutes, most of it torch, the reference that the bundle is verified against)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[build,verify]'
	@touch $@

$(VENV)/test.stamp: $(VENV)/demo.stamp
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[build,verify,serve,test,bench]'
	@touch $@

demo: $(VENV)/demo.stamp
	$(BIN)/python -m calibration.demo.show --checkpoint $(DEMO) --bundle $(BUNDLE)

$(VENV)/serve.stamp: $(VENV)/demo.stamp
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[build,verify,serve]'
	@touch $@

$(BUNDLE): $(VENV)/demo.stamp
	$(BIN)/ojfa-export build $(DEMO) -o $@ --rank 96

serve: $(VENV)/serve.stamp $(BUNDLE)
	$(BIN)/ojfa-export serve $(BUNDLE)

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Two processes of one thread each: with more they wait for each other's.
PYTEST := OMP_NUM_THREADS=1 OJFA_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup

test: $(VENV)/test.stamp lint
	$(PYTEST) -m 'not slow'
	engines/test.sh

# Wheels, whole trainings, a quarter of an hour of attacks: before a release.
slow: $(VENV)/test.stamp
	$(PYTEST) -m slow
	$(MAKE) ray triton

# Ray's processes talk to each other on every interface: where these tests run there is loopback alone.
ray: .venv-ray/stamp
	unshare -rn sh -c 'ip link set lo up && exec .venv-ray/bin/python -m pytest -m slow tests/serving/test_ray.py'

# Its Python backend takes a Python 3.11 as Debian builds it, and fails with later ones of 3.11.
triton: .venv-triton/stamp
	.venv-triton/bin/python -m pytest -m slow tests/serving/test_triton.py

.venv-triton/stamp: pyproject.toml $(VENV)/python.stamp
	/usr/bin/python3.11 -m venv --without-pip .venv-triton
	$(BIN)/python -m pip --python .venv-triton/bin/python install --quiet --disable-pip-version-check \
	  -e '.[build,serve]' nvidia-pytriton==0.7.0 httpx pytest
	@touch $@

.venv-ray/stamp: $(CONSTRAINTS) pyproject.toml
	$(PYTHON) -m venv .venv-ray
	.venv-ray/bin/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) \
	  -e '.[build,serve,ray]' httpx openai psutil pytest
	@touch $@

coverage: $(VENV)/test.stamp
	$(PYTEST) --cov=ojfa_export --cov-report=term:skip-covered

engines:
	engines/test.sh

bench: $(VENV)/test.stamp
	$(BIN)/python -m bench.cpu.compare --help

clean:
	rm -rf $(VENV) .venv-ray .venv-triton $(BUNDLE) $(BUNDLE).partial build dist engines/build
