"""The frozen data that manifests are made of."""

from __future__ import annotations

import pickle

import pytest

from hbcore.errors import RegistryError
from hbcore.registry.spec import Alias, CodecSpec, OptimizerSpec, fold


def test_fold_ignores_case_and_separators() -> None:
    assert fold("PSGD-Kron") == fold("psgd_kron") == fold("PSGDKRON") != fold("PSGDKro")


@pytest.mark.parametrize("name", ["", "Adam W", "hb:AdamW", "2Adam", "__", 3])
def test_a_name_must_be_an_identifier(name: str) -> None:
    with pytest.raises(RegistryError, match="must be a Python identifier"):
        OptimizerSpec(name, "m:C", "")
    with pytest.raises(RegistryError, match="must be a Python identifier"):
        Alias(name, "AdamW")


@pytest.mark.parametrize("target", ["", "module", "module:", ":Class", "a b:C", "m:C:D", None])
def test_a_target_must_read_module_colon_attribute(target: str) -> None:
    with pytest.raises(RegistryError, match="must have the form"):
        OptimizerSpec("AdamW", target, "")
    with pytest.raises(RegistryError, match="must have the form"):
        CodecSpec("bf16+8", target, "")


def test_capabilities_become_a_frozenset_and_a_bare_string_is_refused() -> None:
    assert OptimizerSpec("A", "m:C", "", capabilities={"matrix"}).capabilities == frozenset({"matrix"})  # type: ignore[arg-type]
    with pytest.raises(RegistryError, match="set of strings"):
        OptimizerSpec("A", "m:C", "", capabilities="fast")  # type: ignore[arg-type]


@pytest.mark.parametrize("lr", [0, -0.1, float("inf"), float("nan"), "0.1"])
def test_a_learning_rate_for_small_models_is_a_positive_number(lr: object) -> None:
    assert OptimizerSpec("A", "m:C", "", small_lr=0.02).small_lr == 0.02
    with pytest.raises(RegistryError, match="small_lr of 'A' must be a positive number"):
        OptimizerSpec("A", "m:C", "", small_lr=lr)  # type: ignore[arg-type]


def test_an_alias_is_hashable_read_only_and_picklable_whatever_its_preset_holds() -> None:
    values = {"betas": [0.9, 0.99]}
    alias = Alias("Old", "AdamW", values)
    values["lr"] = [1.0]
    assert dict(alias.preset) == {"betas": [0.9, 0.99]}
    with pytest.raises(TypeError):
        alias.preset["lr"] = 1  # type: ignore[index]
    assert hash(alias) == hash(Alias("Old", "AdamW", {"betas": [0.9, 0.99]}))
    assert pickle.loads(pickle.dumps(alias)) == alias
    assert alias != Alias("Old", "AdamW", {"betas": [0.9, 0.9]})


def test_alias_and_codec_refuse_what_could_never_be_looked_up() -> None:
    with pytest.raises(RegistryError, match="keyword arguments"):
        Alias("Old", "AdamW", {"not a keyword": 1})
    with pytest.raises(RegistryError, match="optimizer's name as its target"):
        Alias("Old", "hb_adam:")
    with pytest.raises(RegistryError, match="without spaces or colons"):
        CodecSpec("bf16 8", "m:C", "")
