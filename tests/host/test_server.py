"""The pack in a real server process, spoken to through its API as the front end does."""

import copy
import os
import signal
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ..test_house import NODE_IDS
from .graphs import id_of, inputs_of, read, to_prompt
from .server import FOLDER, ROOT, RUN_SECONDS, failure, messages, start_server

CACHED_PROMPT = ROOT / "workflows" / "DCM Wan 2.1 text to video (cached prompt).json"
PLAN = "step 1-3 semantic, 4-6 detail, boundary 0.979"
LATENT = "200"  # a node the tests add


@pytest.fixture(scope="session")
def make_prompt(info):
    """The shipped workflow at 64 x 64 and 5 frames, with other inputs on some nodes: make_prompt(DCMSampler={"seed": 1}).

    The latent is saved too: the same pixels need not give the same H.264 file.
    """
    shipped = to_prompt(read(CACHED_PROMPT), info)

    def make(**changes):
        prompt = copy.deepcopy(shipped)
        small = {"width": 64, "height": 64, "length": 5}
        for kind, inputs in {"EmptyHunyuanLatentVideo": small, **changes}.items():
            prompt[id_of(prompt, kind)]["inputs"] |= inputs
        samples = [id_of(prompt, "DCMSampler"), 0]
        prompt[LATENT] = {"class_type": "SaveLatent", "inputs": {"samples": samples, "filename_prefix": "latent"}}
        return prompt

    return make


def latent_of(server, entry):
    (path,) = server.saved(entry, LATENT)
    return load_file(path)["latent_tensor"]


@pytest.fixture(scope="session")
def rendered(server, make_prompt):
    """The history entry of the shipped workflow, run."""
    return server.run(make_prompt())


# The pack in the host


def test_the_pack_loads_without_a_complaint(server):
    assert f"custom_nodes/{FOLDER}" in server.boot.replace(os.sep, "/")
    for bad in ("Traceback", "IMPORT FAILED", "Cannot import"):
        assert bad not in server.boot
    complaints = [line for line in server.boot.splitlines() if FOLDER in line or "DCM" in line]
    assert not [line for line in complaints if any(word in line.lower() for word in ("error", "warn", "fail"))]


def test_all_nodes_are_listed(info):
    ours = {name: node for name, node in info.items() if node["python_module"] == f"custom_nodes.{FOLDER}"}
    assert set(ours) == NODE_IDS
    for name, node in ours.items():
        assert name.startswith("DCM")
        assert node["display_name"].startswith("DCM ")
        assert node["category"] == "DCM" or node["category"].startswith("DCM/")
        assert node["description"]


def test_every_widget_of_ours_has_a_tooltip(info):
    ours = {name: node for name, node in info.items() if name.startswith("DCM")}
    bare = [
        f"{name}.{widget}"
        for name, node in ours.items()
        for widget, kind, options in inputs_of(node)
        if not options.get("tooltip")
    ]
    assert bare == []


def test_every_node_is_found_by_other_words_where_the_host_knows_them(info):
    if "search_aliases" not in info["KSampler"]:
        pytest.skip("this host knows no search aliases")
    assert [
        name for name, node in info.items() if name.startswith("DCM") and len(node["search_aliases"] or []) < 2
    ] == []


# Runs


def test_the_shipped_workflow_renders_a_video(server, make_prompt, rendered):
    av = pytest.importorskip("av")
    (path,) = server.saved(rendered, id_of(make_prompt(), "SaveVideo"))
    assert path.suffix == ".mp4"
    with av.open(str(path)) as container:
        video = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert video.shape == (5, 64, 64, 3)
    # NaN would come out as one flat colour
    assert (video.reshape(5, -1, 3).std(axis=1).max(axis=1) > 2).all()
    latent = latent_of(server, rendered)
    assert latent.shape == (1, 16, 2, 8, 8)
    assert latent.isfinite().all() and latent.std() > 0.1


def test_the_sampler_says_its_plan(rendered, server, make_prompt):
    (text,) = rendered["outputs"][id_of(make_prompt(), "DCMSampler")]["text"]
    assert text.splitlines()[0] == PLAN
    assert PLAN in server.log()


