"""The line of a rule that an error message names."""

from __future__ import annotations

import os
import sys

import torch

from hbcore.rules import contract as contract_module
from hbcore.rules import transform as transform_module

ENGINE = f"{os.path.dirname(os.path.dirname(os.path.abspath(__file__)))}{os.sep}"


def where() -> str:
    """``file:line`` of the innermost frame in a rule, for error messages."""
    frame = sys._getframe(1)
    skip = (f"{torch.__path__[0]}{os.sep}", ENGINE, transform_module.__file__, contract_module.__file__)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(skip):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"
