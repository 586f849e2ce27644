"""Every exception and warning that hbcore raises, in one place.

Each one also derives from the built-in that torch would have raised in the same spot, so that code written for
``torch.optim`` (``except ValueError``) keeps working. A message gives the value, the allowed range and the remedy, and names
the parameter or the plugin.
"""

from __future__ import annotations


class HbcoreError(Exception):
    """Base of everything hbcore raises on purpose."""


class HyperparameterError(HbcoreError, ValueError):
    """A hyperparameter lies outside its bounds: ``lr=-1``, ``betas=(1.0, 0.9)``."""


class OptionError(HbcoreError, TypeError):
    """An option that does not exist, was removed, or that this optimizer cannot honour."""


class ParameterError(HbcoreError, ValueError):
    """The ``params`` argument is unusable: empty, duplicated, not floating point, of a shape the rule refuses."""


class ParameterTypeError(ParameterError, TypeError):
    """The ``params`` argument is of the wrong type: a bare tensor, a string."""


class RuleError(HbcoreError, ValueError):
    """A chain contradicts itself: two transforms claim one slot."""


class SparseGradientError(ParameterError, RuntimeError):
    """A parameter has a sparse gradient where a dense one is needed, or the other way round."""


class TraceError(HbcoreError, RuntimeError):
    """A rule broke the tracing contract: a raw reduction, a branch on a hyperparameter, a length turned into a number."""


class CompileError(HbcoreError, RuntimeError):
    """A backend cannot run a graph on this machine. The engine catches it and falls back to the next backend."""


class CheckpointError(HbcoreError, ValueError):
    """A state dict does not fit the optimizer it is loaded into. Nothing was changed when this is raised."""


class RegistryError(HbcoreError):
    """Base of the errors about names and plugins."""


class UnknownOptimizerError(RegistryError, LookupError):
    """No installed plugin provides the name. The message has suggestions and, for known families, the pip line."""


class AmbiguousNameError(RegistryError, LookupError):
    """Two plugins claim one short name. The message names both; ``plugin:Name`` picks one."""


class PluginError(RegistryError, ImportError):
    """The plugin that provides the name is installed and does not work. The message has its distribution and cause."""


class HbcoreWarning(UserWarning):
    """Base of hbcore's warnings."""


class FallbackWarning(HbcoreWarning):
    """The asked-for backend is not to be had here; the next one runs, with the same results."""


class PluginWarning(HbcoreWarning):
    """A plugin disabled itself: it does not import, asks for another API, or claims what is not its own."""


class StateWarning(HbcoreWarning):
    """A checkpoint was converted on its way in: a codec, a dtype or a structural setting differs."""
