"""Whatever a client posts for a node's widgets: the host refuses it, or the node says what is wrong, and the next prompt runs."""

import json
import urllib.error

import pytest

from ..test_house import NODE_IDS
from .graphs import PLAIN_WIDGETS, inputs_of
from .server import messages

TEXTS = [
    "\ud800",
    "a\udcffb",
    "\0",
    "a\nb",
    "\x1b[31mred",
    "\u202egnp.safetensors",
    "",
    "../../etc/passwd",
    "C:\\a",
    "\\\\server\\share",
    "CON",
    "nul.safetensors",
    "a" * 300,
    "x" * 100_000,
    "<img src=x onerror=alert(1)>",
    {"__value__": "\ud800"},
]
# of these the host makes text where a widget takes text
OTHERS = ["gone.safetensors", None, True, 0, float("nan"), {"a": {"b": []}}, {"__value__": ["a", "b"]}, []]
NUMBERS = {
    "FLOAT": [float("nan"), float("inf"), "\ud800", None],
    "INT": [float("nan"), 10**400, {"__value__": [1]}],
    "BOOLEAN": ["\ud800", {}],
}

# What gives an input of a kind: nodes by number, the first one's first output.
SOURCES = {
    "MODEL": {"DCMLoadModel": {"model_name": "zz_dcm_small_world_base.safetensors", "weight_dtype": "default"}},
    "CONDITIONING": {"DCMLoadConditioning": {"name": "zz_dcm_small_world/a blue circle moving down.safetensors"}},
    "LATENT": {"EmptyHunyuanLatentVideo": {"width": 64, "height": 64, "length": 5, "batch_size": 1}},
    "SIGMAS": {"DCMScheduler": {"preset": "generic", "steps": 2, "shift": 8.0, "denoise": 1.0}},
    "DCM_ROWS": {
        "DCMExpert": {
            "name": "high",
            "unit": "steps",
            "start": 1.0,
            "end": 2.0,
            "lora": "zz_dcm_small_world_detail.safetensors",
            "strength": "1, 0.5",
            "cfg": 0.0,
        }
    },
    "DCM_DATASET": {"DCMLoadDataset": {"file_name": "zz_dcm_small_world.safetensors"}},
    "VAE": {"VAELoader": {"vae_name": "zz_dcm_small_world_vae.safetensors"}},
    "CLIP": {"CLIPLoader": {"clip_name": "none.safetensors", "type": "wan"}},
}
# so that what is good runs, and soon
GOOD = {
    "DCMAttachExperts": {"detail_lora": "zz_dcm_small_world_detail.safetensors"},
    "DCMSampler": {"schedule": "generic", "steps": 1, "shift": 8.0, "cfg": 1.0, "boundary": 0.9},
    "DCMGuider": {"cfg": 1.0},
    "DCMScheduler": {"preset": "generic"},
    "DCMSchedulePlot": {"boundary": 0.9},
    "DCMTune": {
        "name": "of hostile values",
        "detail_lora": "zz_dcm_small_world_detail.safetensors",
        "calls": 5,
        "seeds": 1,
        "schedule": "generic",
        "steps": 1,
        "cfg": 1.0,
        "reference_steps": 2,
    },
    "DCMCompare": {"schedule": "generic", "steps": 1, "seeds": 1, "cfg": 1.0, "reference_steps": 2},
    "DCMInspectModel": {"file": "loras/zz_dcm_small_world_detail.safetensors"},
    "DCMTrainSemanticExpert": {"steps": 1, "rank": 1},
    "DCMTrainDetailExpert": {"steps": 1, "rank": 1, "shift": 17.0, "boundary": 0.9},
    "DCMConvertCheckpoint": {"model_name": "dcm_wan2.1_t2v_1.3B.safetensors", "overwrite": True},
    "DCMExtractLoRA": {
        "tuned_model": "dcm_wan2.1_t2v_1.3B.safetensors",
        "base_model": "zz_dcm_small_world_base.safetensors",
    },
    "DCMExportExpert": {
        "expert": "zz_dcm_small_world_detail.safetensors",
        "format": "diffusers LoRA",
        "overwrite": True,
    },
    "DCMSaveConditioning": {"overwrite": True},
    "DCMSaveDataset": {"overwrite": True},
    "DCMVideoSize": {"model_type": "HunyuanVideo"},
}
# text that is no name
FREE = {("DCMVideoDataset", "negative"), ("DCMExpert", "name"), ("DCMSplitSigmas", "more_boundaries")}
# without a folder, and of models that are not of one make
ENDS = {"DCMVideoDataset": "refused", "DCMExtractLoRA": "error"}
NODE, SEEN = "1", "2"


def prompt_of(kind, definition, **values):
    """One node with inputs of every kind it needs, its output looked at."""
    prompt = {NODE: {"class_type": kind, "inputs": {}}}
    for name, type_, options in inputs_of(definition):
        if type_ in PLAIN_WIDGETS:
            default = options.get("default", (options.get("options") or [""])[0])
            # not the file that another test's workflow writes
            default = f"of_{kind}_{default}" if type_ == "STRING" and name.endswith("name") else default
            prompt[NODE]["inputs"][name] = GOOD.get(kind, {}).get(name, default)
        elif name in definition["input"]["required"]:
            ((source, inputs),) = SOURCES[type_].items()
            number = f"{name} of {NODE}"
            prompt[number] = {"class_type": source, "inputs": inputs}
            prompt[NODE]["inputs"][name] = [number, 0]
    prompt[NODE]["inputs"] |= values
    if not definition["output_node"]:
        prompt[SEEN] = {"class_type": "PreviewAny", "inputs": {"source": [NODE, 0]}}
    return prompt


def outcome(server, prompt):
    """How a prompt ended: refused, error, success; and what was said of the node."""
    try:
        number = server.request("/prompt", {"prompt": prompt})["prompt_id"]
    except urllib.error.HTTPError as error:
        assert error.code == 400, error.read().decode()
        return "refused", json.loads(error.read()).get("node_errors", {}).get(NODE, {}).get("errors", [])
    said = messages(server.wait(number))
    return ("success", None) if "execution_success" in said else ("error", said["execution_error"])


def hostile_values(type_):
    return {"STRING": TEXTS, "COMBO": TEXTS + OTHERS}.get(type_) or NUMBERS[type_]


@pytest.mark.parametrize("kind", sorted(NODE_IDS))
def test_no_value_of_a_widget_ends_the_worker(server, info, kind):
    definition = info[kind]
    for name, type_, _ in inputs_of(definition):
        if type_ not in PLAIN_WIDGETS or (kind, name) in FREE:
            continue
        for value in hostile_values(type_):
            told = f"{name} = {value!r:.60}"
            how, what = outcome(server, prompt_of(kind, definition, **{name: value}))
            if how == "error":
                assert ".dcm_core." in what["exception_type"] and what["exception_type"].endswith("Error"), (
                    f"{told}: {what}"
                )
                assert (
                    what["node_id"] == NODE
                    and len(what["exception_message"]) < 2100
                    and what["exception_message"].encode()
                ), told
            elif how == "refused":
                assert not [fault for fault in what if fault["type"].startswith("exception")], f"{told}: {what}"
            else:
                assert type_ == "BOOLEAN", told
    good, what = outcome(server, prompt_of(kind, definition))
    assert good == ENDS.get(kind, "success"), what
