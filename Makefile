# make demo   the main job: environment, wheel, training, swaps, report in runs/demo (QUICK=1: a training of a minute)
# make test   the whole suite; make test-fast: two minutes of it
# make docs   the documentation site in build/site
.PHONY: demo test test-fast docs wheel wheel-aarch64 sdist build lint bench peers gpu-report cuda-load-check matrix coverage gpu clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CALLERS_PATH := $(PATH)
export PATH := $(CURDIR)/$(BIN):$(PATH)
PIP := $(BIN)/python -m pip --disable-pip-version-check

# The environment, made again when the list of packages changes.
$(VENV)/.ready: requirements-dev.txt requirements-peers.txt
	@echo "== environment: $(VENV) (a few minutes the first time)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade pip
	$(PIP) install --progress-bar on -r requirements-dev.txt
	$(PIP) install --quiet --no-deps -r requirements-peers.txt
	@touch $@

SOURCES := $(shell find csrc iin_fast -type f -not -name '*.so' -not -name '*.pyc' -not -name _build_info.py) \
           CMakeLists.txt setup.py pyproject.toml

# The wheel, made again when a source changes.
dist/.built: $(VENV)/.ready $(SOURCES)
	@echo "== wheel"
	@rm -rf dist build/lib build/bdist*
	$(PIP) wheel --no-build-isolation --no-deps -w dist .
	@touch $@

