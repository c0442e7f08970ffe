"""Every shipped workflow on a real server: it fits the host's nodes, and it runs.

The small world's run as they are. The loaders of the others find small random weights of the same architectures under the official
names. Text encoders and HunyuanVideo's VAE have but one size in the host: a cached prompt and a small Wan VAE stand in for them.
"""

import re
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from dcm_core.files.conditioning import save_conditioning

from .graphs import BYPASSED, FRONT_END_ONLY, WORKFLOWS, id_of, inputs_of, read, to_prompt, widget_values, widgets_of
from .server import FOLDER, messages
from .small_models import native_wan

GRAPHS = {path.stem: read(path) for path in WORKFLOWS}
CONVERT, EXPERT_FILES = "DCM convert and extract", "DCM Wan 2.1 text to video (expert files)"
TWO_MODELS, COMPARED = "DCM Wan 2.2 text to video (two models)", "DCM Wan 2.1 one and two experts compared"
FROM_IMAGE = "DCM Wan 2.2 image to video"
INTERVALS = "DCM Wan 2.2 three intervals (LoRA per step)"
TRAINING, TRAINING_TWO = "DCM small world training (CPU)", "DCM Wan 2.2 training (two models)"

# Title -> what its DCM Samplers say.
WAN = "step 1-3 semantic, 4-6 detail, boundary 0.979"
SMALL_WORLD = "step 1-3 semantic, 4-6 detail, boundary 0.76"
PLANS = {
    "DCM HunyuanVideo text to video": ["step 1-2 semantic, 3-4 detail, boundary 0.982"],
    "DCM Wan 2.1 text to video": [WAN],
    "DCM Wan 2.1 text to video (cached prompt)": [WAN],
    EXPERT_FILES: [WAN],
    "DCM Wan 2.1 text to video (modular)": [],
    COMPARED: ["step 1-6 semantic, boundary 0.001 (the detail side has no step)", WAN],
    TWO_MODELS: ["step 1-11 semantic, 12-20 detail, boundary 0.875"],
    FROM_IMAGE: ["step 1-2 semantic, 3-4 detail, boundary 0.9"],
    INTERVALS: ["step 1-2 motion, 3-4 high, 5-8 low, motion cfg 3.5"],
    CONVERT: [],
    "DCM small world (CPU)": [SMALL_WORLD],
    TRAINING: [SMALL_WORLD],
    TRAINING_TWO: ["step 1-2 semantic, 3-4 detail, boundary 0.875"],
}

each_workflow = pytest.mark.parametrize("title", GRAPHS)


# On the host's word


def illegal(kind, options, value):
    """Whether a widget may not have this value; which files there are is the user's matter."""
    if kind == "COMBO":
        return value not in options["options"] and not str(value).endswith((".safetensors", ".png"))
    if kind in ("INT", "FLOAT"):
        below, above = value < options.get("min", value), value > options.get("max", value)
        off_step = kind == "INT" and (value - options.get("min", 0)) % options.get("step", 1)
        return below or above or bool(off_step)
    return not isinstance(value, bool if kind == "BOOLEAN" else str)


@each_workflow
def test_every_node_is_known_and_every_value_legal(title, info):
    for node in GRAPHS[title]["nodes"]:
        if node["type"] in FRONT_END_ONLY:
            continue
        definition = info[node["type"]]
        widgets, values = widgets_of(definition), widget_values(node, definition)
        wrong = {name: value for name, value in values.items() if illegal(*widgets[name], value)}
        assert wrong == {}, node["type"]
        kinds = {name: kind for name, kind, _ in inputs_of(definition)}
        slots = {slot["name"]: slot["type"] for slot in node["inputs"]}
        assert slots == {name: kinds.get(name) for name in slots}, node["type"]
        linked = {slot["name"] for slot in node["inputs"] if slot["link"] is not None}
        assert linked | set(values) >= set(definition["input"].get("required", {})), (
            f"{node['type']} lacks a required input"
        )
        assert [slot["type"] for slot in node["outputs"]] == definition["output"][: len(node["outputs"])]


