"""Videos that the pack writes by itself."""

import av
import pytest
import torch


class Vae:
    """Decodes each latent frame to a picture of its mean."""

    def decode(self, latent):
        return latent.mean((1, 3, 4)).clamp(0, 1).view(1, -1, 1, 1, 1).expand(-1, -1, 16, 32, 3)


@pytest.mark.parametrize("fps", [16, 24])
def test_a_video_has_the_pictures_and_the_rate_it_is_given(module, tmp_path, fps):
    latent = torch.linspace(0, 1, 5).view(1, 1, 5, 1, 1).expand(1, 16, 5, 2, 4)
    path = tmp_path / "new" / "run" / "sample.mp4"
    module("nodes.host.video").save_video(Vae(), latent, fps, path)
    with av.open(str(path)) as container:
        assert container.streams.video[0].average_rate == fps
        pictures = [torch.from_numpy(frame.to_ndarray(format="rgb24")).float() for frame in container.decode(video=0)]
    assert [picture.shape for picture in pictures] == [(16, 32, 3)] * 5
    assert [picture.mean().item() / 255 for picture in pictures] == pytest.approx([0, 0.25, 0.5, 0.75, 1], abs=0.03)
