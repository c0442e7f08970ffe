"""Beside other node packs in one server: nothing of ours changes, and our experts work in their loaders, patches and samplers.

COMFYUI_OTHER_PACKS names a folder of custom nodes; all of them are loaded together. What they require has to be installed for
the Python that runs the tests. docs/compatibility.md says which packs and versions were tried.
"""

import copy
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from .compare import relative
from .graphs import id_of, read, to_prompt
from .server import FOLDER, HOST, ROOT, start_server

PACKS = os.environ.get("COMFYUI_OTHER_PACKS")
SMALL_WORLD = ROOT / "workflows" / "DCM small world (CPU).json"
SHIPPED = ROOT / "small_world" / "models"
BASE = SHIPPED / "diffusion_models" / "zz_dcm_small_world_base.safetensors"
SEMANTIC, DETAIL = "zz_dcm_small_world_semantic.safetensors", "zz_dcm_small_world_detail.safetensors"
BOUNDARY = 0.76
GGUF_MODEL = "zz_dcm_small_world_base_bf16.gguf"

pytestmark = [
    pytest.mark.skipif(PACKS is None, reason="COMFYUI_OTHER_PACKS names no folder of custom nodes"),
    pytest.mark.skipif(HOST is None, reason="COMFYUI_PATH names no ComfyUI; `python scripts/test.py` brings one"),
]


def packs():
    return sorted(path for path in Path(PACKS).iterdir() if (path / "__init__.py").is_file())


def write_gguf(path):
    """The small world's base as ComfyUI-GGUF reads it, matrices in bfloat16."""
    import gguf  # ComfyUI-GGUF requires it

    kinds = gguf.GGMLQuantizationType
    writer = gguf.GGUFWriter(str(path), "wan")
    for name, tensor in load_file(BASE).items():
        values = tensor.float().numpy()
        if values.ndim > 4:
            writer.add_array(f"comfy.gguf.orig_shape.{name}", [int(size) for size in values.shape])
            values = values.reshape(len(values), -1)
        kind = kinds.BF16 if tensor.ndim == 2 and ".blocks." in f".{name}" else kinds.F32
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    with start_server(tmp_path_factory.mktemp("alone"), "--fp32-unet") as server:
        yield server


@pytest.fixture(scope="module")
def beside(tmp_path_factory):
    base = tmp_path_factory.mktemp("beside")
    for name in ("custom_nodes", "models/diffusion_models"):
        (base / name).mkdir(parents=True)
    for path in packs():
        (base / "custom_nodes" / path.name).symlink_to(path.resolve(), target_is_directory=True)
    if any("gguf" in path.name.lower() for path in packs()):
        write_gguf(base / "models" / "diffusion_models" / GGUF_MODEL)
    with start_server(base, "--fp32-unet") as server:
        yield server


@pytest.fixture(scope="module")
def plain_info(alone):
    return alone.request("/object_info")


@pytest.fixture(scope="module")
def info(beside):
    return beside.request("/object_info")


@pytest.fixture(scope="module")
def graph(plain_info):
    """Make the shipped workflow up to its latent: graph(DCMSampler={"seed": 1})."""
    shipped = to_prompt(read(SMALL_WORLD), plain_info)
    for kind in ("SaveVideo", "CreateVideo", "VAEDecode", "VAELoader"):
        del shipped[id_of(shipped, kind)]
    samples = [id_of(shipped, "DCMSampler"), 0]
    shipped["latent"] = {"class_type": "SaveLatent", "inputs": {"samples": samples, "filename_prefix": "latent"}}

    def make(**changes):
        prompt = copy.deepcopy(shipped)
        for kind, inputs in changes.items():
            prompt[id_of(prompt, kind)]["inputs"] |= inputs
        return prompt

    return make


@pytest.fixture
def need(info):
    """Skip where no pack in the folder has these nodes: need("ClownSampler_Beta")."""

    def check(*kinds):
        if missing := [kind for kind in kinds if kind not in info]:
            pytest.skip(f"no pack in {PACKS} has {' and '.join(missing)}")

    return check


