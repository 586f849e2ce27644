"""Every check, in one tuple."""

from __future__ import annotations

from hbcore.testing import (
    checks_damage,
    checks_gradients,
    checks_hostile,
    checks_numerics,
    checks_protocol,
    checks_shapes,
    checks_state,
)
from hbcore.testing.subject import Check

CHECKS: tuple[Check, ...] = (
    *checks_protocol.CHECKS,
    *checks_gradients.CHECKS,
    *checks_shapes.CHECKS,
    *checks_numerics.CHECKS,
    *checks_state.CHECKS,
    *checks_hostile.CHECKS,
    *checks_damage.CHECKS,
)
