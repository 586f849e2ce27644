"""Levels of the kit: which checks belong to each, so that an upgrade of hbcore does not turn a pinned author's tests red.

A check is added to the newest level that is not in a release yet, and a released level never changes: a test compares it with a
copy. Imports neither torch nor a check.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

ADDED: dict[str, tuple[str, ...]] = {
    "api-1": (
        "it_is_a_torch_optimizer",
        "bad_numbers_are_refused",
        "a_closure_is_called_and_its_loss_returned",
        "copies_train_on",
        "every_hook_runs_once",
        "schedules_apply_and_compile_nothing",
        "a_tensor_is_as_good_a_rate_as_a_number",
        "a_grad_scaler_skips_infinite_steps",
        "late_and_empty_groups_work",
        "nothing_outlives_the_optimizer",
        "eval_and_train_return_to_where_they_were",
        "the_loss_goes_down",
        "the_first_gradient_moves_everything",
        "the_first_gradient_of_a_matrix_only_primes",
        "no_gradient_means_untouched",
        "zero_gradients_stay_finite",
        "accumulated_gradients_are_one_gradient",
        "gradients_are_left_alone",
        "used_gradients_are_let_go",
        "global_random_state_is_untouched",
        "results_do_not_depend_on_the_global_seed",
        "the_seed_option_is_used",
        "every_shape_trains_or_is_refused_when_built",
        "batching_changes_nothing",
        "every_rule_is_fused",
        "generated_kernels_agree",
        "without_a_compiler_the_result_is_the_same",
        "bfloat16_weights_follow_small_updates",
        "memory_is_as_described",
        "capturable_steps_are_the_same",
        "loading_keeps_every_dtype_and_value",
        "resuming_changes_no_bit",
        "resuming_compiled_changes_no_bit",
        "saving_early_leaves_no_trace",
        "the_dry_step_of_distributed_checkpoints_leaves_no_trace",
        "parameters_without_a_gradient_are_saved",
        "state_is_matched_by_name",
        "loaded_groups_are_obeyed",
        "loading_shares_nothing",
        "a_skipped_first_step_can_be_saved",
        "a_state_that_does_not_fit_is_refused",
        "names_of_attributes_are_only_keys",
        "shards_follow_one_process",
        "a_sharded_run_resumes_exactly",
        "parts_are_as_declared",
        "zeros_are_zero",
        "writing_what_was_read_changes_nothing",
        "values_come_back",
        "what_is_not_finite_stays_so",
        "elements_are_stored_by_themselves",
        "reading_and_writing_are_pure",
        "rounding_is_unbiased",
        "every_operation_has_a_kernel",
    ),
    "api-2": ("a_damaged_state_is_refused_or_loads_whole",),
}
"""Level, the oldest first -> the names of the checks that it adds to the level before: of optimizers, of several processes and
of codecs."""

NEWEST = list(ADDED)[-1]
"""The level that applies if none is given."""


def names_of(level: str | None) -> frozenset[str]:
    """The names of all checks of a level; None for the newest.

    Raises:
        ValueError: there is no such level.
    """
    levels = list(ADDED)
    if level is None:
        level = NEWEST
    if level not in levels:
        raise ValueError(f"there is no level {level!r} of checks; choose from {', '.join(levels)}, or None for {NEWEST!r}.")
    return frozenset(name for one in levels[: levels.index(level) + 1] for name in ADDED[one])


def known(name: str, names: Iterable[str]) -> str:
    """``name``, if it is one of the names of checks.

    Raises:
        ValueError: it is not; suggests those that are spelled alike.
    """
    names = list(names)
    if name in names:
        return name
    close = difflib.get_close_matches(name, names, n=3) or names
    raise ValueError(f"no check is named {name!r}; choose from {', '.join(close)}")
