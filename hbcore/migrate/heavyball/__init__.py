"""HeavyBall 1.7, 2 and 3."""

from __future__ import annotations

from hbcore.checkpoint.foreign import is_heavyball
from hbcore.migrate.heavyball.convert import convert, describe
from hbcore.migrate.source import Source

HEAVYBALL = Source("heavyball", is_heavyball, describe, convert)
