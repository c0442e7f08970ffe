"""A real server process of the host with the pack in it, spoken to through its API as the front end does."""

import copy
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dcm_core.conditioning import save_conditioning

ROOT = Path(__file__).parents[2]
HOST = os.environ.get("COMFYUI_PATH")
FOLDER = "some-folder.name"  # no Python name
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
CACHED_PROMPT = ROOT / "workflows" / "DCM Wan 2.1 text to video (cached prompt).json"
PLAN = "step 1-3 semantic, 4-6 detail, boundary 0.979"
NODE_IDS = {
    "DCMLoadModel", "DCMAttachExperts", "DCMSampler", "DCMScheduler", "DCMGuider", "DCMSplitSigmas", "DCMConvertCheckpoint",
    "DCMExtractLoRA", "DCMSchedulePlot", "DCMSaveConditioning", "DCMLoadConditioning",
}
LATENT = "200"  # a node the tests add
START_SECONDS, RUN_SECONDS = 120, 120

FRONT_END_ONLY = {"MarkdownNote", "Note"}
PLAIN_WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
CONTROL = "control_after_generate"
CONTROLS = {"fixed", "increment", "decrement", "randomize"}

direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Server:
    """A running host; `boot` is its log up to the moment it answered."""

    def __init__(self, base, port):
        self.base, self.port, self.boot, self.log_file = base, port, "", base / "server.log"

    def request(self, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{urllib.parse.quote(path)}", data, {"Content-Type": "application/json"}
        )
        with direct.open(request, timeout=30) as answer:
            content = answer.read()
        return json.loads(content) if content else None

    def log(self):
        return self.log_file.read_text(encoding="utf-8", errors="replace")

    def queue(self, prompt):
        try:
            return self.request("/prompt", {"prompt": prompt})["prompt_id"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"the host refuses the prompt: {error.read().decode()}") from error

    def wait(self, prompt_id):
        """The history entry of a prompt, once it has one."""
        deadline = time.monotonic() + RUN_SECONDS
        while time.monotonic() < deadline:
            entry = self.request(f"/history/{prompt_id}").get(prompt_id)
            if entry:
                return entry
            time.sleep(0.05)
        raise AssertionError(f"no end after {RUN_SECONDS} s; the log ends with:\n{self.log()[-3000:]}")

    def run(self, prompt):
        return self.wait(self.queue(prompt))


def wait_until_ready(server, process):
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            server.request("/system_stats")
            return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"the host did not start; its log ends with:\n{server.log()[-3000:]}")


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    if HOST is None:
        pytest.skip("COMFYUI_PATH names no ComfyUI; `python scripts/test.py` brings one")
    base = tmp_path_factory.mktemp("server")
    for name in ("custom_nodes", "user"):
        (base / name).mkdir()
    (base / "custom_nodes" / FOLDER).symlink_to(ROOT, target_is_directory=True)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    subprocess.run([sys.executable, str(ROOT / "scripts" / "tiny_models.py"), str(base / "models")], env=environment, check=True)
    save_conditioning(base / "models" / "dcm_conditioning" / "narrow.safetensors", [[torch.zeros(1, 8, 768), {}]])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        server = Server(base, probe.getsockname()[1])
    command = [
        sys.executable, str(Path(HOST) / "main.py"), "--cpu", "--port", str(server.port), "--base-directory", str(base),
        "--database-url", f"sqlite:///{base / 'user' / 'comfyui.db'}", "--disable-auto-launch", "--disable-api-nodes",
    ]
    with server.log_file.open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=base)
    try:
        wait_until_ready(server, process)
        server.boot = server.log()
        yield server
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture(scope="session")
def info(server):
    """Node id -> what the host says of it."""
    return server.request("/object_info")


# From the saved graph to the API's format

def inputs_of(definition):
    """(name, type, options) of the inputs in the order of the node; the type of a combo is COMBO, its options["options"] its values."""
    for group in ("required", "optional"):
        for name in definition["input_order"].get(group, []):
            kind, *rest = definition["input"][group][name]
            options = dict(rest[0]) if rest else {}
            if isinstance(kind, list):
                kind, options["options"] = "COMBO", kind
            elif kind.startswith("COMFY_DYNAMICCOMBO"):
                kind, options["options"] = "COMBO", [option["key"] for option in options["options"]]
            yield name, kind, options


def widgets_of(definition):
    """Name -> (type, options) of the widgets, in the order of `widgets_values`."""
    found = {}
    for name, kind, options in inputs_of(definition):
        if kind in PLAIN_WIDGETS and not options.get("forceInput"):
            found[name] = kind, options
            if options.get(CONTROL):
                found[f"{name} {CONTROL}"] = "COMBO", {"options": sorted(CONTROLS)}
    return found


