"""The memory a run is said to need, against what it takes; and bases that do not fit beside it."""

import pytest
import torch
from torch._C._profiler import _EventType
from torch.autograd.graph import saved_tensors_hooks

from ..small_models import FP8, native_wan
from .small_runs import group_of_one, make_trainer, random_data, same, weights

# frames, height and width of latents; the second is more than is measured
SIZES = ((2, 4, 6), (9, 36, 32))


def allocations(events):
    for event in events:
        if event.tag == _EventType.Allocation:
            yield event.start_time_ns, event.extra_fields.alloc_size
        yield from allocations(event.children)


def peak(run):
    """The most that torch's allocator gave out at once while it ran."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    now = most = 0
    for _, size in sorted(allocations(profiler.profiler.kineto_results.experimental_event_tree())):
        now += size
        most = max(most, now)
    return most


@pytest.fixture
def trainer(module, config, tmp_path):
    """trainer(side, dtype, size, ...) -> a Trainer on a base stored in that dtype, for videos of that size."""
    import comfy.sd

    def make(side, dtype=torch.float32, size=SIZES[0], layers=4, sharded=False, **values):
        model = comfy.sd.load_diffusion_model_state_dict(
            native_wan(width=128, layers=layers), model_options={"dtype": dtype}
        )
        data = random_data(module("dcm_core.distill.data.dataset"), size=size)
        return make_trainer(module, model, data, config(side, **values), tmp_path, sharded)

    return make


@pytest.mark.usefixtures("gradients")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("side", "dtype", "values"),
    [
        ("semantic", FP8, {"gradient_checkpointing": False}),
        ("semantic", torch.bfloat16, {"rank": 0, "gradient_checkpointing": True}),
        ("detail", torch.float32, {"gradient_checkpointing": False}),
        ("detail", FP8, {"gradient_checkpointing": True}),
    ],
)
def test_a_step_takes_what_was_told(side, dtype, values, size, trainer):
    """By torch's allocator: no less than what a step took, and at most the gradients more, which come as activations go."""
    made = trainer(side, dtype, size, batch_size=1, **values)
    told = made.memory()
    assert not any(value.grad is not None for value in made.learner.parameters.values())
    made._training_step()
    taken = peak(made._training_step)
    gradients = sum(4 * value.numel() for value in made.learner.parameters.values())
    assert 0.95 * taken < told.step < 1.15 * (taken + gradients)
    trained = sum(value.numel() for learner in made._learners for value in learner.parameters.values())
    assert told.moments == 8 * trained


@pytest.mark.usefixtures("gradients")
@pytest.mark.parametrize(
    ("side", "values"),
    [("semantic", {"rank": 0, "gradient_checkpointing": True}), ("detail", {"gradient_checkpointing": False})],
)
def test_a_step_of_a_divided_base_takes_what_was_told(side, values, trainer):
    with group_of_one():
        made = trainer(side, sharded=True, batch_size=1, **values)
        told = made.memory()
        made._training_step()
        taken = peak(made._training_step)
    gradients = sum(4 * value.numel() for value in made.learner.parameters.values())
    assert 0.95 * taken < told.step < 1.15 * (taken + gradients)


@pytest.mark.usefixtures("gradients")
def test_there_is_no_second_copy_of_the_base(trainer):
    """Of an fp8 base one block at a time is there as numbers."""
    low, full = (trainer("semantic", dtype, layers=6, gradient_checkpointing=True) for dtype in (FP8, torch.float32))
    blocks = low.backbone.module.blocks
    block = sum(4 * value.numel() for value in blocks[0].parameters())
    embedder = 4 * low.backbone.module.text_embedding[0].weight.numel()
    assert low.memory().step - full.memory().step < block + embedder
    assert low.memory().base < 0.26 * full.memory().base
    kept = trainer("semantic", FP8, layers=6, gradient_checkpointing=False)
    assert kept.memory().step > low.memory().step + 4 * block, "told, where a graph keeps them"


def in_arrays(*, pin_memory=False):
    """As `save_on_cpu`, but it also moves tensors of the CPU: out of PyTorch's memory."""
    return saved_tensors_hooks(lambda tensor: tensor.detach().numpy().copy(), torch.from_numpy)


