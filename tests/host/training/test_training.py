"""Training on the host's own model classes: what it changes, resuming, several processes, errors, and models
that others have changed."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dcm_core.experts.expert import expert_tensor_list

from ..small_models import native_wan
from .small_runs import SMALL, interrupted_after, make_trainer, random_data, same, weights

pytestmark = pytest.mark.usefixtures("gradients")

TERMS = {"semantic": {"huber", "temporal"}, "detail": {"huber", "gan", "feature_matching", "discriminator"}}
LAUNCHERS = {
    "torch.distributed.run": ["--standalone", "--nproc-per-node", "2"],
    "accelerate.commands.launch": [
        "--multi_gpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
    ],
}


@pytest.mark.parametrize("side", ["semantic", "detail"])
def test_training_changes_the_expert_and_nothing_else(side, train, model, data, config, tmp_path):
    before = weights(model)
    result = train(model, data, config(side, clip_norm=1e6), tmp_path)
    assert [entry["step"] for entry in result.history] == [1, 2, 3]
    assert TERMS[side] <= set(result.history[-1])
    assert all(value.isfinite().all() for value in expert_tensor_list(result.expert))
    assert all(update.up.abs().sum() > 0 for updates in result.expert.low_rank.values() for update in updates)
    assert result.expert.boundary == 0.9 and result.expert.role == side
    after = weights(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    left = ("forward", "weight", "bias", "modulation")
    assert not [
        m for m in model.model.diffusion_model.modules() if any(m.__dict__.get(name) is not None for name in left)
    ]


@pytest.mark.parametrize("side", ["semantic", "detail"])
def test_every_trained_tensor_gets_a_gradient(side, module, model, data, config, tmp_path):
    trainer = make_trainer(module, model, data, config(side), tmp_path)
    # a fresh `up` is zero, which keeps `down` from having a gradient
    for name, value in trainer.learner.parameters.items():
        if ".ups." in name:
            value.data.normal_(std=0.02)
    for batch, share in trainer.batches.of_step(0):
        loss, _, discriminator_loss = trainer.losses(batch)
        (share * loss).backward()
        assert trainer.discriminator is None or all(value.grad is None for value in trainer.discriminator.parameters())
        if discriminator_loss is not None:
            discriminator_loss().backward()
    untouched = [
        name
        for name, value in trainer.learner.parameters.items()
        if value.grad is None or not value.grad.abs().sum() > 0
    ]
    assert untouched == []
    assert all(value.grad is None for value in model.model.diffusion_model.parameters())
    assert trainer.discriminator is None or all(value.grad is not None for value in trainer.discriminator.parameters())


@pytest.mark.parametrize("side", ["semantic", "detail"])
def test_resumed_equals_uninterrupted(side, train, module, model, data, config, tmp_path, monkeypatch):
    settings = config(side, steps=5, save_every=2, scheduler="cosine", gradient_accumulation_steps=2)
    whole = train(model, data, settings, tmp_path / "whole")
    with interrupted_after(module, monkeypatch, 3):
        train(model, data, settings, tmp_path / "parts")
    resumed = train(model, data, settings, tmp_path / "parts")
    assert same(whole.expert, resumed.expert)
    assert whole.history == resumed.history
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) == settings.keep


def test_each_step_is_made_at_its_learning_rate(module, model, data, config, tmp_path):
    settings = config("semantic", steps=4, warmup_steps=2, scheduler="cosine", learning_rate=1e-3)
    trainer = make_trainer(module, model, data, settings, tmp_path)
    used = []
    for _ in range(settings.steps):
        trainer._training_step()
        used += {group["lr"] for group in trainer.learner.optimizer.param_groups}
    assert used == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3, 0.5e-3])


def test_the_discriminator_has_a_clip_and_a_weight_decay_of_its_own(module, model, data, config, tmp_path):
    """Its first moment is the gradient of the last step, as its first beta is 0."""
    norms = {}
    for clip in (0.0, 1e-3):
        settings = config("detail", discriminator_clip_norm=clip, discriminator_weight_decay=0.5, weight_decay=0.25)
        trainer = make_trainer(module, model, data, settings, tmp_path)
        trainer._training_step()
        optimizer = trainer.discriminator_learner.optimizer
        norms[clip] = torch.cat([state["exp_avg"].flatten() for state in optimizer.state.values()]).norm().item()
        assert {group["weight_decay"] for group in optimizer.param_groups} == {0.5}
        assert {group["weight_decay"] for group in trainer.learner.optimizer.param_groups} == {0.25}
    assert norms[0.0] > 1e-2 and norms[1e-3] == pytest.approx(1e-3, rel=1e-3)


def test_checkpointing_and_accumulation_do_not_change_the_gradients(train, model, data, config, tmp_path):
    plain = train(model, data, config("detail", ema_decay=0.0, batch_size=4), tmp_path / "a")
    again = train(
        model, data, config("detail", ema_decay=0.0, batch_size=4, gradient_checkpointing=True), tmp_path / "b"
    )
    parts = train(
        model, data, config("detail", ema_decay=0.0, batch_size=2, gradient_accumulation_steps=2), tmp_path / "c"
    )
    for other in (again, parts):
        for name in ("loss", "huber", "gan", "discriminator", "grad_norm"):
            ours, theirs = ([entry[name] for entry in run.history] for run in (plain, other))
            assert ours == pytest.approx(theirs, rel=2e-3), name


def test_a_full_fine_tune_and_a_shared_expert(train, model, data, config, tmp_path):
    result = train(model, data, config("semantic", rank=0, shared=True, learning_rate=1e-4), tmp_path)
    assert set(result.expert.replaced) == {name for name, _ in model.model.diffusion_model.named_parameters()}


def test_weights_loaded_in_inference_mode_can_be_trained_on(wan, train, data, config, tmp_path):
    with torch.inference_mode():
        model = wan(layers=1)
    assert model.model.diffusion_model.head.head.weight.is_inference()
    assert len(train(model, data, config("detail"), tmp_path).history) == 3


def test_the_trained_expert_samples_as_it_trained(train, module, model, data, config, sample, tmp_path):
    result = train(model, data, config("detail"), tmp_path)
    attached = module("nodes.host.experts.attach").attach_experts(model, detail=result.expert)
    sigmas = [1.0, 0.95, 0.5, 0.0]
    assert not torch.equal(sample(model, sigmas), sample(attached, sigmas))
    only_semantic = [1.0, 0.95, 0.91]
    assert torch.equal(sample(model, only_semantic), sample(attached, only_semantic))


def test_another_configuration_or_other_data_is_not_resumed(train, module, model, data, config, tmp_path):
    errors = module("dcm_core.distill.config")
    train(model, data, config("semantic", steps=1), tmp_path)
    with pytest.raises(errors.TrainingError, match=r"a checkpoint of a run with other settings: rank: 4 -> 8"):
        train(model, data, config("semantic", rank=8), tmp_path)
    other = random_data(module("dcm_core.distill.data.dataset"), count=3)
    with pytest.raises(errors.TrainingError, match="with other settings: data: "):
        train(model, other, config("semantic"), tmp_path)
    assert len(train(model, data, config("semantic", steps=2), tmp_path).history) == 2
    semantic = train(model, data, config("semantic", steps=1), tmp_path / "semantic").expert
    train(model, data, config("detail", steps=1), tmp_path / "detail", semantic=semantic)
    for given in ({}, {"semantic": semantic, "start": semantic}):
        with pytest.raises(
            errors.TrainingError, match=r"with other settings: (semantic expert: \w+ -> None|start: None -> \w+)"
        ):
            train(model, data, config("detail", steps=2), tmp_path / "detail", **given)


def test_a_finished_run_gives_its_expert_and_says_what_it_did(train, model, data, config, tmp_path):
    whole = train(model, data, config("semantic", steps=2), tmp_path)
    again = train(model, data, config("semantic", steps=2, save_every=1), tmp_path)
    assert same(whole.expert, again.expert) and again.history == whole.history
    assert (
        whole.resumed == ""
        and again.resumed == "Already at step 2 of 2: nothing was trained. Raise steps to train further."
    )
    longer = train(model, data, config("semantic", steps=3, learning_rate=1e-3), tmp_path)
    assert longer.resumed == "Resumed from step 2 of 3, changed: steps: 2 -> 3; learning_rate: 0.0001 -> 0.001."
    assert len(longer.history) == 3


def test_another_learning_rate_takes_effect_where_a_run_goes_on(train, model, data, config, tmp_path):
    train(model, data, config("semantic", steps=2), tmp_path / "faster")
    shutil.copytree(tmp_path / "faster", tmp_path / "same")
    same_rate = train(model, data, config("semantic", steps=4), tmp_path / "same").history
    faster = train(model, data, config("semantic", steps=4, learning_rate=1e-2), tmp_path / "faster").history
    assert faster[:3] == same_rate[:3] and faster[3] != same_rate[3]


REFUSED = {
    "another run": ({"rank": 8}, r"with other settings: rank: 4 -> 8"),
    "fewer steps": ({"steps": 1}, r"steps is 1, but the run in .* is already at step 2. Set steps to 2"),
    "rate": (
        {"steps": 2, "learning_rate": 1e-3},
        r"at step 2 of 2, so no step is left for learning_rate: 0.0001 -> 0.001",
    ),
    "held out": ({"held_out": 4}, r"4 of 4 clips cannot be held out"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_run_cannot_go_on_with_is_refused_before_the_base_is_loaded(
    case, train, module, model, data, config, tmp_path, monkeypatch
):
    train(model, data, config("semantic", steps=2), tmp_path)
    settings, message = REFUSED[case]
    monkeypatch.setattr(module("nodes.host.training.run"), "clear_device", None)
    with pytest.raises(module("dcm_core.errors").DCMError, match=message):
        train(model, data, config("semantic", **settings), tmp_path)


def test_a_damaged_state_is_passed_over(train, model, data, config, tmp_path):
    settings = config("semantic", steps=4, save_every=2, keep=3)
    whole = train(model, data, settings, tmp_path)
    newest = sorted(tmp_path.glob("*.safetensors"))[-1]
    newest.write_bytes(newest.read_bytes()[:1000])
    assert same(whole.expert, train(model, data, settings, tmp_path).expert)


def test_nan_losses_end_the_run_and_keep_the_expert(train, module, model, config, tmp_path):
    dataset, errors = module("dcm_core.distill.data.dataset"), module("dcm_core.distill.config")
    broken = dataset.TensorDataset(
        [torch.full((16, 2, 4, 6), float("nan"))],
        [[[torch.zeros(1, 3, 4096), {}]]],
        [0],
        [[torch.zeros(1, 3, 4096), {}]],
    )
    with pytest.raises(errors.TrainingError, match=r"NaN or infinite 5 times in a row.*Lower learning_rate"):
        train(model, broken, config("semantic", steps=20, batch_size=1), tmp_path)
    checkpoint = module("dcm_core.distill.checkpoints").newest_checkpoint(tmp_path)[1]
    assert all(value.isfinite().all() for value in checkpoint.tensors.values())


def test_states_that_cannot_be_read_are_kept_and_nothing_starts_over_them(train, module, model, data, config, tmp_path):
    checkpoints, file = module("dcm_core.distill.checkpoints"), module("dcm_core.distill.checkpoint_file")
    (tmp_path / "step_00000900.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match=r"No checkpoint in .* can be used: 1 file tried \(newest: step_00000900"):
        train(model, data, config("semantic"), tmp_path)
    saved = file.Checkpoint(2, config("semantic"), {}, [{"step": 1.0}, {"step": 2.0}], {"x": torch.zeros(2)})
    for steps in (1, 2, 3):
        path = checkpoints.save_checkpoint(tmp_path, dataclasses.replace(saved, steps=steps), keep=2)
        assert path.exists()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [f"step_{steps:08d}.safetensors" for steps in (2, 3, 900)]


def test_a_full_disk_loses_no_state(train, module, model, data, config, tmp_path, monkeypatch):
    errors = module("dcm_core.errors")
    train(model, data, config("semantic", steps=2), tmp_path)
    before = sorted(tmp_path.iterdir())

    def full(*_):
        raise errors.CheckpointError("The disk is full.")

    monkeypatch.setattr(module("dcm_core.distill.checkpoint_file"), "write_tensors", full)
    with pytest.raises(errors.CheckpointError, match="full"):
        train(model, data, config("semantic", steps=3), tmp_path)
    assert sorted(tmp_path.iterdir()) == before


def test_what_does_not_fit_is_refused_before_training(train, module, model, data, config, random_expert, tmp_path):
    errors = module("dcm_core.errors")
    foreign = dataclasses.replace(random_expert(model), family="hunyuan_video")
    with pytest.raises(errors.DCMError, match=r"The expert is for hunyuan_video, but the model is Wan 2.1"):
        train(model, data, config("semantic"), tmp_path, start=foreign)
    wide = random_data(module("dcm_core.distill.data.dataset"), channels=48)
    with pytest.raises(errors.DCMError, match="have 48 channels, but the model takes 16"):
        train(model, wide, config("semantic"), tmp_path)
    with pytest.raises(errors.DCMError, match="4 of 4 clips cannot be held out"):
        train(model, data, config("semantic", held_out=4), tmp_path)
    assert not list(tmp_path.iterdir())


def test_too_little_memory_is_refused_with_advice(train, module, model, data, config, tmp_path, monkeypatch):
    import comfy.model_management

    def little(device=None, torch_free_too=False):
        return (2**20, 2**20) if torch_free_too else 2**20

    monkeypatch.setattr(comfy.model_management, "get_free_memory", little)
    with pytest.raises(
        module("dcm_core.errors").DCMError, match=r"needs about .* GiB besides the base model.*lower batch_size from 2"
    ):
        train(model, data, config("detail"), tmp_path)


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("side", ["semantic", "detail"])
def test_two_processes_train_as_one(side, launcher, train, module, model, data, config, tmp_path):
    """Two CPU processes, against one that accumulates two batches. It also goes on with their run."""
    turns = {"gradient_accumulation_steps": 2}
    alone = train(model, data, config(side, steps=4, **turns), tmp_path / "alone")
    script = Path(__file__).with_name("train_in_parallel.py")
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            launcher,
            *LAUNCHERS[launcher],
            str(script),
            side,
            str(tmp_path / "together"),
            json.dumps(SMALL),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"losses_{rank}.json").read_text()) for rank in range(2))
    assert first == second
    again = train(model, data, config(side, steps=4, **turns), tmp_path / "together")
    assert "Resumed with 1 process instead of 2: each step has the same clips as before." in again.resumed
    for found in (first, again.history):
        for name in TERMS[side] | {"loss"}:
            wanted = [entry[name] for entry in alone.history[: len(found)]]
            assert [entry[name] for entry in found] == pytest.approx(wanted, rel=1e-4), name


# What the model is


def with_patch(model, name, value):
    clone = model.clone()
    clone.add_patches({f"diffusion_model.{name}": ("diff", (value,))}, 1.0)
    return clone


def test_what_others_have_loaded_into_the_shared_model_is_not_trained_on(
    train, module, data, config, sample, wan, tmp_path
):
    model, name = wan(layers=2), "head.head.weight"
    original = model.model.diffusion_model.head.head.weight.clone()
    expected = train(model, data, config("detail", steps=2), tmp_path / "plain")
    tuned = with_patch(model, name, torch.full((64, 256), 0.5))
    sample(tuned, [1.0, 0.5, 0.0])
    assert not torch.equal(model.model.diffusion_model.head.head.weight, original), "still in the weights"
    after = train(model, data, config("detail", steps=2), tmp_path / "after")
    assert expected.history == after.history and same(expected.expert, after.expert)


def test_a_lora_on_the_model_is_part_of_the_teacher(train, module, model, data, config, wan, tmp_path):
    import comfy.sd

    name, value = "head.head.weight", torch.full((64, 256), 0.02)
    state_dict = native_wan(layers=2)
    state_dict[name] = state_dict[name] + value
    merged = comfy.sd.load_diffusion_model_state_dict(state_dict, model_options={"dtype": torch.float32})
    expected = train(merged, data, config("detail", steps=2), tmp_path / "merged")
    patched = train(with_patch(model, name, value), data, config("detail", steps=2), tmp_path / "patched")
    assert expected.history == patched.history and same(expected.expert, patched.expert)
    plain = train(model, data, config("detail", steps=2), tmp_path / "plain")
    assert plain.history != patched.history


def test_compiled_blocks_do_not_hide_the_layers(train, module, data, config, wan, tmp_path):
    model = wan(layers=2)
    expected = train(model, data, config("detail", steps=2), tmp_path / "plain")
    compiled = model.clone()
    for index, block in enumerate(model.model.diffusion_model.blocks):
        compiled.add_object_patch(f"diffusion_model.blocks.{index}", torch.compile(block, backend="eager"))
    import comfy.model_management

    comfy.model_management.load_models_gpu([compiled])
    found = train(compiled, data, config("detail", steps=2), tmp_path / "compiled")
    assert expected.history == found.history and same(expected.expert, found.expert)


def test_checkpointing_keeps_another_pack_s_forward(train, data, config, wan, tmp_path):
    model = wan(layers=2)
    block, calls = model.model.diffusion_model.blocks[0], []
    expected = train(model, data, config("semantic", steps=1, gradient_checkpointing=True), tmp_path / "plain")
    forward = block.forward

    def counted(*args, **kwargs):
        calls.append(1)
        return forward(*args, **kwargs)

    block.forward = counted
    found = train(model, data, config("semantic", steps=1, gradient_checkpointing=True), tmp_path / "own")
    assert calls and block.__dict__["forward"] is counted
    assert expected.history == found.history and same(expected.expert, found.expert)


def test_a_model_whose_weights_are_streamed_is_trained_as_a_whole_one(module, model):
    """Of newer hosts' patchers for that: here one with the method that gives the other kind."""
    places = module("nodes.host.training.base")
    whole = model.clone()

    class Streaming(type(model)):
        def get_non_dynamic_delegate(self):
            return whole

    streaming = model.clone()
    streaming.__class__ = Streaming
    assert places.training_base(streaming) is whole


def test_a_base_without_a_gradient_is_refused(train, module, model, data, config, tmp_path, monkeypatch):
    errors = module("dcm_core.errors")
    layer = model.model.diffusion_model.blocks[0].ffn[0]
    monkeypatch.setitem(layer.__dict__, "forward", lambda x: x.int())
    with pytest.raises(
        errors.DCMError,
        match=r"cannot be trained the way it is loaded \(.*Load the model with weight_dtype",
    ):
        train(model, data, config("semantic"), tmp_path)
    assert not list(tmp_path.iterdir())