def test_another_seed_reuses_the_loaded_files(server, make_prompt, rendered):
    server.run(make_prompt())
    prompt = make_prompt(DCMSampler={"seed": 1})
    entry = server.run(prompt)
    cached = set(messages(entry)["execution_cached"]["nodes"])
    assert {id_of(prompt, kind) for kind in ("DCMLoadModel", "VAELoader", "DCMLoadConditioning")} <= cached
    assert id_of(prompt, "DCMSampler") not in cached
    assert not torch.equal(latent_of(server, entry), latent_of(server, rendered))


def test_embeddings_of_another_width_are_refused_on_the_sampler(server, make_prompt):
    prompt = make_prompt(DCMLoadConditioning={"name": "narrow.safetensors"})
    error = failure(server.run(prompt))
    assert error["node_id"] == id_of(prompt, "DCMSampler")
    assert error["exception_type"].endswith("DCMError")
    for part in ("positive", "width 768", "takes 4096", "CLIPLoader"):
        assert part in error["exception_message"]


def test_missing_experts_are_refused_on_the_attaching_node(server, make_prompt):
    prompt = make_prompt()
    sampler, model = id_of(prompt, "DCMSampler"), id_of(prompt, "DCMLoadModel")
    settings = {
        "semantic_lora": "none",
        "semantic_strength": 1.0,
        "detail_lora": "none",
        "detail_strength": 1.0,
        "boundary": 0.0,
    }
    prompt["100"] = {"class_type": "DCMAttachExperts", "inputs": {"model": [model, 0], **settings}}
    prompt[sampler]["inputs"]["model"] = ["100", 0]
    error = failure(server.run(prompt))
    assert error["node_id"] == "100"
    assert error["exception_type"].endswith("ExpertError")
    assert "semantic_lora and detail_lora are both none" in error["exception_message"]
    assert sampler not in error["executed"]


def test_interrupt_ends_a_run_and_the_next_is_as_ever(server, make_prompt, rendered):
    long = make_prompt(
        EmptyHunyuanLatentVideo={"width": 256, "height": 256, "length": 33},
        DCMSampler={"schedule": "generic", "steps": 50},
    )
    said = len(server.log())
    number = server.queue(long)
    deadline = time.monotonic() + RUN_SECONDS
    while "boundary 0.979" not in server.log()[said:]:
        assert time.monotonic() < deadline, f"the run did not begin; the log goes on with:\n{server.log()[said:]}"
        time.sleep(0.05)
    server.request("/interrupt", {})
    entry = server.wait(number)
    happened = messages(entry)
    assert happened["execution_interrupted"]["node_id"] == id_of(long, "DCMSampler")
    assert not {"execution_error", "execution_success"} & set(happened)
    assert torch.equal(latent_of(server, server.run(make_prompt())), latent_of(server, rendered))


TRAINING = ROOT / "workflows" / "DCM small world training (CPU).json"


def test_ctrl_c_on_the_server_saves_a_training_run(info, tmp_path):
    """The server waits for no work that is in hand. A parent that ignores the signal would have it ignored there, too."""
    prompt = to_prompt(read(TRAINING), info)
    trainer = id_of(prompt, "DCMTrainSemanticExpert")
    prompt[trainer]["inputs"] |= {
        "steps": 100_000,
        "save_every": 100_000,
        "sample_every": 0,
        "batch_size": 2,
        "name": "ended",
    }
    wanted, found = [trainer], {}
    while wanted:
        number = wanted.pop()
        found[number] = prompt[number]
        wanted += [value[0] for value in prompt[number]["inputs"].values() if isinstance(value, list)]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with start_server(tmp_path) as running:
            running.queue(found)
            deadline = time.monotonic() + RUN_SECONDS
            while "Step 1 of 100000" not in running.log() and time.monotonic() < deadline:
                time.sleep(0.1)
            running.process.send_signal(signal.SIGINT)
            running.process.wait(timeout=RUN_SECONDS)
    finally:
        signal.signal(signal.SIGINT, before)
    (state,) = (tmp_path / "output" / "dcm_training" / "ended").glob("step_*.safetensors")
    assert int(state.stem.removeprefix("step_")) > 0
