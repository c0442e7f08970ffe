"""AdamW's steps, and the learning rate over a run."""

import math

import pytest
import torch
from torch import nn

from dcm_core.distill.config import TrainingConfig
from dcm_core.distill.learner import make_learner, make_schedule
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
    config = TrainingConfig("semantic", **settings)
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(1))], lr=1.0)
    schedule, found = make_schedule(optimizer, config), []
    for _ in range(config.steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_warm_up_then_constant():
    assert rates(steps=6, warmup_steps=3) == pytest.approx([1 / 4, 2 / 4, 3 / 4, 1, 1, 1])
    assert rates(steps=3, warmup_steps=0) == [1, 1, 1]


def test_warm_up_then_cosine():
    expected = [1 / 3, 2 / 3, *(0.5 + 0.5 * math.cos(math.pi * step / 4) for step in range(4))]
    assert rates(steps=6, warmup_steps=2, scheduler="cosine") == pytest.approx(expected)


def test_warm_up_is_shorter_than_the_run():
    assert rates(steps=2, warmup_steps=10) == pytest.approx([1 / 2, 1])


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
