"""The factors of a stack of blocks as a rule holds them in a step."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from hb_psgd import kron
from hbcore.api import Context


class Held(NamedTuple):
    """The factors of a stack, as they are stored.

    Attributes:
        q: of Q, for each dimension.
        p: of P, for each dimension; None where none is kept.
        bounds: the running bounds, each ``[B]``.
        share: ``[B]``, the multiple of the identity that is to be added to ``q``: in blocks that start in this step. None for
            0 everywhere.
        whole: ``[B]``, that of all of P, a power of the same.
    """

    q: list[Tensor]
    p: list[Tensor | None]
    bounds: list[Tensor]
    share: Tensor | None = None
    whole: Tensor | None = None

    def begun(self) -> Held:
        """The factors with what starts in this step: copies, which are not kept longer than they are needed."""
        if self.share is None:
            return self
        square = self.share.square()
        p = [None if p is None else kron.begin([p], square)[0] for p in self.p]
        return Held(kron.begin(self.q, self.share), p, self.bounds)

    def precondition(self, x: Tensor, c: Context, out: Tensor | None = None) -> Tensor:
        """:math:`P x`, by factors that have begun; perhaps in the memory ``out``."""
        return kron.precondition(x, self.q, c.products, self.p, out)

    def precondition_begun(self, x: Tensor, c: Context) -> Tensor:
        """The same by factors some of which begin in this step, and are zeros so far."""
        made = self.precondition(x, c)
        return made if self.whole is None else made.addcmul_(x, kron.per_block(self.whole, x))


def slots_of(held: Held) -> dict[str, Tensor]:
    """The factors by the names of their slots."""
    slots = {f"{letter}_{i}": t for letter, some in (("Q", held.q), ("L", held.bounds)) for i, t in enumerate(some)}
    return slots | {f"P_{i}": p for i, p in enumerate(held.p) if p is not None}
