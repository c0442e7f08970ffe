"""HunyuanVideo's training steps against a slow implementation: whole copies of the model with merged weights, plain formulas."""

import copy

import pytest
import torch

from dcm_core.experts.expert import expert_tensor_list

from ..compare import relative
from .small_runs import group_of_one, make_trainer, same

pytestmark = pytest.mark.usefixtures("gradients")

TOLERANCE, GRADIENTS = 2e-4, 3e-4
BOUNDARY, GUIDANCE, CFG = 0.982, 6.0, 5.0


@pytest.fixture(scope="module")
def model(module, releases):
    return load_base(module, releases)


def load_base(module, releases):
    load = module("nodes.host.experts.load")
    load.WEIGHT_DTYPES["float32"] = {"dtype": torch.float32}
    loaded, _ = load.load_model(releases["hy_tiny"], "float32")
    del load.WEIGHT_DTYPES["float32"]
    return module("nodes.host.experts.attach").detach_experts(loaded)


@pytest.fixture(scope="module")
def data(module):
    generator = torch.Generator().manual_seed(0)

    def conditioning():
        return [
            [
                torch.randn(1, 5, 4096, generator=generator) * 0.3,
                {"pooled_output": torch.randn(1, 768, generator=generator) * 0.5},
            ]
        ]

    latents = [torch.randn(16, 5, 6, 8, generator=generator) for _ in range(2)]
    return module("dcm_core.distill.data.dataset").TensorDataset(
        latents, [conditioning(), conditioning()], [0, 1], conditioning()
    )


@pytest.fixture(scope="module")
def config(config):
    """The small settings on the release's noise levels."""
    release = {"boundary": 0.0, "shift": 17.0, "cfg": CFG, "guidance": GUIDANCE}
    return lambda side, **values: config(side, **{**release, **values})


@pytest.fixture(scope="module")
def trainer(module, model, data, config, tmp_path_factory):
    """trainer(side, ...) -> a Trainer on random data, its pairs' `up` no longer zero."""

    def make(side, model=model, gradient_checkpointing=False):
        generator = torch.Generator().manual_seed(1)
        made = make_trainer(
            module,
            model,
            data,
            config(side, gradient_checkpointing=gradient_checkpointing),
            tmp_path_factory.mktemp(side),
        )
        for name, value in made.learner.parameters.items():
            value.data += (
                0.02 * torch.randn(value.shape, generator=generator) * (".ups." in name or ".replaced." in name)
            )
        return made

    return make


@pytest.mark.parametrize("side", ["semantic", "detail"])
def test_a_divided_base_makes_the_same_steps(side, module, releases, model, data, config, tmp_path):
    """In a group of one process: what FSDP2 does to blocks that overwrite their input, and return two tensors."""
    with group_of_one():
        plain, divided = (
            make_trainer(module, base, data, config(side), tmp_path, sharded)
            for base, sharded in ((model, False), (load_base(module, releases), True))
        )
        for made in (plain, divided):
            for _ in range(2):
                made._training_step()
        for mine, theirs in zip(plain.history, divided.history, strict=True):
            assert theirs == pytest.approx(mine, rel=1e-6)
        tensors = [expert_tensor_list(made.expert()) for made in (plain, divided)]
        torch.testing.assert_close(*tensors, rtol=0, atol=1e-7)


def merged(network, student):
    """A whole copy of the transformer with the expert in its weights."""
    result = copy.deepcopy(network).requires_grad_(True)
    weights = dict(result.named_parameters())
    expert = student.to_expert()
    with torch.no_grad():
        for name, updates in expert.low_rank.items():
            for update in updates:
                rows = slice(update.start, update.start + len(update.up))
                weights[f"{name}.weight"][rows] += update.scale * update.up @ update.down
        for name, value in expert.replaced.items():
            weights[name].copy_(value)
    return result


