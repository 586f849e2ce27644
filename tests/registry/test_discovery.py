"""Broken plugins disable themselves alone, say so once, and come back after a repair."""

from __future__ import annotations

import os
import sys
import threading
import warnings
from typing import Any

import pytest

from hbcore import registry as package
from hbcore.errors import PluginError, PluginWarning, RegistryError, UnknownOptimizerError
from hbcore.registry import Registry
from hbcore.registry.discovery import installed

RAISING = "@hookimpl\ndef hb_optimizers(api): raise RuntimeError('boom')\n"


def one_failure(registry: Registry) -> Any:
    (failure,) = registry.failures()
    return failure


def test_nothing_is_scanned_before_the_first_lookup() -> None:
    calls: list[int] = []
    registry = Registry(lambda: calls.append(1) or [])  # type: ignore[func-returns-value]
    assert calls == []
    registry.list_optimizers()
    registry.list_optimizers()
    assert calls == [1]


@pytest.mark.parametrize(
    ("manifest", "phase", "cause"),
    [
        ("import no_such_module", "import", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("raise SystemExit(3)", "import", "SystemExit: 3"),
        ("def broken(:", "import", "SyntaxError"),
        ("API = (2, 0)\n" + RAISING, "api", "needs plugin API 2.0, but this hbcore has 1.9; upgrade hbcore"),
        ("API = (1, 10)\n" + RAISING, "api", "needs plugin API 1.10, but this hbcore has 1.9; upgrade hbcore"),
        ("API = (0, 9)\n" + RAISING, "api", "upgrade the plugin"),
        ("API = '1.0'", "api", "must declare API = (1, 9)"),
        ("del API", "api", "found None"),
        ("@hookimpl\ndef hb_optimisers(api): return []", "register", "hb_optimisers"),
        ("@hookimpl\ndef hb_optimizers(api, extra): return []", "register", "extra"),
        ("def hb_optimizers(api): return []", "register", "lacks the @hookimpl decorator"),
        (RAISING, "hooks", "RuntimeError: boom"),
        ("@hookimpl\ndef hb_optimizers(api): return 3", "hooks", "must return a list of OptimizerSpec"),
        ("@hookimpl\ndef hb_optimizers(api): []", "hooks", "list of OptimizerSpec; it returned None. Is a 'return' missing?"),
        ("@hookimpl\ndef hb_optimizers(api): return OptimizerSpec('A', 'm:C', '')", "hooks", "must return a list"),
        ("@hookimpl\ndef hb_aliases(api): return ['Old']", "hooks", "found 'Old'"),
        ("@hookimpl\ndef hb_aliases(api): return [Alias('O_ld', 'A'), Alias('Old', 'B')]", "hooks", "two meanings"),
        (
            "@hookimpl\ndef hb_optimizers(api): return [OptimizerSpec('A', 'm:C', ''), OptimizerSpec('a', 'm:D', '')]",
            "hooks",
            "declares 'a' twice, with the targets m:C and m:D",
        ),
    ],
)
def test_a_broken_plugin_disables_itself_alone(site: Any, manifest: str, phase: str, cause: str) -> None:
    site.install("hb_bad", manifest, version="0.7")
    site.offer("hb_good", "Good")
    registry = site.registry()
    with pytest.warns(PluginWarning, match=r"'hb_bad' \(distribution hb_bad 0.7\)") as caught:
        assert registry.list_optimizers() == ["Good"]
    assert len(caught) == 1 and caught[0].filename == __file__
    failure = one_failure(registry)
    assert (failure.distribution, failure.version, failure.entry, failure.phase) == ("hb_bad", "0.7", "hb_bad", phase)
    assert cause in failure.cause
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        assert registry.get("Good").__name__ == "Good"


def test_an_api_mismatch_runs_no_hook(site: Any) -> None:
    site.install("hb_new", "API = (2, 0)\n@hookimpl\ndef hb_optimizers(api):\n    import sys; sys.hb_ran = True\n")
    assert site.registry().failures()[0].phase == "api"
    assert not hasattr(sys, "hb_ran")


def test_an_older_minor_version_would_be_accepted(site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hbcore.registry.loading.API_VERSION", (1, 9))
    site.offer("hb_good", "Good")
    assert site.registry().list_optimizers() == ["Good"]


def test_a_hook_may_take_fewer_arguments_and_sees_the_api(site: Any) -> None:
    site.install(
        "hb_few",
        """
        @hookimpl
        def hb_optimizers(): return (OptimizerSpec("Few", "hb_few.rules:Few", "") for _ in range(1))
        @hookimpl
        def hb_aliases(api): return [Alias(f"V{api.version[0]}_{api.plugin}", "Few")]
        """,
    )
    assert site.registry().list_optimizers(aliases=True) == ["Few", "V1_hb_few"]


def test_a_lookup_that_misses_tries_failed_plugins_again(site: Any) -> None:
    site.install("hb_late", "import hb_late.helper", helper="import not_there")
    registry = site.registry()
    with pytest.warns(PluginWarning):
        assert registry.list_optimizers() == []
    with pytest.raises(PluginError, match="No module named 'not_there'"):
        registry.get("hb_late:Late")
    site.offer("hb_late", "Late", helper="")
    assert registry.get("Late").__name__ == "Late"
    assert registry.failures() == ()


def test_a_repair_of_a_module_that_did_import_is_read_too(site: Any) -> None:
    site.install("hb_late", "from hb_late.helper import API", helper="API = (9, 0)")
    registry = site.registry()
    with pytest.warns(PluginWarning, match=r"plugin API 9\.0"):
        registry.list_optimizers()
    site.offer("hb_late", "Late", helper="API = (1, 0)")
    assert registry.get("hb_late:late").__name__ == "Late"


def test_a_plugin_installed_while_running_is_found_by_the_lookup_that_misses(site: Any) -> None:
    registry = site.registry()
    with pytest.raises(UnknownOptimizerError):
        registry.get("Fresh")
    site.offer("hb_fresh", "Fresh")
    assert registry.get("Fresh").__name__ == "Fresh"


def test_a_dependency_installed_meanwhile_is_seen_whatever_the_folders_time_stamp_says(site: Any) -> None:
    site.offer("hb_needy", "Needy")
    manifest = site.path / "hb_needy" / "plugin.py"
    manifest.write_text("import hb_dependency\n" + manifest.read_text())
    registry = site.registry()
    with pytest.warns(PluginWarning):
        registry.list_optimizers()
    stamp = site.path.stat().st_mtime_ns  # the import system trusts its list of the folder as long as this is the same
    (site.path / "hb_dependency.py").write_text("")
    site.packages.add("hb_dependency")
    os.utime(site.path, ns=(stamp, stamp))
    assert registry.get("Needy").__name__ == "Needy"


def test_refresh_notices_a_plugin_that_is_gone(site: Any) -> None:
    site.offer("hb_gone", "Gone")
    registry = site.registry()
    assert registry.list_optimizers() == ["Gone"]
    (site.path / "hb_gone-1.0.dist-info" / "entry_points.txt").unlink()
    assert registry.list_optimizers() == ["Gone"]
    registry.refresh()
    assert registry.list_optimizers() == []


def test_a_failed_plugin_names_its_cause_for_the_optimizers_it_had_declared(site: Any) -> None:
    site.offer("hb_half", "Half", aliases="1 / 0")
    with pytest.warns(PluginWarning), pytest.raises(PluginError, match="ZeroDivisionError") as caught:
        site.registry().get("half")
    assert "1 / 0" in str(caught.value.__cause__)  # the stored traceback


def test_a_failed_plugin_of_a_known_family_names_its_cause(site: Any) -> None:
    site.install("hb_psgd", "import no_such_module")
    with pytest.warns(PluginWarning), pytest.raises(PluginError, match=r"hb_psgd 1\.0.*no_such_module"):
        site.registry().get("ForeachCachedPSGDKron")


def test_strict_raises_instead_of_warning(site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    site.install("hb_bad", RAISING)
    monkeypatch.setenv("HBCORE_STRICT", "1")
    registry = site.registry()
    with pytest.raises(PluginError, match=r"hb_bad.*RuntimeError: boom"):
        registry.list_optimizers()
    assert one_failure(registry).entry == "hb_bad"  # diagnosis itself never raises
    monkeypatch.setenv("HBCORE_STRICT", "0")
    with pytest.warns(PluginWarning):
        assert registry.list_optimizers() == []


@pytest.mark.parametrize("spelling", ["hb_bad", "HB-Bad"])
@pytest.mark.parametrize("way", ["block", "HBCORE_DISABLE_PLUGINS", "HBCORE_PLUGINS"])
def test_a_blocked_plugin_is_never_imported(site: Any, monkeypatch: pytest.MonkeyPatch, way: str, spelling: str) -> None:
    site.install("hb_bad", "import sys; sys.hb_was_imported = True")
    site.offer("hb_good", "Good")
    registry = site.registry()
    if way == "block":
        registry.block(spelling)
    else:
        monkeypatch.setenv(way, f"other, {spelling}" if way.startswith("HBCORE_DIS") else "hb-good ,hb_else")
    assert registry.list_optimizers() == ["Good"]
    assert [(b.name, b.reason.partition("(")[0]) for b in registry.blocked()] == [
        ("hb_bad", "hbcore.block" if way == "block" else way)
    ]
    assert not hasattr(sys, "hb_was_imported")
    with pytest.raises(UnknownOptimizerError, match=f"blocked by (hbcore.)?{way}"):
        registry.get("hb_bad:X")


def test_block_and_unblock_take_effect_at_once(site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    site.offer("hb_good", "Good")
    registry = site.registry()
    assert registry.list_optimizers() == ["Good"]
    registry.block("hb_good")
    assert registry.list_optimizers() == []
    registry.unblock("HB_Good")
    assert registry.list_optimizers() == ["Good"]
    monkeypatch.setenv("HBCORE_DISABLE_PLUGINS", "hb_good")
    with pytest.raises(RegistryError, match="stays blocked by HBCORE_DISABLE_PLUGINS"):
        registry.unblock("hb_good")


def test_unreadable_metadata_is_one_plugins_trouble(site: Any) -> None:
    site.offer("hb_good", "Good")
    site.install("hb_mess", "")
    (site.path / "hb_mess-1.0.dist-info" / "entry_points.txt").write_text("[hbcore.plugins]\nno equals sign\n")
    (site.path / "alien-1.dist-info").mkdir()
    (site.path / "alien-1.dist-info" / "entry_points.txt").write_bytes(b"\xff\xfe\x00garbage")
    registry = site.registry()
    with pytest.warns(PluginWarning, match="hb_mess"):
        assert registry.list_optimizers() == ["Good"]
    assert one_failure(registry).phase == "metadata"


def test_one_entry_name_belongs_to_one_distribution(site: Any) -> None:
    site.offer("hb_good", "Good")
    site.install("hb_good", "", dist="another")  # sorted before hb_good, and overwrites nothing of it but the manifest
    site.offer("hb_good", "Good")
    registry = site.registry()
    assert "taken by hb_good (another 1.0)" in one_failure(registry).cause


def test_entry_points_without_a_distribution_can_be_injected(site: Any) -> None:
    from importlib_metadata import EntryPoint

    site.offer("hb_good", "Good")
    registry = Registry(lambda: [EntryPoint("hb_good", "hb_good.plugin", "hbcore.plugins")])
    assert registry.info("Good").distribution == "unknown"


def test_a_shadowed_distribution_counts_once(site: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    site.offer("hb_good", "Good")
    other = type(site)(tmp_path_factory.mktemp("other"))
    other.install("hb_good", "", version="0.1")
    found = list(installed([str(site.path), str(other.path)]))
    assert [point.dist.version for point in found] == ["1.0"]  # type: ignore[union-attr]


def test_a_manifest_that_uses_the_registry_while_loading_is_told_so(site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    site.install("hb_eager", "from hbcore import registry; registry.default.get('Good')")
    site.offer("hb_good", "Good")
    registry = site.registry()
    monkeypatch.setattr(package, "default", registry)
    assert "used hbcore's registry while it was being loaded" in one_failure(registry).cause
    with pytest.warns(PluginWarning):
        assert registry.get("Good").__name__ == "Good"  # and the registry works on


def test_threads_share_one_scan(site: Any) -> None:
    site.install(
        "hb_slow",
        """
        import sys, time
        time.sleep(0.2)
        sys.hb_loads = getattr(sys, "hb_loads", 0) + 1
        """,
    )
    registry = site.registry()
    try:
        threads = [threading.Thread(target=registry.list_optimizers) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=30)
        assert not any(thread.is_alive() for thread in threads)
        assert sys.hb_loads == 1  # type: ignore[attr-defined]
    finally:
        del sys.hb_loads  # type: ignore[attr-defined]


def test_migrations_and_doctor_hooks_are_guarded(site: Any) -> None:
    site.install(
        "hb_m",
        """
        @hookimpl
        def hb_migrations(api): raise RuntimeError("boom")
        @hookimpl
        def hb_doctor(report): report.note("fine"); report.problem("one"); raise RuntimeError("two")
        """,
    )
    site.install("hb_n", "@hookimpl\ndef hb_migrations(api): return ['step']\n")
    registry = site.registry()
    with pytest.warns(PluginWarning, match=r"hb_m \(hb_m 1.0\) failed: RuntimeError: boom; its"):
        assert registry.migrations() == ["step"]
    report = registry.examine(registry.plugins()[0])
    assert report.notes == ["fine"]
    assert report.problems == ["one", "its hb_doctor hook raised RuntimeError('two')"]
