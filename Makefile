# Everything a person types. Each target builds what it needs: `make demo` and `make test` work from a fresh clone.
.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip --disable-pip-version-check install --quiet
OUT ?= benchmarks/results

.PHONY: help demo setup serve stack gateway test lint wheel-check bench soak fuzz audit gpu-check protos clean

help:  ## what there is
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 18

demo: setup  ## set up, serve the default model, stream one chat answer to this terminal
	@$(BIN)/python -m pagestream.server.demo

setup: .venv/.installed  ## .venv, pagestream, the compiled kernels, the default model
	@$(BIN)/python -m pagestream.kernels.build
	@$(BIN)/pagestream pull

serve: setup  ## serve the default model until Ctrl-C
	@$(BIN)/pagestream serve

stack: setup  ## a server, Prometheus with our rules, Alertmanager and a small load, until Ctrl-C
	@$(BIN)/python deploy/stack.py

gateway: setup  ## two servers and smg in front of them: the OpenAI API over HTTP, until Ctrl-C
	@$(BIN)/python deploy/gateway.py

test: setup .venv/.test  ## every test that needs no GPU
	@OMP_WAIT_POLICY=PASSIVE $(BIN)/pytest -n 2 --dist loadscope -m "not gpu"

lint: .venv/.installed .venv/.test .venv/.lint build/tree  ## ruff, mypy, import-linter, buf, and fresh stubs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p pagestream.server -p pagestream.model -p pagestream.kernels -p pagestream.loadtest
	$(BIN)/lint-imports
	$(BIN)/buf lint
	protos/generate.sh build/stubs && diff -r -x '*.proto' -x py.typed -x __pycache__ build/stubs/pagestream protos/pagestream

wheel-check: setup  ## install the wheel into an empty environment and run the demo from an unrelated folder
	rm -rf build/empty dist
	$(BIN)/pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .
	$(PYTHON) -m venv build/empty
	build/empty/bin/pip install --quiet --disable-pip-version-check torch==2.13.0
	build/empty/bin/pip install --quiet --disable-pip-version-check dist/*.whl
	cd / && $(CURDIR)/build/empty/bin/python -m pagestream.server.demo

bench: setup .venv/.test  ## all CPU benchmarks; results in benchmarks/results
	@$(BIN)/python benchmarks/compare.py
	@$(BIN)/python benchmarks/start.py
	@$(BIN)/python benchmarks/decode.py
	@$(BIN)/python benchmarks/step_share.py
	@$(BIN)/python benchmarks/perplexity.py
	@$(BIN)/python -m pagestream.kernels.bench

soak: setup .venv/.test  ## 10,000 random client events and readers that stop: what is left of them, within 10 minutes
	@PYTHONPATH=. $(BIN)/python -m tests.support.soak --out "$(OUT)"

fuzz: setup .venv/.test  ## 10,000 damaged model files and 1,000,000 absurd messages, 15 minutes; results in $OUT
	@PYTHONPATH=. $(BIN)/python -m tests.support.fuzz_files --out "$(OUT)"
	@PYTHONPATH=. $(BIN)/python -m tests.support.fuzz_wire --out "$(OUT)"

# Without their "+cpu", which no database lists. Strict: what could not be looked up must not pass for well.
audit: .venv/.installed  ## known vulnerabilities of what is installed; asks a public database over the network
	@$(PYTHON) -m venv build/audit && build/audit/bin/pip --disable-pip-version-check install --quiet pip-audit==2.10.1
	@$(BIN)/pip freeze --exclude-editable | sed 's/+.*//' >build/audit/installed.txt
	@build/audit/bin/pip-audit --strict --no-deps --disable-pip --requirement build/audit/installed.txt

# Uses the python3 it finds, not .venv: machines with a GPU bring their own torch, which must not be replaced.
gpu-check: build/tree  ## everything that needs a GPU; JSON and a log in $$OUT
	@PYTHONPATH=build/tree $(PYTHON) benchmarks/gpu_check.py "$(OUT)"

protos:  ## regenerate the gRPC stubs
	protos/generate.sh

clean:  ## remove what these targets made here; the model and the kernels stay in the user's cache
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

# torch first and exactly: a range would pull gigabytes of CUDA libraries onto a machine without a GPU.
.venv/.installed: pyproject.toml
	@echo "setting up .venv (a minute or two the first time)"
	@$(PYTHON) -m venv .venv
	@echo "  1/2 torch (200 MB)" && $(PIP) torch==2.13.0
	@echo "  2/2 pagestream and its libraries" && $(PIP) --editable .
	@touch $@

.venv/.test: .venv/.installed
	@echo "  installing what the tests need" && $(PIP) --editable '.[test]'
	@touch $@

.venv/.lint: .venv/.installed
	@echo "  installing the linters" && $(PIP) --editable '.[lint]'
	@touch $@

# The folders as the namespace `pagestream`, for tools and machines that do without an installation.
build/tree:
	@mkdir -p build/tree/pagestream
	@for name in server model kernels loadtest; do ln -sfn ../../../$$name build/tree/pagestream/$$name; done
	@ln -sfn ../../../protos/pagestream/v1 build/tree/pagestream/v1
