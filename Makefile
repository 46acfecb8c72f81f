# make demo   trains a small vision transformer plain and with partial forgetting, and compares
# make test   passes the tests: of the long ones, what is drawn for the day; make test CASES=all passes all
# make lint   checks style, types and the direction of imports
# make docs   builds the documentation into build/docs; a broken link or reference is an error
# make hosts  installs hflayers and DeepRC, which are Git repositories; `make test` tries to and goes on without
# make test-lowest  passes the tests with the lowest versions that pyproject.toml allows, in .venv-lowest
# Each builds the environment it needs in .venv, from a Python package index alone.

PYTHON ?= python3
CASES ?= day
# The lowest Python that pyproject.toml allows, where it can be run.
LOWEST_PYTHON ?= $(or $(shell lowest=$$(sed -n 's/^requires-python = ">=\(.*\)"$$/python\1/p' pyproject.toml); \
	$$lowest -c '' 2>/dev/null && echo $$lowest),$(PYTHON))
ENV := .venv
BIN := $(ENV)/bin
# The versions of timm that are tested beside the newest one; each lies in a folder of its own.
TIMM_VERSIONS := 0.6.13 0.9.16 1.0.9 1.0.15 1.0.20
# The same of transformers, each with what it needs in an older version than the newest does.
TRANSFORMERS_VERSIONS := 4.57.6
PIP := $(BIN)/python -m pip --disable-pip-version-check -q

# A repository that cannot be reached shall say so and not wait for a password.
export GIT_TERMINAL_PROMPT := 0

.PHONY: demo test test-lowest lint docs hosts try-hosts clean
.DELETE_ON_ERROR:

demo: $(ENV)/installed
	$(BIN)/python recipes/digits/compare.py --output build/digits

test: $(ENV)/installed $(TIMM_VERSIONS:%=$(ENV)/timm/%) $(ENV)/timm/source \
		$(TRANSFORMERS_VERSIONS:%=$(ENV)/transformers/%) try-hosts
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal --cases $(CASES)

# The same in another environment, where pip is held to the lower bounds.
test-lowest:
	mkdir -p build
	$(PYTHON) tests/lowest.py > build/lowest.txt
	PIP_CONSTRAINT=$(CURDIR)/build/lowest.txt $(MAKE) test ENV=.venv-lowest PYTHON=$(LOWEST_PYTHON)

hosts: $(ENV)/hosts

try-hosts: $(ENV)/installed
	@$(MAKE) --no-print-directory $(ENV)/hosts || echo "hflayers and DeepRC could not be installed: their repositories \
	cannot be reached from here. Their tests will be reported as skipped; LWPF_REQUIRE_HOSTS=1 makes that a failure."

lint: $(ENV)/linters
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Without --quiet: warnings that it hides are no errors under --strict.
docs: $(ENV)/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(ENV) .venv-lowest build dist

$(ENV)/installed: pyproject.toml
	@echo "Building the environment in $(ENV); PyTorch is large, this takes some minutes."
	$(PYTHON) -m venv $(ENV)
	$(PIP) install -e '.[timm,transformers,plots,test]'
	touch $@

$(ENV)/hosts: $(ENV)/installed
	$(PIP) install --upgrade 'pip>=25.1'
	$(PIP) install --group hopfield --group deeprc
	touch $@

$(ENV)/linters: $(ENV)/installed
	$(PIP) install -e '.[dev]'
	touch $@

$(ENV)/site: $(ENV)/installed
	$(PIP) install -e '.[docs]'
	touch $@

$(ENV)/timm/source: $(ENV)/installed
	rm -rf $@ && mkdir -p $@
	version=$$($(BIN)/python -c 'from importlib.metadata import version; print(version("timm"))') && \
	$(PIP) download --no-deps --no-binary timm --dest $@ "timm==$$version" && \
	tar -xzf $@/timm-$$version.tar.gz -C $@ --strip-components 1

$(ENV)/timm/%: $(ENV)/installed
	$(PIP) install --no-deps --target $@ timm==$*

$(ENV)/transformers/%: $(ENV)/installed
	$(PIP) install --no-deps --target $@ transformers==$* 'huggingface-hub>=0.34,<1.0' 'tokenizers>=0.22,<=0.23.0'
