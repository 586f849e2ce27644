"""The generated kernels as sources, as machine code, and as files.

Triton compiles for a GPU without having one: run as a program, this file compiles kernels for ``sm_90`` in a process that
does not interpret, and the tests read the code. What a whole step does on a GPU is ``tests/gpu``'s matter.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hb_adam import SGD, AdamW
from hbcore.api import Context, Optimizer, State, Transform
from hbcore.errors import CompileError

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore:.*param_ecc:hbcore.errors.StateWarning")


@dataclass(frozen=True)
class Draws(Transform):
    """A rule that draws both kinds of numbers."""

    name = "draws"
    draws = 2

    def update(self, u: Tensor, s: State, c: Context) -> tuple[Tensor, dict[str, Tensor]]:
        return u * c.noise(u) + c.probe(u), {}


class Drawing(Optimizer):
    lr: float = 0.1

    @staticmethod
    def chain(h: Any) -> tuple[Transform, ...]:
        return (Draws(),)


CASES = {
    "adamw-float32": (AdamW, torch.float32, {}, True),
    "adamw-float32-loose": (AdamW, torch.float32, {}, False),
    "adamw-float64": (AdamW, torch.float64, {"division_backend": "atan2"}, True),
    "adamw-bfloat16": (AdamW, torch.bfloat16, {"storage_dtype": "bfloat16"}, True),
    "adamw-ecc": (AdamW, torch.float32, {"ecc": "bf16+8", "param_ecc": "bf16+16"}, True),
    "sgd-float16-loose": (SGD, torch.float16, {"nesterov": True, "division_backend": "nan_to_0"}, False),
    "draws": (Drawing, torch.bfloat16, {"stochastic_rounding": True}, True),
    "everything": (
        AdamW,
        torch.float32,
        {
            "caution": True,
            "cautious_weight_decay": True,
            "mars": True,
            "gradient_clipping": "global_l2norm_clip",
            "update_clipping": "trust_region_clip_",
            "capturable": True,
        },
        True,
    ),
}
"""Optimizer, parameter dtype, options, whether every pointer is a multiple of 16 bytes."""

PLAIN = "adamw-float32"


def program_of(cls, dtype, options, **numbers):
    """The traced program of one optimizer after one step, and its executable if it is Triton's."""
    p = nn.Parameter(torch.zeros(4, dtype=dtype))
    optimizer = cls([p], **options, **numbers, compile="eager")
    p.grad = torch.zeros(4, dtype=p.dtype)
    optimizer.step()
    [segment] = optimizer.core.plan.segments.values()
    return segment.program


def source_of(cls, dtype, options, **numbers):
    from hbcore.engine.backends.triton.codegen import module_source

    program = program_of(cls, dtype, options, **numbers)
    return module_source(program, program.label, "0")