def gradients_of(trainer, alive):
    """A step's gradients, and the most memory on the CPU that its tensors took at once."""
    for learner in trainer._learners:
        learner.allocate_gradients()
    with alive(torch.device("cpu")) as counted:
        trainer._gradients(0)
    return [value.grad for value in trainer.learner.parameters.values()], counted.most


@pytest.mark.usefixtures("gradients")
@pytest.mark.parametrize("side", ["semantic", "detail"])
def test_offloaded_activations_change_the_memory_alone(side, trainer, module, monkeypatch):
    """What the blocks get from each other leaves the device, and comes back as it was."""
    settings = {"layers": 6, "size": (2, 16, 16), "batch_size": 1, "gradient_checkpointing": True}
    kept, offloaded = (trainer(side, **settings, offload_activations=offload) for offload in (False, True))
    alive = module("dcm_core.distill.memory").Alive
    expected, most = gradients_of(kept, alive)
    assert all(map(torch.equal, gradients_of(offloaded, alive)[0], expected)), "on the CPU nothing moves"
    monkeypatch.setattr(module("dcm_core.distill.backbone"), "save_on_cpu", in_arrays)
    found, less = gradients_of(offloaded, alive)
    assert all(map(torch.equal, found, expected))
    # all inputs but the first block's; of the discriminator's features every second output stays
    inputs = 5 * 4 * 128 * (2 * 8 * 8)
    assert 0.95 * inputs < most - less < (1.05 if side == "semantic" else 1.45) * inputs
    if side == "semantic":
        # in the detail stage AdamW's own memory is the most that is there at once
        assert kept.memory().step - offloaded.memory().step == pytest.approx(1.05 * inputs, rel=0.1)


@pytest.fixture
def small_card(pack, monkeypatch):
    """small_card(MODEL, size, taken) -> a clone that the host takes for one on a device with memory of that size, in bytes, of which
    others have taken the sum of `taken`."""
    import comfy.model_management as management

    def make(model, size, taken):
        clone = model.clone()
        clone.load_device = torch.device("cpu:0")

        def free(device=None, torch_free_too=False):
            left = size - clone.loaded_size() - sum(taken)
            return (left, left) if torch_free_too else left

        changes = {
            "get_free_memory": free,
            "is_device_cpu": lambda device: str(device) == "cpu",
            "vram_state": management.VRAMState.NORMAL_VRAM,
            "minimum_inference_memory": lambda: 0,
            "extra_reserved_memory": lambda: 0,
        }
        for name, value in changes.items():
            monkeypatch.setattr(management, name, value)
        return clone

    return make


@pytest.mark.parametrize("side", ["semantic", "detail"])
def test_a_base_that_the_host_keeps_partly_offloaded(
    side, wan, module, train, data, config, small_card, sample, tmp_path, monkeypatch
):
    """It trains as a whole one does, also after samples, for which the host loads more of it."""
    training, show = module("nodes.host.training.run"), module("nodes.host.training.show").Show
    settings = config(side, sample_every=1)
    model = wan(layers=4)
    before, plain = weights(model), sample(model, [1.0, 0.5, 0.0])
    told, loaded, moments, make_room, step, show_sample = [], [], [], training.make_room, show.step, show.sample

    def roomy(trainer, base, *args):
        told.append(make_room(trainer, base, *args))
        loaded.append(base.loaded_size())
        return told[-1]

    monkeypatch.setattr(training, "make_room", roomy)
    monkeypatch.setattr(show, "step", lambda self, *args: loaded.append(self.model.loaded_size()) or step(self, *args))

    def sampled(self, *args):
        moments[:] = [told[-1].moments]
        show_sample(self, *args)

    monkeypatch.setattr(show, "sample", sampled)

    whole = train(model, data, settings, tmp_path / "whole")
    size = told[0].coming + told[0].base // 2
    loaded.clear()
    moments.clear()
    partly = train(small_card(model, size, moments), data, settings, tmp_path / "partly")
    assert len(loaded) == 4 and all(0 < bytes_there < 0.6 * told[0].base for bytes_there in loaded)
    assert whole.history == partly.history and same(whole.expert, partly.expert)
    monkeypatch.undo()
    assert torch.equal(sample(model, [1.0, 0.5, 0.0]), plain)
    assert all(torch.equal(before[name], value) for name, value in weights(model).items())


