"""DCM Video Dataset in the host, with small encoders."""

import json
import urllib.error
from fractions import Fraction

import av
import numpy as np
import pytest
import torch

from ..server import start_server


@pytest.fixture
def data(pack, tmp_path, monkeypatch):
    """Folders of the host of their own, with two clips and one that is too short in input/clips."""
    import folder_paths

    folder = tmp_path / "input" / "clips"
    folder.mkdir(parents=True)
    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path / "input"))
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    for name, frames, size in (("a", 9, (64, 48)), ("b", 9, (48, 64)), ("c", 2, (64, 48))):
        write_video(folder / f"{name}.mp4", frames, size)
        (folder / f"{name}.txt").write_text(f"clip {name}")
    return folder


def write_video(path, frames, size):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=16)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.thread_count = 1
        for index in range(frames):
            pixels = np.full((size[1], size[0], 3), 20 * index, dtype=np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, 16)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.fixture
def dataset_node(module):
    """Run the node as the host does -> its NodeOutput."""
    cls = module("nodes.dataset").DCMVideoDataset
    cls.GET_SCHEMA()

    def run(vae, clip, folder="clips", **changes):
        settings = {"width": 64, "height": 48, "frames": 5, "fps": 16.0, "buckets": True, "negative": "bad"} | changes
        with torch.inference_mode():
            return cls.PREPARE_CLASS_CLONE({"hidden_inputs": {}}).execute(folder=folder, vae=vae, clip=clip, **settings)

    run.cls = cls
    return run


def text(output):
    return output.ui.as_dict()["text"][0]


def test_clips_are_encoded_by_the_hosts_own_models(dataset_node, vae, clip, data, module):
    out = dataset_node(vae, clip)
    dataset = out.result[0]
    assert text(out).split("\n")[:3] == ["2 clips, 2 sizes, 1 file left out", "48x64: 1", "64x48: 1"]
    assert "left out c.mp4: lasts" in text(out)
    clips, sources = module("dcm_core.distill.data.clips"), module("dcm_core.distill.data.sources")
    settings = clips.ClipSettings(5, 16, 64, 48)
    pixels = clips.read_clip(clips.inspect_clip(sources.find_clips(data).clips[0], settings), settings)
    latent = dataset.latent(0)
    assert latent.shape == (16, 2, 6, 8) and not latent.is_inference()
    torch.testing.assert_close(latent, vae.encode(pixels)[0])
    tokens = clip.tokenize("clip a")
    assert torch.equal(dataset.conditioning(0)[0][0], clip.encode_from_tokens_scheduled(tokens)[0][0])
    assert dataset.unconditional()[0][0].shape == (1, 3, 8)
    assert all(
        path.parent.name == "dcm_cache" for entry in dataset.entries for path in (entry.latent, *entry.conditionings)
    )


def test_the_command_names_the_clips_that_are_left_out(vae, clip, data, module, monkeypatch, wan, caplog):
    command, alone = module("nodes.host.training.command"), module("dcm_core.distill.parallel").ALONE
    monkeypatch.setattr(command, "load_vae", lambda path: vae)
    monkeypatch.setattr(command, "load_clip", lambda *_: clip)
    sizes = {"width": 64, "height": 48, "frames": 5, "fps": 16, "buckets": True}
    settings = {"dataset": {"folder": str(data), **sizes}, "vae": "vae.safetensors"}
    with caplog.at_level("INFO"):
        command.load_data(settings, data, wan(layers=1), alone)
    assert "2 clips, 2 sizes, 1 file left out" in caplog.text and "left out c.mp4: lasts" in caplog.text


def test_nothing_is_kept_for_gradients_outside_of_a_node(module, vae, clip):
    """The command line has no inference mode around it."""
    encoders = module("nodes.host.training.encoders").host_encoders(vae, clip)
    with torch.inference_mode(False), torch.enable_grad():
        assert not encoders.encode_video(torch.rand(5, 32, 32, 3)).requires_grad
        assert not encoders.encode_text("a")[0][0].requires_grad