def call(network, x, sigma, text):
    from comfy.ldm.modules.attention import attention_pytorch

    options = {"optimized_attention_override": lambda _, *args, **kwargs: attention_pytorch(*args, **kwargs)}
    guidance = torch.full((len(x),), GUIDANCE)
    return network(
        x, 1000 * sigma, context=text.context, y=text.extras["y"], guidance=guidance, transformer_options=options
    )


def slow_pair(student, teacher, batch, phases):
    """(pred, target), video by video."""
    preds, targets = [], []
    for i, k in enumerate(batch.index.tolist()):
        one = [
            type(text)(text.context[i : i + 1], {"y": text.extras["y"][i : i + 1]})
            for text in (batch.text, batch.no_text)
        ]
        high, low = phases.sigmas[k], phases.previous[k]
        end = phases.previous[int(phases.owned[0])]
        x = high * batch.noise[i : i + 1] + (1 - high) * batch.x0[i : i + 1]
        preds.append(x + (end - high) * call(student, x, high.view(1), one[0]))
        with torch.no_grad():
            cond, uncond = (call(teacher, x, high.view(1), text) for text in one)
            near = x + (low - high) * (cond + CFG * (cond - uncond))
            targets.append(near + (end - low) * call(student, near, low.view(1), one[0]))
    return torch.cat(preds), torch.cat(targets)


def slow_features(teacher, x, sigma, text):
    """Outputs of single blocks 0, 2 ... for the video's tokens, and what the output layer makes of each.

    The video's tokens are where the output layer's input is in the last block's output.
    """
    tokens, found, seen = x.shape[2] * x.shape[3] * x.shape[4] // 4, [], {}
    hooks = [
        block.register_forward_hook(lambda m, a, out: found.append(out.clone())) for block in teacher.single_blocks
    ]
    hooks.append(teacher.final_layer.register_forward_hook(lambda m, a, out: seen.update(video=a[0], vec=a[1])))
    call(teacher, x, sigma, text)
    for hook in hooks:
        hook.remove()
    starts = range(found[-1].shape[1] - tokens + 1)
    (start,) = (start for start in starts if torch.equal(found[-1][:, start : start + tokens], seen["video"]))
    raw = [out[:, start : start + tokens] for out in found[0::2]]
    return raw, [teacher.final_layer(feature, seen["vec"]) for feature in raw]


