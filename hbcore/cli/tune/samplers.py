"""Names of samplers and pruners -> Optuna's, and what to use in place of those that are not there."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Callable, Mapping
from typing import NamedTuple

import optuna
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler

from hbcore.errors import OptionError


class Builtin(NamedTuple):
    """A sampler of Optuna's: ``make(seed)``; ``needs`` is a module that it imports beyond Optuna's own requirements.

    With ``reseed``, each trial gets a seed of its own, so that a search that was interrupted proposes what it would have
    proposed. A sequence that depends on one seed throughout must not be reseeded.
    """

    make: Callable[[int], BaseSampler]
    needs: str = ""
    reseed: bool = True


STARTUP = 5  # random trials before a model is fitted

BUILTIN: Mapping[str, Builtin] = {
    "tpe": Builtin(lambda seed: optuna.samplers.TPESampler(seed=seed, n_startup_trials=STARTUP)),
    "random": Builtin(lambda seed: optuna.samplers.RandomSampler(seed=seed)),
    "qmc": Builtin(lambda seed: optuna.samplers.QMCSampler(seed=seed, scramble=True), "scipy", reseed=False),
    "gp": Builtin(lambda seed: optuna.samplers.GPSampler(seed=seed, n_startup_trials=STARTUP), "scipy"),
    "cmaes": Builtin(lambda seed: optuna.samplers.CmaEsSampler(seed=seed, n_startup_trials=STARTUP), "cmaes"),
}
HUB: Mapping[str, tuple[str, str]] = {
    "hebo": ("samplers/hebo", "HEBOSampler"),
    "auto": ("samplers/auto_sampler", "AutoSampler"),
    "implicitnaturalgradient": ("samplers/implicit_natural_gradient", "ImplicitNaturalGradientSampler"),
}
"""Name -> package and class in OptunaHub. HeavyBall's helpers have samplers of these names too."""

OTHER_NAMES: Mapping[str, str] = {"botorch": "gp", "gaussianprocess": "gp", "cma": "cmaes", "autosampler": "auto"}
"""HeavyBall's and other names -> ours. BoTorchSampler is a Gaussian process, which Optuna has of its own."""

NOT_SAMPLERS: Mapping[str, str] = {
    "fastingo": "it is the optimizer inside ImplicitNaturalGradientSampler; pass --sampler implicit-natural-gradient",
    "simpleapibase": "it is a base class; pass --sampler tpe",
    "threadlocal": "it is a helper of AutoSampler; pass --sampler auto",
    "hebobase": "it is a base class; pass --sampler hebo",
}
"""HeavyBall's names that no study can use -> why, and what to pass."""

PRUNERS = ("median", "halving", "none")


def fold(name: str) -> str:
    """``"TPESampler"``, ``"tpe"`` -> ``"tpe"``: case, hyphens, underscores and the ending are ignored."""
    folded = name.replace("-", "").replace("_", "").casefold()
    folded = OTHER_NAMES.get(folded, folded)
    folded = folded.removesuffix("sampler")
    return OTHER_NAMES.get(folded, folded)


def sampler(name: str) -> Builtin:
    """The sampler called ``name``.

    Raises:
        OptionError: there is none, or it needs a package that is not installed; the message says what to use.
    """
    key = fold(name)
    if key in NOT_SAMPLERS:
        raise OptionError(f"--sampler {name}: {NOT_SAMPLERS[key]}")
    if key in HUB:
        return Builtin(lambda seed: _from_hub(name, key, seed), reseed=False)
    if key not in BUILTIN:
        known = [*BUILTIN, *HUB]
        close = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"choose from {', '.join(known)}"
        raise OptionError(f"--sampler {name}: there is no such sampler; {hint}")
    found = BUILTIN[key]
    if found.needs and importlib.util.find_spec(found.needs) is None:
        raise OptionError(f"--sampler {name}: it needs {found.needs}: pip install {found.needs}, or pass --sampler tpe")
    return found


def _from_hub(name: str, key: str, seed: int) -> BaseSampler:
    package, cls = HUB[key]
    instead = "gp or tpe" if key == "hebo" else "cmaes or tpe" if key == "implicitnaturalgradient" else "tpe"
    try:
        import optunahub
    except ModuleNotFoundError as error:
        raise OptionError(
            f"--sampler {name}: it comes from OptunaHub ({package}): pip install optunahub, or pass --sampler {instead}"
        ) from error
    try:
        made: BaseSampler = getattr(optunahub.load_module(package), cls)(seed=seed)
    except Exception as error:  # the network, or a package that the sampler imports
        raise OptionError(
            f"--sampler {name}: OptunaHub's {package} cannot be used: {type(error).__name__}: {error}; pass --sampler {instead}"
        ) from error
    return made


def pruner(name: str, steps: int, every: int) -> BasePruner:
    """The pruner called ``name``, for trials of ``steps`` steps that report every ``every`` steps.

    ``median`` stops a trial that is worse than the median of the earlier ones at the same step, after a third of the steps and
    four trials; ``halving`` is successive halving, which lets the best third of the trials take three times as many steps.

    Raises:
        OptionError: there is none.
    """
    if name == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=STARTUP - 1, n_warmup_steps=steps // 3)
    if name == "halving":
        return optuna.pruners.SuccessiveHalvingPruner(min_resource=every, reduction_factor=3)
    if name == "none":
        return optuna.pruners.NopPruner()
    raise OptionError(f"--pruner {name}: there is no such pruner; choose from {', '.join(PRUNERS)}")