@pytest.mark.parametrize(
    ("caption", "read"),
    [
        ("a clock (showing 18:30)", "a clock (showing 18:30)"),
        (r"jet \(fighter\), ((blue))", "jet (fighter), ((blue))"),
    ],
)
def test_brackets_in_a_caption_are_brackets(module, pack, caption, read):
    """In the host's prompts they weight words, with any number after a colon."""
    from comfy.sd1_clip import SD1Tokenizer, SDTokenizer

    class Letters:
        @classmethod
        def from_pretrained(cls, path, **options):
            return cls()

        def __call__(self, words):
            return {"input_ids": [ord(letter) for letter in words]}

        def get_vocab(self):
            return {chr(number): number for number in range(128)}

    class Clip:
        tokenizer = SD1Tokenizer(
            tokenizer=lambda **options: SDTokenizer(
                tokenizer_class=Letters,
                has_start_token=False,
                has_end_token=False,
                pad_to_max_length=False,
                pad_token=0,
                max_length=999,
                tokenizer_path="",
            )
        )
        tokenizer_options, layer_idx, patcher = {}, None, None

        def tokenize(self, text, **options):
            return self.tokenizer.tokenize_with_weights(text, **options)

        def encode_from_tokens_scheduled(self, tokens):
            return tokens["l"][0]

    encode = module("nodes.host.training.encoders").caption_encoder(Clip())
    assert encode(caption) == [(ord(letter), 1.0) for letter in read]


def test_windows_images_and_prompts_of_the_node(dataset_node, vae, clip, data):
    from PIL import Image

    Image.new("RGB", (64, 48)).save(data / "d.png")
    (data / "d.txt").write_text("an image")
    plain = text(dataset_node(vae, clip, frames=1)).split("\n")
    assert plain[0] == "3 clips, 2 sizes"
    assert plain[-2:] == ["ignored 1 .png file: d.png", "ignored 1 .txt file: d.txt"]
    out = dataset_node(vae, clip, frames=1, images=True, window="all", sample_prompts=" a fox \n\na cat")
    assert text(out).split("\n")[0] == "21 clips, 2 sizes", "9, 9 and 2 frames, and an image"
    tokens = clip.encode_from_tokens_scheduled(clip.tokenize("a fox"))
    assert len(prompts := out.result[0].sample_prompts()) == 2 and torch.equal(prompts[0][0][0], tokens[0][0])
    for path in data.glob("*.mp4"):
        path.unlink()
    assert "has no clips" in dataset_node.cls.validate_inputs(folder=str(data))
    assert dataset_node.cls.validate_inputs(folder=str(data), images=True) is True


def test_clip_vision_needs_an_image(module, dataset_node, vae, clip, data):
    with pytest.raises(module("dcm_core.errors").DCMError, match="clip_vision is set, but image_conditioning is none"):
        dataset_node(vae, clip, clip_vision=object())


def test_a_second_run_calls_no_model(dataset_node, vae, clip, data, monkeypatch):
    first = dataset_node(vae, clip).result[0]
    for model, method in ((vae, "encode"), (clip, "encode_from_tokens_scheduled")):
        monkeypatch.setattr(model, method, lambda *args, **options: pytest.fail("called"))
    assert dataset_node(vae, clip, folder=str(data)).result[0] == first


def test_both_models_are_unloaded_and_no_other(dataset_node, vae, clip, data, wan):
    import comfy.model_management as management

    other = wan(width=128, layers=1)
    management.load_models_gpu([other, vae.patcher])
    dataset_node(vae, clip)
    loaded = [entry.model for entry in management.current_loaded_models]
    assert any(model is other for model in loaded)
    assert not [model for model in loaded if model.is_clone(vae.patcher) or model.is_clone(clip.patcher)]


def test_weights_are_named_by_what_they_are(module, vae, clip):
    weights_id = module("nodes.host.training.encoders").weights_id
    first = weights_id(vae.patcher)
    assert weights_id(vae.patcher.clone()) == first
    bias = next(value for name, value in vae.first_stage_model.named_parameters() if name.endswith("conv1.bias"))
    with torch.no_grad():
        bias[-1] += 1
        changed = weights_id(vae.patcher)
        bias[-1] -= 1
    assert changed != first and weights_id(clip.patcher) != first


