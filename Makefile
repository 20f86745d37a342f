# Each target does all its own set-up in .venv; a machine with Python >= 3.11 and a C compiler is enough.
PYTHON ?= python3
VENV   := .venv
MINUTES ?= 20
GPU_TESTS := GPU_TESTS=1 .venv/bin/python -m pytest -q tests/test_gpu.py tests/test_fast.py tests/test_quantized.py
RUN    := $(VENV)/bin/python
# Every file is held against its SHA-256; torch is pinned without one, its CPU and CUDA builds being different files.
PIP    := $(RUN) -m pip install -q --disable-pip-version-check

.PHONY: quickstart test test-docs bench chaos tiny lock clean

quickstart: $(VENV)/run      ## the whole way on the tiny model: generate -> SFT -> GRPO -> answer
	@$(RUN) quickstart.py

test: $(VENV)/dev            ## lint, then every test
	$(VENV)/bin/ruff check .
	$(RUN) -m pytest -q -n 2 --dist loadfile --max-worker-restart 0 tests
	@$(RUN) -c "import torch; raise SystemExit(not torch.cuda.is_available())" || exit 0; $(GPU_TESTS)

test-docs: $(VENV)/dev       ## run every command of README and docs that a CPU can run
	$(RUN) dev/test_docs.py

bench: $(VENV)/dev           ## what this machine can measure: the tiny model on a CPU, the 3B shape on a GPU
	@for b in bench/step.py bench/loading.py; do echo "== $$b"; $(RUN) $$b || exit 1; done

chaos: $(VENV)/dev           ## runs killed and files broken on purpose, for MINUTES; the verdict as a table
	$(RUN) tests/chaos.py --minutes $(MINUTES)

tiny: $(VENV)/run            ## rebuild assets/tiny from nothing
	$(RUN) assets/make_tiny.py init output/tiny_init
	$(RUN) assets/make_tiny.py clips --num_samples 16000 --split 0.98 --output_dir data/base --overwrite
	$(RUN) train_sft.py --config configs/tiny_base.py
	$(RUN) assets/make_tiny.py export output/tiny_base assets/tiny

$(VENV)/run: requirements.lock requirements-torch.lock
	$(PYTHON) -c "import sys; assert sys.version_info >= (3, 11), f'Python {sys.version.split()[0]} found, 3.11 or newer needed (make PYTHON=...)'"
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	awk '/^[^ #]/ {on = /^setuptools==/} on' requirements.lock >$(VENV)/setuptools.txt  # DeepSpeed comes as source
	$(PIP) --no-deps --require-hashes -r $(VENV)/setuptools.txt
	$(PIP) --no-deps --require-hashes --no-build-isolation -r requirements.lock
	$(PIP) -c requirements-torch.lock torch
	@touch $@

$(VENV)/dev: requirements-dev.lock $(VENV)/run
	$(PIP) --no-deps --require-hashes -r requirements-dev.lock
	@touch $@

lock: $(VENV)/run            ## write the lock files anew after a change of requirements.txt or requirements-dev.txt
	$(PIP) uv==0.13.9
	$(RUN) .ci/lock.py

clean:                       ## the environment and caches; runs in output/ and clips in data/ are yours
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
