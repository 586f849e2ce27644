#!/usr/bin/env bash
# Build the six wheels, install them where no checkout can be seen, and use them; and a third party's, made by `hbcore new-plugin`.
#
# An editable install finds modules that the wheels lack, and the working directory hides missing packages; so this installs
# into a new environment under a temporary directory and runs from there.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT

cd "$root"
make --no-print-directory wheels
wheels=("$root"/dist/*.whl)
if [ "${#wheels[@]}" -ne 6 ]; then
    echo "check_wheels: expected 6 wheels, found ${#wheels[@]}" >&2
    exit 1
fi

"${PYTHON:-python3}" -m venv "$place/venv"
"$place/venv/bin/python" -m pip install --quiet -c constraints.txt "${wheels[@]}" pytest numpy setuptools wheel

mkdir "$place/elsewhere"
cd "$place/elsewhere"
"$place/venv/bin/hbcore" list | tee listed.txt
for name in AdamW SGD; do
    if ! grep -qw "$name" listed.txt; then
        echo "check_wheels: 'hbcore list' does not print $name" >&2
        exit 1
    fi
done

# -I: neither the working directory nor PYTHONPATH may help.
"$place/venv/bin/python" -I - "$place/venv" <<'PY'
import importlib
import pathlib
import sys

import torch

import hbcore

venv = pathlib.Path(sys.argv[1]).resolve()
for name in ("hbcore", "hb_adam", "hb_muon", "hb_psgd", "hb_soap", "hb_ecc"):
    home = pathlib.Path(importlib.import_module(name).__file__).resolve().parent
    assert home.is_relative_to(venv), f"{name} comes from {home}"
    assert (home / "py.typed").exists(), f"the wheel of {name} lacks py.typed"

for name in ("AdamW", "SGD"):
    weight = torch.nn.Parameter(torch.ones(4))
    optimizer = hbcore.get(name)([weight], lr=0.1)
    weight.square().sum().backward()
    optimizer.step()
    assert (weight < 1).all(), f"{name} did not move the parameter downhill: {weight}"
print("check_wheels: the six wheels install, list and train")
PY

# A third party's package: made, built, installed beside the six, and tested where it is installed.
"$place/venv/bin/hbcore" new-plugin hb_sigma --author "check_wheels"
"$place/venv/bin/python" -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$place/made" ./hb_sigma
"$place/venv/bin/python" -m pip install --quiet --no-deps "$place"/made/hb_sigma-*.whl
"$place/venv/bin/hbcore" list | tee listed.txt
if ! grep -qw Sigma listed.txt; then
    echo "check_wheels: 'hbcore list' does not print Sigma, which hb_sigma provides" >&2
    exit 1
fi
"$place/venv/bin/python" -I - "$place/venv" <<'PY'
import pathlib
import sys

import hb_sigma

home = pathlib.Path(hb_sigma.__file__).resolve().parent
assert home.is_relative_to(pathlib.Path(sys.argv[1]).resolve()), f"hb_sigma comes from {home}"
assert (home / "py.typed").exists(), "the wheel of hb_sigma lacks py.typed"
PY
(cd hb_sigma && "$place/venv/bin/python" -I -m pytest -q -p no:cacheprovider)
echo "check_wheels: a new plugin builds, installs, lists and passes its tests"
