export MPLBACKEND = Agg
SHELL := /bin/bash
PY := .venv/bin/python
BIN := .venv/bin
NB := $(sort $(wildcard nbs/*.ipynb))

.DEFAULT_GOAL := help
.PHONY: help setup demo app film test notebooks figures export check lab clean

help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

.venv/.ready: pyproject.toml
	python3 -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade uv
	$(BIN)/uv pip install --python $(PY) --quiet --compile-bytecode -e ".[dev]"
	@if git rev-parse --git-dir >/dev/null 2>&1; then $(BIN)/nbdev_install_hooks; fi
	@touch $@

setup: .venv/.ready  ## build .venv with everything the project needs (done by the other targets on first use)

demo: setup  ## train a small EdgeConnect on real photographs, headlessly, and evaluate it: runs/demo/
	@$(PY) tests/demo.py

app: setup  ## paint a hole and watch it filled: prints the address of a page on this machine only (PORT=8866)
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/inpaint demo --no-browser --port $(or $(PORT),8866)

film: setup  ## figures/demo.webp anew, from real painting in a headless Chromium
	@$(PY) tests/film.py figures/demo.webp

test: setup  ## every notebook (nbdev_test) and every test (pytest), with the ten slowest
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(PY) tests/run_all.py

notebooks: setup  ## execute the notebooks in place, so that readers see results (N=nbs/25_x.ipynb for one)
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(PY) tests/execute_notebooks.py $(or $(N),$(NB))
	@$(BIN)/nbdev_clean

figures: setup  ## write figures/METHOD.png from the committed weights and the held-out photograph
	@mkdir -p runs/figures
	@for m in context_encoder structural_inpainting partial_conv deepfill_v1 deepfill_v2 edge_connect structure_flow; do \
	  MPLBACKEND=module://matplotlib_inline.backend_inline $(PY) -m papermill --cwd nbs --no-progress-bar --log-level ERROR \
	    nbs/41_evaluate.ipynb runs/figures/41_evaluate.ipynb -p method $$m -p out_dir runs/figures -p size 128 -p per_bin 1 -p seed 3 && \
	  cp runs/figures/rows.png figures/$$m.png || exit 1; done

export: setup  ## write inpaint_lib/ from the notebooks
	$(BIN)/nbdev_export

check: setup  ## is the library in step with the notebooks, are the notebooks clean, does the style hold?
	$(PY) tests/in_step.py
	$(BIN)/ruff check nbs tests

lab: setup  ## open the notebooks in JupyterLab
	$(BIN)/jupyter lab --notebook-dir=.

clean:  ## remove runs and caches (the checkout's own files stay)
	rm -rf runs .pytest_cache .ruff_cache inpaint_lib/__pycache__ inpaint_lib/*/__pycache__
