# The README's two commands: `make demo` and `make test`. Each works alone on a fresh clone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT := demo-output
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test lint unit hostile lowest wheel model api clean

demo: $(VENV)/.demo
	$(BIN)/gtr-export build --model mar-digits --out $(OUT)/mar-digits
	rm -rf $(OUT)/images
	$(BIN)/gtr-run generate $(OUT)/mar-digits --classes 0-9 --images-per-class 8 --batch-size 20 --plan gtr \
		--out $(OUT)/images --grid $(OUT)/grid.png
	$(BIN)/gtr-run generate $(OUT)/mar-digits --classes 3,7,5,2 --plan gtr --out $(OUT)/images --trace $(OUT)/trace.gif
	@echo
	@echo "look at  $(OUT)/grid.png and $(OUT)/trace.gif"
	@echo "for ImageNet pictures (7.4 GB to download), type"
	@echo "  $(BIN)/gtr-export build --model mar-h"
	@echo "  $(BIN)/gtr-run generate bundles/mar-h-fp32 --classes 'golden retriever' --out pictures"

test: lint unit

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	cd typings && ../$(BIN)/lint-imports ../pyproject.toml

# One thread per engine call: two test processes share the cores, and OpenMP threads that spin would fight over them.
unit: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup --durations=15 --cov --cov-report=
	$(BIN)/python -m coverage report --include 'runtime/*' --fail-under 95
	$(BIN)/python -m coverage report --include 'export/*' --fail-under 90
	$(BIN)/python -m coverage report --include 'calibration/*' --fail-under 90

# Other people's files, as an attacker would make them; part of `make test`. GTR_FUZZ_EXAMPLES=20000 tries more manifests.
hostile: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup -m hostile tests/hostile

# The oldest versions that pyproject.toml allows really work: what needs none of the newest tools is tested with them.
lowest:
	$(PYTHON) -m venv .venv-lowest
	$(PYTHON) .ci/lowest.py > .venv-lowest/constraints.txt
	.venv-lowest/bin/pip install --quiet --disable-pip-version-check --constraint .venv-lowest/constraints.txt \
		--editable '.[cpu,openvino,calibration,export,plot]' pytest hypothesis pytest-xdist
	OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest -n 2 -p no:cacheprovider \
		tests/test_toy_family.py tests/test_toy_backend.py tests/calibration/test_collect.py \
		$(addprefix tests/runtime/test_,console.py run_cli.py bundle.py pipeline.py plan.py openvino.py quality.py trace.py) \
		$(addprefix tests/export/test_,export_cli.py onnx_export.py build.py checkpoints.py)

# A wheel with every part and data file, and a type checker that sees its types.
wheel: $(VENV)/.test
	rm -rf dist build
	$(BIN)/pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .
	$(PYTHON) -m venv dist/venv
	dist/venv/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt "$$(ls dist/*.whl)[cpu]"
	cd dist && venv/bin/gtr-run plan mar-h && venv/bin/gtr-run doctor
	printf 'from gtr_deploy import Pipeline\nPipeline.load(3, threads="x")\n' > dist/wrong.py
	echo '{}' > dist/pyrightconfig.json # or this project's own is found, and its typings/ answers for the wheel
	cd dist && ! ../$(BIN)/basedpyright --pythonpath venv/bin/python wrong.py > wrong.txt
	grep -q 'reportArgumentType' dist/wrong.txt

# Trains the shipped model anew (about 40 minutes on two cores).
model: $(VENV)/.test
	$(BIN)/python examples/digits/train.py --out export/data/mar_digits.safetensors

# The API page, from the docstrings; a test says when it is old.
api: $(VENV)/.demo
	$(BIN)/python docs/make_api.py

clean:
	rm -rf $(VENV) .venv-lowest $(OUT) build *.egg-info

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) --editable '.[cpu,export]'
	touch $@

# TensorRT's bindings without TensorRT, of both versions served: tests/export/test_tensorrt_api.py reads their names.
$(VENV)/.test: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) --editable '.[cpu,export,examples,test]'
	$(PIP) --no-deps --upgrade --target $(VENV)/bindings/11 'tensorrt-cu13-bindings==11.4.0.106'
	$(PIP) --no-deps --upgrade --target $(VENV)/bindings/10 'tensorrt-cu13-bindings==10.16.1.11'
	touch $@ $(VENV)/.demo
