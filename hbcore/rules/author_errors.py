"""What a rule raises by mistake, with the rule's name: a stack of engine frames tells an author little."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import FrozenInstanceError

import torch

from hbcore.errors import HbcoreError, RuleError
from hbcore.rules.contract import title
from hbcore.rules.transform import Transform


@contextmanager
def naming(t: Transform, method: str = "update") -> Iterator[None]:
    """Within it ``t.<method>`` runs.

    Raises:
        RuleError: it raised an exception that names no rule, which is the error's cause. hbcore's own errors do name it, and
            a device without memory is not the rule's fault.
    """
    try:
        yield
    except (HbcoreError, torch.OutOfMemoryError):
        raise
    except FrozenInstanceError as error:
        raise RuleError(
            f"{title(t, method)}: {error}; a rule keeps nothing from step to step: declare a slot, or a number in scalars()."
        ) from error
    except Exception as error:
        raise RuleError(f"{title(t, method)} raised {type(error).__name__}: {error}") from error
