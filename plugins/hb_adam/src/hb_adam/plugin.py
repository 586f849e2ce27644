"""What hb_adam offers to hbcore, as plain data. Importing this module imports no torch."""

from __future__ import annotations

from hbcore.api import Alias, OptimizerSpec, hookimpl

API = (1, 3)

OPTIMIZERS = (
    OptimizerSpec(
        name="SGD",
        target="hb_adam.sgd:SGD",
        summary="Stochastic gradient descent with momentum",
        paper="Sutskever et al. 2013, On the importance of initialization and momentum in deep learning",
        capabilities=frozenset({"capturable"}),
    ),
    OptimizerSpec(
        name="Adam",
        target="hb_adam.adam:Adam",
        summary="Adam, with a weight decay that regularises the loss",
        paper="Kingma & Ba 2015, arXiv:1412.6980",
        capabilities=frozenset({"capturable"}),
    ),
    OptimizerSpec(
        name="AdamW",
        target="hb_adam.adamw:AdamW",
        summary="Adam with decoupled weight decay",
        paper="Loshchilov & Hutter 2019, arXiv:1711.05101",
        capabilities=frozenset({"capturable"}),
    ),
    OptimizerSpec(
        name="UnscaledAdamW",
        target="hb_adam.unscaled:UnscaledAdamW",
        summary="AdamW whose update keeps the size of the gradient",
        paper="HeavyBall, https://github.com/HomebrewML/HeavyBall",
        capabilities=frozenset({"capturable"}),
    ),
    OptimizerSpec(
        name="NAdam",
        target="hb_adam.nadam:NAdam",
        summary="Adam with Nesterov's momentum",
        paper="Dozat 2016, Incorporating Nesterov Momentum into Adam",
        capabilities=frozenset({"capturable"}),
    ),
    OptimizerSpec(
        name="RMSprop",
        target="hb_adam.rmsprop:RMSprop",
        summary="The gradient over its root mean square, bias-corrected",
        paper="Tieleman & Hinton 2012, Neural Networks for Machine Learning, lecture 6.5",
        capabilities=frozenset({"capturable"}),
    ),
    OptimizerSpec(
        name="ADOPT",
        target="hb_adam.adopt:ADOPT",
        summary="Adam that converges whatever beta2 is: no gradient is divided by its own square",
        paper="Taniguchi et al. 2024, arXiv:2411.02853",
        capabilities=frozenset({"capturable", "primes"}),
    ),
    OptimizerSpec(
        name="AdEMAMix",
        target="hb_adam.ademamix:AdEMAMix",
        summary="Adam with a second, slow momentum",
        paper="Pagliardini, Ablin & Grangier 2024, arXiv:2409.03137",
        capabilities=frozenset({"capturable"}),
    ),
    OptimizerSpec(
        name="AdamC",
        target="hb_adam.adamc:AdamC",
        summary="AdamW whose weight decay follows the learning rate twice",
        paper="Defazio 2025, arXiv:2506.02285",
        capabilities=frozenset({"capturable"}),
    ),
    OptimizerSpec(
        name="LaProp",
        target="hb_adam.laprop:LaProp",
        summary="Momentum of normalised gradients",
        paper="Ziyin, Wang & Ueda 2020, arXiv:2002.04839",
        capabilities=frozenset({"capturable"}),
    ),
    OptimizerSpec(
        name="SignLaProp",
        target="hb_adam.laprop:SignLaProp",
        summary="The signs of LaProp's update, scaled to its norm",
        paper="HeavyBall, https://github.com/HomebrewML/HeavyBall",
        capabilities=frozenset({"capturable"}),
    ),
    OptimizerSpec(
        name="SUDSAdamW",
        target="hb_adam.suds:SUDSAdamW",
        summary="AdamW in a basis with one axis along the gradient's direction of most variance",
        paper="HeavyBall, https://github.com/HomebrewML/HeavyBall",
        capabilities=frozenset({"matrix", "primes"}),
    ),
    OptimizerSpec(
        name="SFAdamW",
        target="hb_adam.schedule_free:SFAdamW",
        summary="Schedule-free AdamW: an average of the iterates in place of a learning-rate schedule",
        paper="Defazio et al. 2024, arXiv:2405.15682",
        capabilities=frozenset({"modes"}),
    ),
    OptimizerSpec(
        name="MSAMLaProp",
        target="hb_adam.msam:MSAMLaProp",
        summary="LaProp, with the gradient from a point further along the momentum, for flat minima",
        paper="Becker, Altrock & Risse 2024, arXiv:2401.12033",
        capabilities=frozenset({"modes", "capturable"}),
    ),
    OptimizerSpec(
        name="SAMWrapper",
        target="hb_adam.sam:SAMWrapper",
        summary="Any optimizer, with the gradient from the worst point nearby",
        paper="Foret et al. 2021, arXiv:2010.01412; Kwon et al. 2021, arXiv:2102.11600",
        capabilities=frozenset({"closure"}),
    ),
    OptimizerSpec(
        name="Adams",
        target="hb_adam.adams:Adams",
        summary="Adam in a bounded step with no eps, and decay of each matrix's largest singular value",
        paper="Adams, https://github.com/imoneoi/Adams",
        capabilities=frozenset({"matrix"}),
    ),
    OptimizerSpec(
        name="Adafactor",
        target="hb_adam.adafactor:Adafactor",
        summary="Second moments from the means of rows and columns, and steps relative to the parameter",
        paper="Shazeer & Stern 2018, arXiv:1804.04235",
        capabilities=frozenset({"matrix"}),
    ),
    OptimizerSpec(
        name="SparseAdam",
        target="hb_adam.sparse_adam:SparseAdam",
        summary="Adam in the rows that have a gradient, for large embeddings",
        paper="Kingma & Ba 2015, arXiv:1412.6980",
        capabilities=frozenset({"sparse"}),
    ),
    OptimizerSpec(
        name="Lion",
        target="hb_adam.lion:Lion",
        summary="The sign of a momentum",
        paper="Chen et al. 2023, arXiv:2302.06675",
        capabilities=frozenset({"capturable"}),
    ),
)
"""The optimizers of the Adam family."""

FOREACH = ("ADOPT", "AdEMAMix", "AdamC", "AdamW", "LaProp", "NAdam", "RMSprop", "SFAdamW", "SignLaProp")
"""What HeavyBall also calls ``ForeachX``."""

PRESETS = {"PaLMForeachSFAdamW": ("SFAdamW", {"palm": True}), "PaLMSFAdamW": ("SFAdamW", {"palm": True})}
"""Names of HeavyBall's that stand for options."""


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
