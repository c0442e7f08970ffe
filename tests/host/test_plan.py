"""The step bar's plan: foreseen from widgets and files, and as the sampler announces it."""

import json
import re

import pytest
import torch

from dcm_core.families import WAN
from dcm_core.plot import COLOURS
from dcm_core.schedule import generic_sigmas
from dcm_core.storage import TensorFile, write_tensors

from .server import ROOT

SETTINGS = {"schedule": "auto", "steps": 6, "shift": 17.0, "denoise": 1.0, "boundary": 0.0, "two_models": False}
RELEASE = "dcm_wan2.1_t2v_1.3B.safetensors"
SMALL = {
    "model": "dcm_small_world_base.safetensors",
    "semantic": "dcm_small_world_semantic.safetensors",
    "detail": "dcm_small_world_detail.safetensors",
}


def ask(server, **changes):
    return server.request("/dcm/plan", {**SETTINGS, **changes})


def sides(plan):
    return [step["expert"] for step in plan["steps"]]


def test_a_release_has_its_preset(server):
    plan = ask(server, model=RELEASE)
    assert plan["boundary"] == WAN.preset.boundary
    assert [step["sigma"] for step in plan["steps"]] == pytest.approx([t / 1000 for t in WAN.preset.timesteps])
    assert sides(plan) == 3 * ["semantic"] + 3 * ["detail"]


def test_expert_files_bring_their_own_schedule_and_boundary(server):
    plan = ask(server, **SMALL)
    said = TensorFile(ROOT / "small_world" / "models" / "loras" / SMALL["detail"]).metadata
    assert plan["boundary"] == float(said["dcm.boundary"])
    assert [step["sigma"] for step in plan["steps"]] == pytest.approx([t / 1000 for t in json.loads(said["dcm.timesteps"])])


def test_widgets_go_before_files(server):
    assert ask(server, **SMALL, attached_boundary=0.6)["boundary"] == 0.6
    assert ask(server, **SMALL, attached_boundary=0.6, boundary=0.7)["boundary"] == 0.7
    plan = ask(server, **SMALL, schedule="generic", steps=10, shift=3.0, boundary=0.7)
    sigmas = generic_sigmas(10, 3.0)[:-1].tolist()
    assert [step["sigma"] for step in plan["steps"]] == pytest.approx(sigmas)
    assert sides(plan) == ["semantic" if sigma >= 0.7 else "detail" for sigma in sigmas]
    assert len(ask(server, **SMALL, denoise=0.5)["steps"]) == 3


def test_two_full_models_change_over_where_wan_2_2_does(server):
    text_to_video = ask(server, model=SMALL["model"], two_models=True, shift=8.0, steps=4)
    assert text_to_video["boundary"] == 0.875
    assert len(text_to_video["steps"]) == 4
    models = server.base / "models" / "diffusion_models"
    file = TensorFile(ROOT / "small_world" / "models" / "diffusion_models" / SMALL["model"])
    with_image = {key: file.read(key) for key in file.shapes}
    with_image["patch_embedding.weight"] = with_image["patch_embedding.weight"].repeat(1, 3, 1, 1, 1)[:, :36]
    for name, prefix in (("takes_image", ""), ("whole", "model.diffusion_model.")):
        write_tensors(models / f"{name}.safetensors", {prefix + key: value for key, value in with_image.items()}, {})
        assert ask(server, model=f"{name}.safetensors", two_models=True)["boundary"] == 0.9
    # diffusers names: the last layer is called otherwise
    write_tensors(models / "diffusers.safetensors", in_diffusers_names(with_image), {})
    assert ask(server, model="diffusers.safetensors", two_models=True)["boundary"] == 0.9


def in_diffusers_names(native):
    """A base as diffusers keeps it."""
    templates = [pair for rule in WAN.DIFFUSERS_TO_NATIVE for pair in rule.key_pairs()]
    names = {target.replace("{n}", str(n)): source.replace("{n}", str(n)) for source, target in templates for n in range(40)}
    return {names[key]: value for key, value in native.items()}


def test_what_a_gguf_base_is_is_not_known_but_its_experts_are(server):
    gguf = {"model": "base.gguf"}
    assert ask(server, **{**SMALL, **gguf}) == ask(server, **SMALL)
    file = TensorFile(ROOT / "small_world" / "models" / "loras" / SMALL["semantic"])
    loras = server.base / "models" / "loras"
    loras.mkdir(exist_ok=True)
    for name, facts in (("plain", {}), ("of_wan", {"dcm.family": "wan"})):
        write_tensors(loras / f"{name}.safetensors", file.read_all(), facts)
    # it may be an image model's half, or no Wan at all
    assert ask(server, **gguf, semantic="of_wan.safetensors", two_models=True) is None
    assert ask(server, **gguf, semantic="plain.safetensors", boundary=0.9) is None
    assert ask(server, **gguf, semantic="of_wan.safetensors")["boundary"] == 0.979
    assert ask(server, **gguf, semantic="plain.safetensors", boundary=0.9, schedule="generic")["boundary"] == 0.9


