"""Training on two models (Wan 2.2 A14B): one expert on each, in one run."""

import dataclasses
import gc
import json
import os
import shutil
import subprocess
import sys
import weakref

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ..small_models import native_wan
from .small_runs import by_its_schedule, random_data, same
from .test_train_nodes import DETAIL, ROOT, SEMANTIC

TRAINING = {
    "rank": 2,
    "alpha": 4.0,
    "batch_size": 2,
    "steps": 2,
    "sample_every": 2,
    "cfg": 0.0,
    "discriminator_width": 64,
    "gradient_checkpointing": False,
    "temporal_weight": 0.5,
    "detail": {"steps": 3, "adversarial_weight": 0.0},
}
SEEDS = {"semantic": 1, "detail": 2}


@pytest.fixture(scope="module")
def pair(wan):
    """The high-noise and the low-noise MODEL."""
    return {side: wan(layers=1, seed=seed) for side, seed in SEEDS.items()}


@pytest.fixture(scope="module")
def command(module):
    """command(folder, "both", training={...}, ...) -> what it says."""

    def run(folder, which, models=("high", "low"), training=None, **more):
        files = dict(zip(("model", "detail_model"), (f"{name}.safetensors" for name in models), strict=False))
        settings = {**files, "dataset": "data.safetensors", "output": "out/x.safetensors"}
        settings["training"] = TRAINING | (training or {})
        return module("nodes.host.training.command").train(which, {**settings, **more}, folder)

    return run


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, data, module):
    """A folder with both models and the dataset."""
    folder = tmp_path_factory.mktemp("inputs")
    for name, seed in (("high", 1), ("low", 2)):
        save_file(native_wan(seed, layers=1), folder / f"{name}.safetensors")
    module("dcm_core.distill.data.dataset_file").write_dataset(folder / "data.safetensors", data)
    return folder


@pytest.fixture
def folder(inputs, tmp_path):
    """The same without a run."""
    return shutil.copytree(inputs, tmp_path / "run", ignore=lambda *_: {"out", "x_checkpoints"})


class Loaded:
    """The models that a run loads, one after the other."""

    def __init__(self, command, patch):
        self.names, self.alive, self.most = [], [], 0
        load = command.load_file

        def counted(path, *args):
            gc.collect()
            self.most = max(self.most, 1 + sum(model() is not None for model in self.alive))
            found = load(path, *args)
            self.names.append(path.stem)
            self.alive.append(weakref.ref(found[0].model.diffusion_model))
            return found

        patch.setattr(command, "load_file", counted)


@pytest.fixture(scope="module")
def both(inputs, command, module):
    """A finished run of both parts: (its folder, what it said, what it loaded)."""
    with pytest.MonkeyPatch.context() as patch:
        loaded = Loaded(module("nodes.host.training.command"), patch)
        said = command(inputs, "both")
    return inputs, said, loaded


@pytest.fixture
def again(both, tmp_path):
    """A copy of the finished run."""
    return shutil.copytree(both[0], tmp_path / "again")


