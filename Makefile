# `make demo` on a fresh machine: fine-tunes the bundled RoBERTa with SiVA, on a CPU, offline after the install.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
HERE := $(subst $() ,%20,$(CURDIR))# as part of an address, where the path may have spaces
SOURCES := $(wildcard csrc/*.h csrc/*.cpp csrc/cpu/* csrc/cuda/*)
PIP := $(BIN)/python -m pip install --quiet

export PATH := $(CURDIR)/$(BIN):$(PATH)
# by variable, not by option: it takes the place of a constraint in the machine's own pip configuration
export PIP_CONSTRAINT := file://$(HERE)/requirements-dev.lock
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo install-dev check test test-rest test-all test-full kill-test endurance-test distributed-test peft-suite version-test docs fuzz audit \
	native native-aarch64 sanitize sanitize-thread valgrind bench wheel clean

demo: $(VENV)/demo.stamp
	fastpeft train --method siva --model demo --data demo --epochs 1 --output runs/siva-demo --overwrite
	fastpeft predict runs/siva-demo \
		"A warm, funny and beautifully acted film." \
		"Two hours of noise without a single idea." \
		"The plot is thin, but the cast makes it worth seeing."

install-dev: $(VENV)/dev.stamp

check: $(VENV)/dev.stamp
	ruff format --check .
	ruff check .
	mypy
	lint-imports --no-cache
	abi3audit --strict --assume-minimum-abi3 3.11 fastpeft/_C*.so
	clang-format --dry-run -Werror $(filter %.h %.cpp %.cu %.cuh,$(SOURCES)) $(wildcard tests/native/*.cpp)

# a worker holds about 1.5 GB
TEST_WORKERS ?= 2
PYTEST := python -m pytest --numprocesses $(TEST_WORKERS) --dist worksteal

# the short suite, of a contributor; its evidence is bench/data/mutations.csv
test: $(VENV)/dev.stamp
	$(PYTEST)

# what that leaves out; continuous integration runs both
test-rest: $(VENV)/dev.stamp
	$(PYTEST) --rest

test-all: test test-rest

# every case of every test, and every reader of files fuzzed
test-full: $(VENV)/dev.stamp fuzz
	$(PYTEST) --full

# the figures of docs/reliability.md: runs killed at random moments, and runs of very many steps
KILLS ?= 30
kill-test: $(VENV)/dev.stamp
	PYTHONPATH=tests OMP_NUM_THREADS=1 python -m reliability.kill --kills $(KILLS)

endurance-test: $(VENV)/dev.stamp
	PYTHONPATH=tests OMP_NUM_THREADS=1 python -m reliability.endurance siva 20000
	PYTHONPATH=tests OMP_NUM_THREADS=1 python -m reliability.endurance mezo 100000

# 2 and 4 processes that train together, in every engine, with one of them killed; `make test` runs a part
distributed-test: $(VENV)/dev.stamp
	$(PYTEST) --full tests/support/test_processes.py tests/reliability/test_lost_process.py

# PEFT's own tests with SiVA in their tables; the first time it fetches them, then it is offline
peft-suite: $(VENV)/dev.stamp
	PYTHONPATH=tests OMP_NUM_THREADS=1 python -m peft_suite --numprocesses $(TEST_WORKERS) --quiet

# the wheel beside each version that it claims; what passed is not run again unless ENVIRONMENTS names it
version-test: $(VENV)/dev.stamp
	$(PIP) uv
	PYTHONPATH=tests OMP_NUM_THREADS=1 python -m reliability.versions $(ENVIRONMENTS)

# every reader of files for FUZZ_SECONDS, each by inputs that the code they reach steers; `make test` runs a part
FUZZ_SECONDS ?= 20
fuzz: $(VENV)/dev.stamp
	$(PIP) atheris
	export PYTHONPATH=tests && \
	python -c 'from fuzz.targets import TARGETS; print(*TARGETS, sep="\n")' | while read -r target; do \
		python -m fuzz.steered "$$target" -max_total_time=$(FUZZ_SECONDS) || exit 1; done

# what bandit finds in the sources; docs/security.md says why the kinds that pyproject.toml leaves out are none
audit: $(VENV)/dev.stamp
	bandit --quiet --configfile pyproject.toml --recursive fastpeft setup.py

# into build/docs, offline; tables come from bench/data
docs: $(VENV)/dev.stamp
	python docs/tables.py
	NO_MKDOCS_2_WARNING=1 mkdocs build

# the C++ tests of csrc's host code, which need a compiler and nothing else
NATIVE ?= build/native
NATIVE_SOURCES := $(wildcard tests/native/*.cpp csrc/cpu/baseline.cpp csrc/cpu/avx2.cpp csrc/cpu/avx512.cpp \
	csrc/cpu/*_avx512bf16.cpp)
NATIVE_FLAGS := -std=c++17 -g -fno-math-errno -fno-trapping-math -ffp-contract=off -Wall -Wextra -Wno-psabi -pthread -Icsrc
build_native = mkdir -p $(NATIVE) && $(CXX) $(NATIVE_FLAGS) $(1) $(NATIVE_SOURCES) -o $(NATIVE)/$@
run_native = $(build_native) && $(RUNNER) $(NATIVE)/$@

native:
	$(call run_native,-O3)

# the same for 64-bit ARM, whose instructions an emulator runs
native-aarch64: CXX := aarch64-linux-gnu-g++
native-aarch64: RUNNER := qemu-aarch64 -L /usr/aarch64-linux-gnu
native-aarch64:
	$(call run_native,-O3)

sanitize:
	$(call run_native,-O1 -fsanitize=address -fsanitize=undefined -fno-sanitize-recover=all)

sanitize-thread:
	$(call run_native,-O1 -fsanitize=thread)

valgrind:
	$(call build_native,-O1)
	valgrind --quiet --error-exitcode=1 --leak-check=full $(NATIVE)/$@

bench: $(VENV)/dev.stamp
	python -m pytest bench --benchmark-enable --benchmark-only

wheel: $(VENV)/dev.stamp
	python -m build --wheel --no-isolation

clean:
	rm -rf build dist runs *.egg-info fastpeft/_C*.so .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks

# torch comes first: the compiled part is built against the one that is installed
$(VENV)/torch.stamp: requirements-dev.lock
	$(PYTHON) -m venv $(VENV)
	$(PIP) setuptools wheel ninja torch
	touch $@

$(VENV)/demo.stamp: $(VENV)/torch.stamp pyproject.toml demo/pyproject.toml setup.py $(SOURCES)
	$(PIP) --no-build-isolation --editable ./demo --editable ".[demo]"
	touch $@

$(VENV)/dev.stamp: $(VENV)/torch.stamp pyproject.toml demo/pyproject.toml setup.py $(SOURCES)
	$(PIP) --no-build-isolation --editable ./demo --editable ".[dev]"
	touch $@
