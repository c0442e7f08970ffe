"""Both training steps, exact to the official code, on the host's own Wan class."""

import json
import re
from pathlib import Path

import pytest
import torch

from ..compare import relative
from .small_runs import random_data

pytestmark = pytest.mark.usefixtures("gradients")

TOLERANCE = 1e-4
META = json.loads((Path(__file__).parents[2] / "golden" / "wan_train.meta.json").read_text())
SEMANTIC = [case for case in META if case.startswith("semantic.")]
DETAIL = [case for case in META if case.startswith("detail.")]
SOLVER = {"shift": META["shift"], "points": META["num_euler_timesteps"]}
# Between the cleanest point of the semantic expert, which one of the cases starts at, and the point below it.
SPLIT = min(META[case]["index"] for case in SEMANTIC)
BOUNDARY = (META["sigmas"][SPLIT - 1] + META["sigmas"][SPLIT]) / 2


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
    """core("distill.method.stages") -> a module of the library as the pack loads it."""
    return lambda name: module(f"dcm_core.{name}")


@pytest.fixture(scope="module")
def expected(recipe):
    return recipe.expected("wan_train")


@pytest.fixture(scope="module")
def tensors(module, recipe):
    """tensors(role) -> the golden weights of that network, by native name."""
    wan = module("dcm_core.families").WAN
    shapes = recipe.keys("wan_train")["transformer"]
    return lambda role: {
        wan.key_map.find(key).target: weight(recipe, role, key, shape) for key, shape in shapes.items()
    }


@pytest.fixture(scope="module")
def teacher(tensors):
    """A MODEL of the teacher's weights: the base that everything is trained on."""
    import comfy.sd

    return comfy.sd.load_diffusion_model_state_dict(tensors("teacher"), model_options={"dtype": torch.float32})


@pytest.fixture(scope="module")
def make(core, module, teacher, tmp_path_factory):
    """make(config, start, semantic=None) -> a Trainer on the teacher."""
    wan, folder = module("dcm_core.families").WAN, tmp_path_factory.mktemp("run")

    def run(config, start, semantic=None):
        backbone = module("nodes.host.training.run").make_backbone(teacher, wan, config)
        data = random_data(core("distill.data.dataset"))
        return core("distill.trainer").Trainer(
            backbone, data, config, start, folder, torch.device("cpu"), semantic=semantic
        )

    return run


@pytest.fixture(scope="module")
def settings(core, module, recipe):
    """settings(side, case) -> the official run's configuration."""
    hidden = recipe.keys("wan_train")["discriminator"]["heads.0.0.conv_out.weight"][1]

    def read(side, case):
        facts = META[case]
        config = core("distill.config").TrainingConfig(
            side,
            rank=META["rank"] if side == "detail" else 0,
            **SOLVER,
            alpha=2.0 * META["rank"],
            boundary=BOUNDARY,
            gradient_checkpointing=False,
            cfg=facts["distill_cfg"] if facts["use_cfg"] else 0.0,
            adversarial_weight=facts.get("adv_weight", 0.0),
            discriminator_width=hidden,
        )
        return config.for_family(module("dcm_core.families").WAN)

    return read


def video_shape(recipe, facts):
    channels = recipe.keys("wan_train")["transformer"]["patch_embedding.weight"][1]
    return 1, channels, facts["T"], facts["H"], facts["W"]


def crop(made, expected):
    """The part of a tensor that the golden file keeps."""
    return made[tuple(map(slice, expected.shape))]


def gradients_of(expected, case, kind="grad"):
    """Name of a parameter in the official code -> its gradient, of those that the golden file keeps."""
    prefix = f"{case}.{kind}."
    return {key.removeprefix(prefix): value for key, value in expected.items() if key.startswith(prefix)}


def sites_of(part):
    """Module name -> what trains there, of a trained expert's low-rank or replaced layers."""
    return dict(zip(part.names, part.sites, strict=True))


def head_name(key):
    """Our name of a discriminator's tensor: the official heads are numbered twice."""
    return re.sub(r"^(heads\.\d+)\.0\.", r"\1.", key)


