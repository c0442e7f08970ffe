"""Counting what tensors take, and what follows for larger ones."""

import pytest
import torch

from dcm_core.distill.config import TrainingConfig, TrainingError
from dcm_core.distill.memory import PROBE, Alive, Memory, step_size, tokens_of

KIB = 1024
CPU, META = torch.device("cpu"), torch.device("meta")


def floats(kib):
    return torch.empty(kib * KIB // 4)


def test_what_is_made_counts_until_it_is_gone():
    before = floats(64)
    with Alive(CPU) as alive:
        one = before + 1
        view = one[:10]
        two = one.mul(2)
        del one
        assert alive.now == 128 * KIB, "a view keeps its tensor"
        del view
        assert alive.now == 64 * KIB
        two.add_(1)
        three = two + before
    assert (alive.now, alive.most) == (128 * KIB, 128 * KIB)
    del three
    assert alive.now == 64 * KIB


def test_what_was_there_before_does_not_count():
    before = floats(64)
    with Alive(CPU) as alive:
        before.mul_(2)
        before.view(-1, 2).t()
    assert alive.most == 0


def test_what_a_graph_keeps_counts():
    x = torch.ones(1024, requires_grad=True)
    with Alive(CPU) as alive:
        y = x.exp().exp()
        assert alive.now == 2 * 4096
        y.sum().backward()
        assert alive.now == 2 * 4096, "the first result is gone, the gradient is there"


def test_what_is_measured_is_what_runs():
    with Alive(CPU) as alive:
        made = torch.full((1024,), 3, dtype=torch.float64)
    assert made.dtype is torch.float64 and alive.most == 8 * KIB


def test_what_is_on_another_device_does_not_count():
    """As what waits in system memory for the backward pass."""
    with Alive(META) as alive:
        kept = [torch.empty(1024, device="meta"), torch.empty(4096)]
        kept.append(kept[0] + 1)
    assert alive.most == 2 * 4 * KIB


def test_tokens():
    assert tokens_of((2, 5, 6, 7)) == 2 * 5 * 3 * 4


def step_of(fixed, a_token, seen, a_video=0):
    """A step that makes so many bytes."""

    def step(shape):
        seen.append(shape)
        torch.empty((fixed + a_token * tokens_of(shape) + a_video * shape[0]) // 4)

    return step


def test_a_small_step_is_made_and_counted():
    seen = []
    assert step_size(step_of(400, 40, seen), (2, 3, 8, 8), CPU) == int(1.05 * (400 + 40 * 96))
    assert seen == [(2, 3, 8, 8)]


@pytest.mark.parametrize("videos", [1, 4])
def test_a_large_step_follows_from_smaller_ones(videos):
    """Also where each video brings something of its own, as its text."""
    seen, large = [], (videos, 21, 60, 104)
    size = 4000 + 40 * tokens_of(large) + 80_000 * videos
    assert step_size(step_of(4000, 40, seen, 80_000), large, CPU) == pytest.approx(1.05 * size, rel=1e-6)
    assert large not in seen and all(tokens_of(shape) <= PROBE for shape in seen)


def test_advice_names_what_would_help():
    memory = Memory(base=0, present=0, moments=2**30, step=2**30)
    memory.check(2**31, TrainingConfig("semantic"))
    cases = {
        "lower batch_size from 4": {"batch_size": 4},
        "turn gradient checkpointing on": {"gradient_checkpointing": False},
        "turn offload_activations on": {},
        "set rank above 0": {"rank": 0},
        "lower rank from 64, and alpha in proportion": {"rank": 64},
        "use fewer frames": {},
        "set optimizer to adamw8bit": {},
    }
    for advice, settings in cases.items():
        needed = r"needs about 2\.00 GiB besides the base model, but only 1\.50 GiB are available\."
        with pytest.raises(TrainingError, match=f"{needed} To need less: .*{advice}"):
            memory.check(3 * 2**29, TrainingConfig("semantic", **settings))
    with pytest.raises(TrainingError, match="set adversarial_weight to 0"):
        memory.check(3 * 2**29, TrainingConfig("detail"))


def test_memory_in_words():
    text = str(Memory(base=2**30, present=2**28, moments=2**28, step=2**29))
    assert text == "Peak memory about 2.00 GiB (base 1.00, experts and optimiser 0.50, one step 0.50)"
