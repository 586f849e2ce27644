"""What is said of names that nobody provides, and that it is true."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest

from hbcore.errors import UnknownOptimizerError
from hbcore.registry import hints


def test_hints_know_every_name_of_the_families_and_no_other() -> None:
    for family, names in hints.FAMILIES.items():
        manifest = import_module(f"{family}.plugin")
        assert set(names) == {each.name for hook in ("hb_optimizers", "hb_aliases") for each in getattr(manifest, hook)(None)}
    for family, names in hints.CODECS.items():
        assert set(names) == {codec.name for codec in import_module(f"{family}.plugin").hb_codecs(None)}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Bsae", r"Did you mean Base\? "),
        ("hb_x:Bsae", r"Plugin hb_x \(hb_x 1\.0\) provides no optimizer 'Bsae'\. Did you mean Base\?"),
        ("hb_x:Other", r"Plugin hb_x \(hb_x 1\.0\) provides no optimizer 'Other'\. 'Other' exists as 'hb_y:Other'\. 'hb"),
        ("nope:Base", r"No plugin named 'nope' is installed\. 'Base' exists as 'hb_x:Base'\. 'hbcore list'"),
        ("nope:Zzz", r"No plugin named 'nope' is installed\. 'hbcore list'"),
        ("nope:SOAP", r"No plugin named 'nope' is installed\. SOAP comes with hb_soap: pip install hb_soap\. 'hb"),
        ("hb_x:SOAP", r"Plugin hb_x .* provides no optimizer 'SOAP'\. SOAP comes with hb_soap: pip install hb_soap\. 'hb"),
        ("hbcore:Nope", "hbcore itself provides no optimizer 'Nope', only SplitOpt and Parallel"),
        ("SOAP", r"No installed plugin provides the optimizer 'SOAP'\. SOAP comes with hb_soap: pip install hb_soap"),
        ("ForeachSOAP", r"ForeachSOAP comes with hb_soap: pip install hb_soap"),
        ("hb_soap:Anything", "No plugin named 'hb_soap' is installed. hb_soap has no such optimizer either; it has SOAP, "),
        ("PrecondScheduleSFPaLMSOAP", r"PrecondScheduleSFPaLMSOAP comes with hb_soap: pip install hb_soap"),
        ("ForeachPSGD", r"nearest relative that hbcore has is PSGDKron \(hb_psgd: pip install hb_psgd\)"),
        ("NewtonHybrid2PSGDLRA", r"NewtonHybrid2PSGDLRA comes with hb_psgd: pip install hb_psgd"),
        ("hb_psgd:QSGD", r"QSGD comes with hb_psgd: pip install hb_psgd"),
        ("PaLMForeachSFAdamW", "comes with hb_adam: pip install hb_adam"),
        ("PSGDKorn", r"Did you mean PSGDKron \(pip install hb_psgd\)"),
        ("q4", r"It is a codec of hb_y \(hb_y 1\.0\): pass ecc='q4' to an optimizer"),
        ("Zzz", "'Zzz'. 'hbcore list' shows every name"),
        ("", "'' names no optimizer. 'hbcore list'"),
        ("hb_x:", "'hb_x:' names no optimizer: nothing follows the colon. 'hbcore list'"),
        (3, "a string such as 'AdamW'; got 3"),
    ],
)
def test_unknown_names_get_a_remedy(site: Any, name: str, said: str) -> None:
    site.offer("hb_x", "Base")
    site.install(
        "hb_y",
        """
        @hookimpl
        def hb_optimizers(api): return [OptimizerSpec("Other", "hb_y.rules:Other", "")]
        @hookimpl
        def hb_codecs(api): return [CodecSpec("q4", "hb_y.rules:Q", "")]
        """,
    )
    with pytest.raises(UnknownOptimizerError, match=said):
        site.registry().get(name)


def test_a_family_that_is_too_old_is_upgraded(site: Any) -> None:
    site.offer("hb_soap", "Older")
    with pytest.raises(UnknownOptimizerError, match=r"SOAP comes with a newer version of hb_soap .*--upgrade hb_soap"):
        site.registry().get("SOAP")
