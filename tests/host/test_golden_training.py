"""Both training steps, exact to the official code, on the host's own Wan class."""

import json
from pathlib import Path

import pytest
import torch

from .compare import relative

pytestmark = pytest.mark.usefixtures("gradients")

TOLERANCE = 1e-4
META = json.loads((Path(__file__).parents[1] / "golden" / "wan_train.meta.json").read_text())
SEMANTIC = [case for case in META if case.startswith("semantic.")]
DETAIL = [case for case in META if case.startswith("detail.")]
# The golden runs split at point 35; any sigma between the points 34 and 35 says so.
BOUNDARY = 0.9765


def weight(recipe, role, key, shape):
    """A float32 weight of the golden training runs.

    Their norm gains were never rounded to bfloat16, as those of a release are: 1 + a bfloat16 tensor, in float32.
    """
    if "norm" in key and key.endswith(".weight"):
        return 1 + recipe.normals(f"{role}.{key}", shape, 0.1).float()
    return recipe.weight(key, shape, f"{role}.{key}").float()


def close(a, b):
    return float(a.detach()) == pytest.approx(b, rel=TOLERANCE, abs=1e-9)


@pytest.fixture(scope="module")
def core(module):
    """core("distill.stages") -> a module of the library as the pack loads it."""
    return lambda name: module(f"dcm_core.{name}")


@pytest.fixture(scope="module")
def expected(recipe):
    return recipe.expected("wan_train")


@pytest.fixture(scope="module")
def network(module, recipe):
    """network(role) -> backbone of the golden weights of that role."""
    import comfy.sd

    wan = module("dcm_core.families").WAN
    shapes = recipe.keys("wan_train")["transformer"]
    training = module("nodes.host.training")

    def make(role):
        tensors = {wan.key_map.find(key).target: weight(recipe, role, key, shape) for key, shape in shapes.items()}
        model = comfy.sd.load_diffusion_model_state_dict(tensors, model_options={"dtype": torch.float32})
        config = module("dcm_core.distill.config").TrainingConfig("detail", checkpointing=False)
        return training.make_backbone(model, wan, config)

    return make


@pytest.fixture(scope="module")
def networks(network):
    return {role: network(role) for role in ("student", "teacher", "ema")}


def make_batch(core, recipe, case, **more):
    facts = META[case]
    inputs = recipe.training_inputs(case, (1, 16, facts["T"], facts["H"], facts["W"]))
    text = core("distill.backbone").Text
    return core("distill.consistency").Batch(
        inputs["x0"], text(inputs["context"]), text(inputs["uncond"]), inputs["noise"], torch.tensor([facts["index"]]), **more
    )


def test_the_points_are_the_official_ones(core):
    phases = core("distill.phases").Phases("semantic", BOUNDARY)
    assert phases.sigmas.tolist() == pytest.approx(META["sigmas"], rel=1e-6)
    assert phases.previous.tolist() == pytest.approx(META["sigmas_prev"], rel=1e-6)
    assert phases.owned.tolist() == list(range(35, 50))
    assert core("distill.phases").Phases("detail", BOUNDARY).owned.tolist() == list(range(35))
    for facts in (META[case] for case in SEMANTIC + DETAIL):
        assert phases.sigmas[facts["index"]].item() == pytest.approx(facts["sigma"], rel=1e-6)
        assert phases.previous[facts["index"]].item() == pytest.approx(facts["sigma_prev"], rel=1e-6)
    for facts in (META[case] for case in DETAIL):
        assert phases.previous[facts["adv_index"]].item() == pytest.approx(facts["sigma_adv"], rel=1e-6)


@pytest.mark.parametrize("case", SEMANTIC)
def test_semantic_step(case, core, recipe, networks, expected):
    facts = META[case]
    trainee, stages = core("distill.trainee"), core("distill.stages")
    modules = dict(networks["student"].module.named_modules())
    family = networks["student"].family
    student = trainee.make_trainee(trainee.new_semantic(family, modules, 0, 1.0, None), modules, torch.device("cpu"))
    roles = core("distill.consistency").Roles(
        student=lambda x, sigma, text: networks["student"].velocity(x, sigma, text, student.working),
        teacher=networks["teacher"].velocity,
        target=networks["ema"].velocity,
    )
    batch = make_batch(core, recipe, case)
    assert relative(batch.x0, expected[f"{case}.x0"]) < 1e-6
    phases = core("distill.phases").Phases("semantic", BOUNDARY)
    stage = stages.SemanticStage(phases, facts["distill_cfg"] if facts["use_cfg"] else 0.0)
    pred, target = core("distill.consistency").predict(roles, batch, phases, stage.cfg)
    assert relative(pred, expected[f"{case}.student_pred"]) < TOLERANCE
    assert relative(target, expected[f"{case}.target"]) < TOLERANCE
    loss, terms = stage.losses(roles, batch)
    assert close(loss, facts["loss"]) and close(terms["huber"], facts["huber"]) and close(terms["temporal"], facts["temporal"])
    loss.backward()
    gradients = {name: value.grad for name, value in student.named_parameters()}
    assert all(gradient is not None and torch.isfinite(gradient).all() for gradient in gradients.values())
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    assert close(norm, facts["grad_norm"])
    assert all(weight.grad is None for weight in networks["student"].module.parameters())
    sites = dict(zip(student.replaced.names, student.replaced.sites, strict=True))
    for name, key in (("blocks.0.self_attn.q", "blocks.0.attn1.to_q"), ("head.head", "proj_out")):
        found = sites[name].replaced.weight.grad[:16]
        assert relative(found, expected[f"{case}.grad.{key}.weight"]) < TOLERANCE, key