def test_a_lora_on_the_text_encoder_gives_it_another_name_loaded_or_not(module, clip):
    import comfy.model_management as management

    encoders = module("nodes.host.training.encoders")
    plain = encoders.weights_id(clip.patcher)
    tuned = clip.clone()
    tuned.add_patches({"table.weight": ("diff", (torch.full((256, 8), 0.5),))}, 0.7)
    stronger = clip.clone()
    stronger.add_patches({"table.weight": ("diff", (torch.full((256, 8), 0.5),))}, 0.9)
    name = encoders.weights_id(tuned.patcher)
    assert len({plain, name, encoders.weights_id(stronger.patcher)}) == 3
    management.load_models_gpu([tuned.patcher])
    assert (encoders.weights_id(tuned.patcher), encoders.weights_id(clip.patcher)) == (name, plain)
    encoders.unload([clip.patcher])


def test_layer_of_the_text_encoder_is_part_of_its_name(module, vae, clip):
    host_encoders = module("nodes.host.training.encoders").host_encoders
    skipping = clip.clone()
    skipping.clip_layer(-2)
    assert host_encoders(vae, clip).text_id != host_encoders(vae, skipping).text_id


def test_a_vae_for_pictures_is_refused(dataset_node, vae, clip, data, monkeypatch):
    monkeypatch.setattr(vae, "encode", lambda pixels: torch.zeros(len(pixels), 4, 6, 8))
    with pytest.raises(
        ValueError, match=r"\(5, 4, 6, 8\) from 5 frames; expected one video. Connect the VAE of Wan 2.1"
    ):
        dataset_node(vae, clip)


def test_interrupting_stops_the_work(dataset_node, vae, clip, data):
    import comfy.model_management as management

    management.interrupt_current_processing(True)
    with pytest.raises(management.InterruptProcessingException):
        dataset_node(vae, clip)


def test_changed_files_are_noticed(dataset_node, data):
    fingerprint = dataset_node.cls.fingerprint_inputs
    first = fingerprint(folder="clips", width=64)
    assert fingerprint(folder=str(data), width=32) == first
    (data / "a.txt").write_text("another")
    assert fingerprint(folder="clips", width=64) != first


def test_a_wrong_folder_is_refused_before_anything_is_loaded(dataset_node, data):
    validate = dataset_node.cls.validate_inputs
    assert validate(folder="clips") is True
    assert validate(folder=None) is True, "the text of another node is not known yet"
    assert "does not exist; expected a folder of videos" in validate(folder="nowhere")
    assert "`folder` is empty" in validate(folder=" ")


# Where clips may be


@pytest.fixture
def listening(pack, monkeypatch):
    """The host as if started with --listen <addresses>."""
    import comfy.cli_args

    def start(addresses="0.0.0.0,::"):
        monkeypatch.setattr(comfy.cli_args.args, "listen", addresses)

    return start


@pytest.mark.parametrize(
    ("addresses", "alone"),
    [
        ("127.0.0.1", True),
        ("::1", True),
        ("127.2.2.2, 127.3.3.3", True),
        ("localhost", True),
        ("0.0.0.0,::", False),
        ("192.168.0.2", False),
        ("127.0.0.1,10.0.0.1", False),
        ("my-machine", False),
        ("::ffff:10.0.0.1", False),
        ("", False),
    ],
)
def test_which_addresses_are_of_this_machine_alone(module, addresses, alone):
    assert module("nodes.host.reach").only_this_machine(addresses) is alone


