"""Maps names to optimizers: which plugins are installed, what each provides, and why a plugin fails.

Plain data throughout; importing this package imports neither torch nor a plugin. The functions here are methods of the
process-wide :class:`Registry`; ``Registry(source)`` creates a separate one.
"""

from __future__ import annotations

from hbcore.registry.discovery import BlockedPlugin
from hbcore.registry.hookspecs import DoctorReport
from hbcore.registry.index import Conflict, Shadow
from hbcore.registry.loading import Plugin, PluginFailure
from hbcore.registry.lookup import Registry
from hbcore.registry.spec import Alias, CodecSpec, OptimizerInfo, OptimizerSpec

__all__ = [
    "Alias",
    "BlockedPlugin",
    "CodecSpec",
    "Conflict",
    "DoctorReport",
    "OptimizerInfo",
    "OptimizerSpec",
    "Plugin",
    "PluginFailure",
    "Registry",
    "Shadow",
    "block",
    "blocked",
    "codec_info",
    "codecs",
    "conflicts",
    "create",
    "dangling",
    "default",
    "examine",
    "failures",
    "get",
    "info",
    "list_optimizers",
    "load_codec",
    "migrations",
    "plugins",
    "preset_class",
    "reason_blocked",
    "refresh",
    "resolve",
    "shadows",
    "unblock",
]

default = Registry()

# Bound methods, so that each signature and docstring is written once.
get = default.get
create = default.create
info = default.info
list_optimizers = default.list_optimizers
resolve = default.resolve
preset_class = default.preset_class
codecs = default.codecs
codec_info = default.codec_info
load_codec = default.load_codec
migrations = default.migrations
examine = default.examine
plugins = default.plugins
failures = default.failures
blocked = default.blocked
conflicts = default.conflicts
dangling = default.dangling
shadows = default.shadows
block = default.block
unblock = default.unblock
reason_blocked = default.reason_blocked
refresh = default.refresh