def test_models_come_from_where_the_hosts_own_templates_take_them():
    """Those of the release, which the host has no template for, from its authors."""
    package = pytest.importorskip(
        "comfyui_workflow_templates", reason="the host's templates are not installed as a package"
    )
    texts = Path(package.__file__).parents[1].glob("comfyui_workflow_templates*/**/*.json")
    official = {
        url
        for text in texts
        for url in re.findall(r"https://huggingface\.co/[^\s\"?)\\]+", text.read_text(encoding="utf-8"))
    }
    models = [
        model for graph in GRAPHS.values() for node in graph["nodes"] for model in node["properties"].get("models", [])
    ]
    elsewhere = {model["url"] for model in models} - official
    assert elsewhere and all(
        url.startswith("https://huggingface.co/cszy98/DCM/resolve/main/DCM_") for url in elsewhere
    ), elsewhere
    assert [
        model for model in models if model["url"] in official and not model["url"].endswith(f"/{model['name']}")
    ] == []


@pytest.mark.parametrize(
    ("title", "settings"),
    [
        ("DCM Wan 2.1 text to video", {"EmptyHunyuanLatentVideo": [832, 480, 81, 1], "CreateVideo": [16]}),
        (
            "DCM HunyuanVideo text to video",
            {"EmptyHunyuanLatentVideo": [1280, 720, 29, 1], "CreateVideo": [24], "FluxGuidance": [6]},
        ),
    ],
)
def test_a_release_is_sampled_as_its_authors_do(title, settings):
    values = {node["type"]: node.get("widgets_values") for node in GRAPHS[title]["nodes"]}
    assert {kind: values.get(kind) for kind in settings} == settings


def test_templates_are_listed_and_served(server):
    listed = server.request("/workflow_templates")
    assert sorted(listed[FOLDER]) == sorted(GRAPHS)
    for title, graph in GRAPHS.items():
        assert server.request(f"/api/workflow_templates/{FOLDER}/{title}.json") == graph


# Runs


def light_lora(seed):
    """A low-rank update of the small Wan model, in the names of the distilled LoRAs for it."""
    generator = torch.Generator().manual_seed(seed)
    names = [f"diffusion_model.blocks.{block}.self_attn.{part}" for block in range(2) for part in "qkvo"]
    return {
        f"{name}.{end}.weight": 0.1 * torch.randn(shape, generator=generator)
        for name in names
        for end, shape in (("lora_down", (4, 256)), ("lora_up", (256, 4)))
    }


@pytest.fixture(scope="session")
def files(server, recipe):
    """Small models under every name that the workflows ask for, beside those of the server."""
    models = server.base / "models"
    wan = {"diffusion_models/wan2.1_t2v_1.3B_fp16": native_wan(1)}
    for kind, channels, version in (("t2v", 16, "v1.1"), ("i2v", 36, "v1")):
        for seed, side in enumerate(("high", "low")):
            wan[f"diffusion_models/wan2.2_{kind}_{side}_noise_14B_fp8_scaled"] = native_wan(seed, channels=channels)
            wan[f"loras/wan2.2_{kind}_lightx2v_4steps_lora_{version}_{side}_noise"] = light_lora(seed)
    stand_in = {"vae/hunyuan_video_vae_bf16": load_file(models / "vae" / "wan_2.1_vae.safetensors")}
    release = {"diffusion_models/dcm_hunyuan_video_13B": recipe.release("hy_tiny")}
    for name, tensors in {**wan, **stand_in, **release}.items():
        path = models / f"{name}.safetensors"
        path.parent.mkdir(exist_ok=True)
        save_file({key: tensor.bfloat16() for key, tensor in tensors.items()}, path)
    embeddings = torch.randn(1, 20, 4096, generator=torch.Generator().manual_seed(2))
    save_conditioning(
        models / "dcm_conditioning" / "hunyuan.safetensors", [[embeddings, {"pooled_output": embeddings[:, 0, :768]}]]
    )
    Image.linear_gradient("L").convert("RGB").save(server.base / "input" / "example.png")