def machine_code(folder: Path) -> None:
    """Compile every phase of every case for an H100; leave PTX, Triton's IR and the sources in ``folder``."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from hbcore.engine.backends.triton import cache as triton_cache
    from hbcore.engine.backends.triton.backend import TritonExecutable

    results = {}
    pointers = {"table": "*i64", "chunks": "*i64", "moving": "*i64", "rows": "*fp64", "partials": "*fp64", "model": "*fp64"}
    for name, (cls, dtype, options, aligned) in CASES.items():
        program = program_of(cls, dtype, options)
        source = source_of(cls, dtype, options)
        module = triton_cache.load(source)
        executable = TritonExecutable(program, [], interpreted=False)
        constants = executable.constants(executable.block, aligned)
        types = {**pointers, "n_tensors": "i32", "n_chunks": "i32", **dict.fromkeys(constants, "constexpr")}
        phases = []
        for i in range(len(program.phases)):
            kernel = ASTSource(getattr(module, f"phase_{i}"), types, constants)
            compiled = triton.compile(kernel, target=GPUTarget("cuda", 90, 32), options=next(executable.attempts())[1])
            phases.append({kind: compiled.asm[kind] for kind in ("ptx", "ttir")})
        results[name] = {"phases": phases, "source": source}
    (folder / "code.json").write_text(json.dumps(results))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Name of a case -> its sources and machine code, made by another process with another hash seed."""
    folder = tmp_path_factory.mktemp("sm_90")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"HBCORE_CACHE_DIR": str(folder / "hbcore"), "TRITON_CACHE_DIR": str(folder / "triton"), "PYTHONHASHSEED": "7"}
    command = [sys.executable, "-W", "ignore", __file__, str(folder)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    if done.returncode and re.search("ptxas|No module named 'triton|Cannot find .*backend", done.stderr):
        pytest.skip(f"Triton cannot compile for NVIDIA GPUs here: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "code.json").read_text())


# --- machine code -------------------------------------------------------------------------------------------------------


def test_every_case_compiles_all_its_phases(compiled):
    assert {name: len(case["phases"]) for name, case in compiled.items()} == {
        **dict.fromkeys(CASES, 1),
        "everything": 3,  # the norm of the model, the share that agrees, the rest
    }


@pytest.mark.parametrize(
    ("case", "bits", "width"), [(PLAIN, 32, 4), ("adamw-float64", 64, 2), ("adamw-bfloat16", 32, 4), ("adamw-ecc", 32, 4)]
)
def test_whole_chunks_move_16_bytes_at_a_time(compiled, case, bits, width):
    """Three tensors are written and four are read, at the least; packed narrow numbers travel as 32-bit words."""
    ptx = compiled[case]["phases"][0]["ptx"]
    assert len(re.findall(rf"ld\.global[\w.:]*\.v{width}\.b{bits}", ptx)) >= 4
    assert len(re.findall(rf"st\.global[\w.:]*\.v{width}\.b{bits}", ptx)) >= 3


@pytest.mark.parametrize("case", [name for name in CASES if "loose" in name])
def test_unaligned_tensors_are_read_element_by_element(compiled, case):
    ptx = compiled[case]["phases"][0]["ptx"]
    assert not re.search(r"(ld|st)\.global[\w.:]*\.v[248]", ptx)
    assert re.search(r"st\.global\.b(16|32)", ptx)


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_spilled_to_local_memory(compiled, case):
    for phase in compiled[case]["phases"]:
        assert not re.search(r"\.local\b|__local_depot|\b(ld|st)\.local", phase["ptx"])


@pytest.mark.parametrize(("case", "most"), [(PLAIN, 64), ("adamw-ecc", 128), ("everything", 128)])
def test_ptxas_spills_nothing_either(compiled, case, most, tmp_path):
    """PTX has as many registers as it likes; a multiprocessor has 65536 for all of its threads."""
    import triton

    brought = sorted((Path(triton.__file__).parent / "backends/nvidia/bin").glob("ptxas*"))
    if not brought:
        pytest.skip("this Triton brings no ptxas")
    for phase in compiled[case]["phases"]:
        source = tmp_path / "kernel.ptx"
        source.write_text(phase["ptx"])
        [target] = re.findall(r"\.target (\w+)", phase["ptx"])
        command = [brought[-1], "-v", f"--gpu-name={target}", source, "-o", tmp_path / "kernel.cubin"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        assert re.findall(r"(\d+) bytes spill (?:stores|loads)", said) == ["0", "0"], said
        [registers] = map(int, re.findall(r"Used (\d+) registers", said))
        assert registers <= most


@pytest.mark.parametrize("case", [case for case in CASES if case != "draws"])  # Philox cuts the offset into two words
def test_offsets_into_tensors_are_64_bits_wide(compiled, case):
    for phase in compiled[case]["phases"]:
        offsets = re.findall(r"tt\.addptr %(?:v_|p_)\w+, %\w+ : tensor<\d+x!tt\.ptr<\w+>>, tensor<\d+x(\w+)>", phase["ttir"])
        assert offsets and set(offsets) == {"i64"}
        # the offset of the chunk, and the end of the tensor, arrive as 64 bits and are never cut
        assert re.search(r"%start\w* = tt\.load %start\w* .*: !tt\.ptr<i64>", phase["ttir"])
        assert not re.search(r"arith\.trunci .*: (tensor<\d+x)?i64>? to", phase["ttir"])
        assert re.search(r"add\.s64", phase["ptx"]) and re.search(r"ld\.global\.b64", phase["ptx"])


@pytest.mark.parametrize("case", ["adamw-ecc"])
def test_codecs_are_compiled_without_contracting_floats(case):
    """A fused multiply-add rounds once where the other backends round twice, and an integer codec shows it."""
    from hbcore.engine.backends.triton.backend import TritonExecutable

    cls, dtype, options, _ = CASES[case]
    asked = {}

    class Kernel:
        def warmup(self, *args, **options):
            asked.update(options)
            return self

    program = program_of(cls, dtype, options)
    executable = TritonExecutable(program, [Kernel()], interpreted=False)
    executable.prepare(batch_of(program, [torch.zeros(4)]))
    assert asked["enable_fp_fusion"] is False


# --- 64 bits on the host ------------------------------------------------------------------------------------------------


def batch_of(program, tensors):
    """A batch whose columns all are ``tensors``, with every scalar 1."""
    from hbcore.engine.backends.base import Batch

    columns = {name: [t.to(dtype) if t.numel() < 1000 else t for t in tensors] for name, dtype in program.dtypes.items()}
    return Batch(columns, [0] * len(tensors), [[1.0] * len(program.scalar_names)])


@pytest.mark.parametrize("options", [{}, {"caution": True}])
def test_chunks_tile_a_tensor_of_three_billion_elements(options):
    """Nothing is allocated: the large tensor is one element, expanded."""
    from hbcore.engine.backends.triton.backend import TritonExecutable

    sizes = [5, 3_000_000_000, 2**31, 8193]
    program = program_of(AdamW, torch.float32, options)
    executable = TritonExecutable(program, [], interpreted=True)
    executable.prepare(batch_of(program, [torch.zeros(1).expand(n) for n in sizes]))
    [launch] = executable.tables.launches
    assert launch.chunks.dtype == launch.table.dtype == torch.int64
    of, start = launch.chunks.T
    numel, first, count = launch.table.T[-3:]
    assert numel.tolist() == sizes
    assert int(start.max()) > 2**31
    for i, n in enumerate(sizes):
        expected = torch.arange(0, n, executable.chunk)
        mine = slice(int(first[i]), int(first[i] + count[i]))
        assert torch.equal(start[mine], expected) and bool((of[mine] == i).all())
    assert len(of) == int(count.sum())


# --- sources ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_a_chain_has_one_source_in_every_process(compiled, case):
    """The other process hashed strings with another seed."""
    cls, dtype, options, _ = CASES[case]
    assert source_of(cls, dtype, options) == compiled[case]["source"]
    assert source_of(cls, dtype, options) == source_of(cls, dtype, options)


def test_numbers_are_no_part_of_the_source():
    numbers = {"lr": 0.7, "betas": (0.1, 0.2), "eps": 1e-3, "weight_decay": 0.3, "warmup_steps": 9}
    cls, dtype, options, _ = CASES["everything"]
    assert source_of(cls, dtype, options, **numbers) == source_of(cls, dtype, options)
    sources = {source_of(*CASES[case][:3]) for case in CASES}
    assert len(sources) == len(CASES) - 1  # alignment is the caller's: two cases share one source


def test_a_source_says_where_it_comes_from():
    source = source_of(AdamW, torch.float32, {"caution": True})
    assert source.startswith('"""Generated by hbcore 0 from the chain adam -> caution -> weight_decay -> lr -> apply.')
    compile(source, "kernel", "exec")


# --- the cache ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """``triton_cache`` with a folder of its own, not made yet, and no module kept from one test to the next."""
    from hbcore.engine.backends.triton import cache as triton_cache

    monkeypatch.setenv("HBCORE_CACHE_DIR", str(tmp_path / "deep" / "kernels"))
    before = set(sys.modules)
    yield triton_cache
    for name in set(sys.modules) - before:
        if name.startswith("hbcore_kernel_"):
            del sys.modules[name]


def forget():
    for name in [n for n in sys.modules if n.startswith("hbcore_kernel_")]:
        del sys.modules[name]


def test_a_kernel_is_one_private_file_named_by_its_content(cache):
    source = "VALUE = 1\n"
    assert cache.load(source).VALUE == 1
    folder = Path(os.environ["HBCORE_CACHE_DIR"])
    assert cache.directory() == folder
    digest = hashlib.sha256(source.encode()).hexdigest()
    assert [f.name for f in folder.glob("*") if f.name != "__pycache__"] == [f"hbcore_kernel_{digest[:16]}.py"]  # no .tmp
    if os.name == "posix":
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert all(stat.S_IMODE(f.stat().st_mode) & 0o077 == 0 for f in folder.glob("*.py"))


def test_without_the_variable_the_users_cache_folder_serves(cache, monkeypatch, tmp_path):
    monkeypatch.delenv("HBCORE_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.directory() == tmp_path / "hbcore"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.directory() == tmp_path / ".cache" / "hbcore"


def test_a_source_is_written_and_imported_once(cache):
    first = cache.load("VALUE = []\n")
    assert cache.load("VALUE = []\n") is first
    [file] = cache.directory().glob("*.py")
    before = file.stat()
    forget()
    assert cache.load("VALUE = []\n") is not first  # another process
    assert file.stat().st_mtime_ns == before.st_mtime_ns and file.stat().st_ino == before.st_ino


@pytest.mark.parametrize("content", ["raise SystemExit('ran')\n", "", "VALUE = 2\n"])
def test_a_tampered_file_is_refused_and_does_not_run(cache, content):
    cache.load("VALUE = 1\n")
    [file] = cache.directory().glob("*.py")
    file.write_text(content)
    forget()
    with pytest.raises(CompileError, match="was changed after it was generated; delete it"):
        cache.load("VALUE = 1\n")
    file.unlink()
    assert cache.load("VALUE = 1\n").VALUE == 1


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_a_folder_that_others_can_write_to_is_refused(cache, mode):
    folder = cache.directory()
    folder.mkdir(parents=True)
    folder.chmod(mode)
    with pytest.raises(CompileError, match=r"others can write to .*chmod 700"):
        cache.load("VALUE = 1\n")
    assert not list(folder.iterdir())


def test_a_folder_that_cannot_be_made_says_so(cache, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HBCORE_CACHE_DIR", str(tmp_path / "file" / "kernels"))
    with pytest.raises(CompileError, match=r"cannot be used .*HBCORE_CACHE_DIR"):
        cache.load("VALUE = 1\n")


def test_a_write_that_fails_leaves_nothing_behind(cache, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(CompileError, match=r"cannot be written .*No space left"):
        cache.load("VALUE = 1\n")
    assert not list(cache.directory().iterdir())


def test_a_module_that_fails_to_import_is_not_kept(cache):
    with pytest.raises(ZeroDivisionError):
        cache.load("1 / 0\n")
    assert not [n for n in sys.modules if n.startswith("hbcore_kernel_") and not hasattr(sys.modules[n], "triton")]


if __name__ == "__main__":
    machine_code(Path(sys.argv[1]))
