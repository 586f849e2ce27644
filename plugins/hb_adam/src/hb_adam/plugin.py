"""What hb_adam offers to hbcore, as plain data. Importing this module imports no torch."""

from __future__ import annotations

from hbcore.api import Alias, OptimizerSpec, hookimpl

API = (1, 0)


@hookimpl
def hb_optimizers(api: object) -> list[OptimizerSpec]:
    """The optimizers of the Adam family."""
    return [
        OptimizerSpec(
            name="AdamW",
            target="hb_adam.adamw:AdamW",
            summary="Adam with decoupled weight decay",
            paper="Loshchilov & Hutter 2019, arXiv:1711.05101",
            capabilities=frozenset({"capturable"}),
        ),
        OptimizerSpec(
            name="SFAdamW",
            target="hb_adam.schedule_free:SFAdamW",
            summary="Schedule-free AdamW: an average of the iterates in place of a learning-rate schedule",
            paper="Defazio et al. 2024, arXiv:2405.15682",
            capabilities=frozenset({"modes"}),
        ),
        OptimizerSpec(
            name="SGD",
            target="hb_adam.sgd:SGD",
            summary="Stochastic gradient descent with momentum",
            paper="Sutskever et al. 2013, On the importance of initialization and momentum in deep learning",
            capabilities=frozenset({"capturable"}),
        ),
    ]


@hookimpl
def hb_aliases(api: object) -> list[Alias]:
    """Names that HeavyBall users know."""
    return [Alias(name="ForeachAdamW", target="AdamW"), Alias(name="ForeachSFAdamW", target="SFAdamW")]
