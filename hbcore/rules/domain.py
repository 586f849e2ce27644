"""A rule's place: which part of the model it sees, and where in a chain it stands."""

from __future__ import annotations

from enum import IntEnum


class Domain(IntEnum):
    """The smallest part of the model that a rule must see at once."""

    ELEMENTWISE = 0
    """One element at a time: Adam, Lion, weight decay."""
    TENSOR = 1
    """Elementwise, plus reductions over one tensor: caution, per-tensor clipping."""
    MATRIX = 2
    """A whole matrix: Muon, SOAP, PSGD."""
    MODEL = 3
    """Reductions over the whole model: global clipping. A preconditioner for a whole group is a flat rule of MATRIX."""


ORDER: tuple[str, ...] = (
    "mars",
    "clip_gradient",
    "couple_decay",
    "rule",
    "clip_update",
    "caution",
    "weight_decay",
    "lr",
    "apply",
    "after",
    "parameter_ema",
)
"""Up to ``apply``, or to a rule that owns the application, the update is a step; from there on it is the new parameter.

``codec.write`` comes last: it stores what the chain computed, and is not a transform.
"""
