# make demo   trains a small vision transformer plain and with partial forgetting, and compares
# make test   passes the tests
# make lint   checks style and types
# Each builds the environment it needs in .venv, from a Python package index alone.

PYTHON ?= python3
ENV := .venv
BIN := $(ENV)/bin
# The versions of timm that are tested beside the newest one; each lies in a folder of its own.
TIMM_VERSIONS := 0.6.13 0.9.16 1.0.9 1.0.20
PIP := $(BIN)/python -m pip --disable-pip-version-check -q

.PHONY: demo test lint clean
.DELETE_ON_ERROR:

demo: $(ENV)/installed
	$(BIN)/python recipes/digits/compare.py --output build/digits

test: $(ENV)/installed $(TIMM_VERSIONS:%=$(ENV)/timm/%) $(ENV)/timm/source
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

lint: $(ENV)/linters
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(ENV) build dist

$(ENV)/installed: pyproject.toml
	@echo "Building the environment in $(ENV); PyTorch is large, this takes some minutes."
	$(PYTHON) -m venv $(ENV)
	$(PIP) install -e '.[timm,plots,test]'
	touch $@

$(ENV)/linters: $(ENV)/installed
	$(PIP) install -e '.[dev]'
	touch $@

$(ENV)/timm/source: $(ENV)/installed
	rm -rf $@ && mkdir -p $@
	version=$$($(BIN)/python -c 'from importlib.metadata import version; print(version("timm"))') && \
	$(PIP) download --no-deps --no-binary timm --dest $@ "timm==$$version" && \
	tar -xzf $@/timm-$$version.tar.gz -C $@ --strip-components 1

$(ENV)/timm/%: $(ENV)/installed
	$(PIP) install --no-deps --target $@ timm==$*
