"""For each conformance check an optimizer that breaks what it checks, and little else."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from hb_adam import AdamW
from hbcore.api import Transform
from hbcore.testing import Subject

KEPT: list[Any] = []


def broken(**members: Any) -> type[AdamW]:
    """AdamW with other members."""
    return type("Broken", (AdamW,), members)


def built(change: Callable[[dict[str, Any]], Any]) -> type[AdamW]:
    """AdamW whose arguments are changed before it is built."""

    def init(self, params, **options):
        change(options)
        AdamW.__init__(self, params, **options)

    return broken(__init__=init, __signature__=AdamW.__signature__, own=AdamW.own)


def stepping(act: Callable[[AdamW], Any], late: bool = True) -> type[AdamW]:
    """AdamW that does something more after, or before, each step."""

    extra = torch.no_grad()(act)

    def step(self, closure=None):
        if not late:
            extra(self)
        loss = AdamW.step(self, closure)
        if late:
            extra(self)
        return loss

    step.hooked = True  # else torch wraps it, and AdamW's own step a second time
    return broken(step=step)


def loading(act: Callable[..., Any]) -> type[AdamW]:
    """AdamW that does something more after it has loaded a state dict."""

    def load_state_dict(self, state_dict):
        AdamW.load_state_dict(self, state_dict)
        act(self, state_dict)

    return broken(load_state_dict=load_state_dict)


def params(optimizer: AdamW) -> list[torch.Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def option(name: str, value: Any) -> type[AdamW]:
    """AdamW with an option that is always ``value``."""
    return built(lambda options: options.update({name: value}))


def doubled_if(name: str, value: Any) -> type[AdamW]:
    """AdamW that learns twice as fast with one option."""
    return built(lambda o: o.update(lr=2 * o.get("lr", 0.0025)) if o.get(name, "unset") == value else None)


# --- stepping ---------------------------------------------------------------------------------------------------------


def decays_everything(optimizer: AdamW) -> None:
    for p in params(optimizer):
        p.mul_(0.99)


def divides_by_the_norm(optimizer: AdamW) -> None:
    for p in params(optimizer):
        if p.grad is not None:
            p.add_(p.grad / p.grad.norm(), alpha=1e-3)


def moves_in_the_dry_step(optimizer: AdamW) -> None:
    if all(g["lr"] == 0 for g in optimizer.param_groups):
        for p in params(optimizer):
            p.add_(1.0)


def adds_global_noise(optimizer: AdamW) -> None:
    for p in params(optimizer):
        p.add_(torch.randn_like(p), alpha=1e-3)


def grows(optimizer: AdamW) -> None:
    for p in params(optimizer):
        seen = optimizer.state[p].get("history")
        optimizer.state[p]["history"] = p.clone()[None] if seen is None else torch.cat([seen, p[None]])


def fails_on_scalars(optimizer: AdamW) -> None:
    if any(p.ndim == 0 for p in params(optimizer)):
        raise IndexError("tuple index out of range")


def leaves_scalars(optimizer: AdamW) -> None:
    for group in optimizer.param_groups:
        group["lr"] = 0.0 if any(p.ndim == 0 for p in group["params"]) else 0.0025


def ignores_schedules(optimizer: AdamW) -> None:
    for group in optimizer.param_groups:
        group["lr"] = 0.0025


def replaces_gradients(optimizer: AdamW) -> None:
    for p in params(optimizer):
        p.grad = p.grad * 2


def waits_a_step(self: AdamW, closure: Any = None) -> Any:
    if not self.state:
        for p in params(self):
            self.state[p]
        return None
    return AdamW.step(self, closure)


def forgets_the_loss(self: AdamW, closure: Any = None) -> None:
    AdamW.step(self, closure)


def ignores_infinity() -> type[AdamW]:
    """Claims that it looks at ``found_inf`` itself, and does not."""
    return broken(_step_supports_amp_scaling=True, step=AdamW.step)


def halves_each_micro_batch(self: AdamW, group: dict[str, Any]) -> None:
    AdamW.add_param_group(self, group)
    for p in params(self):
        p.register_post_accumulate_grad_hook(halve)


def halve(p: torch.Tensor) -> None:
    p.grad.mul_(0.5)


def hooks_twice(self: AdamW, closure: Any = None) -> Any:
    return AdamW.step(self, closure)


def refuses_late_groups(self: AdamW, group: dict[str, Any]) -> None:
    if not self.state:
        AdamW.add_param_group(self, group)


# --- saving and loading -----------------------------------------------------------------------------------------------


def casts_state(optimizer: AdamW, _: Any) -> None:
    for p, slots in optimizer.state.items():
        slots.update({k: v.to(p.dtype) for k, v in slots.items() if k != "step"})


def forgets_moments(optimizer: AdamW, _: Any) -> None:
    for slots in optimizer.state.values():
        slots["exp_avg"].zero_()


def shares_moments(optimizer: AdamW, saved: dict[str, Any]) -> None:
    for slots, theirs in zip(optimizer.state.values(), saved["state"].values(), strict=True):
        slots.update({k: v for k, v in theirs.items() if k != "step"})


def sets_attributes(optimizer: AdamW, saved: dict[str, Any]) -> None:
    for key, value in saved["param_groups"][0].items():
        if key not in ("params", "__class__", "__dict__"):
            setattr(optimizer, key, value)


def detaches_groups(optimizer: AdamW, _: Any) -> None:
    own = copy.copy(optimizer.param_groups[0])
    optimizer.step = lambda closure=None: optimizer.param_groups[0].update(own) or AdamW.step(optimizer, closure)


def refuses_too_late(self: AdamW, saved: dict[str, Any]) -> None:
    if "state" in saved:
        for p in self.state:
            self.state[p]["exp_avg"].zero_()
    AdamW.load_state_dict(self, saved)


def loads_by_position(self: AdamW, saved: dict[str, Any]) -> None:
    names = self.param_groups[0]["param_names"]
    AdamW.load_state_dict(self, {**saved, "param_groups": [{**saved["param_groups"][0], "param_names": names}]})


def saves_and_changes(self: AdamW) -> dict[str, Any]:
    self.param_groups[0]["lr"] *= 0.5
    return AdamW.state_dict(self)


def saves_what_was_stepped(self: AdamW) -> dict[str, Any]:
    saved = AdamW.state_dict(self)
    return {**saved, "state": {k: v for k, v in saved["state"].items() if v["step"] > 0}}


def forgets_its_state(self: AdamW, state: dict[str, Any]) -> None:
    AdamW.__setstate__(self, {**state, "state": {}})


def loses_skipped_steps(self: AdamW, saved: dict[str, Any]) -> None:
    if all(float(slots["step"]) == 0 for slots in saved["state"].values()):
        raise KeyError("exp_avg")
    AdamW.load_state_dict(self, saved)


def does_not_return(self: AdamW) -> None:
    """An eval() whose train() does nothing."""
    with torch.no_grad():
        for p in params(self):
            p.mul_(0.5)


MODES = {"train": lambda self: None, "eval": does_not_return}


@dataclass(frozen=True)
class Sorted(Transform):
    """Not elementwise, and so not to be fused."""

    name = "sorted"

    def update(self, u, s, c):
        return torch.sort(u.flatten())[0].view_as(u), {}


BROKEN: dict[str, type[Any] | Subject | tuple[type[Any], ...]] = {
    "every_rule_is_fused": broken(chain=staticmethod(lambda h: (Sorted(),))),
    "generated_kernels_agree": stepping(
        lambda o: [p.add_(1e-6) for p in params(o)] if o.settings.compile == "triton" else None
    ),
    "it_is_a_torch_optimizer": broken(__init__=lambda self, *args, **options: AdamW.__init__(self, *args, **options)),
    "bad_numbers_are_refused": built(lambda o: o.update(lr=abs(o.get("lr", 0.0025)))),
    "a_closure_is_called_and_its_loss_returned": broken(step=forgets_the_loss),
    "copies_train_on": broken(__setstate__=forgets_its_state),
    "every_hook_runs_once": broken(step=hooks_twice),
    "schedules_apply_and_compile_nothing": (
        stepping(lambda o: o.core.invalidate()),
        stepping(ignores_schedules, late=False),
    ),
    "a_tensor_is_as_good_a_rate_as_a_number": built(
        lambda o: o.update(lr=1e-3) if isinstance(o.get("lr"), torch.Tensor) else None
    ),
    "a_grad_scaler_skips_infinite_steps": ignores_infinity(),
    "late_and_empty_groups_work": broken(add_param_group=refuses_late_groups),
    "nothing_outlives_the_optimizer": stepping(KEPT.append),
    "eval_and_train_return_to_where_they_were": Subject(broken(**MODES), frozenset({"modes"})),
    "the_loss_goes_down": option("maximize", True),
    "the_first_gradient_moves_everything": broken(step=waits_a_step),
    "the_first_gradient_of_a_matrix_only_primes": Subject(AdamW, frozenset({"primes"})),
    "no_gradient_means_untouched": stepping(decays_everything),
    "zero_gradients_stay_finite": stepping(divides_by_the_norm, late=False),
    "accumulated_gradients_are_one_gradient": broken(add_param_group=halves_each_micro_batch),
    "gradients_are_left_alone": stepping(replaces_gradients),
    "used_gradients_are_let_go": stepping(lambda o: KEPT.extend(p.grad for p in params(o)), late=False),
    "global_random_state_is_untouched": stepping(adds_global_noise),
    "results_do_not_depend_on_the_global_seed": stepping(adds_global_noise),
    "the_seed_option_is_used": Subject(AdamW, frozenset({"random"})),
    "every_shape_trains_or_is_refused_when_built": (
        stepping(fails_on_scalars),
        stepping(leaves_scalars, late=False),
    ),
    "batching_changes_nothing": doubled_if("multi_tensor", False),
    "without_a_compiler_the_result_is_the_same": option("compile", "eager"),
    "bfloat16_weights_follow_small_updates": option("stochastic_rounding", False),
    "memory_is_as_described": (stepping(grows), stepping(lambda o: KEPT.append(params(o)[0].clone()))),
    "capturable_steps_are_the_same": Subject(doubled_if("capturable", True), frozenset({"capturable"})),
    "loading_keeps_every_dtype_and_value": loading(casts_state),
    "resuming_changes_no_bit": loading(forgets_moments),
    "resuming_compiled_changes_no_bit": loading(forgets_moments),
    "saving_early_leaves_no_trace": broken(state_dict=saves_and_changes),
    "the_dry_step_of_distributed_checkpoints_leaves_no_trace": stepping(moves_in_the_dry_step),
    "parameters_without_a_gradient_are_saved": broken(state_dict=saves_what_was_stepped),
    "state_is_matched_by_name": broken(load_state_dict=loads_by_position),
    "loaded_groups_are_obeyed": loading(detaches_groups),
    "loading_shares_nothing": loading(shares_moments),
    "a_skipped_first_step_can_be_saved": broken(load_state_dict=loses_skipped_steps),
    "a_state_that_does_not_fit_is_refused": (
        broken(load_state_dict=torch.optim.Optimizer.load_state_dict),
        broken(load_state_dict=refuses_too_late),
    ),
    "names_of_attributes_are_only_keys": loading(sets_attributes),
    "a_damaged_state_is_refused_or_loads_whole": (
        broken(load_state_dict=torch.optim.Optimizer.load_state_dict),
        broken(load_state_dict=refuses_too_late),
    ),
}
"""Check -> what does not pass it: classes, or a subject that declares what is not so."""