wheel: dist/.built
	@ls dist/*.whl

# The wheel for aarch64, by the cross compiler g++-aarch64-linux-gnu. Of torch's builds for it 2.10.0 is for the CPU, and small.
wheel-aarch64: $(VENV)/.ready
	$(PIP) install --quiet --no-deps --no-compile --upgrade --target build/torch-aarch64 --platform manylinux_2_28_aarch64 --only-binary=:all: torch==2.10.0
	@rm -rf build/lib* build/bdist* build/wheel-aarch64
	CMAKE_TOOLCHAIN_FILE=$(CURDIR)/csrc/aarch64.cmake _PYTHON_HOST_PLATFORM=linux-aarch64 PYTHONPATH=$(CURDIR)/build/torch-aarch64 \
	  IIN_FAST_CUDA=off $(BIN)/python setup.py --quiet bdist_wheel --dist-dir build/wheel-aarch64
	$(BIN)/auditwheel show build/wheel-aarch64/*.whl

sdist: $(VENV)/.ready
	$(BIN)/python setup.py --quiet sdist

# The wheel of the demo is for this machine alone: it compiles sooner.
build/demo/.built: $(VENV)/.ready $(SOURCES)
	@rm -rf build/demo build/lib* build/bdist*
	@mkdir -p build/demo
	@cuda=$${IIN_FAST_CUDA:-$$(test -e /dev/nvidiactl && echo auto || echo off)}; \
	test "$$cuda" != off || echo "== no GPU code is built: no NVIDIA GPU here, or IIN_FAST_CUDA=off (IIN_FAST_CUDA=on make demo builds it)"; \
	echo "== compiling for this machine"; \
	IIN_FAST_ISAS=native IIN_FAST_CUDA=$$cuda $(BIN)/python setup.py --quiet bdist_wheel --dist-dir build/demo
	@touch $@

# The main job, run from the installed wheel in an environment of its own: the command does not see the source tree.
demo: build/demo/.built
	@echo "== install the wheel"
	$(PIP) install --quiet --no-deps --force-reinstall build/demo/*.whl
	@rm -rf runs/demo
	$(BIN)/iin-fast demo $(if $(QUICK),--quick)

# An editable install for developers; run it again after a change in csrc/ and only that is compiled. Without a GPU the code of
# one kind of GPU is enough, and compiles in a third of the time.
build: $(VENV)/.ready
	IIN_FAST_CUDA_ARCHITECTURES=$${IIN_FAST_CUDA_ARCHITECTURES-$$(test -e /dev/nvidiactl || echo 90)} \
	$(PIP) install --quiet --no-build-isolation --no-deps -e .

lint: $(VENV)/.ready
	ruff check .
	ruff format --check .
	clang-format --dry-run -Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' 'tests/*.h' 'tests/*.cpp')
	mypy

test: build lint
	$(BIN)/python -m pytest -n auto --dist loadscope --no-loadscope-reorder

# Two minutes of it, for daily work: tests/conftest.py says what is left out.
test-fast: build
	$(BIN)/python -m pytest -n auto --dist loadscope --no-loadscope-reorder -m "not slow"

# The documentation site; any warning is an error.
docs: $(VENV)/.ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "== build/site/index.html"

# The benchmarks whose results are committed, on an otherwise idle machine (a quarter of an hour).
bench: build
	iin-fast bench --out benchmarks/results
	$(BIN)/python -m pytest benchmarks/test_ops.py -q --benchmark-json=build/ops.json
	$(BIN)/python benchmarks/ops_summary.py build/ops.json benchmarks/results/ops_cpu.json
	$(BIN)/python benchmarks/spline.py
	$(BIN)/python benchmarks/spline_accuracy.py
	$(BIN)/python benchmarks/backends.py
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/dropin.py $(if $(PEERS),--peers $(PEERS))
	$(BIN)/python benchmarks/dropin_pairs.py
	$(BIN)/python benchmarks/readme.py

# The libraries' own test suites under patch, and tests/dropin on the published code and FrEIA's repository (ten minutes):
# make peers PEERS=FOLDER
peers: build
	@test -n "$(PEERS)" || (echo "make peers PEERS=FOLDER: benchmarks/peers.py says what the folder holds"; exit 2)
	$(PIP) install --quiet --no-deps torchtestcase
	$(BIN)/python benchmarks/peer_sources.py $(PEERS) --out benchmarks/results/peer_sources.json
	$(BIN)/python benchmarks/peer_suites.py --source freia=$(PEERS)/FrEIA --out benchmarks/results/peer_suites.json
	$(BIN)/python benchmarks/readme.py

# What the compilers made of the GPU kernels: registers, spills, instructions. Needs nvcc, but no GPU.
gpu-report: export IIN_FAST_CUDA_ARCHITECTURES = 80,90,100
gpu-report: build
	$(PIP) install --quiet triton
	$(BIN)/python benchmarks/gpu_report.py

# The wheel beside CUDA builds of torch, oldest and newest, each in an environment of its own (no GPU needed; 6 GB each).
TORCHES ?= 2.10.0 2.14.1
cuda-load-check: dist/.built
	@for torch in $(TORCHES); do \
	  echo "== torch $$torch" && rm -rf build/torch-$$torch && $(PYTHON) -m venv build/torch-$$torch && \
	  build/torch-$$torch/bin/python -m pip install --quiet torch==$$torch numpy typer rich && \
	  build/torch-$$torch/bin/python -m pip install --quiet --no-deps --no-index dist/*.whl && \
	  (cd build && torch-$$torch/bin/iin-fast info && torch-$$torch/bin/python ../tests/packaging/load_check.py && \
	   torch-$$torch/bin/iin-fast check) || exit 1; \
	done

# Which Pythons and torches the wheel works with, as far as the index serves them for the CPU; the table is in docs/install.md.
matrix: dist/.built
	$(PYTHON) benchmarks/matrix.py dist/*.whl

# Lines of Python that the tests of two minutes run, page by page in build/coverage; and of C++ those that the ops' tests run.
coverage: build
	$(BIN)/python -m pytest tests -n auto -q -m "not slow" --cov=iin_fast --cov-report=term --cov-report=html:build/coverage
	$(BIN)/python -m tests.faults.cpp_coverage

# Everything that needs a GPU, in ten minutes: build, tests, sanitizer, benchmarks. With the caller's python3, which has a
# torch with CUDA: the environment above has one for the CPU. DRY_RUN=1 walks through it on a machine without a GPU.
gpu:
	env PATH="$(CALLERS_PATH)" $(PYTHON) benchmarks/gpu.py $(if $(DRY_RUN),--dry-run)

clean:
	rm -rf build dist *.egg-info iin_fast/lib iin_fast/_build_info.py

# Faults. docs/reliability.md says what each campaign promises, and what the last one found.
.PHONY: fuzz kill soak sanitize
MINUTES ?= 10
KILLS ?= 50

# New cases for that many minutes: ops, modules, programs, files, commands. Then what the tests draw, drawn anew. make test has a
# short set of both that repeats.
fuzz: build
	IIN_FAST_FUZZ_MINUTES=$(MINUTES) $(BIN)/python -m pytest -n 0 -s -q tests/fuzz
	$(BIN)/python -m pytest -n auto -q --hypothesis-profile=default $$(git grep -l "^from hypothesis import" tests/flow tests/iin tests/ops)

# Trainings killed at random moments, stopped by signals, on a full disk, and with a dying rank.
kill: build
	$(BIN)/python -m tests.faults.kill --kills $(KILLS)

# Training steps, evaluations, saves and loads for that many minutes: resident memory and speed.
soak: build
	$(BIN)/python -m tests.faults.soak --minutes $(MINUTES)

# The compiled ops and the emulated CUDA kernels under AddressSanitizer, UBSan and ThreadSanitizer.
sanitize: build
	$(BIN)/python -m tests.faults.sanitize