def latent(server, prompt):
    (path,) = server.saved(server.run(prompt), "latent")
    return load_file(path)["latent_tensor"]


@pytest.fixture(scope="module")
def expected(alone, graph):
    return latent(alone, graph())


def through(prompt, taker, kind, **inputs):
    """The graph with another node on the MODEL that the node `taker` takes."""
    slots = prompt[id_of(prompt, taker)]["inputs"]
    prompt["between"] = {"class_type": kind, "inputs": {"model": slots["model"], **inputs}}
    slots["model"] = ["between", 0]
    return prompt


def sampled_by(prompt, steps=6, **sampler):
    """The graph with another SAMPLER, over the first `steps` of the 6."""
    schedule = {
        "preset": "auto",
        "steps": 6,
        "shift": 17.0,
        "denoise": 1.0,
        "model": [id_of(prompt, "DCMAttachExperts"), 0],
    }
    prompt["schedule"] = {"class_type": "DCMScheduler", "inputs": schedule}
    prompt["first"] = {"class_type": "SplitSigmas", "inputs": {"sigmas": ["schedule", 0], "step": steps}}
    prompt["sampler"] = sampler
    prompt[id_of(prompt, "DCMSampler")]["inputs"] |= {"sampler": ["sampler", 0], "sigmas": ["first", 0]}
    return prompt


def clown_sampler(name):
    return {
        "class_type": "ClownSampler_Beta",
        "inputs": {"eta": 0.0, "sampler_name": name, "seed": -1, "bongmath": False},
    }


def with_merged_model(prompt):
    """The graph with the detail expert merged into a second model by the host's LoRA loader: no expert is routed."""
    base = prompt[id_of(prompt, "DCMAttachExperts")]["inputs"]["model"]
    prompt["low"] = {
        "class_type": "LoraLoaderModelOnly",
        "inputs": {"model": base, "lora_name": DETAIL, "strength_model": 1.0},
    }
    prompt[id_of(prompt, "DCMSampler")]["inputs"] |= {"model": base, "detail_model": ["low", 0], "boundary": BOUNDARY}
    return prompt


def test_all_load_together(beside, info, plain_info):
    assert packs()
    for bad in ("Traceback", "IMPORT FAILED", "Cannot import"):
        assert bad not in beside.boot, beside.boot[-3000:]
    assert {f"custom_nodes.{path.name}" for path in packs()} <= {node["python_module"] for node in info.values()}
    ours = {name for name, node in plain_info.items() if node["python_module"] == f"custom_nodes.{FOLDER}"}
    assert len(ours) > 10
    assert [name for name in ours if info[name]["python_module"] != f"custom_nodes.{FOLDER}"] == []


def test_the_small_world_is_the_same_to_the_bit(beside, graph, expected):
    assert torch.equal(latent(beside, graph()), expected)


def test_another_packs_euler_gives_what_the_hosts_gives(beside, graph, need):
    """Down to a sigma above 0: each ends on 0 in its own way."""
    need("ClownSampler_Beta")
    theirs = latent(beside, sampled_by(graph(), 5, **clown_sampler("linear/euler")))
    own = latent(beside, sampled_by(graph(), 5, class_type="KSamplerSelect", inputs={"sampler_name": "euler"}))
    assert relative(theirs, own) < 1e-5


@pytest.mark.parametrize(
    "name", ["exponential/res_2s", "exponential/res_3s", "multistep/res_2m", "fully_implicit/gauss-legendre_2s"]
)
def test_another_packs_sampler_routes_its_calls_between_the_steps(beside, graph, need, name):
    """Without the semantic expert: it is a full fine-tune, of which the host's LoRA loader leaves the modulations out."""
    need("ClownSampler_Beta")

    def sampled():
        return sampled_by(graph(DCMAttachExperts={"semantic_lora": "none"}), **clown_sampler(name))

    assert relative(latent(beside, sampled()), latent(beside, with_merged_model(sampled()))) < 1e-5


