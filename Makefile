# Every target creates the virtual environment first if necessary; no target depends on an earlier one.
#
#   make demo             train the same model with six optimizers and plot the losses   -> build/demo/
#   make test             run the tests, without the long ones
#   make test-full        run all tests, numeric ones at every vector width, and mutants of the engine (hours);
#                         writes tests/full/result.json
#   make lint             run ruff and mypy
#   make docs             build the documentation site                                   -> build/site/
#   make wheels           build the six wheels                                           -> dist/
#   make install          create the virtual environment only
#   make clean            remove everything the other targets created, the environment included
#   make help             print this text
#
#   make test ARGS="-k AdamW"       pass arguments to pytest
#   make test PYTHON=python3.12     use another Python
#   make test-full CASES=folder     also run the scripts of a folder, see scripts/run_cases.py
#   make test CONSTRAINTS=/dev/null VENV=build/newest     test with the newest releases instead of the pinned ones

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
CASES ?=
CONSTRAINTS ?= constraints.txt
# Test processes, of one thread each.
JOBS ?= 2

PLUGINS := plugins/hb_adam plugins/hb_muon plugins/hb_psgd plugins/hb_soap plugins/hb_ecc
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip

# The installation is keyed by the Python version and the contents of the files it depends on, not by timestamps:
# a second run, or a checkout that touches files without changing them, installs nothing.
DECIDE := $(CONSTRAINTS) pyproject.toml $(addsuffix /pyproject.toml,$(PLUGINS))
PYVERSION := $(shell $(PYTHON) -c "import platform; print(platform.python_version())")
ifeq ($(PYVERSION),)
$(error '$(PYTHON)' does not run; choose a Python with make PYTHON=...)
endif
KEY := $(PYVERSION)-$(firstword $(shell cat $(DECIDE) | cksum))
INSTALLED := $(VENV)/.installed-$(KEY)

.PHONY: demo test test-full lint docs wheels clean install help
.DELETE_ON_ERROR:

demo: $(INSTALLED)
	$(BIN)/hbcore compare AdamW SGD Muon SOAP PSGDKron SFAdamW --steps 300 --out build/demo

test: $(INSTALLED)
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

test-full: $(INSTALLED)
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 JOBS=$(JOBS) CASES="$(CASES)" $(BIN)/python scripts/test_full.py $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@test ! -x $(BIN)/lint-imports || $(BIN)/lint-imports  # it needs Python 3.11

docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "open build/site/index.html"

# Remove earlier builds: anything left in build/lib, deleted modules included, would end up in the wheels.
wheels: $(INSTALLED)
	rm -rf build/lib build/bdist.* $(addsuffix /build,$(PLUGINS)) dist
	$(PIP) wheel --quiet --no-deps --no-build-isolation --wheel-dir dist . $(addprefix ./,$(PLUGINS))
	@ls dist

install: $(INSTALLED)

# The comment at the top of this file.
help:
	@sed -n '/^$$/q; s/^# \{0,1\}//p' $(firstword $(MAKEFILE_LIST))

$(INSTALLED): | $(VENV)/.python-$(PYVERSION)
	$(PIP) install --quiet -c $(CONSTRAINTS) "setuptools>=77" wheel
	$(PIP) install --quiet --no-build-isolation -c $(CONSTRAINTS) -e ".[cli,dev]" $(addprefix -e ./,$(PLUGINS))
	$(PIP) install --quiet --no-deps -c $(CONSTRAINTS) timm  # its torchvision fits one build of torch, and breaks imports beside others
	@rm -f $(VENV)/.installed-*
	@touch $@

# Keep an environment of the same Python version; replace one of another version, which cannot be repaired.
$(VENV)/.python-$(PYVERSION):
	@if [ "$$($(BIN)/python -c 'import platform; print(platform.python_version())' 2>/dev/null)" != "$(PYVERSION)" ]; then \
		echo "$(PYTHON) -m venv --clear $(VENV)"; $(PYTHON) -m venv --clear $(VENV); \
	fi
	@touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache *.egg-info \
		$(addsuffix /build,$(PLUGINS)) $(addsuffix /src/*.egg-info,$(PLUGINS))
	find hbcore plugins examples scripts tests -name __pycache__ -type d -prune -exec rm -rf {} +
