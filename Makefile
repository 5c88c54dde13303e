# Every target sets up its own virtual environment in .venv; `make help` lists them.
# Needed on the machine: Python >= 3.10 with pip, and make; npm for demo-voice and eval-voice.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
# A system Python without ensurepip makes environments without pip; its own pip serves them then (pip >= 22.3).
PIP = $$($(PY) -m pip --version >/dev/null 2>&1 && echo $(PY) -m pip || echo $(PYTHON) -m pip --python $(PY))
VERSIONS = -c constraints.txt
INSTALL = $(PIP) install --quiet --disable-pip-version-check $(VERSIONS)

# Workers of the test run. Tensors in tests are tiny, so each worker computes in one thread.
WORKERS ?= 2
PYTEST_ARGS ?=
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(WORKERS) --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help demo demo-voice eval-voice test test-isa test-latest test-oldest test-clients test-load test-slow test-emulated bench bench-check bench-suite bench-gpu codegen docs pictures serve \
	package-test lint clean clean-results

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(VENV)/.created:
	@$(PYTHON) -m venv $(VENV) || $(PYTHON) -m venv --without-pip $(VENV)
	@touch $@

$(VENV)/.base: $(VENV)/.created pyproject.toml constraints.txt
	@echo "installing dia-fast and what it needs into $(VENV) (torch is large; this happens once)"
	@$(INSTALL) -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.base
	@echo "installing what the tests need into $(VENV)"
	@$(INSTALL) -e '.[dev]'
	@# The dac package is compared with; that takes few of the some 70 packages it depends on.
	@# Twice quiet: older pips warn about the way argbind is packaged.
	@$(INSTALL) --quiet argbind einops
	@$(INSTALL) --quiet --no-deps descript-audio-codec
	@touch $@

$(VENV)/.voice $(VENV)/.docs $(VENV)/.server: $(VENV)/.%: $(VENV)/.base
	@echo "installing the extra $* into $(VENV)"
	@$(INSTALL) -e '.[$*]'
	@touch $@

$(VENV)/.ray: $(VENV)/.dev
	@echo "installing Ray into $(VENV)"
	@$(INSTALL) -e '.[ray]'
	@touch $@

demo: $(VENV)/.base ## speak a short dialogue with the voice that comes with the package (downloads no weights)
	$(PY) examples/demo.py

VOICE_ARGS ?=
VOICE_BUILD := examples/demo_voice/build
demo-voice: $(VENV)/.voice ## make a demo voice from nothing: speech, codec, codes, model (hours on two cores; VOICE_BUILD=, VOICE_ARGS=)
	OMP_NUM_THREADS=2 $(PY) -m examples.demo_voice.build $(VOICE_BUILD) $(VOICE_ARGS)

eval-voice: $(VENV)/.voice ## let two recognisers listen to the demo voice: sentences, dialogues, scripts, cloning (VOICE_ARGS=)
	OMP_NUM_THREADS=2 $(PY) -m examples.demo_voice.evaluate $(VOICE_BUILD)/kokoro $(VOICE_ARGS)

test: $(VENV)/.dev ## run the test suite (under 15 minutes on two cores)
	$(PYTEST) $(PYTEST_ARGS)

test-isa: $(VENV)/.dev ## run the numeric tests under each instruction set of this processor, with one and two threads
	$(PY) -m tests.isa $(PYTEST_ARGS)

# Its environment is brought up to date each time. pip takes a CUDA build of torch here, of several GB.
LATEST := .venv-latest
test-latest: ## run the test suite with the newest release of each dependency, in an environment of its own
	@rm -f $(LATEST)/.base
	@$(MAKE) --no-print-directory VENV=$(LATEST) VERSIONS='--upgrade --upgrade-strategy eager' $(LATEST)/.dev
	@$(LATEST)/bin/python -m tests.versions
	@$(MAKE) --no-print-directory VENV=$(LATEST) VERSIONS='--upgrade --upgrade-strategy eager' test

# pip cannot choose the oldest versions; uv can. It takes a CUDA build of torch as well.
OLDEST := .venv-oldest
PYTHON_OLDEST ?= python3.10
test-oldest: ## run the test suite with the oldest release of each dependency that pyproject.toml allows (needs Python 3.10)
	@rm -rf $(OLDEST)
	@$(PYTHON_OLDEST) -m venv $(OLDEST)
	@$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check uv argbind einops
	@$(OLDEST)/bin/python -m uv pip install --quiet --python $(OLDEST)/bin/python --resolution lowest-direct -e '.[dev]'
	@$(OLDEST)/bin/python -m pip install --quiet --quiet --no-deps descript-audio-codec
	@touch $(OLDEST)/.created $(OLDEST)/.base $(OLDEST)/.dev
	@$(OLDEST)/bin/python -m tests.versions
	@$(MAKE) --no-print-directory VENV=$(OLDEST) test

# Clients of the server that agree with nobody on versions: an environment each, of 1 GB together.
CLIENTS := .venv-clients
PYTHON_WYOMING ?= python3.12
$(CLIENTS)/%/.installed: tests/server/clients/%.txt
	@echo "installing what tests/server/clients/through_$*.py runs into $(CLIENTS)/$*"
	@$(if $(filter wyoming,$*),$(PYTHON_WYOMING),$(PYTHON)) -m venv $(CLIENTS)/$*
	@$(CLIENTS)/$*/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