def make_batch(core, recipe, case, **more):
    facts = META[case]
    shapes = recipe.keys("wan_train")["transformer"]
    text_width = shapes["condition_embedder.text_embedder.linear_1.weight"][1]
    inputs = recipe.training_inputs(case, video_shape(recipe, facts), text_width)
    text = core("distill.backbone").Text
    return core("distill.method.consistency").Batch(
        inputs["x0"],
        text(inputs["context"]),
        text(inputs["uncond"]),
        inputs["noise"],
        torch.tensor([facts["index"]]),
        **more,
    )


def test_the_points_are_the_official_ones(core):
    phases = core("distill.method.phases").Phases("semantic", BOUNDARY, **SOLVER)
    assert phases.sigmas.tolist() == pytest.approx(META["sigmas"], rel=1e-6)
    assert phases.previous.tolist() == pytest.approx(META["sigmas_prev"], rel=1e-6)
    assert phases.owned.tolist() == list(range(SPLIT, len(META["sigmas"])))
    assert core("distill.method.phases").Phases("detail", BOUNDARY, **SOLVER).owned.tolist() == list(range(SPLIT))
    for facts in (META[case] for case in SEMANTIC + DETAIL):
        assert phases.sigmas[facts["index"]].item() == pytest.approx(facts["sigma"], rel=1e-6)
        assert phases.previous[facts["index"]].item() == pytest.approx(facts["sigma_prev"], rel=1e-6)
    for facts in (META[case] for case in DETAIL):
        assert phases.previous[facts["adv_index"]].item() == pytest.approx(facts["sigma_adv"], rel=1e-6)


def norm_of(gradients):
    return torch.stack([gradient.norm() for gradient in gradients]).norm()


def predictions(core, trainer, batch):
    return core("distill.method.consistency").predict(trainer.networks(), batch, trainer.phases, trainer.config.cfg)


@pytest.mark.parametrize("case", SEMANTIC)
def test_semantic_step(case, core, recipe, make, settings, tensors, expected):
    facts = META[case]
    Expert, wan = core("experts.expert").Expert, core("families").WAN
    # teacher, student and EMA are three different networks, as in the middle of a run
    trainer = make(settings("semantic", case), Expert("wan", "semantic", replaced=tensors("student")))
    ema = core("distill.student").Student(
        Expert("wan", "semantic", replaced=tensors("ema")),
        dict(trainer.backbone.module.named_modules()),
        trainer.device,
    )
    trainer.ema.update_ema(ema, decay=0.0)
    batch = make_batch(core, recipe, case)
    assert relative(batch.x0, expected[f"{case}.x0"]) < 1e-6
    pred, target = predictions(core, trainer, batch)
    assert relative(pred, expected[f"{case}.student_pred"]) < TOLERANCE
    assert relative(target, expected[f"{case}.target"]) < TOLERANCE
    loss, terms, discriminator_loss = trainer.losses(batch)
    assert discriminator_loss is None
    assert (
        close(loss, facts["loss"])
        and close(terms["huber"], facts["huber"])
        and close(terms["temporal"], facts["temporal"])
    )
    loss.backward()
    gradients = {name: value.grad for name, value in trainer.student.named_parameters()}
    assert all(gradient is not None and torch.isfinite(gradient).all() for gradient in gradients.values())
    assert close(norm_of(gradients.values()), facts["grad_norm"])
    others = (*trainer.backbone.module.parameters(), *(value for _, value in trainer.ema.named_parameters()))
    assert all(value.grad is None for value in others)
    sites, kept = sites_of(trainer.student.replaced), gradients_of(expected, case)
    assert kept
    for key, golden in kept.items():
        name, _, param = wan.key_map.find(key).target.rpartition(".")
        found = sites[name].replaced.get_parameter(param).grad
        assert relative(crop(found, golden), golden) < TOLERANCE, key


