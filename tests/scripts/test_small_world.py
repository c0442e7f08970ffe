"""The scripts that make the small world, and the shipped training workflow, shortened."""

import shutil
import subprocess

from environment import ROOT
from instance import outputs_of

SMALL_WORLD = ROOT / "small_world"
WORKFLOW = ROOT / "workflows" / "DCM small world training (CPU).json"
TRAINERS = {"DCMTrainSemanticExpert": "semantic", "DCMTrainDetailExpert": "detail"}


def test_training_workflow_trains_both_experts_and_renders(server):
    graph = server.prompt_of(WORKFLOW)
    for node in graph.values():
        if node["class_type"] in TRAINERS:
            node["inputs"].update(steps=3, batch_size=2, save_every=2, sample_every=3)
    entry = server.run(graph)
    by_type = {graph[number]["class_type"]: shown for number, shown in outputs_of(entry).items()}
    for kind, side in TRAINERS.items():
        text = by_type[kind]["text"][0]
        assert f"{side} expert: LoRA rank" in text and "3 steps" in text
        run = server.base / "output" / "dcm_training" / f"small_world_{side}"
        assert [path.name for path in sorted(run.glob("step_*"))] == [
            "step_00000002.safetensors",
            "step_00000003.safetensors",
        ]
        assert (run / "sample_00000003.mp4").stat().st_size > 500
        assert (server.base / "models" / "loras" / "dcm" / f"small_world_{side}.safetensors").is_file()
    assert "step 1-3 semantic, 4-6 detail, boundary 0.76" in by_type["DCMSampler"]["text"][0]
    assert len(by_type["PreviewImage"]["images"]) == 6
    (video,) = (number for number, node in graph.items() if node["class_type"] == "SaveVideo")
    assert [path.suffix for path in server.saved(entry, video)] == [".mp4"]


# The scripts as they are, but for how long they work.
MAKE = """
import sys
sys.path.insert(0, sys.argv[1])
import distill, measure, ship, train_base
sys.argv[1:] = sys.argv[2:]
train_base.CLIPS, train_base.STEPS = 16, 2
train_base.main()
distill.VIDEOS_PER_CAPTION, distill.TEACHER_STEPS = 1, 1
sys.argv[2:] = ["--steps", "2"]
distill.main()
folder = distill.Path(sys.argv[1])
ship.write_experts(folder, distill.load_base(folder), folder / "shipped")
table = {"base, 25 steps": {"calls": 25, "latent distance": (1e-5, 2e-6)}}
measure.write(table, folder / "measured_1")
assert measure.measure(folder, 1, videos=6) == table
print(*measure.models(folder), sep="; ")
"""


def test_scripts_make_base_and_experts(environment, tmp_path):
    shutil.copy(SMALL_WORLD / "models" / "vae" / "zz_dcm_small_world_vae.safetensors", tmp_path / "vae.safetensors")
    command = [str(environment.python), "-c", MAKE, str(SMALL_WORLD), str(tmp_path)]
    result = subprocess.run(command, env=environment.variables(), capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    compared = result.stdout.splitlines()[-1].split("; ")
    assert compared[-5:] == [
        "one expert",
        "two experts",
        "+ temporal coherence",
        "+ GAN and feature matching",
        "as shipped",
    ]
    shipped = sorted((tmp_path / "shipped").iterdir())
    assert [path.name for path in shipped] == [
        "zz_dcm_small_world_detail.safetensors",
        "zz_dcm_small_world_semantic.safetensors",
    ]
    assert sum(path.stat().st_size for path in shipped) < 6.5e6


def test_the_image_to_video_script(environment, tmp_path):
    """Shortened: what its figures are is measured by hand."""
    short = ["--base-steps", "1", "--steps", "1", "--clips", "2", "--held-out", "1"]
    command = [str(environment.python), str(SMALL_WORLD / "image_to_video.py"), str(tmp_path), *short]
    result = subprocess.run(command, env=environment.variables(), capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    rows = [line.rpartition(": ") for line in result.stdout.splitlines()[-5:]]
    assert [name.strip() for name, _, _ in rows] == [
        "the VAE alone",
        "text-to-video base, 50 steps",
        "image-to-video base, 50 steps",
        "image-to-video base, 6 steps",
        "experts, 6 steps",
    ]
    vae, *others = [float(value) for *_, value in rows]
    assert vae < 0.05 < min(others)


LIVE = """
import sys
sys.path.insert(0, sys.argv[1])
import torch, train_base
from world import COLOURS, LATENT, MOTIONS, SHAPES, embed
torch.manual_seed(0)
model = train_base.make_transformer()
train_base.train(model, torch.randn(16, *LATENT), 20, seed=0)
words = torch.stack([embed(word)[0].float() for word in (*COLOURS, *SHAPES, *MOTIONS)])
# below -3 a GELU is flat: such a unit learns no more
print(int((model.text_embedding[0](words) > -3).sum(1).min()))
"""


def test_every_word_keeps_units_that_learn(environment):
    """A first layer that is thrown about kills them: the base never heard what the motion's words said."""
    command = [str(environment.python), "-c", LIVE, str(SMALL_WORLD)]
    result = subprocess.run(command, env=environment.variables(), capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    assert int(result.stdout.splitlines()[-1]) > 100
