"""AdamW's steps, and the learning rate over a run."""

import math
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import lr_scheduler

from dcm_core.distill.checkpoint_file import Checkpoint, read_checkpoint
from dcm_core.distill.checkpoints import save_checkpoint
from dcm_core.distill.config import SCHEDULERS, TrainingConfig, TrainingError
from dcm_core.distill.learner import learning_rate_at, make_learner, state_shapes
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


# a shape of whole blocks, one with a last block that is not full, and one that stays in float32
SHAPES = {"large": (64, 128), "odd": (67, 65), "small": (8, 8)}


def make_8bit(seed=0, kind="adamw8bit"):
    generator = torch.Generator().manual_seed(seed)
    parameters = {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}
    return make_learner("expert", parameters, 1e-2, kind=kind, betas=(0.9, 0.999), weight_decay=0.01)


def steps(learner, numbers):
    for number in numbers:
        generator = torch.Generator().manual_seed(100 + number)
        for value in learner.parameters.values():
            value.grad = torch.randn(value.shape, generator=generator)
        learner.step(1.0)


def test_without_bitsandbytes_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(
        TrainingError, match=r"needs the package bitsandbytes.*pip install bitsandbytes.* or set optimizer"
    ):
        make_8bit()


def test_8bit_moments_are_the_library_s():
    """As close to AdamW as 8 bits allow, in a quarter of the memory, in the shapes that checkpoints expect."""
    pytest.importorskip("bitsandbytes")
    ours, exact = make_8bit(), make_8bit(kind="adamw")
    start = {name: value.detach().clone() for name, value in ours.parameters.items()}
    found = ours.tensors()
    for learner in (ours, exact):
        steps(learner, range(4))
    for name, value in ours.parameters.items():
        moved, expected = value - start[name], exact.parameters[name] - start[name]
        assert (moved - expected).norm() < (1e-5 if name == "small" else 0.1) * expected.norm(), name
    for tensors in (found, ours.tensors()):
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items() if "_optimizer." in name}
        assert shapes == {
            f"expert_optimizer.{name}.{entry}": size
            for name, shape in SHAPES.items()
            for entry, size in state_shapes("adamw8bit", shape).items()
        }
    sizes = {name: tensor.nbytes for name, tensor in found.items() if name.split(".")[-1][:-1] in ("state", "absmax")}
    assert ours.moments == sum(sizes.values()) < 0.27 * exact.moments


def test_8bit_moments_come_back_from_a_checkpoint_to_the_bit(tmp_path):
    pytest.importorskip("bitsandbytes")
    config = TrainingConfig("semantic", optimizer="adamw8bit", ema_decay=0.0)
    through, first, resumed = make_8bit(), make_8bit(), make_8bit(seed=1)
    steps(through, range(5))
    steps(first, range(3))
    history = [{"step": step} for step in (1, 2, 3)]
    path = save_checkpoint(tmp_path, Checkpoint(3, config, {}, history, first.tensors()), keep=1)
    shapes = {name: tuple(value.shape) for name, value in resumed.tensors().items()}
    resumed.load(read_checkpoint(path, shapes).tensors)
    steps(resumed, range(3, 5))
    for name, value in through.tensors().items():
        assert torch.equal(value, resumed.tensors()[name]), name