test-clients: $(VENV)/.dev $(foreach client,livekit pipecat wyoming,$(CLIENTS)/$(client)/.installed) ## let LiveKit, Pipecat and Home Assistant's proxy speak through the server (needs Python 3.12)
	OMP_NUM_THREADS=1 $(PY) -m pytest -q tests/server/test_clients.py $(PYTEST_ARGS)

LOAD_ARGS ?=
test-load: $(VENV)/.dev ## let 200 clients use a server for 5 minutes; some leave, some are hostile (LOAD_ARGS=)
	$(PY) -m bench.serving_http --schemathesis $(LOAD_ARGS)

test-slow: $(VENV)/.dev ## run the tests that take long or need gigabytes of memory
	OMP_NUM_THREADS=2 $(PY) -m pytest -q -m slow $(PYTEST_ARGS)

test-ray: $(VENV)/.ray ## run the tests on a Ray cluster of this machine, whose actors and drivers they kill
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -m slow tests/jobs/test_ray.py tests/server/test_ray.py $(PYTEST_ARGS)
	OMP_NUM_THREADS=1 SERVE_WITH='--ray local --replicas 2 --threads 1' \
		$(PY) -m pytest -q tests/server/test_clients.py tests/server/test_speech.py tests/server/test_voices.py \
		--deselect tests/server/test_speech.py::test_requests_have_an_id_and_metrics_count_them $(PYTEST_ARGS)

# The emulator runs the machine code that Triton compiles for an AMD GPU, on the CPU. It is not part of this repository:
# EMULATOR is the folder of its pytest plugin, TINYGRAD_REPO the checkout that it needs.
GFX ?= gfx1100
test-emulated: $(VENV)/.dev ## run the kernel tests on compiled code (EMULATOR=, TINYGRAD_REPO=, GFX=, PYTEST_ARGS=)
	@test -n "$(EMULATOR)" -a -n "$(TINYGRAD_REPO)" || \
		{ echo "say where the emulator and tinygrad are: make test-emulated EMULATOR=folder TINYGRAD_REPO=folder"; exit 2; }
	OMP_NUM_THREADS=1 TINYGRAD_REPO="$(TINYGRAD_REPO)" PYTHONPATH="$(EMULATOR)" \
		$(PY) -m pytest -q -p pytest_plugin --triton-emulate $(GFX) tests/kernels $(PYTEST_ARGS)

BENCH_MODEL ?= bench/results/random-1.6b
BENCH_ARGS ?=
bench: $(VENV)/.dev ## time a decode step beside transformers, at full size (first makes random weights, 3.2 GB; BENCH_ARGS=)
	@test -d $(BENCH_MODEL) || $(PY) -m bench.make_checkpoint $(BENCH_MODEL)
	$(PY) -m bench.decode_step --model $(BENCH_MODEL) --against transformers $(BENCH_ARGS)

CHECK_ARGS ?=
bench-check: $(VENV)/.dev ## fail if launches, bytes moved, compiled code, memory or the lead on transformers got worse (CHECK_ARGS=)
	$(PY) -m bench.check $(CHECK_ARGS)

SUITE_ARGS ?=
bench-suite: $(VENV)/.dev ## time every kernel and stage on every backend; JSON and plots in bench/results/suite (SUITE_ARGS=)
	$(PY) -m bench.suite $(SUITE_ARGS)

GPU_ARGS ?=
bench-gpu: $(VENV)/.dev ## check and measure everything on a GPU, in 12 minutes; report in bench/results/gpu (GPU_ARGS=)
	$(PY) -m bench.gpu $(GPU_ARGS)

CODEGEN_ARGS ?=
codegen: $(VENV)/.dev ## compile every kernel for eight GPUs; tables and figures in bench/results (no GPU needed, CODEGEN_ARGS=)
	@mkdir -p bench/results
	$(PY) -m bench.codegen --markdown bench/results/codegen.md --json bench/results/codegen.json $(CODEGEN_ARGS)

SERVE_ARGS ?=
serve: $(VENV)/.server ## serve the demo voice over HTTP at port 8000, with a page for the browser (SERVE_ARGS=)
	$(VENV)/bin/dia-fast serve $(SERVE_ARGS)

docs: $(VENV)/.docs ## build the documentation into build/site
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet --strict

pictures: $(VENV)/.dev ## draw the pictures of the README again, and speak its sample
	$(PY) -m bench.readme

package-test: $(VENV)/.dev ## build wheel and sdist, install them into clean environments and speak there
	$(PY) .ci/package_test.py

lint: $(VENV)/.dev ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m mypy

clean: ## remove the virtual environments and everything generated, but what took long: see clean-results
	rm -rf $(VENV) $(LATEST) $(OLDEST) $(CLIENTS) build dist demo-output *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

clean-results: ## remove what benchmarks and the demo voice left: results, plots, random weights, trained weights
	rm -rf bench/results examples/demo_voice/build
