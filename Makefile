# Every target makes the virtual environment first if it has to; none needs another to have run.
#
#   make demo             train the same model with six optimizers and draw the curves   -> build/demo/
#   make test             the tests
#   make test-full        the tests and the long ones; writes tests/full/result.json
#   make lint             ruff and mypy
#   make wheels           the six wheels                                                 -> dist/
#   make install          only the virtual environment
#   make clean            remove what the others made, the virtual environment included
#
#   make test PYTHON=python3.12     with another Python
#   make test ARGS="-k AdamW"       more arguments for pytest

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
# Processes that run tests; each has one thread.
JOBS ?= 2

PLUGINS := plugins/hb_adam plugins/hb_muon plugins/hb_psgd plugins/hb_soap plugins/hb_ecc
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip

# The installation is keyed by the contents of the files that decide it and by the Python version, not by timestamps:
# a second run, or a checkout that touches files without changing them, installs nothing.
DECIDE := constraints.txt pyproject.toml $(addsuffix /pyproject.toml,$(PLUGINS))
PYVERSION := $(shell $(PYTHON) -c "import platform; print(platform.python_version())")
ifeq ($(PYVERSION),)
$(error '$(PYTHON)' does not run; say which Python to use: make PYTHON=...)
endif
KEY := $(PYVERSION)-$(firstword $(shell cat $(DECIDE) | cksum))
INSTALLED := $(VENV)/.installed-$(KEY)

.PHONY: demo test test-full lint wheels clean install
.DELETE_ON_ERROR:

demo: $(INSTALLED)
	$(BIN)/hbcore compare AdamW SGD Muon SOAP PSGDKron SFAdamW --steps 300 --out build/demo

test: $(INSTALLED)
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

test-full: $(INSTALLED)
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 JOBS=$(JOBS) $(BIN)/python scripts/test_full.py $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# What an earlier build left in build/lib would end up in the wheels, deleted modules included: hence the first line.
wheels: $(INSTALLED)
	rm -rf build/lib build/bdist.* $(addsuffix /build,$(PLUGINS)) dist
	$(PIP) wheel --quiet --no-deps --no-build-isolation --wheel-dir dist . $(addprefix ./,$(PLUGINS))
	@ls dist

install: $(INSTALLED)

$(INSTALLED): | $(VENV)/.python-$(PYVERSION)
	$(PIP) install --quiet -c constraints.txt setuptools wheel
	$(PIP) install --quiet --no-build-isolation -c constraints.txt -e ".[cli,dev]" $(addprefix -e ./,$(PLUGINS))
	@rm -f $(VENV)/.installed-*
	@touch $@

# An environment of the same Python version is kept; one of another version cannot be repaired and is made anew.
$(VENV)/.python-$(PYVERSION):
	@if [ "$$($(BIN)/python -c 'import platform; print(platform.python_version())' 2>/dev/null)" != "$(PYVERSION)" ]; then \
		echo "$(PYTHON) -m venv --clear $(VENV)"; $(PYTHON) -m venv --clear $(VENV); \
	fi
	@touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache *.egg-info \
		$(addsuffix /build,$(PLUGINS)) $(addsuffix /src/*.egg-info,$(PLUGINS))
	find hbcore plugins scripts tests -name __pycache__ -type d -prune -exec rm -rf {} +
