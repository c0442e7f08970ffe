"""What a user meets: the pack in a running ComfyUI."""

import json
from pathlib import Path

import av
import numpy as np
import pytest
from demo import LATENT_NODE, WORKFLOW
from instance import PACK_FOLDER, RunError

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))


@pytest.fixture(scope="session")
def object_info(server):
    return server.get("/object_info")


@pytest.fixture
def prompt(server):
    """The shipped workflow for a cached prompt, small."""
    prompt = server.prompt_of(WORKFLOW)
    inputs_of(prompt, LATENT_NODE).update(width=64, height=48, length=5)
    return prompt


def inputs_of(prompt, node_type):
    return next(node["inputs"] for node in prompt.values() if node["class_type"] == node_type)


def test_pack_is_loaded(server, object_info):
    ours = {name for name, info in object_info.items() if info["python_module"] == f"custom_nodes.{PACK_FOLDER}"}
    assert {"DCMLoadModel", "DCMSampler", "DCMLoadConditioning"} <= ours
    assert all(name.startswith("DCM") for name in ours)
    assert "Traceback" not in server.log()


def test_templates_are_offered(server):
    assert sorted(server.get("/api/workflow_templates")[PACK_FOLDER]) == sorted(path.stem for path in WORKFLOWS)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_use_nodes_and_inputs_that_exist(server, object_info, path):
    notes = {"MarkdownNote", "Note"}
    assert {node["type"] for node in json.loads(path.read_text(encoding="utf-8"))["nodes"]} <= object_info.keys() | notes
    for node in server.prompt_of(path).values():
        known = object_info[node["class_type"]]["input"]
        assert node["inputs"].keys() <= known.get("required", {}).keys() | known.get("optional", {}).keys()
        assert known.get("required", {}).keys() <= node["inputs"].keys()


def test_workflow_renders_a_video(server, prompt):
    (path,) = server.saved(server.run(prompt))
    with av.open(path) as video:
        assert video.streams.video[0].average_rate == 16
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)])
    assert frames.shape == (5, 48, 64, 3)
    assert all(frame.std() > 5 for frame in frames), "a flat picture: NaN, or no signal"
    assert "step 1-3 semantic, 4-6 detail, boundary 0.979" in server.log()


def test_refused_prompt_says_why(server, prompt):
    inputs_of(prompt, "DCMSampler")["schedule"] = "no such schedule"
    with pytest.raises(RunError, match=r"DCMSampler: Value not in list: schedule: 'no such schedule'"):
        server.run(prompt)


def test_failing_node_says_why(server, prompt):
    inputs_of(prompt, "DCMSampler")["denoise"] = 0.0
    with pytest.raises(RunError, match=r"DCMSampler: denoise is 0"):
        server.run(prompt)

def test_tmp(server, prompt):
    inputs_of(prompt, "DCMLoadModel")["model_name"] = "missing.safetensors"
    print(inputs_of(prompt, "DCMLoadModel"))
    with pytest.raises(RunError, match=r"Value not in list"):
        server.run(prompt)
    print(server.log_tail(50))