@pytest.mark.parametrize("case", DETAIL)
def test_detail_step(case, core, recipe, networks, expected, monkeypatch):
    facts = META[case]
    trainee, stages, keys = core("distill.trainee"), core("distill.stages"), recipe.keys("wan_train")
    base, family = networks["student"], networks["student"].family
    modules = dict(base.module.named_modules())
    pairs = {key: recipe.weight(key, shape, f"student.{key}").float() for key, shape in keys["detail_student"].items() if ".lora_" in key}
    # its own layers begin as copies of the base's
    fresh = trainee.new_detail(family, modules, META["rank"], 2.0 * META["rank"], torch.Generator())
    read = core("experts").expert_from_release(family, pairs)
    student = trainee.make_trainee(core("experts").Expert("wan", "detail", read.low_rank, fresh.replaced), modules, torch.device("cpu"))

    def velocity(x, sigma, text):
        return base.velocity(x, sigma, text, student.working)

    roles = core("distill.consistency").Roles(velocity, networks["teacher"].velocity, velocity)
    noise = recipe.normals(f"{case}.adv_noise", (1, 16, facts["T"], facts["H"], facts["W"])).float()
    batch = make_batch(core, recipe, case, level=torch.tensor([facts["adv_index"]]), level_noise=noise)
    phases = core("distill.phases").Phases("detail", BOUNDARY)
    stage = stages.DetailStage(phases, facts["distill_cfg"] if facts["use_cfg"] else 0.0, facts["adv_weight"])
    teacher = networks["teacher"]
    discriminator = core("distill.discriminator").Discriminator(len(teacher.feature_blocks()), 256)
    tensors = recipe.discriminator(keys["discriminator"])
    discriminator.load_state_dict({key.replace("heads.0.0.", "heads.0.").replace("heads.1.0.", "heads.1."): value
                                   for key, value in tensors.items()})
    pairs_made = []
    monkeypatch.setattr(stages, "predict", lambda *args: pairs_made.append(core("distill.consistency").predict(*args)) or pairs_made[0])
    loss, terms, discriminator_loss = stage.losses(roles, batch, teacher.features, discriminator)
    for made, name in zip(pairs_made[0], ("student_pred", "target"), strict=True):
        assert relative(made.detach()[:, :, :, :10, :10], expected[f"{case}.{name}"]) < TOLERANCE, name
    assert close(terms["huber"], facts["huber"])
    assert close(terms["feature_matching"], facts["feature_matching_weighted"])
    assert close(terms["feature_matching"] / stage.feature_weight, facts["feature_matching_mse"])
    assert close(terms["gan"], facts["gan_generator_weighted"])
    assert close(loss, facts["generator_loss"])
    loss.backward()
    gradients = [value.grad for _, value in student.named_parameters()]
    assert all(gradient is not None for gradient in gradients)
    assert close(torch.stack([gradient.norm() for gradient in gradients]).norm(), facts["generator_grad_norm"])
    assert all(value.grad is None for value in discriminator.parameters())
    low_rank = dict(zip(student.low_rank.names, student.low_rank.sites, strict=True))
    for found, key in (
        (low_rank["blocks.0.self_attn.q"].branch.down.weight, "blocks.0.attn1.to_q.lora_A.lora1.weight"),
        (low_rank["blocks.3.cross_attn.o"].branch.ups[0].weight, "blocks.3.attn2.to_out.0.lora_B.lora1.weight"),
        (dict(zip(student.replaced.names, student.replaced.sites, strict=True))["head.head"].replaced.weight, "proj_out_lora.weight"),
    ):
        assert relative(found.grad[:16], expected[f"{case}.grad.{key}"]) < TOLERANCE, key
    judged = discriminator_loss()
    assert close(judged, facts["discriminator_loss"])
    judged.backward()
    norm = torch.stack([value.grad.norm() for value in discriminator.parameters()]).norm()
    assert close(norm, facts["discriminator_grad_norm"])
    found = discriminator.heads[0].conv_out.weight.grad
    assert relative(found, expected[f"{case}.dgrad.heads.0.0.conv_out.weight"]) < TOLERANCE
