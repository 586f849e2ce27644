"""Run by ``hbcore doctor`` in a separate process: imports what plugins declare, which may abort, hang or exit.

Arguments: a file for the answers, then the questions, each ``"KIND NAME"``. Each answer is one line of JSON, written as soon as
it is known, so that the doctor sees at which question the process ended.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

if __name__ == "__main__":
    # Running by path puts this folder first on sys.path, where list.py and show.py would shadow other modules.
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [path for path in sys.path if os.path.abspath(path or ".") != here]


class _TorchImport:
    """A finder that finds nothing, and notes the line that first imports torch."""

    def __init__(self) -> None:
        self.place = ""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name == "torch" and not self.place:
            frame = sys._getframe(1)
            while frame.f_back is not None and "importlib" in frame.f_code.co_filename:
                frame = frame.f_back
            self.place = f"{frame.f_code.co_filename}, line {frame.f_lineno}"


def manifest(name: str) -> list[str]:
    """Problems of loading the manifests of the plugins with this name. Reasons why one fails are the registry's to report."""
    from hbcore.registry.discovery import Discovery, installed
    from hbcore.registry.loading import PluginFailure

    watch = _TorchImport()
    sys.meta_path.insert(0, watch)
    mine = [point for point in installed() if not isinstance(point, PluginFailure) and point.name == name]
    Discovery(lambda: mine).snapshot()
    if not watch.place:
        return []
    return [
        f"its manifest imports torch ({watch.place}), which makes 'hbcore list' slow, and fail where torch does not work; "
        "import torch in the targets' modules"
    ]


def optimizer(name: str) -> list[str]:
    """Problems of importing the class of an optimizer or alias."""
    from hbcore import registry

    cls = registry.resolve(name)
    base = getattr(getattr(sys.modules.get("torch"), "optim", None), "Optimizer", None)
    if isinstance(base, type) and not issubclass(cls, base):
        return [f"{name}: {cls.__module__}.{cls.__qualname__} is not a subclass of torch.optim.Optimizer"]
    return []


def codec(name: str) -> list[str]:
    """Problems of importing and creating a codec."""
    from hbcore import registry

    made = registry.load_codec(name)()
    if lacking := [part for part in ("name", "rounds", "parts", "read", "write") if not hasattr(made, part)]:
        return [f"codec {name}: {type(made).__qualname__} lacks {', '.join(lacking)}"]
    if made.name != name.rpartition(":")[2]:
        return [f"codec {name}: {type(made).__qualname__}.name is {made.name!r}; checkpoints would not find it"]
    return []


def migrations(name: str) -> list[str]:
    """Problems of a plugin's ``hb_migrations``."""
    from hbcore import registry

    for plugin in registry.plugins():
        if plugin.name == name:
            plugin.migrations()
    return []


def _text(question: str, error: BaseException) -> str:
    from hbcore.errors import HbcoreError

    text = " ".join(str(error).split())
    return text if isinstance(error, HbcoreError) else f"{question}: {type(error).__name__}: {text}"


QUESTIONS = {function.__name__: function for function in (manifest, optimizer, codec, migrations)}


def main(answers: str, questions: list[str]) -> None:
    """Answer the questions in order."""
    for question in questions:
        kind, _, name = question.partition(" ")
        try:
            problems = QUESTIONS[kind](name)
        except (Exception, SystemExit) as error:
            problems = [_text(question, error)]
        with open(answers, "a", encoding="utf-8") as file:
            file.write(json.dumps(problems) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
    sys.stdout.flush()
    os._exit(0)  # what plugins left running, such as threads, must not keep the doctor waiting
