# Every command a person needs. `make demo` and `make test` do all the set-up on a fresh machine.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# A path may hold spaces: quoted in recipes, escaped where make reads it as a file it keeps track of.
EMPTY :=
STAMP := $(subst $(EMPTY) $(EMPTY),\ ,$(VENV)/.installed)

.PHONY: setup demo test test-report test-tasks test-families test-formats test-resume test-distributed test-llamacpp \
    llamacpp test-vllm vllm asan lint bench clean

setup: $(STAMP)

# gptqmodel is built from source against the torch that is there, so torch comes first.
$(STAMP): pyproject.toml setup.cfg setup.py
	"$(PYTHON)" -m venv "$(VENV)"
	"$(BIN)/python" -m pip install --quiet --upgrade pip setuptools
	"$(BIN)/python" -m pip install --quiet "torch>=2.8"
	"$(BIN)/python" -m pip install --quiet -e ".[dev]"
	touch "$(VENV)/.installed"

demo: $(STAMP)
	"$(BIN)/eora" demo --out demo

# Two files of tests at a time, whose OpenMP threads yield the processors to each other instead of spinning.
test: $(STAMP)
	OMP_WAIT_POLICY=passive "$(BIN)/python" -m pytest --numprocesses 2 --dist loadfile \
	    -m "not browser and not harness and not families and not llamacpp and not formats and not resume and not vllm and \
	        not distributed"

# Two to four processes on real models, one thread each, and processes that hang: some ten minutes on two quiet cores.
test-distributed: $(STAMP)
	OMP_WAIT_POLICY=passive "$(BIN)/python" -m pytest -m distributed

# Reports in a real browser: needs Chromium (Debian's package `chromium`), and tells so where there is none.
test-report: $(STAMP)
	"$(BIN)/python" -m pytest -m browser

# Tasks scored by lm-eval from files, beside its own data sets. IFEval's checker reads nltk's data, which nltk takes from a
# server of its own; llama-index-core, on PyPI, carries the same files. Nothing else of it is used.
test-tasks: $(STAMP)
	"$(BIN)/python" -m pip install --quiet --no-deps --target "$(VENV)/nltk" llama-index-core
	NLTK_DATA="$(VENV)/nltk/llama_index/core/_static/nltk_cache" "$(BIN)/python" -m pytest -m harness

# Small random models of every mixture of experts that GPTQModel defines, through both hosts: a process for each host.
test-families: $(STAMP)
	"$(BIN)/python" -m pytest -m families

# Checkpoints of bitsandbytes and compressed-tensors, which are no dependencies: they are put beside the others, for these
# tests alone. loguru is what compressed-tensors logs with.
test-formats: $(STAMP)
	"$(BIN)/python" -m pip install --quiet --no-deps --target "$(VENV)/formats" bitsandbytes compressed-tensors loguru
	PYTHONPATH="$(VENV)/formats$${PYTHONPATH:+:$$PYTHONPATH}" "$(BIN)/python" -m pytest -m formats

# Commands killed at twenty random moments, and on disks that are full, and started again: some forty minutes on two
# quiet cores. The disks are small tmpfs, which root alone may mount; skipped otherwise.
test-resume: $(STAMP)
	"$(BIN)/python" -m pytest -m resume tests/e2e

# llama.cpp's programs, built once into the user's cache from the sources that llama-cpp-python carries: some ten minutes on
# two quiet cores. Needs a C++ compiler and cmake.
llamacpp: $(STAMP)
	sh benchmarks/build_llamacpp.sh "$(BIN)/python"

# What is made for llama.cpp, in llama.cpp; skipped where `make llamacpp` has not run.
test-llamacpp: $(STAMP)
	"$(BIN)/python" -m pytest -m llamacpp

# vLLM's CPU build and this package, in a virtual environment of its own in the user's cache (or EORA_VLLM): 2.4 GB.
vllm: $(STAMP)
	sh benchmarks/build_vllm.sh "$(PYTHON)" "$${EORA_VLLM:-$$("$(BIN)/python" -c \
	    "from gptqmodel_eora_ext.system.files import cache_folder; print(cache_folder() / 'vllm')")}"

# Checkpoints of every form served there, against torch; skipped where `make vllm` has not run, and those of
# compressed-tensors where `make test-formats` has not. Some ten minutes.
test-vllm: $(STAMP)
	PYTHONPATH="$(VENV)/formats$${PYTHONPATH:+:$$PYTHONPATH}" "$(BIN)/python" -m pytest -m vllm

# The kernels' tests once more over a library that looks at every read and write. Linux with gcc, whose libasan has to be
# loaded before Python; the library is built for it once and kept beside the usual one. Leaks are not looked for: Python
# and torch keep memory until they end. Little freed memory is held back, since tests look at how much there is.
asan: $(STAMP)
	CXX=g++ GPTQMODEL_EORA_EXT_CXXFLAGS="-fsanitize=address -g" OMP_WAIT_POLICY=passive \
	    ASAN_OPTIONS=detect_leaks=0:quarantine_size_mb=64 \
	    LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
	    "$(BIN)/python" -m pytest tests/kernels/test_untrusted.py tests/kernels/test_unpack.py tests/kernels/test_cpu.py \
	    tests/kernels/test_cuda.py

lint: $(STAMP)
	"$(BIN)/ruff" check .
	"$(BIN)/mypy"

bench: $(STAMP)
	"$(BIN)/python" benchmarks/recovery.py
	"$(BIN)/python" benchmarks/presets.py
	"$(BIN)/python" benchmarks/plan.py
	"$(BIN)/python" benchmarks/autoround.py
	"$(BIN)/python" benchmarks/forecast.py
	"$(BIN)/python" benchmarks/cost.py
	"$(BIN)/python" benchmarks/kernels_cpu.py
	"$(BIN)/python" benchmarks/loading.py
	"$(BIN)/python" benchmarks/stability.py
	"$(BIN)/python" benchmarks/autoload.py
	"$(BIN)/python" benchmarks/evaluation.py
	"$(BIN)/python" benchmarks/picture.py

clean:
	rm -rf "$(VENV)" demo