def widget_values(node, definition):
    """Widget name -> its value in a saved graph; optional widgets at the end that a newer host added have none."""
    names, values = list(widgets_of(definition)), node["widgets_values"]
    assert len(values) <= len(names) and set(names[len(values) :]) <= set(definition["input"].get("optional", {})), node["type"]
    return dict(zip(names, values, strict=False))


def to_prompt(graph, info):
    """A flat saved graph in the API's format."""
    links = {number: [str(source), output] for number, source, output, *_ in graph["links"]}
    prompt = {}
    for node in graph["nodes"]:
        if node["type"] not in FRONT_END_ONLY:
            inputs = {name: value for name, value in widget_values(node, info[node["type"]]).items() if CONTROL not in name}
            inputs |= {slot["name"]: links[slot["link"]] for slot in node["inputs"] if slot["link"] is not None}
            prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def id_of(prompt, kind):
    return next(number for number, node in prompt.items() if node["class_type"] == kind)


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


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


def messages(entry):
    """Kind -> details of what the host said about a run."""
    return dict(entry["status"]["messages"])


def saved(server, entry, number, kind):
    """The file that a node of a good run saved."""
    assert "execution_success" in messages(entry), messages(entry).get("execution_error", {}).get("exception_message")
    (file,) = entry["outputs"][number][kind]
    return server.base / file["type"] / file["subfolder"] / file["filename"]


def latent_of(server, entry):
    return load_file(saved(server, entry, LATENT, "latents"))["latent_tensor"]


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
    assert set(ours) >= NODE_IDS
    for name, node in ours.items():
        assert name.startswith("DCM")
        assert node["display_name"].startswith("DCM ")
        assert node["category"] == "DCM" or node["category"].startswith("DCM/")
        assert node["description"]


def test_every_widget_of_ours_has_a_tooltip(info):
    ours = {name: node for name, node in info.items() if name.startswith("DCM")}
    bare = [f"{name}.{widget}" for name, node in ours.items() for widget, kind, options in inputs_of(node) if not options.get("tooltip")]
    assert bare == []


def test_templates_are_listed_and_served(server):
    listed = server.request("/workflow_templates")
    assert sorted(listed[FOLDER]) == sorted(path.stem for path in WORKFLOWS)
    for path in WORKFLOWS:
        assert server.request(f"/api/workflow_templates/{FOLDER}/{path.name}") == read(path)


def illegal(kind, options, value):
    """Whether a widget may not have this value; file names are the user's matter."""
    if kind == "COMBO":
        return value not in options["options"] and not str(value).endswith(".safetensors")
    if kind in ("INT", "FLOAT"):
        below, above = value < options.get("min", value), value > options.get("max", value)
        off_step = kind == "INT" and (value - options.get("min", 0)) % options.get("step", 1)
        return below or above or bool(off_step)
    return not isinstance(value, bool if kind == "BOOLEAN" else str)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflow_fits_the_host(path, info):
    for node in read(path)["nodes"]:
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
        assert linked | set(values) >= set(definition["input"].get("required", {})), f"{node['type']} lacks a required input"
        assert [slot["type"] for slot in node["outputs"]] == definition["output"][: len(node["outputs"])]


# Runs

def test_the_shipped_workflow_renders_a_video(server, make_prompt, rendered):
    av = pytest.importorskip("av")
    path = saved(server, rendered, id_of(make_prompt(), "SaveVideo"), "images")
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
    assert rendered["outputs"][id_of(make_prompt(), "DCMSampler")]["text"] == [PLAN]
    assert PLAN in server.log()


def test_another_seed_reuses_the_loaded_files(server, make_prompt, rendered):
    server.run(make_prompt())
    prompt = make_prompt(DCMSampler={"seed": 1})
    entry = server.run(prompt)
    cached = set(messages(entry)["execution_cached"]["nodes"])
    assert {id_of(prompt, kind) for kind in ("DCMLoadModel", "VAELoader", "DCMLoadConditioning")} <= cached
    assert id_of(prompt, "DCMSampler") not in cached
    assert not torch.equal(latent_of(server, entry), latent_of(server, rendered))


def failure(entry):
    assert entry["status"]["status_str"] == "error"
    return messages(entry)["execution_error"]


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
        "semantic_lora": "none", "semantic_strength": 1.0, "detail_lora": "none", "detail_strength": 1.0, "boundary": 0.0,
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
        EmptyHunyuanLatentVideo={"width": 256, "height": 256, "length": 33}, DCMSampler={"schedule": "generic", "steps": 50}
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
