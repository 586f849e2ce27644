"""hb_adam's manifest: its optimizers and their other names, as plain data. Importing this module imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hbcore.api import Alias, Choice, Decay, LogUniform, OptimizerSpec, Uniform, hookimpl

API = (1, 9)

SEARCH: dict[str, Mapping[str, Any]] = {
    # the paper's advice: a learning rate 3 to 10 times smaller than AdamW's, a weight decay as much larger
    "Lion": {
        "lr": LogUniform(1e-4, 3e-2),
        "betas": (Decay(0.8, 0.98), Decay(0.95, 0.999)),
        "weight_decay": LogUniform(1e-3, 10.0),
    },
    # the first of the betas interpolates between two sequences of weights, and is no decay rate
    "SFAdamW": {
        "lr": LogUniform(5e-4, 5e-2),
        "betas": (Uniform(0.8, 0.98), Decay(0.9, 0.999)),
        "weight_decay": LogUniform(1e-4, 1.0),
        "warmup_steps": Choice(0, 10, 30, 100),
    },
    "SAMWrapper": {"ball": LogUniform(1e-3, 1.0)},
}
"""Where ``hbcore tune`` looks for hyperparameters whose roles do not say it."""


def spec(name: str, module: str, summary: str, paper: str, *capabilities: str, small_lr: float | None = None) -> OptimizerSpec:
    """The class ``name`` in ``hb_adam.<module>``."""
    kinds = frozenset(capabilities)
    return OptimizerSpec(name, f"hb_adam.{module}:{name}", summary, paper, kinds, small_lr, SEARCH.get(name, {}))


OPTIMIZERS = (
    spec("SGD", "sgd", "Stochastic gradient descent with momentum",
         "Sutskever et al. 2013, On the importance of initialization and momentum in deep learning", "capturable",
         small_lr=0.1),
    spec("Adam", "adam", "Adam, with a weight decay that regularises the loss",
         "Kingma & Ba 2015, arXiv:1412.6980", "capturable"),
    spec("AdamW", "adamw", "Adam with decoupled weight decay",
         "Loshchilov & Hutter 2019, arXiv:1711.05101", "capturable"),
    spec("UnscaledAdamW", "unscaled", "AdamW whose update keeps the size of the gradient",
         "HeavyBall, https://github.com/HomebrewML/HeavyBall", "capturable"),
    spec("NAdam", "nadam", "Adam with Nesterov's momentum",
         "Dozat 2016, Incorporating Nesterov Momentum into Adam", "capturable"),
    spec("RMSprop", "rmsprop", "The gradient over its root mean square, bias-corrected",
         "Tieleman & Hinton 2012, Neural Networks for Machine Learning, lecture 6.5", "capturable"),
    spec("ADOPT", "adopt", "Adam that converges whatever beta2 is: no gradient is divided by its own square",
         "Taniguchi et al. 2024, arXiv:2411.02853", "capturable", "primes"),
    spec("AdEMAMix", "ademamix", "Adam with a second, slow momentum",
         "Pagliardini, Ablin & Grangier 2024, arXiv:2409.03137", "capturable"),
    spec("AdamC", "adamc", "AdamW whose weight decay follows the learning rate twice",
         "Defazio 2025, arXiv:2506.02285", "capturable"),
    spec("LaProp", "laprop", "Momentum of normalised gradients",
         "Ziyin, Wang & Ueda 2020, arXiv:2002.04839", "capturable"),
    spec("SignLaProp", "laprop", "The signs of LaProp's update, scaled to its norm",
         "HeavyBall, https://github.com/HomebrewML/HeavyBall", "capturable"),
    spec("SUDSAdamW", "suds", "AdamW in a basis with one axis along the gradient's direction of most variance",
         "HeavyBall, https://github.com/HomebrewML/HeavyBall", "matrix", "primes"),
    spec("SFAdamW", "schedule_free", "Schedule-free AdamW: an average of the iterates in place of a learning-rate schedule",
         "Defazio et al. 2024, arXiv:2405.15682", "modes", small_lr=0.005),
    spec("MSAMLaProp", "msam", "LaProp, with the gradient from a point further along the momentum, for flat minima",
         "Becker, Altrock & Risse 2024, arXiv:2401.12033", "capturable", "modes"),
    spec("SAMWrapper", "sam", "Any optimizer, with the gradient from the worst point nearby",
         "Foret et al. 2021, arXiv:2010.01412; Kwon et al. 2021, arXiv:2102.11600", "closure"),
    spec("Adams", "adams", "Adam in a bounded step with no eps, and decay of each matrix's largest singular value",
         "Adams, https://github.com/imoneoi/Adams", "matrix"),
    spec("Adafactor", "adafactor", "Second moments from the means of rows and columns, and steps relative to the parameter",
         "Shazeer & Stern 2018, arXiv:1804.04235", "matrix"),
    spec("SparseAdam", "sparse_adam", "Adam in the rows that have a gradient, for large embeddings",
         "Kingma & Ba 2015, arXiv:1412.6980", "sparse"),
    spec("Lion", "lion", "The sign of a momentum",
         "Chen et al. 2023, arXiv:2302.06675", "capturable", small_lr=0.003),
)  # fmt: skip
"""The optimizers of the Adam family."""

FOREACH = ("ADOPT", "AdEMAMix", "AdamC", "AdamW", "LaProp", "NAdam", "RMSprop", "SFAdamW", "SignLaProp")
"""The optimizers that HeavyBall also calls ``ForeachX``."""

PRESETS = {"PaLMForeachSFAdamW": ("SFAdamW", {"palm": True}), "PaLMSFAdamW": ("SFAdamW", {"palm": True})}
"""HeavyBall's names for an optimizer with other options."""


@hookimpl
def hb_optimizers(api: object) -> tuple[OptimizerSpec, ...]:
    """The optimizers of the Adam family."""
    return OPTIMIZERS


@hookimpl
def hb_aliases(api: object) -> list[Alias]:
    """Names that users of HeavyBall and of adams-torch know."""
    presets = [Alias(name=name, target=target, preset=preset) for name, (target, preset) in PRESETS.items()]
    other = Alias(name="Adams_ZeRO", target="Adams")  # adams-torch's
    return [*(Alias(name=f"Foreach{name}", target=name) for name in FOREACH), *presets, other]
