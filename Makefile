# Each target makes .venv first if need be. PYTHON is only used for that.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
OLDEST := .venv-oldest
OUT := out

.PHONY: help demo test test-oldest lint bench bench-gpu gpu-bundle kernels roofline clean

help:  ## This list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*##/\t/' | expand -t 12

.venv/ready: setup.py pins.txt
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint pins.txt setuptools torch
	$(BIN)/pip install --quiet --constraint pins.txt --editable ".[test,train]"
	touch $@

$(OLDEST)/ready: setup.py pins-oldest.txt
	test -d $(OLDEST) || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install --quiet --constraint pins-oldest.txt --editable ".[test,train]"
	touch $@

demo: .venv/ready  ## Sample the reference model in full and accelerated: pictures, table, figures in out/
	$(BIN)/python bench/demo.py --out $(OUT)

test: .venv/ready lint  ## Lint and the whole test suite, in two processes of one thread
	TRITON_INTERPRET=1 $(BIN)/pytest tests/interpreted
	$(BIN)/pytest --numprocesses 2 --dist loadfile

test-oldest: $(OLDEST)/ready  ## The test suite with the oldest versions that setup.py allows, in an environment of its own
	TRITON_INTERPRET=1 $(OLDEST)/bin/pytest tests/interpreted
	$(OLDEST)/bin/pytest --numprocesses 2 --dist loadfile

lint: .venv/ready  ## ruff and mypy, check only; types of the package as it is installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf $(OUT)/typed
	$(BIN)/python setup.py -q build --build-base $(OUT)/typed --build-lib $(OUT)/typed/lib
	$(BIN)/mypy $(OUT)/typed/lib/harmonica_rt

bench: .venv/ready  ## The figures of README.md, the suites, and peers in short (about an hour and a half on two cores)
	$(BIN)/python bench/targets.py
	$(BIN)/pytest bench/suites --benchmark-only
	$(BIN)/python bench/run_quality.py --peers all --quick --out $(OUT)

bench-gpu: .venv/ready  ## On a CUDA machine: correct, capture, latency, kernels, profile, in out/gpu/
	$(BIN)/python bench/run_gpu.py --out $(OUT)/gpu
	$(BIN)/python bench/run_gpu.py --report $(OUT)/gpu

gpu-bundle: .venv/ready  ## A folder that does bench-gpu on a machine without network: out/gpu-bundle/run.sh
	$(BIN)/python bench/gpu/bundle.py --out $(OUT)/gpu-bundle

kernels: .venv/ready  ## Compile the Triton kernels for sm_80 to sm_120, without a GPU: registers, spills, loads
	$(BIN)/python bench/aot.py

roofline: .venv/ready  ## Predicted time per step on NVIDIA GPUs, from counts: nothing is measured
	$(BIN)/python bench/roofline.py

clean:  ## Remove what the targets above made
	rm -rf .venv $(OLDEST) out