SMALL = {"width": 64, "height": 64, "length": 5}
SMALLER = {
    "EmptyHunyuanLatentVideo": SMALL,
    "WanImageToVideo": SMALL,
    "DCMTrainSemanticExpert": {"steps": 2, "batch_size": 2, "sample_every": 2},
    "DCMTrainDetailExpert": {"steps": 2, "batch_size": 2, "sample_every": 2},
}
# Empties the host's cache, which holds what the last prompt gave: what is in it does not run again, and says nothing.
NOTHING = {"1": {"class_type": "PreviewAny", "inputs": {"source": ""}}}
# It would need a text encoder.
CLIPS = {"class_type": "DCMLoadDataset", "inputs": {"file_name": "zz_dcm_small_world.safetensors"}}
PROMPTS = {"CLIPLoader": "prompt.safetensors", "DualCLIPLoader": "hunyuan.safetensors"}


def small_prompt(title, info, graph=None):
    """A workflow in the API's format: small videos except for the small world's, cached prompts, little training."""
    prompt = to_prompt(graph or GRAPHS[title], info)
    for node in prompt.values():
        kind, inputs = node["class_type"], node["inputs"]
        if kind == "CLIPTextEncode":
            loader = prompt[inputs["clip"][0]]["class_type"]
            node.update(class_type="DCMLoadConditioning", inputs={"name": PROMPTS[loader]})
        elif kind == "DCMVideoDataset":
            node.update(CLIPS)
        elif "Train" in kind or "small world" not in title:
            inputs |= SMALLER.get(kind, {})
    return {number: node for number, node in prompt.items() if node["class_type"] not in PROMPTS}


@pytest.fixture(scope="session")
def ran(server, info, files):
    """Run a workflow once: ran(title) -> (its prompt, its history entry)."""
    runs = {}

    def run(title):
        if title == EXPERT_FILES:
            run(CONVERT)  # writes them
        if title not in runs:
            server.run(NOTHING)
            prompt = small_prompt(title, info)
            runs[title] = prompt, server.run(prompt)
        return runs[title]

    return run


