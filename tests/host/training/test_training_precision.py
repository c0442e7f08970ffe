"""Training on bases that are stored in few bits: as on the same weights in float32, with the base as it was."""

import pytest
import torch
from safetensors.torch import save_file

from ..compare import relative
from ..small_models import KINDS, native_wan, stored
from .small_runs import make_trainer

KEPT = ("weight", "bias", "modulation")


@torch.no_grad()
def numbers(model):
    """The weights of a MODEL as they count, float32."""
    network = model.model.diffusion_model
    found = {name: value.detach() for name, value in network.named_parameters() if name.rpartition(".")[2] in KEPT}
    for name, value in found.items():
        scale = (
            getattr(network.get_submodule(name.rpartition(".")[0]), "scale_weight", None)
            if name.endswith("weight")
            else None
        )
        plain = value.dequantize() if type(value) is not torch.Tensor else value.float()
        found[name] = plain.float() if scale is None else plain * scale
    return found


def copied(tensors):
    return {name: value.clone() for name, value in tensors.items()}


def same_numbers(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def base(pack, models):
    """base(kind) -> the MODEL as the host's loader node makes it of a file of that kind."""
    import nodes

    def load(kind, **sizes):
        tensors, metadata = stored(kind, native_wan(layers=2, **sizes))
        save_file(tensors, models / "diffusion_models" / f"{kind}.safetensors", metadata)
        with torch.inference_mode():
            return nodes.UNETLoader().load_unet(f"{kind}.safetensors", "fp8_e4m3fn" if kind == "fp8" else "default")[0]

    yield load
    for kind in KINDS:
        (models / "diffusion_models" / f"{kind}.safetensors").unlink(missing_ok=True)


@pytest.fixture
def trainer(module, data, config, tmp_path):
    """trainer(MODEL, side, ...) -> a Trainer, its pairs' `up` no longer zero."""

    def make(model, side, **values):
        made = make_trainer(module, model, data, config(side, **values), tmp_path)
        generator = torch.Generator().manual_seed(1)
        for name, value in made.learner.parameters.items():
            if ".ups." in name:
                value.data.normal_(std=0.02, generator=generator)
        if made.ema:
            made.ema.update_ema(made.student, 0.0)
        return made

    return make


def gradients_of(places, model, made):
    with places.differentiable(model):
        terms = made._gradients(0)
    return terms, {name: value.grad for name, value in made.learner.parameters.items()}


@pytest.mark.usefixtures("gradients")
@pytest.mark.parametrize(("side", "rank"), [("semantic", 4), ("semantic", 0), ("detail", 4)])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_same_weights_in_float32(kind, side, rank, base, trainer, module):
    import comfy.sd

    places = module("nodes.host.training.base")
    model = base(kind)
    before = numbers(model)
    plain = comfy.sd.load_diffusion_model_state_dict(copied(before), model_options={"dtype": torch.float32})
    made, reference = trainer(model, side, rank=rank), trainer(plain, side, rank=rank)
    assert made.learner.parameters.keys() == reference.learner.parameters.keys()
    for name, value in made.learner.parameters.items():
        assert value.dtype is torch.float32 and torch.allclose(value, reference.learner.parameters[name], rtol=1e-6), (
            name
        )
    (terms, found), (expected_terms, expected) = (
        gradients_of(places, model, made),
        gradients_of(places, plain, reference),
    )
    assert terms == pytest.approx(expected_terms, rel=1e-4)
    for name, gradient in found.items():
        assert gradient is not None and gradient.abs().sum() > 0, name
        assert relative(gradient, expected[name]) < 1e-3, name
    assert same_numbers(before, numbers(model))


@pytest.mark.parametrize("kind", KINDS)
def test_experts_trained_on_it_are_usable(kind, base, train, data, config, module, sample, tmp_path):
    training, attach = module("nodes.host.training.run"), module("nodes.host.experts.attach")
    model = base(kind)
    before, semantic = numbers(model), None
    sigmas = [1.0, 0.95, 0.8, 0.0]
    outputs = [sample(model, sigmas)]
    for side in ("semantic", "detail"):
        settings = config(side, steps=2, learning_rate=1e-2, gradient_checkpointing=True)
        expert = train(model, data, settings, tmp_path / side, semantic=semantic).expert
        file = tmp_path / f"{side}.safetensors"
        training.save_expert(file, expert, model)
        read = module("nodes.host.experts.expert_files").read_expert_file(file, side, model)
        semantic = semantic or read
        outputs.append(sample(attach.attach_experts(model, semantic, read if side == "detail" else None), sigmas))
    # which takes the last experts off
    assert torch.equal(outputs[0], sample(model, sigmas))
    assert same_numbers(before, numbers(model))
    assert all(output.isfinite().all() for output in outputs)
    assert relative(outputs[1], outputs[0]) > 1e-3 and relative(outputs[2], outputs[1]) > 1e-3


@pytest.mark.parametrize("kind", ["fp8", "scaled_fp8", "quantised"])
def test_fp8_products_of_the_device_are_not_used(kind, base, train, data, config, module, tmp_path, monkeypatch):
    """They have no gradient. A base loaded for them trains as one that is not."""
    import comfy.model_management
    import comfy.ops

    products, product = [], torch._scaled_mm
    monkeypatch.setattr(torch, "_scaled_mm", lambda *args, **kwargs: products.append(args) or product(*args, **kwargs))
    settings, load = config("semantic", steps=2), module("nodes.host.experts.load")
    plain = train(base(kind), data, settings, tmp_path / "plain")
    monkeypatch.setattr(comfy.model_management, "supports_fp8_compute", lambda *_: True)
    path = module("nodes.host.folders").path_of("diffusion_models", f"{kind}.safetensors")
    with torch.inference_mode():
        model, _ = load.load_file(path, "fp8_e4m3fn_fast" if kind == "fp8" else "default")
    fast = train(model, data, settings, tmp_path / "fast")
    # such a host keeps the rest of a quantised model in fp8 too
    assert [entry["loss"] for entry in fast.history] == pytest.approx(
        [entry["loss"] for entry in plain.history], rel=1e-3
    )
    assert products == []
    layer = model.model.diffusion_model.blocks[0].ffn[0]
    with torch.no_grad():
        layer(torch.ones(1, 16, 256))
    assert len(products) == 1, "as before"


@pytest.fixture
def half(pack, monkeypatch):
    """A MODEL that computes in float16, as the host has it on a GPU."""
    import comfy.model_management
    import comfy.sd

    tensors = {name: value.half() for name, value in native_wan(layers=2).items()}
    with monkeypatch.context() as patch:
        patch.setattr(comfy.model_management, "should_use_fp16", lambda *_, **__: True)
        return comfy.sd.load_diffusion_model_state_dict(tensors, model_options={"dtype": torch.float16})


@pytest.mark.usefixtures("gradients")
@pytest.mark.parametrize("share", [1.0, 1e-3], ids=["few values", "a long video"])
def test_gradients_below_float16_are_not_lost(share, half, trainer, module, monkeypatch):
    """A loss is a mean: of a video's two million values each has a gradient that float16 cannot hold."""
    import comfy.sd

    stages = module("dcm_core.distill.method.stages")
    plain = comfy.sd.load_diffusion_model_state_dict(numbers(half), model_options={"dtype": torch.float32})
    huber = stages.pseudo_huber
    monkeypatch.setattr(stages, "pseudo_huber", lambda *videos: share * huber(*videos))
    made, reference = trainer(half, "semantic"), trainer(plain, "semantic")
    assert made.backbone.dtype is torch.float16
    reference._gradients(0)
    made._gradients(0)
    norms = [made_or.learner.gather(made_or.processes, made_or.loss_scale) for made_or in (made, reference)]
    assert norms[0] == pytest.approx(norms[1], rel=0.05)
    expected = reference.learner.parameters
    worst = max(relative(value.grad, expected[name].grad) for name, value in made.learner.parameters.items())
    assert worst < 0.3


@pytest.mark.usefixtures("gradients")
def test_a_loss_scale_that_is_too_large_is_lowered(wan, trainer, monkeypatch):
    made = trainer(wan(layers=1), "semantic")
    expected = trainer(wan(layers=1), "semantic")
    expected._training_step()
    made.loss_scale = 2.0**8
    gather = made.learner.__class__.gather

    def overflowing(self, processes, scale=1.0):
        norm = gather(self, processes, scale)
        return norm if scale < 2.0**7 else float("inf")

    monkeypatch.setattr(made.learner.__class__, "gather", overflowing)
    made._training_step()
    assert made.loss_scale == 2.0**6
    assert made.history[0]["loss"] == expected.history[0]["loss"]
    assert made.history[0]["grad_norm"] == pytest.approx(expected.history[0]["grad_norm"], rel=1e-5)
    for name, value in made.learner.parameters.items():
        assert torch.allclose(value, expected.learner.parameters[name], atol=1e-7), name


@pytest.mark.usefixtures("gradients")
def test_the_loss_scale_outlives_a_step_that_no_scale_saves(half, trainer, module, monkeypatch):
    """It also grows again after one that it was lowered for."""
    made, learner = trainer(half, "semantic"), module("dcm_core.distill.learner")
    gather = learner.Learner.gather
    monkeypatch.setattr(learner.Learner, "gather", lambda *args: (gather(*args), float("nan"))[1])
    made._training_step()
    assert made.loss_scale == 2.0**16 and made.done == 1
    monkeypatch.undo()
    made.loss_scale = 2.0**15
    monkeypatch.setattr(module("dcm_core.distill.trainer"), "STEPS_TO_RESCALE", 2)
    scales = []
    for _ in range(4):
        made._training_step()
        scales.append(made.loss_scale)
    assert scales == [2.0**16] * 4


@pytest.mark.usefixtures("gradients")
def test_the_loss_scale_is_part_of_a_state(half, trainer):
    made = trainer(half, "semantic")
    made.loss_scale = 2.0**5
    made._training_step()
    made._save()
    again = trainer(half, "semantic")
    assert again.loss_scale == 2.0**16
    again._resume()
    assert again.loss_scale == 2.0**5 and again.done == 1
