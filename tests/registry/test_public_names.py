"""`import hbcore`, `from hbcore import AdamW`, `hbcore.presets` and `hbcore.api`, each in a fresh interpreter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import hbcore
from hbcore import api, errors

Run = Callable[[str], str]


def test_importing_hbcore_loads_next_to_nothing(run_python: Run) -> None:
    heavy = "{'torch', 'pluggy', 'importlib_metadata', 'hbcore.registry', 'hbcore.errors'}"
    assert run_python(f"import sys, hbcore; print({heavy} & set(sys.modules))") == "set()"


def test_the_registry_and_the_api_need_no_torch(run_python: Run, site: Any) -> None:
    site.offer("hb_x", "Base", aliases="[Alias('Old', 'Base', {'flag': True})]")
    code = """
        import sys
        sys.modules["torch"] = None  # any import of it raises
        import hbcore, hbcore.api
        hbcore.block("hb_x"), hbcore.unblock("hb_x")
        print(hbcore.list_optimizers(), hbcore.info("old").name, hbcore.create("Base", [1]).seen["params"])
        """
    assert run_python(code) == "['Base'] Base [1]"


def test_every_public_name_but_the_engines_resolves_and_is_listed() -> None:
    for name in set(hbcore.__all__) - {"Optimizer"}:
        assert getattr(hbcore, name) is not None
    assert set(hbcore.__all__) <= set(dir(hbcore))
    every = {n for n, v in vars(errors).items() if isinstance(v, type) and issubclass(v, (Exception, Warning))}
    assert every <= set(hbcore.__all__)


def test_an_optimizer_is_importable_and_an_alias_warns_at_that_line(run_python: Run, site: Any) -> None:
    site.offer("hb_x", "Base", aliases="[Alias('Old', 'Base')]")
    code = """
        import warnings
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            from hbcore import Base
            from hbcore import Old
        import hbcore
        print(Old is Base is hbcore.Base is hbcore.get("base"), [(w.filename, w.lineno) for w in caught])
        """
    assert run_python(code) == "True [('<string>', 6)]"


def test_a_name_that_does_not_exist_keeps_the_registrys_message(run_python: Run, site: Any) -> None:
    site.offer("hb_x", "Base")
    code = """
        import hbcore
        try: hbcore.Bsae
        except AttributeError as error: print("Did you mean Base?" in str(error), hasattr(hbcore, "Bsae"))
        try: from hbcore import PSGDKron
        except ImportError as error: print("hb_psgd" in str(error))
        """
    assert run_python(code) == "True False\nTrue"


def test_a_broken_optimizer_raises_its_cause_from_an_import(run_python: Run, site: Any) -> None:
    site.offer("hb_x", "Base", rules="1 / 0")
    code = """
        try: from hbcore import Base
        except ImportError as error: print(type(error).__name__, type(error.__cause__).__name__)
        """
    assert run_python(code) == "PluginError ZeroDivisionError"


@pytest.mark.parametrize("module", ["hbcore", "hbcore.presets"])
@pytest.mark.parametrize("name", ["__wrapped__", "_Private", "adamw", "__path__x"])
def test_probing_for_other_names_starts_no_scan(run_python: Run, module: str, name: str) -> None:
    code = f"import sys, {module}; print(hasattr({module}, {name!r}), 'hbcore.registry' in sys.modules)"
    assert run_python(code) == "False False"


def test_a_preset_class_pickles_by_name_without_a_warning(run_python: Run, site: Any) -> None:
    site.offer("hb_x", "Base", aliases="[Alias('FlagBase', 'Base', {'flag': True}), Alias('Plain', 'Base')]")
    pickled = run_python(
        """
        import hbcore, pickle, warnings
        warnings.simplefilter("ignore")
        cls = hbcore.get("flagbase")
        assert pickle.loads(pickle.dumps(cls)) is cls
        print(pickle.dumps(cls([7])).hex())
        """
    )
    code = f"""
        import pickle, warnings
        warnings.simplefilter("error")
        loaded = pickle.loads(bytes.fromhex("{pickled}"))
        print(type(loaded).__qualname__, loaded.seen["params"], loaded.seen["flag"])
        import hbcore.presets
        print([hasattr(hbcore.presets, name) for name in ("FlagBase", "Plain", "Base", "Nothing")])
        """
    assert run_python(code) == "FlagBase [7] True\n[True, False, False, False]"


def test_the_api_names_what_plugins_may_use() -> None:
    assert api.API_VERSION == (1, 9)
    assert set(api.__all__) <= set(dir(api))
    with pytest.raises(AttributeError, match="plugins may use API_VERSION, Alias"):
        api.no_such_name  # noqa: B018
    with pytest.raises(ImportError):
        from hbcore.api import Nothing  # noqa: F401


def test_the_apis_rule_names_resolve() -> None:
    pytest.importorskip("hbcore.optimizer")
    for name in api.__all__:
        assert getattr(api, name) is not None


def test_a_preset_of_a_real_optimizer_sets_its_options(run_python: Run, site: Any) -> None:
    pytest.importorskip("hbcore.optimizer")
    rules = """
        from hbcore.api import Optimizer
        from hbcore.rules.moments import ScaleByAdam
        class Tiny(Optimizer):
            def __init__(self, params, lr=1e-3, betas=(0.9, 0.99), eps=1e-8, **options):
                super().__init__(params, {"lr": lr, "betas": betas, "eps": eps}, options)
            @staticmethod
            def chain(h):
                return (ScaleByAdam(h.betas, h.eps),)
        """
    aliases = "[Alias('Preset', 'Tiny', {'lr': 0.5, 'caution': True})]"
    site.offer("hb_x", "Tiny", aliases=aliases, rules=rules)
    code = """
        import copy, inspect, pickle, torch, hbcore, warnings
        warnings.simplefilter("ignore")
        model = torch.nn.Linear(2, 2)
        optimizer = hbcore.create("preset", model)
        shown = inspect.signature(type(optimizer)).parameters
        print(optimizer.param_groups[0]["lr"], shown["lr"].default, shown["caution"].default)
        print(optimizer.param_groups[0]["param_names"], optimizer.settings.caution)
        print(hbcore.create("preset", model.parameters(), caution=False).settings.caution)
        print(isinstance(optimizer, (torch.optim.Optimizer, hbcore.Optimizer)), type(copy.deepcopy(optimizer)).__name__)
        """
    assert run_python(code).splitlines() == ["0.5 0.5 True", "['weight', 'bias'] True", "False", "True Preset"]
