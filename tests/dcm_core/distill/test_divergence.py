"""When a run is ended because it no longer learns."""

import math

import pytest

from dcm_core.distill.config import TrainingConfig, TrainingError
from dcm_core.distill.divergence import (
    PATIENCE,
    WINDOW,
    Diverged,
    best_step,
    check_any_made,
    check_losses,
    is_skipped,
    skipped_in_words,
)


def history(*losses):
    return [{"step": step, "loss": loss, "grad_norm": 1.0} for step, loss in enumerate(losses, start=1)]


def config(**settings):
    return TrainingConfig("semantic", **settings)


def test_losses_that_stay_no_numbers():
    check_losses(history(1.0, *[math.nan] * (PATIENCE - 1)), config())
    with pytest.raises(TrainingError, match=r"NaN or infinite 5 times in a row, up to step 6\. .*Lower learning_rate"):
        check_losses(history(1.0, *[math.nan] * PATIENCE), config())
    check_losses(history(1.0, *[math.nan] * PATIENCE, 1.0), config())


def test_gradients_that_stay_no_numbers():
    found = history(*[1.0] * 7)
    for entry in found[2:]:
        entry["grad_norm"] = math.inf
    with pytest.raises(TrainingError, match="NaN or infinite 5 times"):
        check_losses(found, config())


def test_losses_that_grow():
    low, high = [0.1] * WINDOW, [3.0] * WINDOW
    check_losses(history(*low, *high[:-1]), config())
    with pytest.raises(
        Diverged, match=r"the loss has grown 30-fold since step 50, to 3\..*stopped at step 100 without saving"
    ):
        check_losses(history(*low, *high), config())
    check_losses(history(*low, *high), config(divergence=40.0))
    check_losses(history(*low, *high), config(divergence=0.0))
    check_losses(history(*high, *low), config())
    with pytest.raises(Diverged, match=r"has grown 30-fold"):
        check_losses(history(*high, *low, *high), config())


def test_one_high_loss_is_no_divergence():
    check_losses(history(*[0.1] * WINDOW, 50.0, *[0.1] * (WINDOW - 1)), config())


def test_the_lowest_window():
    low, high = [0.1] * WINDOW, [5.0] * WINDOW
    assert best_step(history(*low[1:])) == 0
    assert best_step(history(*high, *low, *high, *high[1:])) == 2 * WINDOW
    assert best_step(history(*[math.nan] * WINDOW, *high)) == 2 * WINDOW


def test_skipped_steps_are_counted_and_listed():
    assert skipped_in_words(history(1.0, 2.0)) == ""
    assert skipped_in_words(history(1.0, math.nan)) == "1 of 2 steps skipped, as the loss was NaN or infinite: 2."
    many = skipped_in_words(history(*[math.inf] * 12))
    assert many == "12 of 12 steps skipped, as the loss was NaN or infinite: ..., 5, 6, 7, 8, 9, 10, 11, 12."


@pytest.mark.parametrize("name", ["loss", "grad_norm", "discriminator"])
def test_a_step_is_skipped_for_any_loss_that_is_no_number(name):
    entry = {"step": 1, "loss": 1.0, "grad_norm": 1.0, "discriminator": 1.0}
    assert not is_skipped(entry) and is_skipped({**entry, name: math.nan})
    # measured after the step
    assert not is_skipped({**entry, "held_out": math.nan})


def test_a_run_of_skipped_steps_alone_is_no_success():
    check_any_made(history(math.nan, 1.0, math.nan))
    check_any_made([])
    with pytest.raises(TrainingError, match=r"Nothing was trained: in all 3 steps the loss was NaN or infinite"):
        check_any_made(history(*[math.nan] * 3))
