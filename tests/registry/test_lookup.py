"""Names to classes: folding, clashes, aliases, presets, and what is said when there is nothing to be had."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import pytest

from hbcore.errors import AmbiguousNameError, PluginError, UnknownOptimizerError

OLD = (
    "[Alias('OldBase', 'Base', since='0.1', removed_in='0.9', message='See the notes.'), "
    "Alias('FlagBase', 'Base', {'flag': True, 'betas': [0.9]})]"
)


@pytest.mark.parametrize("name", ["PSGDTest", "psgdtest", "PSGD-Test", "psgd_test", "hb_x:PSGDTest", "HB-X:psgd-TEST"])
def test_case_and_separators_do_not_count(site: Any, name: str) -> None:
    site.offer("hb_x", "PSGDTest")
    assert site.registry().get(name).__module__ == "hb_x.rules"


def test_two_plugins_that_claim_a_name_are_both_named_and_others_work(site: Any) -> None:
    site.offer("hb_x", "Same", "Other")
    site.offer("hb_y", "SAME")
    registry = site.registry()
    with pytest.raises(AmbiguousNameError, match=r"hb_x \(hb_x 1\.0\) as 'hb_x:Same' and hb_y .* as 'hb_y:SAME'"):
        registry.get("same")
    assert registry.get("hb_y:same").__module__ == "hb_y.rules"
    assert registry.get("Other").__name__ == "Other"
    assert registry.list_optimizers() == ["Other", "hb_x:Same", "hb_y:SAME"]
    assert registry.list_optimizers("sam*") == ["hb_x:Same", "hb_y:SAME"]
    assert [conflict.name for conflict in registry.conflicts()] == ["Same"]


def test_the_same_meaning_twice_is_no_clash(site: Any) -> None:
    site.offer("hb_x", "Base", aliases="[Alias('PalmForEachX', 'Base'), Alias('PaLMForeachX', 'Base')]")
    site.offer("hb_y", aliases="[Alias('palm_foreach_x', 'hb_x:Base')]")
    registry = site.registry()
    assert registry.conflicts() == []
    with pytest.warns(FutureWarning):
        assert registry.get("palmforeachx") is registry.get("Base")


def test_anothers_clash_leaves_a_plugins_own_aliases_alone(site: Any) -> None:
    site.offer("hb_x", "Base", aliases="[Alias('Old', 'Base')]")
    site.offer("hb_y", "Base", aliases="[Alias('Older', 'hb_x:Base')]")
    site.offer("hb_z", aliases="[Alias('Vague', 'Base')]")
    registry = site.registry()
    with pytest.warns(FutureWarning):
        assert registry.get("Old").__module__ == registry.get("Older").__module__ == "hb_x.rules"
    with pytest.raises(AmbiguousNameError):
        registry.get("Vague")


def test_an_alias_warns_once_at_the_callers_line(site: Any) -> None:
    site.offer("hb_x", "Base", aliases=OLD)
    registry = site.registry()
    with pytest.warns(FutureWarning) as caught:
        line = inspect.currentframe().f_lineno + 1  # type: ignore[union-attr]
        cls = registry.create("OldBase", [1])
    assert [(w.filename, w.lineno) for w in caught] == [(__file__, line)]
    text = str(caught[0].message)
    assert text == "OldBase is another name for Base (since 0.1, to be removed in 0.9); use Base. See the notes."
    assert type(cls) is registry.get("Base")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert registry.get("old_base") is type(cls)


def test_the_warning_of_a_preset_says_what_to_write(site: Any) -> None:
    site.offer("hb_x", "Base", aliases=OLD)
    with pytest.warns(FutureWarning, match=r"use Base\(flag=True, betas=\[0\.9\]\)$"):
        site.registry().get("FlagBase")


def test_a_preset_is_a_cached_real_subclass_with_the_presets_as_defaults(site: Any) -> None:
    site.offer("hb_x", "Base", aliases=OLD)
    registry = site.registry()
    cls, base = registry.resolve("flag-base"), registry.get("Base")
    assert issubclass(cls, base) and cls is not base
    assert cls is registry.resolve("hb_x:FlagBase") is registry.preset_class("FlagBase")
    assert (cls.__module__, cls.__qualname__, cls.__name__) == ("hbcore.presets", "FlagBase", "FlagBase")
    assert str(inspect.signature(cls)) == "(params, lr=0.1, flag=True, *, rank=None, betas=[0.9], **options)"
    assert str(inspect.signature(base)) == "(params, lr=0.1, flag=False, *, rank=None, **options)"
    registry.refresh()
    assert registry.resolve("FlagBase") is cls


def test_what_the_user_passes_wins_over_a_preset(site: Any) -> None:
    site.offer("hb_x", "Base", aliases=OLD)
    cls = site.registry().resolve("FlagBase")
    first, second = cls([1]), cls([1])
    assert first.seen == {"params": [1], "lr": 0.1, "flag": True, "rank": None, "betas": [0.9]}
    assert first.seen["betas"] is not second.seen["betas"]  # no two optimizers share the preset's list
    assert cls([1], flag=False, rank=2).seen["flag"] is False
    assert cls([1], 0.5, "positional").seen["flag"] == "positional"
    with pytest.raises(TypeError, match="positional arguments"):
        cls([1], 0.5, True, "too many")


def test_a_preset_that_the_class_does_not_take_is_the_plugins_error(site: Any) -> None:
    rules = "class Base:\n    def __init__(self, params, lr=1): pass\n"
    site.offer("hb_x", "Base", aliases="[Alias('Old', 'Base', {'nope': 1})]", rules=rules)
    with pytest.raises(PluginError, match=r"'Old' of plugin hb_x .* sets 'nope', which Base does not take"):
        site.registry().get("Old")


def test_only_an_alias_with_a_preset_has_a_preset_class(site: Any) -> None:
    site.offer("hb_x", "Base", aliases=OLD)
    for name in ("Base", "OldBase"):
        with pytest.raises(UnknownOptimizerError, match="has no preset"):
            site.registry().preset_class(name)


def test_an_alias_without_its_target_gives_the_pip_line(site: Any) -> None:
    site.offer("hb_x", aliases="[Alias('OldKron', 'hb_psgd:PSGDKron'), Alias('OldSoap', 'SOAP')]")
    registry = site.registry()
    with pytest.raises(UnknownOptimizerError, match="pip install hb_psgd"):
        registry.get("OldKron")
    with pytest.raises(UnknownOptimizerError, match="pip install hb_soap"):
        registry.info("OldSoap")
    assert registry.list_optimizers(aliases=True) == []


def test_an_alias_of_an_alias_is_refused(site: Any) -> None:
    site.offer("hb_x", "Base", aliases="[Alias('One', 'Base'), Alias('Two', 'One')]")
    with pytest.raises(PluginError, match="itself an alias"):
        site.registry().get("Two")


def test_unknown_names_do_not_claim_a_family_by_accident(site: Any) -> None:
    with pytest.raises(UnknownOptimizerError) as caught:
        site.registry().get("QuantumSGDFlow")
    assert "It comes with" not in str(caught.value)


def test_a_target_that_does_not_import_is_that_optimizers_trouble_until_repaired(site: Any) -> None:
    manifest = """
        @hookimpl
        def hb_optimizers(api):
            return [OptimizerSpec(n, f"hb_x.{n.lower()}:{n}", "") for n in ("Works", "Fails", "Lacks", "Func")]
        """
    modules = {"works": "class Works: pass", "fails": "1 / 0", "lacks": "", "func": "Func = 3"}
    site.install("hb_x", manifest, **modules)
    registry = site.registry()
    assert registry.get("Works").__name__ == "Works"
    with pytest.raises(PluginError, match=r"'Fails' of plugin hb_x \(hb_x 1\.0\) .*ZeroDivisionError") as caught:
        registry.get("Fails")
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    with pytest.raises(PluginError, match="no attribute 'Lacks'"):
        registry.get("Lacks")
    with pytest.raises(PluginError, match="must be a class; it is 3"):
        registry.get("Func")
    site.install("hb_x", manifest, **modules | {"fails": "class Fails: pass", "lacks": "class Lacks: pass"})
    assert registry.get("Fails").__name__ == "Fails"
    assert registry.get("Lacks").__name__ == "Lacks"


def test_create_passes_named_parameters_of_a_module(site: Any) -> None:
    site.offer("hb_x", "Base")

    class Module:
        def named_parameters(self) -> Any:
            yield "weight", 1

    registry = site.registry()
    assert registry.create("Base", Module(), lr=0.5).seen["params"] == [("weight", 1)]
    assert registry.create("Base", [1], lr=0.5).seen == {"params": [1], "lr": 0.5, "flag": False, "rank": None}


def test_list_is_sorted_globbed_and_without_aliases(site: Any) -> None:
    site.offer("hb_x", "Zeta", "AdamB", "AdamA", aliases="[Alias('AdamOld', 'AdamA', {'flag': True})]")
    registry = site.registry()
    assert registry.list_optimizers() == ["AdamA", "AdamB", "Zeta"]
    assert registry.list_optimizers("adam?") == ["AdamA", "AdamB"]
    assert registry.list_optimizers("Adam*", aliases=True) == ["AdamA", "AdamB", "AdamOld"]
    assert registry.list_optimizers("nothing") == []


def test_info_gathers_spec_origin_and_aliases_and_warns_of_nothing(site: Any) -> None:
    site.offer("hb_x", "Base", "Other", aliases=OLD)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        registry = site.registry()
        info, of_alias = registry.info("base"), registry.info("FlagBase")
    assert (info.name, info.plugin, info.distribution, info.version) == ("Base", "hb_x", "hb_x", "1.0")
    assert info.spec.summary == "Base of hb_x" and info.alias is None
    assert info.aliases == ("FlagBase", "OldBase")
    assert of_alias.spec is info.spec and of_alias.alias is not None and of_alias.alias.name == "FlagBase"
    assert registry.info("Other").aliases == ()
