"""Where a name that no installed plugin provides can be found: what hbcore's own families hold, and what is spelled alike.

Only for messages: lookups do not use these tables. A test compares them with the manifests, so that no hint sends a user to a
package that does not have the name.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from hbcore.registry.origin import pip_line
from hbcore.registry.spec import fold

FAMILIES: Mapping[str, tuple[str, ...]] = {
    "hb_adam": (
        *("SGD", "Adam", "AdamW", "UnscaledAdamW", "NAdam", "RMSprop", "ADOPT", "AdEMAMix", "AdamC", "LaProp", "SignLaProp"),
        *("SUDSAdamW", "SFAdamW", "MSAMLaProp", "SAMWrapper", "Adams", "Adafactor", "SparseAdam", "Lion", "ForeachADOPT"),
        *("ForeachAdEMAMix", "ForeachAdamC", "ForeachAdamW", "ForeachLaProp", "ForeachNAdam", "ForeachRMSprop"),
        *("ForeachSFAdamW", "ForeachSignLaProp", "PaLMForeachSFAdamW", "PaLMSFAdamW", "Adams_ZeRO"),
    ),
    "hb_muon": (*("Muon", "MuonAdamW", "MuonLaProp", "HyperBallAdamW", "OrthoLaProp", "LaPropOrtho", "Scion", "ForeachMuon"),),
    "hb_soap": (
        *("SOAP", "SOLP", "SOAPNAdam", "SOAPAdEMAMix", "SFSOAP", "KLSOAP", "KLShampoo", "HeavySOAP", "HeavySOLP"),
        *("HeavySOAPNAdam", "HeavySOAPAdEMAMix", "HeavyKLSOAP", "HeavyKLShampoo", "ForeachSOAP", "ForeachSOLP"),
        *("ForeachSOAPNAdam", "ForeachSOAPAdEMAMix", "PaLMForeachSOAP", "PaLMSOAP", "PalmForEachSoap"),
        *("PrecondScheduleForeachSOAP", "PrecondScheduleSOAP", "PrecondSchedulePaLMForeachSOAP", "PrecondSchedulePaLMSOAP"),
        *("SFPaLMForeachSOAP", "PrecondScheduleSFPaLMForeachSOAP", "PrecondScheduleSFPaLMSOAP"),
    ),
    "hb_psgd": (
        *("PSGDKron", "PSGDPRO", "QSGD", "LATHER", "PSGDLRA", "ForeachPSGDKron", "ForeachCachedPSGDKron", "CachedPSGDKron"),
        *("ForeachPurePSGD", "PurePSGD", "ForeachDelayedPSGD", "DelayedPSGD", "ForeachCachedDelayedPSGDKron"),
        *("CachedDelayedPSGDKron", "ForeachCachedNewtonPSGD", "NewtonPSGDKron", "NewtonHybrid2PSGDKron", "ForeachPSGDLRA"),
        *("ForeachDelayedPSGDLRA", "DelayedPSGDLRA", "ForeachNewtonPSGDLRA", "NewtonPSGDLRA", "NewtonHybrid2PSGDLRA"),
    ),
}
"""The optimizers and aliases of hbcore's families."""

CODECS: Mapping[str, tuple[str, ...]] = {"hb_ecc": ("bf16+8", "bf16+16", "fp16+8", "fp16+16", "int8", "uint8")}
"""The codecs of hbcore's families."""

# HeavyBall's names that hbcore has no counterpart of -> the nearest one.
_RELATIVES = {"PSGD": "PSGDKron"}
# HeavyBall's old names prefix the optimizer's name with these words: PaLMForeachSFAdamW, NewtonHybrid2PSGDLRA.
_OLD_PREFIXES = re.compile("(?:foreach|cached|delayed|newton|hybrid2|pure|palm|precondschedule|sf(?=palm))*")


class Home(NamedTuple):
    """What a family has for a name: the ``name`` itself, or its nearest relative (``exact`` is false)."""

    plugin: str
    name: str
    exact: bool


def home(key: str) -> Home | None:
    """The home of a folded optimizer name, or of HeavyBall's name for something that hbcore does not have."""
    held = {fold(name): Home(plugin, name, True) for plugin, names in FAMILIES.items() for name in names}
    relatives = {fold(name): held[fold(near)] for name, near in _RELATIVES.items()}
    if found := held.get(key):
        return found
    bare = _OLD_PREFIXES.sub("", key, count=1)
    near = relatives.get(key) or held.get(bare) or relatives.get(bare)
    return near._replace(exact=False) if near else None


def codec_home(name: str) -> Home | None:
    """:func:`home`, of a codec."""
    held = {codec: Home(plugin, codec, True) for plugin, names in CODECS.items() for codec in names}
    return held.get(name.casefold())


def suggestions(name: str, known: Iterable[str], absent: Iterable[str] = ()) -> str:
    """``"Did you mean AdamW? "`` or the empty string.

    Args:
        name: what was asked for; a plugin's prefix does not count.
        known: the names that can be looked up.
        absent: the families that are not installed; their names are suggested with the pip command.
    """
    spelled = {fold(other): f"{other} ({pip_line(plugin)})" for plugin in absent for other in FAMILIES.get(plugin, ())}
    spelled.update((fold(other), other) for other in known)
    close = difflib.get_close_matches(fold(name.rpartition(":")[2]), spelled, n=3, cutoff=0.7)
    return f"Did you mean {', '.join(spelled[key] for key in close)}? " if close else ""