def frames_of(path):
    """The decoded video, shape (frames, height, width, 3)."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.fixture(scope="session")
def video(server, ran):
    """The frames that a workflow saved: video(title)."""

    def frames(title):
        prompt, entry = ran(title)
        return frames_of(*server.saved(entry, id_of(prompt, "SaveVideo")))

    return frames


def plans(prompt, entry):
    """The first line of what each DCM Sampler says, in the order of the nodes."""
    samplers = sorted((number for number, node in prompt.items() if node["class_type"] == "DCMSampler"), key=int)
    return [entry["outputs"][number]["text"][0].splitlines()[0] for number in samplers]


def test_every_workflow_has_an_expected_plan():
    assert set(PLANS) == set(GRAPHS)


@each_workflow
def test_workflow_runs(title, ran, video):
    prompt, entry = ran(title)
    assert "execution_success" in messages(entry), messages(entry).get("execution_error", {}).get("exception_message")
    assert plans(prompt, entry) == PLANS[title]
    if title != CONVERT:
        shown = video(title)
        size = (17, 256, 256) if "small world" in title else (5, 64, 192 if title == COMPARED else 64)
        assert shown.shape == (*size, 3)
        # NaN would come out as one flat colour
        assert (shown.reshape(len(shown), -1, 3).std(axis=1).max(axis=1) > 2).all()


def test_the_modular_graph_gives_the_sampler_s_video(video):
    whole, parts = video("DCM Wan 2.1 text to video"), video("DCM Wan 2.1 text to video (modular)")
    assert np.abs(whole.astype(float) - parts).mean() < 1


def test_compared_videos_stand_side_by_side(video):
    base, one, two = np.split(video(COMPARED).astype(float), 3, axis=2)
    for left, right in ((base, one), (one, two), (base, two)):
        assert np.abs(left - right).mean() > 2
    # each is decoded from another picture's neighbourhood in H.264
    assert np.abs(two - video("DCM Wan 2.1 text to video")).mean() < 2


def test_compared_rows_start_from_the_same_noise():
    """Each has its own size and seed: shared ones cannot reach three rows without crossing wires."""
    nodes = GRAPHS[COMPARED]["nodes"]
    seeds = [node["widgets_values"][0] for node in nodes if node["type"] in ("KSampler", "DCMSampler")]
    sizes = [node["widgets_values"] for node in nodes if node["type"] == "EmptyHunyuanLatentVideo"]
    assert seeds == [0] * 3 and sizes == [sizes[0]] * 3


def test_nodes_that_load_the_same_file_load_it_once(server, info, files):
    prompt = small_prompt(COMPARED, info)
    kinds = [node["class_type"] for node in prompt.values()]
    assert kinds.count("DCMLoadModel") == 2 and kinds.count("UNETLoader") == 1 and kinds.count("VAELoader") == 3
    server.run(NOTHING)
    said = len(server.log())
    assert "execution_success" in messages(server.run(prompt))
    log = server.log()[said:]
    assert log.count("model_type FLOW") == 2 and log.count("VAE load device") == 1


def test_converted_files_are_those_the_other_workflow_loads(server, ran):
    prompt, entry = ran(CONVERT)
    base, detail, semantic, layers = [
        entry["outputs"][number]["text"][0] for number, node in prompt.items() if node["class_type"] == "PreviewAny"
    ]
    assert Path(base).is_file()
    loaded, _ = ran(EXPERT_FILES)
    attach, loras = loaded[id_of(loaded, "DCMAttachExperts")]["inputs"], server.base / "models" / "loras"
    assert Path(semantic) == loras / attach["semantic_lora"] and Path(detail) == loras / attach["detail_lora"]
    assert "blocks.0.self_attn.q" in layers


def test_the_four_step_loras_work_when_awake(server, info, files):
    graph = read(next(path for path in WORKFLOWS if path.stem == TWO_MODELS))
    asleep = [node for node in graph["nodes"] if node["mode"] == BYPASSED]
    assert [node["type"] for node in asleep] == ["LoraLoaderModelOnly"] * 2
    for node in asleep:
        node["mode"] = 0
    prompt = small_prompt(TWO_MODELS, info, graph)
    prompt[id_of(prompt, "DCMSampler")]["inputs"].update(schedule="Wan 2.2 4 steps (lightx2v)", cfg=1.0)
    said = len(server.log())
    entry = server.run(prompt)
    assert plans(prompt, entry) == ["step 1-2 semantic, 3-4 detail, boundary 0.875"]
    assert frames_of(*server.saved(entry, id_of(prompt, "SaveVideo"))).shape == (5, 64, 64, 3)
    assert "lora key not loaded" not in server.log()[said:]


@pytest.mark.parametrize(("title", "steps", "shift"), [(FROM_IMAGE, 4, 5.0), (TWO_MODELS, 20, 8.0)])
def test_two_full_models_are_sampled_at_even_levels(server, info, files, title, steps, shift):
    """The 4-step LoRAs are made for these and work at these only."""
    prompt = to_prompt(GRAPHS[title], info)
    sampler = prompt[id_of(prompt, "DCMSampler")]["inputs"]
    settings = {name: sampler[name] for name in ("schedule", "steps", "shift", "denoise", "boundary")}
    base = next(
        node["inputs"]["unet_name"] for node in prompt.values() if "high_noise" in node["inputs"].get("unet_name", "")
    )
    plan = server.request("/dcm/plan", {**settings, "two_models": True, "model": base})
    even = [1 - step / steps for step in range(steps)]
    assert [step["sigma"] for step in plan["steps"]] == pytest.approx([shift * s / (1 + (shift - 1) * s) for s in even])


def test_graphs_of_earlier_versions_run(server, info, files):
    """With the schedule's former name and without the newest widget."""
    prompt = small_prompt(FROM_IMAGE, info)
    inputs = prompt[id_of(prompt, "DCMSampler")]["inputs"]
    inputs |= {"schedule": "generic", "steps": 4, "shift": 5.0}
    del inputs["sampler_name"]
    assert plans(prompt, server.run(prompt)) == PLANS[FROM_IMAGE]
