"""Training data in one file."""

import weakref

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dcm_core.distill.data_file import read_data, write_data
from dcm_core.distill.dataset import TensorData
from dcm_core.errors import DCMError


def text(seed, **extras):
    return [[torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(seed)).bfloat16(), extras]]


@pytest.fixture
def data():
    latents = [torch.full((2, 1, 2, 2), float(value)) for value in range(4)]
    texts = [text(0, pooled_output=torch.ones(1, 4).bfloat16(), guidance=6.0), text(1), text(1)]
    return TensorData(latents, texts, [0, 1, 2, 0], text(9))


def test_what_is_written_comes_back(data, tmp_path):
    write_data(tmp_path / "data.safetensors", data)
    back = read_data(tmp_path / "data.safetensors")
    assert len(back) == 4 and back.buckets == data.buckets
    for index in range(4):
        assert torch.equal(back.latent(index).float(), data.latent(index))
        (context, extras), (wanted, wanted_extras) = back.conditioning(index)[0], data.conditioning(index)[0]
        assert torch.equal(context, wanted) and set(extras) == set(wanted_extras)
    assert back.conditioning(0)[0][1]["guidance"] == 6.0
    assert torch.equal(back.unconditional()[0][0], data.unconditional()[0][0])


class Fresh(TensorData):
    """Data that is made when it is asked for; `most` is how many latents were there at once."""

    most = 0

    def latent(self, index):
        latent = super().latent(index).clone()
        self.alive = [one for one in getattr(self, "alive", []) if one() is not None] + [weakref.ref(latent)]
        self.most = max(self.most, len(self.alive))
        return latent


def test_no_more_than_a_clip_is_held(data, tmp_path):
    fresh = Fresh([data.latent(0).bfloat16()] * 8, [text(1)], [0] * 8, text(9))
    write_data(tmp_path / "data.safetensors", fresh)
    assert 1 <= fresh.most <= 2
    back = read_data(tmp_path / "data.safetensors")
    assert len({back.latent(index).untyped_storage().data_ptr() for index in range(8)}) == 1, "views of one mapped file"


def test_equal_texts_are_written_once(data, tmp_path):
    write_data(tmp_path / "data.safetensors", data)
    with safe_open(tmp_path / "data.safetensors", "pt") as file:
        assert len([key for key in list(file.keys()) if key.endswith(".context")]) == 3


def test_other_and_damaged_files_are_refused(data, tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(DCMError, match=r"holds no training data\. Choose a file that DCM Save Dataset wrote"):
        read_data(tmp_path / "other.safetensors")
    save_file({"latent.0": torch.zeros(1)}, tmp_path / "damaged.safetensors", {"format": "dcm-dataset", "facts": "{}"})
    with pytest.raises(DCMError, match="damaged data file"):
        read_data(tmp_path / "damaged.safetensors")


def test_texts_of_the_same_tokens_in_another_order_are_two(data, tmp_path):
    tokens = text(3)[0][0]
    both = TensorData([data.latent(0)] * 2, [[[tokens, {}]], [[tokens.flip(1), {}]]], [0, 1], text(9))
    write_data(tmp_path / "data.safetensors", both)
    back = read_data(tmp_path / "data.safetensors")
    assert torch.equal(back.conditioning(1)[0][0], tokens.flip(1)) and torch.equal(back.conditioning(0)[0][0], tokens)


def test_progress_tells_every_clip_and_can_interrupt(data, tmp_path):
    told = []
    write_data(tmp_path / "data.safetensors", data, progress=lambda *done: told.append(done))
    read_data(tmp_path / "data.safetensors", lambda *done: told.append(done))
    assert told == 2 * [(1, 4), (2, 4), (3, 4), (4, 4)]

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_data(tmp_path / "other.safetensors", data, progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["data.safetensors"]