def test_another_packs_sampler_node_routes(beside, graph, need):
    need("ClownsharKSampler_Beta")

    def sampled(strength):
        prompt = sampled_by(graph(DCMAttachExperts={"detail_strength": strength}), class_type="ClownsharKSampler_Beta")
        own = prompt.pop(id_of(prompt, "DCMSampler"))["inputs"]
        prompt["sampler"]["inputs"] = {
            "eta": 0.0,
            "sampler_name": "exponential/res_2s",
            "scheduler": "simple",
            "steps": 6,
            "steps_to_run": -1,
            "denoise": 1.0,
            "cfg": 1.0,
            "seed": 0,
            "sampler_mode": "standard",
            "bongmath": False,
            "sigmas": ["schedule", 0],
            "positive": own["positive"],
            "negative": own["positive"],
            "model": own["model"],
            "latent_image": own["latent_image"],
        }
        prompt["latent"]["inputs"]["samples"] = ["sampler", 0]
        return latent(beside, prompt)

    both, semantic_only = sampled(1.0), sampled(0.0)
    assert both.isfinite().all()
    assert relative(both, semantic_only) > 1e-3


def test_a_patched_attention_is_the_same_before_and_after_the_experts(beside, graph, need, expected):
    need("WanVideoNAG")

    def patched(taker):
        prompt = graph()
        negative = [id_of(prompt, "DCMLoadConditioning"), 0]
        settings = {"nag_scale": 11.0, "nag_alpha": 0.25, "nag_tau": 2.5, "conditioning": negative}
        return latent(beside, through(prompt, taker, "WanVideoNAG", **settings))

    before, after = patched("DCMAttachExperts"), patched("DCMSampler")
    assert torch.equal(before, after)
    assert relative(before, expected) > 1e-3


@pytest.mark.parametrize("taker", ["DCMAttachExperts", "DCMSampler"])
def test_another_packs_lora_loader_does_what_the_hosts_does(beside, graph, need, expected, taker):
    need("Power Lora Loader (rgthree)")
    own = latent(beside, through(graph(), taker, "LoraLoaderModelOnly", lora_name=SEMANTIC, strength_model=0.3))
    lora = {"on": True, "lora": SEMANTIC, "strength": 0.3}
    assert torch.equal(latent(beside, through(graph(), taker, "Power Lora Loader (rgthree)", lora_1=lora)), own)
    assert relative(own, expected) > 1e-3


def test_a_gguf_file_of_the_same_weights_gives_the_same(beside, graph, need, expected):
    need("UnetLoaderGGUF")
    prompt = graph()
    prompt[id_of(prompt, "DCMLoadModel")] = {"class_type": "UnetLoaderGGUF", "inputs": {"unet_name": GGUF_MODEL}}
    assert torch.equal(latent(beside, prompt), expected)


def test_the_rows_of_a_table_over_a_gguf_file(alone, beside, graph, need):
    need("UnetLoaderGGUF")

    def with_rows(prompt):
        experts = id_of(prompt, "DCMAttachExperts")
        model, rows = prompt[experts]["inputs"]["model"], None
        for name, lora, start, end in (("a", SEMANTIC, 1, 2), ("b", DETAIL, 4, 6), ("c", SEMANTIC, 6, 6)):
            row = {
                "name": name,
                "unit": "steps",
                "start": start,
                "end": end,
                "lora": lora,
                "strength": "0.75",
                "cfg": 0.0,
            }
            prompt[name] = {"class_type": "DCMExpert", "inputs": row | ({"rows": rows} if rows else {})}
            rows = [name, 0]
        prompt[experts] = {"class_type": "DCMAttachTable", "inputs": {"model": model, "rows": rows}}
        return prompt

    plain, prompt = latent(alone, with_rows(graph())), with_rows(graph())
    prompt[id_of(prompt, "DCMLoadModel")] = {"class_type": "UnetLoaderGGUF", "inputs": {"unet_name": GGUF_MODEL}}
    assert torch.equal(latent(beside, prompt), plain)


def test_nothing_stays_behind(beside, graph, expected):
    """After all of the above, in the same server."""
    other = latent(beside, graph(DCMSampler={"seed": 1}))
    assert not torch.equal(other, expected)
    assert torch.equal(latent(beside, graph(DCMSampler={"steps": 7})), expected)
