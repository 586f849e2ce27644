"""The manifest that hbcore discovers. It names the plugin API it was written for and provides nothing yet."""

from __future__ import annotations

API = (1, 0)
