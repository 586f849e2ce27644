"""Checkpoint files: read without executing anything, written whole or not at all."""

from __future__ import annotations

import os
import re
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hbcore.errors import CheckpointError

PLACES = ("optimizer", "optimizer_state_dict", "optimizer_states", "optim", "opt")
"""Where trainers keep the optimizer's state dict: ``optimizer_states`` is Lightning's list."""

INERT = re.compile(r"(heavyball(\.\w+)*\.[A-Za-z_]\w*|builtins\.object|__builtin__\.object)")
"""The globals that HeavyBall 1 and 2 leave in their param groups, a class and a sentinel: read as names, never imported."""


CONTAINERS = ("collections.defaultdict", "builtins.dict", "__builtin__.dict")
"""What HeavyBall 2 keeps state in, beyond the containers that torch reads by itself: read as plain dicts."""


class Name:
    """A class or an object of another library, of which a checkpoint has the name; nothing of it is imported or run."""

    name = ""

    def __repr__(self) -> str:
        return f"<{type(self).name}>"


class Found(NamedTuple):
    """A state dict in a file.

    Attributes:
        content: the whole file's.
        path: the keys that lead from there to the state dict.
        state_dict: the optimizer's.
    """

    content: Any
    path: tuple[Any, ...]
    state_dict: Any


def read(file: str | Path) -> Any:
    """What ``torch.load(weights_only=True)`` reads from a file, on the CPU.

    Raises:
        CheckpointError: there is no such file, it is damaged, or wants something to be imported; nothing was executed.
    """
    try:
        wanted = _globals(file)
        if foreign := [name for name in wanted if name not in CONTAINERS and not INERT.fullmatch(name)]:
            raise CheckpointError(_refusal(file, foreign[0]))
        with torch.serialization.safe_globals([_stand_in(name) for name in wanted]):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file) or None)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror or error}.") from None
    except Exception as error:  # a damaged file makes the unpickler raise nearly anything
        text = " ".join(str(error).split())
        named = re.search(r"GLOBAL ([\w.]+)", text)
        if named:
            raise CheckpointError(_refusal(file, named[1])) from None
        raise CheckpointError(f"{file} is no checkpoint, or damaged ({type(error).__name__}: {text:.120}).") from None


def _stand_in(name: str) -> Any:
    """What the unpickler takes for the global of that name: an empty class, or for a container a function that makes a dict."""
    module, _, short = name.rpartition(".")
    if name not in CONTAINERS:
        return type(short, (Name,), {"__module__": module, "name": name})

    def empty(*factory: Any) -> dict[Any, Any]:
        return {}

    empty.__module__, empty.__qualname__ = module, short
    return empty


def _globals(file: str | Path) -> list[str]:
    """The globals beyond torch's own that a file wants; only the newer format, a zip file, tells them beforehand."""
    if not zipfile.is_zipfile(file):
        return []
    return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file))


def _refusal(file: str | Path, name: str) -> str:
    return (
        f"{file} is refused: to load it, {name} would have to be imported, and it could run anything. Only tensors, numbers, "
        "strings and containers are read; nothing in it was executed."
    )


def find(content: Any, key: str | None = None) -> Found:
    """The optimizer's state dict in a file's content: at ``key``, itself, or where trainers keep it.

    Raises:
        CheckpointError: there is none, or there are several; the message names the keys.
    """
    if key is not None:
        path = tuple(key.split("."))
        value, taken = content, list[Any]()
        for word in path:
            step, value = _child(value, word, key)
            taken.append(step)
        return Found(content, tuple(taken), value)
    if is_state_dict(content) or not isinstance(content, Mapping):
        return Found(content, (), content)
    candidates = [path for place in PLACES if place in content for path in _in(place, content[place])]
    if len(candidates) == 1:
        [path] = candidates
        value = content
        for word in path:
            value = value[word]
        return Found(content, path, value)
    if candidates:
        keys = ", ".join(".".join(map(str, path)) for path in candidates)
        raise CheckpointError(f"the file has several optimizers' state: choose one with --key: {keys}.")
    held = ", ".join(str(k)[:40] for k in list(content)[:12])
    raise CheckpointError(
        f"no optimizer's state dict is found in the file, which has {held or 'nothing'}; say where: --key KEY."
    )


def _in(place: str, value: Any) -> list[tuple[Any, ...]]:
    if isinstance(value, (list, tuple)):
        return [(place, i) for i, one in enumerate(value) if isinstance(one, Mapping)]
    return [(place,)] if isinstance(value, Mapping) else []


def _child(value: Any, word: str, key: str) -> tuple[Any, Any]:
    if isinstance(value, Mapping):
        for step in (word, int(word) if word.isdigit() else word):
            if step in value:
                return step, value[step]
    elif isinstance(value, (list, tuple)) and word.isdigit() and int(word) < len(value):
        return int(word), value[int(word)]
    raise CheckpointError(f"--key {key}: there is no {word!r}.")


def is_state_dict(value: Any) -> bool:
    """Whether a value has the form of an optimizer's state dict."""
    return isinstance(value, Mapping) and "state" in value and "param_groups" in value


def replaced(found: Found, state_dict: Any) -> Any:
    """The file's content with another state dict in that place; everything else is as it was."""
    return _replaced(found.content, found.path, state_dict)


def _replaced(content: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    first, *rest = path
    if isinstance(content, Mapping):
        return {k: _replaced(v, tuple(rest), value) if k == first else v for k, v in content.items()}
    return [_replaced(v, tuple(rest), value) if i == first else v for i, v in enumerate(content)]


def check_free(file: str | Path, force: bool) -> None:
    """Raise if a file could not be written.

    Raises:
        CheckpointError: it is there, without ``force``; or its folder is not.
    """
    path = Path(file)
    if path.is_dir() or not path.parent.is_dir():
        raise CheckpointError(f"{file} cannot be written: {'it is a folder' if path.is_dir() else 'there is no such folder'}.")
    if path.exists() and not force:
        raise CheckpointError(f"{file} is there already; pass --force to replace it.")


def write(file: str | Path, content: Any, force: bool = False) -> None:
    """Save plain data to a file beside the target, and put it in its place once it is whole and on the disk.

    Raises:
        CheckpointError: the target is there, without ``force``; it cannot be written; or the content is not plain data.
    """
    check_free(file, force)
    path, temporary = Path(file), ""
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp", delete=False) as stream:
            temporary = stream.name
            torch.save(content, stream)
            stream.flush()
            os.fsync(stream.fileno())
        if rest := _globals(temporary):
            raise CheckpointError(
                f"the rest of the file has {rest[0]}, which is not plain data; choose the optimizer with --key."
            )
        _like_others(temporary, path)
        os.replace(temporary, path)
        temporary = ""
    except OSError as error:
        raise CheckpointError(f"{file} cannot be written: {error.strerror or error}.") from None
    finally:
        if temporary:
            Path(temporary).unlink(missing_ok=True)


def _like_others(temporary: str, path: Path) -> None:
    """The permissions that a new file gets here, or that the replaced one has; temporary files are private."""
    if path.exists():
        mode = path.stat().st_mode & 0o777
    else:
        mask = os.umask(0)
        os.umask(mask)
        mode = 0o666 & ~mask
    os.chmod(temporary, mode)