def metadata(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def steps_in(folder):
    return sorted(int(path.stem.removeprefix("step_")) for path in folder.glob("step_*.safetensors"))


def files(folder):
    """Side -> tensors of the expert."""
    return {side: load_file(folder / "out" / f"x_{side}.safetensors") for side in SEEDS}


# The command


def test_one_command_trains_both_experts_as_one_pair(both):
    folder, said, _ = both
    assert said.count("Saved to") == 2
    entries = {side: metadata(folder / "out" / f"x_{side}.safetensors") for side in SEEDS}
    pairs = [json.loads(found["dcm.pair"]) for found in entries.values()]
    assert pairs[0] == pairs[1] and pairs[0]["semantic"] != pairs[0]["detail"]
    assert [found["dcm.boundary"] for found in entries.values()] == ["0.875"] * 2
    assert [found["dcm.expert"] for found in entries.values()] == list(SEEDS)
    # at shift 5
    assert json.loads(entries["detail"]["dcm.timesteps"])[:3] == pytest.approx([1000, 963.3, 914.0], abs=0.1)
    assert steps_in(folder / "x_checkpoints" / "semantic") == [2]
    assert steps_in(folder / "x_checkpoints" / "detail") == [3]
    assert (folder / "x_checkpoints" / "detail" / "loss_huber.png").is_file()
    assert (folder / "x_checkpoints" / "boundary.safetensors").is_file(), "between the samples"


def test_one_model_is_in_memory_at_a_time(both):
    _, _, loaded = both
    assert loaded.names == ["high", "low"] and loaded.most == 1


def test_each_expert_is_that_of_a_run_on_its_model_alone(both, module, pair, train, tmp_path):
    """The detail expert stands on the low-noise model, without the semantic expert under it."""
    folder, reader = both[0], module("nodes.host.experts.expert_files")
    data = module("dcm_core.distill.data.dataset_file").read_dataset(folder / "data.safetensors")
    common = {name: value for name, value in TRAINING.items() if name not in ("detail", "temporal_weight")}
    own = {"semantic": {"temporal_weight": 0.5}, "detail": TRAINING["detail"]}
    for side, model in pair.items():
        values = {**common, **own[side], "sample_every": 0, "boundary": 0.875, "shift": 5.0, "side": side}
        config = module("dcm_core.distill.config").TrainingConfig.from_dict(values)
        expected = train(model, data, config, tmp_path / side).expert
        found = reader.read_expert_file(folder / "out" / f"x_{side}.safetensors", side, model)
        assert found.low_rank.keys() == expected.low_rank.keys()
        for name, (update,) in found.low_rank.items():
            assert torch.equal(update.up.float(), expected.low_rank[name][0].up.bfloat16().float()), (side, name)


def test_a_finished_part_is_not_trained_again(again, command, module, monkeypatch):
    loaded = Loaded(module("nodes.host.training.command"), monkeypatch)
    semantic, detail = files(again).values()
    said = command(again, "both", training={"detail": {"steps": 4, "adversarial_weight": 0.0}})
    assert f"The semantic expert is already trained: {again / 'out' / 'x_semantic.safetensors'}" in said
    assert "Resumed from step 3 of 4" in said and loaded.names == ["low"]
    now = files(again)
    assert all(torch.equal(value, now["semantic"][name]) for name, value in semantic.items())
    assert not all(torch.equal(value, now["detail"][name]) for name, value in detail.items())


def test_a_run_that_is_finished_loads_nothing(again, command, module, monkeypatch):
    loaded = Loaded(module("nodes.host.training.command"), monkeypatch)
    assert command(again, "both").count("is already trained") == 2 and loaded.names == []


@pytest.mark.parametrize("change", ["steps", "model", "boundary"])
def test_a_part_with_other_settings_is_not_taken_as_finished(change, again, command, module, monkeypatch):
    training, loaded = {"sample_every": 0}, Loaded(module("nodes.host.training.command"), monkeypatch)
    if change == "steps":
        said = command(again, "semantic", training={**training, "steps": 3})
        assert "Resumed from step 2 of 3" in said and loaded.names == ["high"]
        return
    if change == "model":
        save_file(native_wan(7, layers=1), again / "high.safetensors")
    with pytest.raises(ValueError, match="checkpoint of a run with other settings: " + change):
        command(again, "semantic", training={**training, "boundary": 0.8 if change == "boundary" else 0.0})


def test_other_data_is_refused_for_a_finished_part_too(again, command, module):
    other = random_data(module("dcm_core.distill.data.dataset"), count=3)
    module("dcm_core.distill.data.dataset_file").write_dataset(again / "data.safetensors", other)
    shutil.rmtree(again / "x_checkpoints" / "detail")
    (again / "out" / "x_detail.safetensors").unlink()
    with pytest.raises(ValueError, match=r"semantic/step_00000002\.safetensors is a checkpoint .* data: "):
        command(again, "both")


def test_a_run_resumes_in_the_part_where_it_ended(both, folder, command, module, monkeypatch):
    """Interrupted in both parts, it gives the same files."""
    trainer, stop = module("dcm_core.distill.trainer").Trainer, ["semantic", "detail"]
    update = trainer._training_step

    def step(self):
        if self.done == 1 and self.config.side in stop:
            stop.remove(self.config.side)
            raise KeyboardInterrupt
        update(self)

    monkeypatch.setattr(trainer, "_training_step", step)
    for side in SEEDS:
        with pytest.raises(KeyboardInterrupt):
            command(folder, "both")
        assert steps_in(folder / "x_checkpoints" / side) == [1]
    said = command(folder, "both")
    assert "semantic expert is already trained" in said and "Resumed from step 1 of 3" in said
    for side, tensors in files(both[0]).items():
        found = files(folder)[side]
        assert all(torch.equal(value, found[name]) for name, value in tensors.items()), side


def test_one_model_is_trained_by_the_same_command(folder, command, module, monkeypatch):
    """The detail expert goes on top of the semantic one, as with two commands."""
    loaded = Loaded(module("nodes.host.training.command"), monkeypatch)
    one_step = {"shift": 17.0, "steps": 1, "sample_every": 0, "adversarial_weight": 0.0, "detail": {}}
    command(folder, "both", models=["high"], training=one_step)
    assert loaded.names == ["high"]
    assert all("dcm.pair" not in metadata(folder / "out" / f"x_{side}.safetensors") for side in SEEDS)
    assert metadata(folder / "out" / "x_detail.safetensors")["dcm.boundary"] == "0.979"
    settings = {"model": "high.safetensors", "dataset": "data.safetensors", "output": "alone.safetensors"}
    training = {**TRAINING, **one_step}
    del training["detail"], training["temporal_weight"]
    settings |= {"semantic": "out/x_semantic.safetensors", "training": training}
    module("nodes.host.training.command").train("detail", settings, folder)
    one, other = load_file(folder / "out" / "x_detail.safetensors"), load_file(folder / "alone.safetensors")
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_memory_of_both_parts_is_checked_before_the_first(folder, command, module, monkeypatch):
    memory, steps = module("dcm_core.distill.memory").Memory, []
    error = module("dcm_core.distill.config").TrainingError

    def check(self, available, config):
        if config.side == "detail":
            raise error("does not fit")

    monkeypatch.setattr(memory, "check", check)
    monkeypatch.setattr(module("dcm_core.distill.trainer").Trainer, "_training_step", lambda self: steps.append(1))
    with pytest.raises(error, match="does not fit"):
        command(folder, "both")
    assert steps == [] and not (folder / "x_checkpoints").exists()


@pytest.mark.parametrize(
    ("which", "more", "error"),
    [
        ("both", {"detail_model": "high.safetensors"}, "high-noise and the low-noise model have the same weights"),
        ("both", {"semantic": "a.safetensors"}, "`semantic` is 'a.safetensors', but both experts are trained"),
        ("detail", {"semantic": "a.safetensors"}, "with detail_model each expert has a model of its own"),
        ("both", {"continue_from": "a.safetensors"}, "`continue_from` is 'a.safetensors', but both experts"),
        ("both", {"training": {"detail": 3}}, "`detail` in `training` is 3; expected a table"),
        ("both", {"training": {"detail": {"stepz": 3}}}, "Unknown setting stepz"),
        ("both", {"training": {"shared": True}}, "shared is true, but with two models"),
        ("both", {"output": "x.safetensors", "dataset": "x_detail.safetensors"}, "dataset is x_detail.safetensors, which"),
        ("both", {"detail_model": "data.safetensors"}, r"data\.safetensors is not a Wan model file\. Name the"),
        ("both", {"detail_model": "image.safetensors"}, r"do not belong together: .* \(256, 16, 1, 2, 2\) and \(256, 36, 1"),
        ("both", {"checkpoints": "high.safetensors/x"}, "`checkpoints` is .*x/semantic, which cannot be written .*Choose"),
        ("both", {"detail_model": 5}, "`detail_model` is 5; expected a path"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_named(which, more, error, folder, command):
    save_file(native_wan(3, layers=1, channels=36), folder / "image.safetensors")
    with pytest.raises(ValueError, match=error):
        command(folder, which, **more)
    assert not (folder / "x_checkpoints").exists()


def test_the_command_line_has_it(again):
    """In a process of its own."""
    settings = {
        "model": "high.safetensors",
        "detail_model": "low.safetensors",
        "dataset": "data.safetensors",
        "output": "out/x.safetensors",
        "training": TRAINING,
    }
    (again / "run.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "dcm_core", "train", "both", "--config", str(again / "run.json")]
    found = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False)
    assert found.returncode == 0 and found.stdout.count("is already trained") == 2, found.stderr[-3000:]


# Samples


@pytest.fixture
def halves(pair, module, random_expert):
    """side -> (its model with an expert, the expert)."""
    attach, two = module("nodes.host.experts.attach").attach_experts, module("dcm_core.pair")
    bases = {side: module("nodes.host.experts.halves").model_fingerprint(model) for side, model in pair.items()}
    known = {"boundary": 0.875, "timesteps": (1000.0, 960.0, 800.0, 500.0)}
    known["pair"] = two.make_pair(bases, *known.values())
    experts = {
        side: dataclasses.replace(random_expert(model, side, replaced=False), **known) for side, model in pair.items()
    }
    return {side: (attach(model, **{side: experts[side]}), experts[side]) for side, model in pair.items()}


def test_samples_are_made_by_the_half_that_is_there(halves, module, data):
    """The semantic expert's is its estimate at the boundary; the detail expert's begins with a clip and noise."""
    seen = {side: [] for side in halves}
    for side, (model, expert) in halves.items():
        prepared = model.clone()

        def call(executor, x, t, *args, found=seen[side], **more):
            found.append(float(t))
            return executor(x, t, *args, **more)

        prepared.add_wrapper_with_key("apply_model", "seen", call)
        show = module("nodes.host.training.show")
        latent = show.sample_latent(prepared, data.conditioning(0), data.latent(0), expert, 0)
        assert latent.shape == (1, *data.shape(0)) and latent.isfinite().all()
    assert seen == {"semantic": pytest.approx([1.0, 0.96]), "detail": pytest.approx([0.8, 0.5])}


def test_samples_of_both_parts_are_one_trajectory(halves, module, data, tmp_path):
    """The detail expert's sample starts where the semantic expert's ended, and is that of both models together."""
    show, run = module("nodes.host.training.show"), module("nodes.host.sampling.run")
    for model, expert in halves.values():
        found = show.sample_latent(
            model, data.conditioning(0), data.latent(0), expert, 0, tmp_path / "boundary.safetensors"
        )
    (high, semantic), (low, _) = halves.values()
    model, _ = run.prepare_model(high, detail_model=low)
    plain = dataclasses.replace(semantic, pair=None)
    together = show.sample_latent(model, data.conditioning(0), data.latent(0), plain, 0)
    assert (found - together).norm() / together.norm() < 1e-5


# The nodes


AUTO = {"boundary": 0.0, "sample_every": 0, "held_out": 0, "steps": 1}
ATTACH = {"semantic_strength": 1.0, "detail_strength": 1.0, "boundary": 0.0}
NO_FILES = {"semantic_lora": "none", "detail_lora": "none"}


@pytest.fixture(scope="module")
def output(pack, models, tmp_path_factory):
    """The host's output folder; the experts are removed at the end."""
    import folder_paths

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folder_paths, "output_directory", str(tmp_path_factory.mktemp("output")))
        yield
    for path in (models / "loras" / "dcm").glob("*"):
        path.unlink()


@pytest.fixture(scope="module")
def trained(node, pair, data, output):
    """side -> output of the training node."""
    high, low = pair.values()
    semantic = node("DCMTrainSemanticExpert", model=high, detail_model=low, dataset=data, name="one", **SEMANTIC | AUTO)
    expert = semantic.result[1]
    detail = node("DCMTrainDetailExpert", model=low, dataset=data, name="two", semantic_expert=expert, **DETAIL | AUTO)
    return {"semantic": semantic, "detail": detail}


def plan(node, model, detail_model=None, **more):
    return node(
        "DCMSampler",
        model=model,
        detail_model=detail_model,
        seed=0,
        **by_its_schedule([[torch.zeros(1, 3, 4096), {}]], (16, 2, 4, 6)),
        **more,
    ).ui.as_dict()["text"][0]


def test_nodes_train_a_pair_that_is_sampled_at_once_and_from_files(trained, node, pair, module):
    experts = {side: found.result[1] for side, found in trained.items()}
    assert experts["semantic"].pair == experts["detail"].pair is not None
    facts = module("nodes.host.experts.route").attached_experts(trained["detail"].result[0])
    assert "semantic" not in facts.experts and facts.boundary == 0.875
    expected = "step 1-2 semantic, 3-4 detail, boundary 0.875"
    assert plan(node, trained["semantic"].result[0], trained["detail"].result[0]).startswith(expected)
    names = {"semantic": "dcm/one.safetensors", "detail": "dcm/two.safetensors"}
    files = [
        node("DCMAttachExperts", model=model, **{**NO_FILES, f"{side}_lora": names[side]}, **ATTACH).result[0]
        for side, model in pair.items()
    ]
    assert plan(node, *files).startswith(expected)
    objects = [
        node("DCMAttachExperts", model=model, **NO_FILES, **ATTACH, **{f"{side}_expert": experts[side]}).result[0]
        for side, model in pair.items()
    ]
    assert plan(node, *objects).startswith(expected)


def test_the_detail_expert_of_a_pair_needs_the_other_model_and_the_same_levels(trained, node, pair, data, wan):
    high, low = pair.values()

    def refused(model, error, **more):
        settings = {"semantic_expert": trained["semantic"].result[1], "dataset": data, "name": "x"}
        with pytest.raises(ValueError, match=error):
            node("DCMTrainDetailExpert", model=model, **settings, **DETAIL | AUTO | more)

    refused(
        high, r"low-noise model, but model is the high-noise model that the trained semantic expert was trained for"
    )
    refused(wan(layers=1, seed=9), r"but model is neither the high-noise nor the low-noise model")
    refused(low, r"need the same models, boundary, shift and sample_steps", shift=6.0)
    refused(low, r"boundary is 0\.8, but the semantic expert was made for 0\.875", boundary=0.8)


def test_a_detail_expert_is_trained_with_its_two_models_alone(trained, node, pair, data, output):
    """Without the semantic expert, which may be trained later or elsewhere."""
    high, low = pair.values()
    found = node(
        "DCMTrainDetailExpert", model=low, semantic_model=high, dataset=data, name="three", **DETAIL | AUTO
    ).result[1]
    assert found.pair == trained["semantic"].result[1].pair and same(found, trained["detail"].result[1])


@pytest.mark.parametrize("clone", [False, True])
def test_one_model_is_not_a_pair(clone, node, pair, data):
    high = pair["semantic"]
    other = high.clone() if clone else high
    with pytest.raises(ValueError, match=r"have the same weights; expected two different models"):
        node("DCMTrainSemanticExpert", model=high, detail_model=other, dataset=data, name="x", **SEMANTIC | AUTO)


def test_image_models_have_another_boundary(module, wan):
    training, family = module("nodes.host.training.pair"), module("dcm_core.families").WAN
    config = module("dcm_core.distill.config").TrainingConfig("semantic")
    found = [training.pair_boundary(wan(layers=1, channels=channels), family, config) for channels in (16, 36)]
    assert found == [0.875, 0.9]
    hunyuan = module("dcm_core.families").FAMILIES["hunyuan_video"]
    with pytest.raises(ValueError, match=r"HunyuanVideo has no default for two models\. Set boundary"):
        training.pair_boundary(wan(layers=1), hunyuan, config)


def test_a_half_can_be_trained_further(trained, node, pair, data):
    """continue_from keeps the pair, and its boundary."""
    start = {"continue_from": "dcm/two.safetensors", "name": "more"}
    more = node("DCMTrainDetailExpert", model=pair["detail"], dataset=data, **start, **DETAIL | AUTO).result[1]
    former = trained["detail"].result[1]
    assert more.pair == former.pair and more.boundary == 0.875 and not same(more, former)