def test_a_server_that_others_reach_reads_clips_only_where_the_host_does(
    dataset_node, vae, clip, data, tmp_path, listening, monkeypatch
):
    """In the input, output and configured model folders, links resolved; elsewhere nothing tells what exists."""
    import folder_paths

    secret, disk, packs = (tmp_path / name for name in ("secret", "disk", "packs"))
    for folder in (secret, disk, packs, tmp_path / "output" / "clips"):
        folder.mkdir(parents=True)
        for name in ("a.mp4", "a.txt"):
            (folder / name).write_bytes((data / name).read_bytes())
    (tmp_path / "input" / "linked").symlink_to(secret, target_is_directory=True)
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "my_clips", ([str(disk)], set()))
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "odd", ("/", set()))
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "custom_nodes", ([str(packs)], set()))
    validate, fingerprint = dataset_node.cls.validate_inputs, dataset_node.cls.fingerprint_inputs
    outside = [
        str(secret),
        str(secret / "a.mp4"),
        str(tmp_path / "nothing"),
        str(packs),
        str(packs / "a.mp4"),
        "linked",
        "linked/nothing",
        "../secret",
        "../nothing",
        "/",
        "~",
        "~nobody-of-this-name",
        str(tmp_path),
    ]
    for name in (str(secret), "linked", "../secret", str(disk)):
        assert validate(folder=name) is True, "on this machine alone"
    listening()
    words = {validate(folder=name) for name in outside}
    assert len(words) == 1 and words.pop().startswith(
        "`folder` is outside the folders that this server may read. Because it accepts"
    )
    assert {fingerprint(folder=name) for name in outside} == {""}
    with pytest.raises(ValueError, match="is outside the folders that this server may read"):
        dataset_node(vae, clip, folder=str(secret))
    for name in ("clips", str(data), str(disk), str(tmp_path / "output" / "clips")):
        assert validate(folder=name) is True and fingerprint(folder=name)
    assert "does not exist" in validate(folder="nowhere"), "inside, errors say what is wrong"
    assert len(dataset_node(vae, clip).result[0]) == 2


def test_a_real_server_that_listens_to_others_answers_their_requests_so(pack, tmp_path):
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "a.mp4").write_bytes(b"")

    def refusals(server, folder):
        values = {"folder": folder, "width": 64, "height": 48, "frames": 5, "fps": 16, "buckets": True}
        with pytest.raises(urllib.error.HTTPError) as refused:
            server.request("/prompt", {"prompt": {"1": {"class_type": "DCMVideoDataset", "inputs": values}}})
        errors = json.loads(refused.value.read())["node_errors"]["1"]["errors"]
        return [error["details"] for error in errors if error["type"] == "custom_validation_failed"]

    with start_server(tmp_path / "server", "--listen", "0.0.0.0") as server:
        real, absent = (refusals(server, str(tmp_path / name)) for name in ("secret", "nothing"))
        assert real == absent and "is outside the folders that this server may read" in real[0]
        assert "does not exist" in refusals(server, "nothing")[0], "in the input folder"


def test_a_list_does_not_lead_out_of_these_folders(dataset_node, vae, clip, data, tmp_path, listening):
    secret = tmp_path / "secret.mp4"
    secret.write_bytes((data / "a.mp4").read_bytes())
    names = ["a.mp4", str(secret), "../../secret.mp4", str(tmp_path / "nothing.mp4"), "gone.mp4"]
    (data / "list.jsonl").write_text("\n".join(json.dumps({"video": name, "caption": "x"}) for name in names))
    assert len(dataset_node(vae, clip, folder="clips/list.jsonl").result[0]) == 3, "on this machine alone"
    listening()
    lines = text(dataset_node(vae, clip, folder="clips/list.jsonl")).split("\n")
    left_out = [line.removeprefix("left out ") for line in lines if line.startswith("left out")]
    where = "is outside the folders that this server may read. Move it to the input folder."
    outside = [f"{name}.mp4: {where}" for name in ("secret", "secret", "nothing")]
    assert left_out == [*outside, "gone.mp4: does not exist. Check the name."]


def test_what_cannot_be_read_has_a_fingerprint_all_the_same(dataset_node, data):
    """An error there ends the worker of 0.3.75."""
    (data / "broken.jsonl").write_text("{")
    for folder in ("nowhere", " ", "clips/broken.jsonl", "a\0b", "x" * 5000, "\ud800", "~nobody-of-this-name"):
        assert dataset_node.cls.fingerprint_inputs(folder=folder) == ""
        assert isinstance(dataset_node.cls.validate_inputs(folder=folder), (str, bool))


def test_the_node_says_what_everything_is(dataset_node):
    schema = dataset_node.cls.GET_SCHEMA()
    assert (schema.node_id, schema.category) == ("DCMVideoDataset", "DCM/training")
    assert schema.description and all(item.tooltip for item in [*schema.inputs, *schema.outputs])
