"""The shipped training workflow, shortened, in a real server."""

from environment import ROOT

WORKFLOW = ROOT / "workflows" / "DCM small world training (CPU).json"
TRAINERS = {"DCMTrainSemanticExpert": "semantic", "DCMTrainDetailExpert": "detail"}


def test_training_workflow_trains_both_experts_and_renders(server):
    graph = server.prompt_of(WORKFLOW)
    for node in graph.values():
        if node["class_type"] in TRAINERS:
            node["inputs"].update(steps=3, batch_size=2, save_every=2, sample_every=3)
    outputs = server.run(graph)
    by_type = {graph[number]["class_type"]: shown for number, shown in outputs.items()}
    for kind, side in TRAINERS.items():
        text = by_type[kind]["text"][0]
        assert f"{side} expert, rank" in text and "3 steps" in text
        run = server.base / "output" / "dcm_training" / f"small_world_{side}"
        assert [path.name for path in sorted(run.glob("step_*"))] == ["step_00000002.safetensors", "step_00000003.safetensors"]
        assert (run / "sample_00000003.mp4").stat().st_size > 500
        assert (server.base / "models" / "loras" / "dcm" / f"small_world_{side}.safetensors").is_file()
    assert "step 1-3 semantic, 4-6 detail, boundary 0.893" in by_type["DCMSampler"]["text"][0]
    assert len(by_type["PreviewImage"]["images"]) == 6
    assert [path.suffix for path in server.saved({"video": by_type["SaveVideo"]})] == [".mp4"]
