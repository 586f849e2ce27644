"""Who gets a name that several plugins claim, and that no plugin can take a name away from hbcore's own families."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from hbcore.errors import AmbiguousNameError, PluginWarning

RIVAL = "[Alias('{}', 'Rival')]"
# Each plugin: its optimizers and its aliases. The expected winner's plugin, or None for an error that names both.
CASES = {
    "a third party's class against a family's": ({"hb_adam": ("AdamW", "[]"), "zz": ("ADAM_W", "[]")}, "hb_adam"),
    "the order of names does not matter": ({"aa": ("AdamW", "[]"), "hb_adam": ("AdamW", "[]")}, "hb_adam"),
    "a third party's alias against a family's class": (
        {"aa": ("Rival", RIVAL.format("AdamW")), "hb_adam": ("AdamW", "[]")},
        "hb_adam",
    ),
    "a third party's class against a family's alias": (
        {"aa": ("AdamW", "[]"), "hb_adam": ("Rival", RIVAL.format("AdamW"))},
        "hb_adam",
    ),
    "a dangling alias against a family's class": (
        {"aa": ("Rival", "[Alias('AdamW', 'Nobody')]"), "hb_adam": ("AdamW", "[]")},
        "hb_adam",
    ),
    "an alias against a class": ({"aa": ("Rival", RIVAL.format("AdamW")), "zz": ("AdamW", "[]")}, "zz"),
    "two classes of third parties": ({"aa": ("AdamW", "[]"), "zz": ("AdamW", "[]")}, None),
    "two aliases of third parties": ({"aa": ("Rival", RIVAL.format("AdamW")), "zz": ("Foe", "[Alias('AdamW', 'Foe')]")}, None),
    "two families": ({"hb_adam": ("AdamW", "[]"), "hb_muon": ("AdamW", "[]")}, None),
}


@pytest.mark.parametrize("case", CASES)
def test_who_gets_the_name(site: Any, case: str) -> None:
    plugins, winner = CASES[case]
    for name, (optimizer, aliases) in plugins.items():
        site.offer(name, optimizer, aliases=aliases)
    registry = site.registry()
    first, second = plugins
    if winner is None:
        with pytest.raises(AmbiguousNameError, match=f"{first}:AdamW.*{second}:AdamW"):
            registry.get("AdamW")
        assert len(registry.conflicts()) == 1 and registry.shadows() == []
        return
    (loser,) = set(plugins) - {winner}
    with pytest.warns(Warning) as caught:
        cls = registry.get("adamw")
    assert cls.__module__ == f"{winner}.rules"
    (said,) = (str(w.message) for w in caught if w.category is PluginWarning)
    assert f"{winner}:AdamW" in said and f"{loser} ({loser} 1.0) claims it too" in said
    with warnings.catch_warnings():
        warnings.simplefilter("error", PluginWarning)
        assert registry.get("AdamW") is cls, "warned once"
        if "Nobody" not in plugins[loser][1]:
            assert registry.resolve(f"{loser}:AdamW").__module__ == f"{loser}.rules", "the qualified name still works"
    assert registry.conflicts() == [] and [shadow.loser for shadow in registry.shadows()] == [f"{loser} ({loser} 1.0)"]


def test_every_listed_name_and_every_alias_of_info_leads_to_its_own_optimizer(site: Any) -> None:
    site.offer("aa", "AdamW", "Rival", aliases="[Alias('Lion', 'Rival')]")
    site.offer("hb_adam", "AdamW", "Lion")
    registry = site.registry()
    names = registry.list_optimizers(aliases=True)
    assert names == ["AdamW", "Lion", "Rival", "aa:AdamW", "aa:Lion"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PluginWarning)
        homes = {name: registry.resolve(name).__module__ for name in names}
        assert homes == {name: "aa.rules" if name.startswith(("aa", "Rival")) else "hb_adam.rules" for name in names}
        assert registry.info("Rival").aliases == ("aa:Lion",)


def test_an_alias_of_a_name_that_others_claim_means_the_winner(site: Any) -> None:
    site.offer("aa", "AdamW")
    site.offer("hb_adam", "AdamW")
    site.offer("zz", aliases="[Alias('Old', 'AdamW')]")
    assert site.registry().resolve("Old").__module__ == "hb_adam.rules"


def test_no_other_distribution_can_take_a_familys_plugin_name(site: Any) -> None:
    site.offer("hb_adam", "AdamW")
    info = site.path / "aaa-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: aaa\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[hbcore.plugins]\nhb_adam = aaa.plugin\n")
    registry = site.registry()
    (failure,) = registry.failures()
    assert failure.distribution == "aaa" and "taken by hb_adam (hb_adam 1.0)" in failure.cause
    assert registry.resolve("AdamW").__module__ == "hb_adam.rules"


def test_a_class_of_the_core_keeps_its_name(site: Any) -> None:
    site.offer("aa", "SplitOpt")
    registry = site.registry()
    assert registry.get("SplitOpt").__module__ == "hbcore.wrappers.split"
    (shadow,) = registry.shadows()
    assert str(shadow) == (
        "the name 'SplitOpt' means the core's own class; aa (aa 1.0) claims it too, and is found as 'aa:SplitOpt'"
    )