def test_two_models_with_experts_or_a_lora(server):
    """A release keeps its own schedule and boundary; a LoRA that says nothing changes neither."""
    plan = ask(server, model=RELEASE, two_models=True)
    assert plan["boundary"] == WAN.preset.boundary
    assert [step["sigma"] for step in plan["steps"]] == pytest.approx([t / 1000 for t in WAN.preset.timesteps])
    file = TensorFile(ROOT / "small_world" / "models" / "loras" / SMALL["semantic"])
    loras = server.base / "models" / "loras"
    loras.mkdir(exist_ok=True)
    write_tensors(loras / "plain.safetensors", file.read_all(), {})
    half = ask(server, model=SMALL["model"], semantic="plain.safetensors", two_models=True, shift=8.0, steps=4)
    assert half == ask(server, model=SMALL["model"], two_models=True, shift=8.0, steps=4) and half["boundary"] == 0.875
    assert ask(server, model=SMALL["model"], semantic="plain.safetensors")["boundary"] == 0.979


@pytest.fixture(scope="module")
def small_world(module):
    """Load the small world's base: load() -> MODEL."""
    return lambda: module("nodes.host.load").load_model(SMALL["model"], "default")[0]


@pytest.mark.parametrize("schedule", ["auto", "generic", "HunyuanVideo 4 steps"])
@pytest.mark.parametrize("second", [None, "same", "other"])
@pytest.mark.parametrize("experts", [True, False])
def test_what_is_foreseen_is_what_the_sampler_does(experts, second, schedule, module, small_world):
    plan, sampling = module("nodes.host.plan"), module("nodes.host.sampling")
    model = small_world()
    detail = {None: lambda: None, "same": model.clone, "other": small_world}[second]()
    if experts:
        read, attach = module("nodes.host.expert_files").load_expert, module("nodes.host.attach").attach_experts
        model = attach(model, *(read(SMALL[side], side, model) for side in ("semantic", "detail")))
    prepared, boundary = sampling.prepare_model(model, 0.0, detail)
    sigmas = sampling.choose_sigmas(schedule, 6, 9.0, 0.7, prepared)
    asked = {"model": SMALL["model"], **(SMALL if experts else {}), "two_models": second == "other"}
    foreseen = plan.foresee({**SETTINGS, "schedule": schedule, "shift": 9.0, "denoise": 0.7, **asked})
    # the same model twice without experts: what else differs, only the run tells
    assert foreseen == (plan.as_message(sigmas, boundary) if experts or second == "other" else None)


@pytest.mark.parametrize(
    "changes",
    [
        {"model": SMALL["model"]},  # no experts
        {"model": "no such file.safetensors"},
        {**SMALL, "boundary": 2.0},
        {**SMALL, "schedule": "generic", "steps": 0},
        {**SMALL, "semantic": "\ud800.safetensors"},
        {**SMALL, "semantic": "../../etc/passwd.safetensors"},
        {"model": "\0.safetensors", "two_models": True},
    ],
)
def test_what_cannot_be_foreseen_is_nothing(server, changes):
    assert ask(server, **changes) is None


def test_the_sampler_announces_its_plan(module, monkeypatch):
    sent = []
    plan = module("nodes.host.plan")

    class Running:
        client_id = "page"

        def send_sync(self, event, data, client):
            sent.append((event, data, client))

    class Model:
        def __init__(self, attachment):
            self.attachment = attachment

        def get_attachment(self, key):
            return self.attachment if key == "dcm" else None

    sigmas = torch.tensor([1.0, 0.9, 0.5, 0.0])
    plan.announce(Model(None), sigmas, 0.8, "7")  # nobody to tell
    monkeypatch.setattr(plan, "server", Running)
    plan.announce(Model(object()), sigmas, 0.8, "7")
    plan.announce(Model(None), sigmas, 0.8, "7")
    (_, routed, client), (event, plain, _) = sent
    assert (event, client, routed["node"]) == ("dcm.plan", "page", "7")
    assert sides(routed) == ["semantic", "semantic", "detail"] and routed["boundary"] == 0.8
    assert sides(plain) == [None, None, None] and plain["boundary"] is None


def test_the_front_end_wears_the_plot_s_colours():
    text = (ROOT / "web" / "colours.js").read_text(encoding="utf-8")
    found = dict(re.findall(r'(\w+): "(#\w+)"', text.split("COLOURS = {")[1].split("}")[0]))
    assert found == COLOURS