@pytest.fixture(scope="module")
def detail_pair(core, recipe, tensors):
    """The golden semantic expert, a full fine-tune of the teacher, and the detail expert that is trained on top of it."""
    experts, wan, student = core("experts.expert"), core("families").WAN, tensors("student")
    shapes = recipe.keys("wan_train")["detail_student"]
    pairs = {
        key: recipe.weight(key, shape, f"student.{key}").float() for key, shape in shapes.items() if ".lora_" in key
    }
    # its own layers begin as copies of the semantic expert's
    own = {
        name: [piece.source.split(".")[0] for piece in wan.key_map.sources_of(name.rpartition(".")[0])]
        for name in student
    }
    replaced = {name: value for name, value in student.items() if set(own[name]) & set(wan.detail_modules)}
    shapes = {name: tuple(value.shape) for name, value in student.items()}
    low_rank = core("experts.reader").read_expert(pairs, {}, "detail", wan, shapes).low_rank
    return experts.Expert("wan", "semantic", replaced=student), experts.Expert("wan", "detail", low_rank, replaced)


@pytest.mark.parametrize("case", DETAIL)
def test_detail_step(case, core, recipe, make, settings, detail_pair, expected):
    facts, (semantic, detail), wan = META[case], detail_pair, core("families").WAN
    trainer = make(settings("detail", case), detail, semantic)
    with torch.no_grad():
        # an EMA that would give other targets: the detail stage takes the student's own
        for _, value in trainer.ema.named_parameters():
            value.mul_(1.5)
    tensors = recipe.discriminator(recipe.keys("wan_train")["discriminator"])
    trainer.discriminator.load_state_dict({head_name(key): value for key, value in tensors.items()})
    noise = recipe.normals(f"{case}.adv_noise", video_shape(recipe, facts)).float()
    batch = make_batch(core, recipe, case, level=torch.tensor([facts["adv_index"]]), level_noise=noise)
    with torch.no_grad():
        made = predictions(core, trainer, batch)
    for value, name in zip(made, ("student_pred", "target"), strict=True):
        golden = expected[f"{case}.{name}"]
        assert relative(crop(value, golden), golden) < TOLERANCE, name
    loss, terms, discriminator_loss = trainer.losses(batch)
    assert close(terms["huber"], facts["huber"])
    assert close(terms["feature_matching"], facts["feature_matching_weighted"])
    assert close(terms["feature_matching"] / trainer.config.feature_weight, facts["feature_matching_mse"])
    assert close(terms["gan"], facts["gan_generator_weighted"])
    assert close(loss, facts["generator_loss"])
    loss.backward()
    gradients = [value.grad for _, value in trainer.student.named_parameters()]
    assert all(gradient is not None for gradient in gradients)
    assert close(norm_of(gradients), facts["generator_grad_norm"])
    assert all(value.grad is None for value in trainer.discriminator.parameters())
    low_rank, replaced = map(sites_of, (trainer.student.low_rank, trainer.student.replaced))
    kept = gradients_of(expected, case)
    assert kept
    for key, golden in kept.items():
        module, lora, _ = key.partition(".lora_")
        source = f"{module}.weight" if lora else wan.detail_source(key)
        name, _, param = wan.key_map.find(source).target.rpartition(".")
        if lora:
            branch = low_rank[name].branch
            found = (branch.down if key.startswith(f"{module}.lora_A.") else branch.ups[0]).weight.grad
        else:
            found = replaced[name].replaced.get_parameter(param).grad
        assert relative(crop(found, golden), golden) < TOLERANCE, key
    judged = discriminator_loss()
    assert close(judged, facts["discriminator_loss"])
    judged.backward()
    assert close(norm_of(value.grad for value in trainer.discriminator.parameters()), facts["discriminator_grad_norm"])
    kept = gradients_of(expected, case, "dgrad")
    assert kept
    for key, golden in kept.items():
        found = trainer.discriminator.get_parameter(head_name(key)).grad
        assert relative(crop(found, golden), golden) < TOLERANCE, key
    # with the betas of the official code, its first step forgets all but the newest gradient
    assert {group["betas"] for group in trainer.discriminator_learner.optimizer.param_groups} == {(0.0, 0.999)}