@pytest.fixture
def run_on_card(module, train, config, small_card, tmp_path, monkeypatch):
    """run_on_card(MODEL, size of(what a run was told), taken) -> results of a run with room and of one on such a card."""
    training, make_room, told = module("nodes.host.training.run"), module("nodes.host.training.run").make_room, []
    data = random_data(module("dcm_core.distill.data.dataset"), size=(4, 16, 16))
    settings = config("semantic", steps=1)
    monkeypatch.setattr(training, "make_room", lambda *args: told.append(make_room(*args)) or told[-1])

    def run(model, size_of, taken=()):
        whole = train(model, data, settings, tmp_path / "whole")
        card = small_card(model, size_of(told[0]), taken)
        return whole, train(card, data, settings, tmp_path / "card")

    return run


@pytest.mark.parametrize(
    ("settings", "first", "advice"),
    [
        ({"rank": 0}, "first_expert", r"set rank above 0 \(a LoRA instead"),
        ({"rank": 128, "alpha": 128.0}, "Trainer", "lower rank from 128"),
    ],
)
def test_tensors_that_cannot_fit_are_refused_before_they_are_made(
    settings, first, advice, wan, train, data, config, module, small_card, tmp_path, monkeypatch
):
    def never(*args, **keywords):
        raise AssertionError("made")

    monkeypatch.setattr(module("nodes.host.training.run"), first, never)
    card = small_card(wan(layers=2), 8 * 2**20, ())
    with pytest.raises(
        module("dcm_core.errors").DCMError, match=rf"Training needs about .* GiB besides the base model.*{advice}"
    ):
        train(card, data, config("semantic", **settings), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def measured_on_card(pack, module, monkeypatch):
    """A measured step runs out of memory where it makes more than the card has free."""
    import comfy.model_management as management

    memory = module("dcm_core.distill.memory")
    measured = memory._measured

    def on_card(step, shape, device):
        size = measured(step, shape, device)
        if size > management.get_free_memory():
            raise management.OOM_EXCEPTION("out of memory")
        return size

    monkeypatch.setattr(memory, "_measured", on_card)


@pytest.mark.usefixtures("measured_on_card")
def test_a_step_that_does_not_fit_beside_the_base_is_measured_without_it(wan, run_on_card, module):
    model = wan(layers=8, width=256)
    whole, card = run_on_card(model, lambda told: told.coming + told.base // 8)
    assert whole.history == card.history and same(whole.expert, card.expert)
    with pytest.raises(module("dcm_core.errors").DCMError, match="Not enough memory for even a small training step"):
        run_on_card(model, lambda told: told.step // 2)


def test_other_models_make_room(wan, run_on_card):
    """What was sampled with before stays on the device until somebody needs it."""
    import comfy.model_management as management

    other = wan(layers=8, seed=1).clone()
    other.load_device = torch.device("cpu:0")

    class Taken:
        def __iter__(self):
            yield other.loaded_size()

    management.load_models_gpu([other])
    held = other.loaded_size()
    assert held > 0
    whole, card = run_on_card(wan(layers=2), lambda told: held + told.base + told.coming // 2, Taken())
    assert whole.history == card.history and other.loaded_size() == 0


def test_an_average_is_there_before_the_first_step_and_only_where_there_is_one(module, model, config):
    check_fits = module("nodes.host.training.base").check_fits
    found = [
        check_fits(model, config("semantic", ema_decay=decay), 1000, 10, model.load_device) for decay in (0.0, 0.95)
    ]
    assert found == [1010, 2010]


def test_the_device_is_cleared_of_other_models_alone(module, model, wan):
    import comfy.model_management as management

    other = wan(layers=1)
    management.load_models_gpu([model, other])
    module("nodes.host.training.base").clear_device(model)
    loaded = [entry.model for entry in management.current_loaded_models]
    assert any(model.is_clone(patcher) for patcher in loaded)
    assert not any(other.is_clone(patcher) for patcher in loaded)
