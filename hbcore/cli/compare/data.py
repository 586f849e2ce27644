"""What models are trained on: here text, as bytes, of the standard library or of a file."""

from __future__ import annotations

import hashlib
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from hbcore.errors import OptionError

Batch: TypeAlias = tuple[Tensor, ...]
"""Tensors of one length, the number of examples."""

MAX_BYTES = 16 * 2**20  # a few hundred steps use a fraction of this; reading more would only take time
VALIDATION_SHARE = 0.1
VALIDATION_WINDOWS = 256
_SKIPPED = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})


@dataclass(frozen=True)
class Corpus:
    """Bytes for training and held-out bytes for validation, each a 1-d uint8 tensor on the CPU."""

    name: str
    train: Tensor
    validation: Tensor
    sha256: str

    @property
    def num_bytes(self) -> int:
        """Number of bytes in both parts together."""
        return self.train.numel() + self.validation.numel()


class Data(Protocol):
    """A source of batches."""

    @property
    def name(self) -> str:
        """What a chart calls it."""

    @property
    def size(self) -> str:
        """How much there is, ``"11.6 MB"``; empty if that is not known."""

    @property
    def facts(self) -> dict[str, Any]:
        """For ``compare.json``."""

    def training(self, batch_size: int, seed: int) -> Iterator[Batch]:
        """The batches of one run, from the beginning, on the CPU: they depend on the arguments alone."""

    def validation(self, batch_size: int) -> list[Batch]:
        """The held-out batches, the same for every run."""


@dataclass(frozen=True)
class TextData:
    """Windows of ``context`` bytes of a text, and the same windows shifted by one byte: each ``[batch, context]``, int64."""

    corpus: Corpus
    context: int

    @property
    def name(self) -> str:
        """The text's."""
        return self.corpus.name

    @property
    def size(self) -> str:
        """Of both parts together."""
        return f"{self.corpus.num_bytes / 1e6:.1f} MB"

    @property
    def facts(self) -> dict[str, Any]:
        """For ``compare.json``."""
        return {"name": self.name, "bytes": self.corpus.num_bytes, "sha256": self.corpus.sha256}

    def training(self, batch_size: int, seed: int) -> Iterator[Batch]:
        """Endless random windows of the first part."""
        return training_batches(self.corpus.train, self.context, batch_size, seed)

    def validation(self, batch_size: int) -> list[Batch]:
        """Evenly spaced windows of the second part."""
        return [*validation_batches(self.corpus.validation, self.context, batch_size)]


def _stdlib_files(root: Path) -> list[Path]:
    """Source files under ``root``, without tests and installed packages.

    Sorted by a checksum of the relative path: the same order on every machine, but shuffled, so that the held-out block at
    the end resembles the rest. In alphabetical order it would consist of ``xml`` and ``zipfile``.
    """

    def key(path: Path) -> tuple[int, str]:
        relative = path.relative_to(root).as_posix()
        return zlib.crc32(relative.encode()), relative

    files = (path for path in root.rglob("*.py") if _SKIPPED.isdisjoint(path.relative_to(root).parts))
    return sorted(files, key=key)


def stdlib_source(root: Path | None = None, limit: int = MAX_BYTES) -> bytes:
    """At most ``limit`` bytes of Python source from ``root``, by default the running Python's standard library.

    Unreadable files are skipped; an installation without source files yields ``b""``.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    chunks, size = [], 0
    for path in _stdlib_files(root):
        if size >= limit:
            break
        try:
            chunks.append(path.read_bytes() + b"\n")
        except OSError:
            continue
        size += len(chunks[-1])
    return b"".join(chunks)[:limit]


def load_corpus(file: str | None, context: int) -> Corpus:
    """Read the text and hold out its last tenth for validation.

    Args:
        file: path of a text, or None for the standard library.
        context: sequence length in bytes; each part must contain at least one sequence and the byte after it.

    Raises:
        OptionError: the file cannot be read, or there is too little text.
    """
    if file is None:
        name, text = "Python standard library", stdlib_source()
    else:
        name = Path(file).name
        try:
            with open(file, "rb") as handle:
                text = handle.read(MAX_BYTES)
        except OSError as error:
            raise OptionError(f"--data {file}: {error.strerror or error}") from error
    held_out = int(len(text) * VALIDATION_SHARE)
    if held_out < context + 1:
        needed = int((context + 1) / VALIDATION_SHARE) + 1
        remedy = "this Python has no source files; pass a text with --data FILE" if file is None else "use a longer text"
        raise OptionError(f"{name}: {len(text)} bytes of text, but at least {needed} are needed; {remedy}")
    # bytearray, because torch warns about immutable buffers
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return Corpus(name, data[:-held_out], data[-held_out:], hashlib.sha256(text).hexdigest())


def _windows(data: Tensor, starts: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets ``[len(starts), context]``, int64: the targets are the inputs shifted by one byte."""
    rows = data[starts[:, None] + torch.arange(context + 1)].long()
    return rows[:, :-1], rows[:, 1:]


def training_batches(data: Tensor, context: int, batch_size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless random batches ``[batch_size, context]``; they depend only on ``seed``, not on the global generator."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(data.numel() - context, (batch_size,), generator=generator)
        yield _windows(data, starts, context)


def validation_batches(data: Tensor, context: int, batch_size: int) -> list[tuple[Tensor, Tensor]]:
    """Batches of evenly spaced windows of the held-out bytes: the same for every run, so losses are comparable."""
    last = data.numel() - context - 1
    count = min(VALIDATION_WINDOWS, last + 1)
    starts = torch.linspace(0, last, count, dtype=torch.float64).long()
    return [_windows(data, chunk, context) for chunk in torch.split(starts, batch_size)]
