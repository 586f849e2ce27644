"""Every generated kernel leaves room for others on a multiprocessor, whatever chain and codec it is made from.

As in ``test_triton_codegen.py``, a process that does not interpret compiles for ``sm_90``, and ptxas tells the registers.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import hbcore
from hbcore import OptionError, registry
from hbcore.api import Composite

pytest.importorskip("triton")

MOST = 128
"""Of 65,536 registers a multiprocessor then holds 16 warps, enough to wait for memory in turn."""

SPILLED = 80
"""Bytes written and read. A division of float64 scalars is a call, around which a few registers are kept, once a program
instance: HyperBall, which divides three, keeps 56, and up to 80 with the compiler of Triton 3.6. That one also keeps 72 of
SignLaProp's, six registers, to make do with 32 a thread."""

SHAPES = ((64, 96), (64,))
PACKED = {"param_ecc": "bf16+8", "ecc": "bf16+8"}
OPTIONS = [
    (torch.float32, {}), (torch.bfloat16, {}), (torch.float32, {"ecc": "bf16+8"}), (torch.float32, {"ecc": "bf16+16"}),
    (torch.float32, {"ecc": "int8"}), (torch.float32, {"ecc": "fp16+8"}), (torch.bfloat16, PACKED),
    (torch.bfloat16, {**PACKED, "ecc": "int8"}), (torch.bfloat16, {**PACKED, "stochastic_rounding": True}),
    (torch.bfloat16, {"storage_dtype": "bfloat16", "stochastic_rounding": True}),
    (torch.float32, {"ecc": "bf16+8", "mars": True, "caution": True, "use_ema": True}),
    (torch.bfloat16, {"skip_nonfinite": True, "gradient_clipping": "global_l2norm_clip", "update_clipping": "rmsnorm_clip_"}),
]  # fmt: skip
QUICK = ("AdamW", "SFAdamW", "AdEMAMix")
SKIPPED = ("SAMWrapper", "SplitOpt", "SparseAdam")
PARTS = 8
"""How many tests share the optimizers: one alone would take ten minutes."""


def programs(name, dtype, options):
    """The programs of an optimizer after two steps; none if it does not take the options."""
    cls = hbcore.get(name)
    params = [(f"p{i}", nn.Parameter(torch.ones(shape, dtype=dtype))) for i, shape in enumerate(SHAPES)]
    try:
        optimizer = cls(params, compile="eager", **options)
    except OptionError:
        return []
    for _ in range(2):
        for _, p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    children = optimizer.children if isinstance(optimizer, Composite) else [optimizer]
    segments = [s for child in children for s in child.core.plan.segments.values()]
    return [s.program for s in segments if s.program is not None]


def compiled(program, ptxas, folder):
    """(phase, registers, bytes spilled) of each kernel of a program."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from hbcore.engine.backends.triton import cache as triton_cache
    from hbcore.engine.backends.triton.backend import TritonExecutable
    from hbcore.engine.backends.triton.codegen import module_source

    executable = TritonExecutable(program, [], interpreted=False)
    module = triton_cache.load(module_source(program, program.label, "0"))
    types = dict.fromkeys(("table", "chunks", "moving"), "*i64") | dict.fromkeys(("rows", "partials", "model"), "*fp64")
    types |= dict.fromkeys(("n_tensors", "n_chunks"), "i32")
    types |= dict.fromkeys(executable.constants(executable.block, aligned=True), "constexpr")
    for i in range(len(program.phases)):
        for block, options in executable.attempts():
            source = ASTSource(getattr(module, f"phase_{i}"), types, executable.constants(block, aligned=True))
            ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
            (folder / "kernel.ptx").write_text(ptx)
            [target] = re.findall(r"\.target (\w+)", ptx)
            command = [ptxas, "-v", f"--gpu-name={target}", folder / "kernel.ptx", "-o", folder / "kernel.cubin"]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
            [registers] = map(int, re.findall(r"Used (\d+) registers", said))
            spilled = sum(map(int, re.findall(r"(\d+) bytes spill", said)))
            if executable.accepts(options, registers, spilled):
                break
        yield i, registers, spilled


def main(folder, ptxas, names):
    warnings.simplefilter("ignore")
    found, seen = [], set()
    for name in names:
        for dtype, options in OPTIONS:
            for program in programs(name, dtype, options):
                key = repr([(str(p.graph), p.tensors, p.writes) for p in program.phases]) + repr(program.dtypes)
                if key in seen:
                    continue
                seen.add(key)
                for phase, registers, spilled in compiled(program, ptxas, folder):
                    found.append([name, str(dtype), str(options), program.label, phase, registers, spilled])
    (folder / "registers.json").write_text(json.dumps(found))


def offenders(names, folder):
    import triton

    brought = sorted((Path(triton.__file__).parent / "backends/nvidia/bin").glob("ptxas*"))
    if not brought:
        pytest.skip("this Triton brings no ptxas")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"HBCORE_CACHE_DIR": str(folder / "hbcore"), "TRITON_CACHE_DIR": str(folder / "triton")}
    command = [sys.executable, __file__, str(folder), str(brought[-1]), *names]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=3000)
    if done.returncode and re.search("No module named 'triton|Cannot find .*backend", done.stderr):
        pytest.skip(f"Triton cannot compile for NVIDIA GPUs here: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((folder / "registers.json").read_text())
    assert len(found) >= 8
    return [kernel for kernel in found if kernel[-2] > MOST or kernel[-1] > SPILLED]


@pytest.mark.broad  # half a minute of compiling
def test_kernels_of_common_rules_leave_room_for_others(tmp_path):
    assert offenders(QUICK, tmp_path) == []


@pytest.mark.full  # minutes of compiling
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("part", range(PARTS))
def test_kernels_of_every_rule_leave_room_for_others(tmp_path, part):
    names = [name for name in registry.list_optimizers() if name not in SKIPPED]
    assert offenders(names[part::PARTS], tmp_path) == []


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
