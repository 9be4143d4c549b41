# make demo   environment, build, the main job
# make test   environment, build, CPU tests
# The rest is for developers: CONTRIBUTING.md.
#
# Variables: PYTHON (3.10 or newer), VENV, TORCH (what pip installs), and those of the build:
# FLASH_ATTN_CUDA_ARCHS, FLASH_ATTN_KERNELS, MAX_JOBS (setup.py says what they mean).

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch>=2.10
RUN := $(VENV)/bin/python
TOOLS := $(VENV)/bin
READY := $(VENV)/.ready

# A compiler that warns of more than ours must not keep a user from `pip install`; here it fails.
export FLASH_ATTN_WERROR := 1

.DEFAULT_GOAL := build
.PHONY: demo test test-gpu test-wheels sanitize bench docs env build host kernels kernel-table \
  check format hub wheel wheel-fa3 sdist clean

demo: build
	$(RUN) examples/train_gpt.py

test: build host
	$(RUN) -m pytest -m "not gpu" tests

test-gpu: build
	$(RUN) -m pytest -m gpu tests

# NVIDIA's compute-sanitizer comes with the CUDA toolkit. racecheck sees no order where one lane
# arrives at a barrier for its warp, as everywhere but in the forward of sm90: docs/lessons.md.
sanitize: build
	for run in "memcheck" "synccheck" "racecheck 90"; do set -- $$run; \
	  compute-sanitizer --tool $$1 --error-exitcode 1 $(RUN) tests/run_sanitized.py $$2 > build/$$1.txt \
	    || { tail -40 build/$$1.txt; exit 1; }; tail -1 build/$$1.txt; done

bench: build
	$(RUN) -m benchmarks

.PHONY: docs
# The site in build/docs; a broken link or reference fails it. Only the first time downloads anything.
docs: build host $(VENV)/.docs-ready
	$(RUN) -m sphinx -E -W --keep-going -q -b html docs build/docs
	@echo "docs: build/docs/index.html"

$(VENV)/.docs-ready: $(READY)
	PATH="$(abspath $(TOOLS)):$$PATH" $(RUN) -m pip install --quiet --disable-pip-version-check \
	  --no-build-isolation --editable ".[docs]"
	touch $@

env: $(READY)

# The environment holds what building, testing, linting and the example need.
$(READY): pyproject.toml tools/check_machine.py
	@$(PYTHON) tools/check_machine.py
	@echo "Creating the environment $(VENV) (torch and tools, a few minutes) ..."
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check "$(TORCH)" \
	  "setuptools>=77" wheel ninja packaging
	PATH="$(abspath $(TOOLS)):$$PATH" $(RUN) -m pip install --quiet \
	  --disable-pip-version-check --no-build-isolation --editable ".[test,example,dev]"
	touch $@

# ninja and cmake come from the environment.
build: $(READY)
	PATH="$(abspath $(TOOLS)):$$PATH" $(RUN) setup.py --quiet build_ext --inplace

host: $(READY)
	PATH="$(abspath $(TOOLS)):$$PATH" cmake -S . -B build/host -G Ninja --log-level=WARNING \
	  -DPython_EXECUTABLE=$(abspath $(RUN)) -DFLASH_ATTN_CUDA_ARCHS=
	PATH="$(abspath $(TOOLS)):$$PATH" cmake --build build/host --target flash_attn_host

# Every kernel, for the architectures of the wheels; spills fail it.
kernels:
	FLASH_ATTN_CUDA_ARCHS="80;90" FLASH_ATTN_KERNELS= $(MAKE) --no-print-directory build kernel-table

kernel-table: host
	$(RUN) tools/kernel_table.py

SOURCES_CPP = $(shell git ls-files -co --exclude-standard 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cuh' 'csrc/*.cu')

check: $(READY)
	$(TOOLS)/clang-format --dry-run -Werror $(SOURCES_CPP)
	$(TOOLS)/ruff check .
	$(TOOLS)/ruff format --check .
	$(TOOLS)/mypy
	$(RUN) tools/ratchets.py

format: $(READY)
	$(TOOLS)/clang-format -i $(SOURCES_CPP)
	$(TOOLS)/ruff check --fix-only .
	$(TOOLS)/ruff format .

# The package as a kernel of Hugging Face's `kernels`, in dist/hub.
hub: build
	$(RUN) tools/make_hub.py

# One wheel for every machine: CPU and GPU backends, unless FLASH_ATTN_CUDA_ARCHS says otherwise.
# CUDA=13.0 or CUDA=13.x fetches that compiler; else CUDA_HOME or the machine's is used.
# The folders of the last build go first: setuptools would put what lies there into the wheel.
wheel: $(READY)
	rm -rf build/lib.* build/bdist.* flash_attn.egg-info
	$(if $(CUDA),CUDA_HOME=$$($(RUN) tools/cuda_toolkit.py $(CUDA)) || exit 1; export CUDA_HOME;) \
	PATH="$(abspath $(TOOLS)):$$PATH" FLASH_ATTN_RELEASE=1 \
	  FLASH_ATTN_CUDA_ARCHS="$${FLASH_ATTN_CUDA_ARCHS-80;90}" \
	  $(RUN) -m pip wheel --no-build-isolation --no-deps -w dist .
	$(RUN) tools/check_wheel.py "$$(ls -t dist/*.whl | head -1)"

test-wheels: $(READY)
	$(RUN) tools/test_wheels.py
	$(RUN) tools/test_sources.py

sdist: $(READY)
	rm -rf flash_attn.egg-info
	$(RUN) setup.py --quiet sdist --dist-dir dist

# FlashAttention-3's functions and ops on this package: pure Python.
wheel-fa3: $(READY)
	$(RUN) -m pip wheel --no-build-isolation --no-deps -w dist companion/flash_attn_3

clean:
	rm -rf build dist companion/*/build *.egg-info companion/*/*.egg-info flash_attn/_C.abi3.so
