"""HeavyBall 3.2's Heavy forms: second moments are rotated with the basis, and the KL forms leave out empty directions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from hb_soap.kl import KLSOAP, KLShampoo
from hb_soap.rule import PreconditionBySOAP
from hb_soap.soap import SOAP, SOLP, SOAPAdEMAMix, SOAPNAdam
from hbcore.api import Route, Transform


def heavy(chain: Iterable[Transform]) -> tuple[Transform, ...]:
    r"""A chain of the family in its Heavy form.

    .. math::
        v \leftarrow (R_0^{\circ 2})^\top v R_1^{\circ 2} \quad\text{with } R_i = Q_i^\top Q_i' \qquad
        d_i^{-1} = 0 \text{ where } d_i \le \epsilon

    The first is what becomes of second moments whose elements are independent; SOAP leaves them with their columns.
    """
    return tuple(replace(t, then=tuple(map(_heavy, t.then))) if isinstance(t, Route) else t for t in chain)


def _heavy(t: Transform) -> Transform:
    assert isinstance(t, PreconditionBySOAP)
    return replace(t, rotate_squares=True, covariance="plain" if t.covariance == "plain" else "kl_inverse")


class HeavySOAP(SOAP):
    r"""SOAP whose second moments are rotated with the basis, by HeavyBall 3.2: :math:`v \leftarrow (R^{\circ 2})^\top v`.

    Args and state are those of :class:`SOAP`.
    """

    @staticmethod
    def chain(h: Any) -> tuple[Transform, ...]:
        return heavy(SOAP.chain(h))


class HeavySOLP(SOLP):
    """SOLP whose second moments are rotated with the basis, see :class:`HeavySOAP`."""

    @staticmethod
    def chain(h: Any) -> tuple[Transform, ...]:
        return heavy(SOLP.chain(h))


class HeavySOAPNAdam(SOAPNAdam):
    """SOAPNAdam whose second moments are rotated with the basis, see :class:`HeavySOAP`."""

    @staticmethod
    def chain(h: Any) -> tuple[Transform, ...]:
        return heavy(SOAPNAdam.chain(h))


class HeavySOAPAdEMAMix(SOAPAdEMAMix):
    """SOAPAdEMAMix whose second moments are rotated with the basis, see :class:`HeavySOAP`."""

    @staticmethod
    def chain(h: Any) -> tuple[Transform, ...]:
        return heavy(SOAPAdEMAMix.chain(h))


class HeavyKLSOAP(KLSOAP):
    """KLSOAP whose second moments are rotated with the basis, see :class:`HeavySOAP`, and whose inverses are pseudo-inverses:
    eigenvalues of at most ``eps`` are left out."""

    @staticmethod
    def chain(h: Any) -> tuple[Transform, ...]:
        return heavy(KLSOAP.chain(h))


class HeavyKLShampoo(KLShampoo):
    """KLShampoo whose factors are pseudo-inverted: eigenvalues of at most ``eps`` are left out of what they average."""

    @staticmethod
    def chain(h: Any) -> tuple[Transform, ...]:
        return heavy(KLShampoo.chain(h))
