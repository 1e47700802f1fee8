# make demo     one picture from the bundled weights, on a machine that has Python and nothing else
# make check    what needs no ComfyUI, without the longest: while a change is made
# make test     everything that must hold before a change lands
# make nightly  the same with the long tests: before an issue is called resolved
# make gpu      what only an NVIDIA card shows, and the speed in ComfyUI against what is promised: COMFYUI_PATH, 40 minutes
# make docs     the documentation as a site, into build/site
# make clean    back to a fresh checkout

PYTHON ?= python3
BIN    := .venv/bin
GRAPH  := example_workflows/api/text_to_image.json
PYTEST := $(BIN)/pytest --numprocesses 2 --dist loadgroup --no-loadscope-reorder --durations 25

# What make check leaves to make test: ComfyUI, and whole programs that run for long, such as the documented ones.
LONGER := tests/comfyui tests/notebooks tests/benchmarks tests/test_install.py tests/docs/test_python_page.py \
	tests/docs/test_from_diffusers.py tests/core/test_training_ranks.py tests/demo/test_tasks.py \
	tests/demo/test_cascade.py tests/demo/test_high_resolution.py

# Neither pip nor pyright shall ask the network for a newer self.
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1
# Threads that spin while they wait make sampling on a busy machine many times slower.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo check test nightly gpu docs lint clean

demo: .venv/.installed
	$(BIN)/cascade run $(GRAPH)

check: lint
	$(PYTEST) $(addprefix --ignore ,$(LONGER))
	@echo "left to make test: $(LONGER)"

test: lint
	$(PYTEST)

nightly: lint
	$(PYTEST) --nightly

# All parts run, also after one that fails. SERVED=--quick is shorter, SERVED="--resume --budget 500" goes on with the rest.
gpu: .venv/.installed-dev
	@$(BIN)/python -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "make gpu needs an NVIDIA card")'
	@status=0; \
	$(BIN)/pytest tests/gpu || status=1; \
	PYTORCH_CUDA_ALLOC_CONF=backend:cudaMallocAsync $(BIN)/pytest tests/gpu --ignore tests/gpu/test_training.py || status=1; \
	$(BIN)/python -m cascade_nodes.tests.comfyui.gpu || status=1; \
	$(BIN)/python benchmarks/served.py --table --json output/served.json $(SERVED) || status=1; \
	exit $$status

docs: .venv/.installed-docs
	$(BIN)/python docs/site/write.py
	$(BIN)/zensical build --strict --clean --config-file build/mkdocs.yml

lint: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --project pyproject.toml
	$(BIN)/lint-imports

clean:
	rm -rf .venv build dist output *.egg-info .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.python:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v < (3, 14) else \
		"$(PYTHON) is Python %d.%d, but 3.11, 3.12 or 3.13 is needed: make PYTHON=python3.11" % v)'
	$(PYTHON) -m venv .venv
	touch $@

# setuptools is itself in the lock (torch needs it), so the build takes nothing that is not pinned.
.venv/.installed: .venv/.python requirements.lock pyproject.toml setup.py
	$(BIN)/pip install --quiet -r requirements.lock
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

.venv/.installed-docs: .venv/.python requirements-docs.lock
	$(BIN)/pip install --quiet -r requirements-docs.lock
	touch $@

# pyright cannot run the import hook of an editable install: it finds `cascade_nodes` by the link in typing/.
.venv/.installed-dev: .venv/.installed requirements-dev.lock
	$(BIN)/pip install --quiet -r requirements-dev.lock
	mkdir -p .venv/typing
	ln -sfn ../.. .venv/typing/cascade_nodes
	touch $@
