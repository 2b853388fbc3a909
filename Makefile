PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
# Threads that spin while they wait make a shared machine many times slower.
export OMP_WAIT_POLICY := passive
export GOMP_SPINCOUNT := 0

.PHONY: demo test fuzz lint types bench clean

demo: $(INSTALLED)  ## set up, then train a small network with clipped gradients
	$(BIN)/python examples/quickstart.py

test: $(INSTALLED)  ## set up, then run the tests on two processes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

fuzz: $(INSTALLED)  ## random models against one sample at a time; MINUTES=30 SEED=0 JOBS=2
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz.py --minutes $(or $(MINUTES),10) --from $(or $(SEED),0) --jobs $(or $(JOBS),1) $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/basedpyright

bench: $(INSTALLED)  ## step times against plain training; MODELS="mlp cnn" chooses
	$(BIN)/python benchmarks/step_time.py $(or $(MODELS),mlp cnn resnet18 vgg19 vit gpt2 bert lstm) $(ARGS)

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "dpcompile needs Python 3.11 or later")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@
