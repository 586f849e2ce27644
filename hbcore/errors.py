"""All exceptions and warnings raised by hbcore.

Each also derives from the built-in exception that torch raises in the same situation, so code written for ``torch.optim``
(``except ValueError``) keeps working. Messages give the value, the allowed range and the remedy, and name the parameter or
the plugin.
"""

from __future__ import annotations


class HbcoreError(Exception):
    """Base class of all hbcore exceptions."""


class HyperparameterError(HbcoreError, ValueError):
    """A hyperparameter is outside its bounds: ``lr=-1``, ``betas=(1.0, 0.9)``."""


class OptionError(HbcoreError, TypeError):
    """An option is unknown, was removed, or is not supported by this optimizer."""


class ParameterError(HbcoreError, ValueError):
    """The ``params`` argument is invalid: empty, duplicated, not floating point, or of an unsupported shape."""


class ParameterTypeError(ParameterError, TypeError):
    """The ``params`` argument has the wrong type: a bare tensor, a string."""


class RuleError(HbcoreError, ValueError):
    """A rule breaks the protocol, or a chain is inconsistent: two transforms claim one slot, a rule mutates its arguments."""


class SparseGradientError(ParameterError, RuntimeError):
    """A parameter has a sparse gradient where a dense one is required, or vice versa."""


class TraceError(HbcoreError, RuntimeError):
    """A rule violates the tracing contract: a raw reduction, a branch on a hyperparameter, a length used as a number."""


class CompileError(HbcoreError, RuntimeError):
    """A backend cannot run a graph on this machine. The engine catches it and falls back to the next backend."""


class CheckpointError(HbcoreError, ValueError):
    """A state dict does not fit the optimizer it is loaded into. The optimizer is unchanged when this is raised."""


class RegistryError(HbcoreError):
    """Base class of errors about names and plugins."""


class UnknownOptimizerError(RegistryError, LookupError):
    """No installed plugin provides the name. The message suggests similar names and, for known families, a pip command."""


class UnknownCodecError(RegistryError, LookupError):
    """No installed plugin provides the codec. The message lists the installed ones and suggests similar names."""


class AmbiguousNameError(RegistryError, LookupError):
    """Two plugins provide the same short name. The message names both; ``plugin:Name`` selects one."""


class PluginError(RegistryError, ImportError):
    """The plugin that provides the name is installed but broken. The message names its distribution and the cause."""


class HbcoreWarning(UserWarning):
    """Base class of all hbcore warnings."""


class FallbackWarning(HbcoreWarning):
    """The requested backend is unavailable, and the next one runs with the same results; or a rule cannot be fused."""


class PluginWarning(HbcoreWarning):
    """A plugin was disabled: it fails to import, requires another API version, or claims names it does not own."""


class StateWarning(HbcoreWarning):
    """A checkpoint was converted on load: its codec, a dtype or a structural setting differs."""
