# Works on a machine with nothing but make and Python 3.11 or newer; everything lives in .venv.
PYTHON ?= $(firstword $(foreach name,python3 python3.14 python3.13 python3.12 python3.11 python,$(shell \
	command -v $(name) >/dev/null 2>&1 && $(name) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $(name))))
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
N ?= 10000

.PHONY: install demo test lint fuzz clean

install: $(STAMP)

# Repeated only when pyproject.toml changed, or when the environment is gone.
$(STAMP): pyproject.toml
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or newer found; name one: make install PYTHON=/path/to/python3" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[all,test]'
	touch $@

demo: install
	$(BIN)/python examples/demo.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/mypy

# As many processes as cores, four at most: each needs up to 3 GiB. A test by itself: .venv/bin/python -m pytest FILE
test: lint
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

# `make fuzz N=100000` tries that many random architectures instead of the default suite's few hundred.
fuzz: install
	NIWAKI_FUZZ=$(N) $(BIN)/python -m pytest tests/laws/test_random_architectures.py --timeout=0

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info
	find src tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
