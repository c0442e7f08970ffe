"""AdamW's steps, and the learning rate over a run."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import lr_scheduler

from dcm_core.distill.config import SCHEDULERS, TrainingConfig
from dcm_core.distill.learner import learning_rate_at, make_learner
from dcm_core.distill.parallel import Processes


@pytest.fixture
def learner():
    torch.manual_seed(0)
    return make_learner(
        "expert", {"a": nn.Parameter(torch.ones(3)), "b": nn.Parameter(torch.ones(2, 2))}, 0.1, clip=1.0
    )


def give(learner, value):
    for parameter in learner.parameters.values():
        parameter.grad = torch.full_like(parameter, value)


def rates(**settings):
    config = TrainingConfig("semantic", learning_rate=1.0, **settings)
    return [learning_rate_at(step, config) for step in range(config.steps)]


def test_warm_up_then_constant():
    assert rates(steps=6, warmup_steps=3) == pytest.approx([1 / 4, 2 / 4, 3 / 4, 1, 1, 1])
    assert rates(steps=3, warmup_steps=0) == [1, 1, 1]


def test_warm_up_then_cosine():
    expected = [1 / 3, 2 / 3, *(0.5 + 0.5 * math.cos(math.pi * step / 4) for step in range(4))]
    assert rates(steps=6, warmup_steps=2, scheduler="cosine") == pytest.approx(expected)


def test_warm_up_is_shorter_than_the_run():
    assert rates(steps=2, warmup_steps=10) == pytest.approx([1 / 2, 1])


@pytest.mark.filterwarnings("ignore:The epoch parameter")  # torch's own, of SequentialLR
@given(steps=st.integers(1, 60), warmup_steps=st.integers(0, 60), scheduler=st.sampled_from(SCHEDULERS))
def test_the_same_rates_as_torch_s_schedulers(steps, warmup_steps, scheduler):
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(1))], lr=1.0)
    warmup = min(warmup_steps, steps - 1)
    after = (
        lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps - warmup)
        if scheduler == "cosine"
        else lr_scheduler.ConstantLR(optimizer, factor=1.0, total_iters=0)
    )
    if warmup:
        start = lr_scheduler.LinearLR(optimizer, start_factor=1 / (warmup + 1), total_iters=warmup)
        after = lr_scheduler.SequentialLR(optimizer, [start, after], milestones=[warmup])
    expected = []
    for _ in range(steps):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        after.step()
    found = rates(steps=steps, warmup_steps=warmup_steps, scheduler=scheduler)
    assert found == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_a_step_is_made_at_the_rate_that_is_set(learner):
    """AdamW's first step moves every value by the rate, whatever its gradient."""
    give(learner, 3.0)
    learner.set_learning_rate(0.25)
    learner.step(1.0)
    for parameter in learner.parameters.values():
        # weight decay of 0.01
        torch.testing.assert_close(parameter, torch.full_like(parameter, 0.75 - 0.25 * 0.01))


def test_gradients_are_unscaled_then_clipped(learner):
    give(learner, 8.0)
    # 7 values of 2
    assert learner.gather(Processes(), scale=4.0) == pytest.approx(2 * 7**0.5)
    clipped = torch.cat([parameter.grad.flatten() for parameter in learner.parameters.values()])
    assert clipped.norm() == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("norm", [math.inf, math.nan])
def test_gradients_that_are_no_numbers_are_thrown_away(learner, norm):
    give(learner, 1.0)
    learner.step(norm)
    assert all(torch.equal(parameter, torch.ones_like(parameter)) for parameter in learner.parameters.values())
    assert all(parameter.grad is None for parameter in learner.parameters.values())


def test_a_state_that_is_taken_up_goes_on_as_the_first_did(learner):
    give(learner, 1.0)
    learner.step(learner.gather(Processes()))
    state = {name: value.clone() for name, value in learner.tensors().items()}
    other = make_learner(
        "expert", {"a": nn.Parameter(torch.zeros(3)), "b": nn.Parameter(torch.zeros(2, 2))}, 0.1, clip=1.0
    )
    other.load(state)
    for each in (learner, other):
        give(each, -0.5)
        each.step(each.gather(Processes()))
    assert all(torch.equal(learner.parameters[name], other.parameters[name]) for name in "ab")


def test_what_a_step_needs_beside_its_state(learner):
    assert learner.scratch == 2 * 4 * 4