def slow_detail_loss(pred, target, trainer, batch, teacher):
    phases, discriminator = trainer.phases, trainer.discriminator
    end, sigma = phases.previous[0], phases.previous[batch.level]
    level = sigma.view(-1, 1, 1, 1, 1)

    def noised(video):
        return ((1 - level) * video + (level - end) * batch.level_noise) / (1 - end)

    fake, fake_out = slow_features(teacher, noised(pred), sigma, batch.text)
    _, real_out = slow_features(teacher, noised(target), sigma, batch.text)
    grid = (pred.shape[2], pred.shape[3] // 2, pred.shape[4] // 2)
    gan = sum((1 - score).clamp(min=0).mean() for score in discriminator(fake, grid)) / len(fake)
    matching = sum((a - b).square().mean() for a, b in zip(fake_out, real_out, strict=True)) / len(fake)
    huber = (((pred - target).square() + 1e-6).sqrt() - 1e-3).mean()
    return huber + 0.1 * (5 * gan + 1 * matching)


@pytest.mark.parametrize("side", ["semantic", "detail"])
def test_step_equals_the_slow_one(side, trainer, model):
    made = trainer(side)
    teacher = model.model.diffusion_model
    student = merged(teacher, made.student)
    # the averaged expert is the semantic stage's target network; here it is the student
    for (_, mine), (_, theirs) in zip(made.ema.named_parameters(), made.student.named_parameters(), strict=True):
        mine.data.copy_(theirs.data)
    ((batch, share),) = made.batches.of_step(0)
    assert share == 1
    loss, _, _ = made.losses(batch)
    loss.backward()
    # the host's blocks write in place
    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        pred, target = slow_pair(student, teacher, batch, made.phases)
        if side == "semantic":
            moved = (pred[:, :, 3:] - pred[:, :, :-3]) - (target[:, :, 3:] - target[:, :, :-3])
            slow = (((pred - target).square() + 1e-6).sqrt() - 1e-3).mean() + moved.square().mean()
        else:
            slow = slow_detail_loss(pred, target, made, batch, teacher)
        assert float(loss.detach()) == pytest.approx(float(slow.detach()), rel=TOLERANCE)
        slow.backward()
    gradients = {name: value.grad for name, value in student.named_parameters()}
    checked = 0
    for name, site in zip(made.student.low_rank.names, made.student.low_rank.sites, strict=True):
        branch, whole = site.branch, gradients[f"{name}.weight"]
        downs = branch.down.weight.split(branch.ranks)
        for start, up, down, grad in zip(
            branch.starts, branch.ups, downs, branch.down.weight.grad.split(branch.ranks), strict=True
        ):
            part = whole[start : start + len(up.weight)]
            assert relative(up.weight.grad, made.student.scale * part @ down.detach().t()) < GRADIENTS, name
            assert relative(grad, made.student.scale * up.weight.detach().t() @ part) < GRADIENTS, name
            checked += 1
    for name, site in zip(made.student.replaced.names, made.student.replaced.sites, strict=True):
        for param, value in site.replaced.named_parameters():
            assert relative(value.grad, gradients[f"{name}.{param}"]) < GRADIENTS, name
            checked += 1
    assert checked > 5


@pytest.mark.parametrize("side", ["semantic", "detail"])
def test_an_fp8_base_has_the_gradients_of_its_weights_in_float32(side, trainer, module, releases):
    import comfy.sd

    loaded, _ = module("nodes.host.experts.load").load_model(releases["hy_tiny"], "fp8_e4m3fn")
    low = module("nodes.host.experts.attach").detach_experts(loaded)
    network = low.model.diffusion_model
    assert network.single_blocks[0].linear1.weight.dtype is torch.float8_e4m3fn
    weights = {name: value.detach().float() for name, value in network.named_parameters()}
    plain = comfy.sd.load_diffusion_model_state_dict(copy.copy(weights), model_options={"dtype": torch.float32})
    made, reference = trainer(side, low, gradient_checkpointing=True), trainer(side, plain)
    assert made._gradients(0) == pytest.approx(reference._gradients(0), rel=1e-3)
    for name, value in made.learner.parameters.items():
        assert value.grad.abs().sum() > 0, name
        assert relative(value.grad, reference.learner.parameters[name].grad) < 1e-2, name
    assert all(torch.equal(weights[name], value.float()) for name, value in network.named_parameters())


@pytest.mark.parametrize(("side", "values"), [("semantic", {}), ("detail", {"every_linear": True, "phases": 2})])
def test_a_resumed_run_equals_one_that_was_not_interrupted(side, values, train, model, data, config, module, tmp_path):
    settings = {**values, "learning_rate": 1e-3, "save_every": 1, "warmup_steps": 0}
    whole = train(model, data, config(side, steps=3, **settings), tmp_path / "whole")
    train(model, data, config(side, steps=1, **settings), tmp_path / "parts")
    resumed = train(model, data, config(side, steps=3, **settings), tmp_path / "parts")
    assert whole.history == resumed.history and same(whole.expert, resumed.expert)
    # the file holds all that was trained: fused layers with pairs of their own beside the rest
    file = tmp_path / "expert.safetensors"
    module("nodes.host.training.run").save_expert(file, whole.expert, model)
    read = module("nodes.host.experts.expert_files").read_expert_file(file, side, model)
    assert set(read.low_rank) == set(whole.expert.low_rank) and set(read.replaced) == set(whole.expert.replaced)
