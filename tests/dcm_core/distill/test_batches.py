"""A batch follows from seed, step and place alone, however its videos are put together."""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dcm_core.distill.backbone import Text
from dcm_core.distill.batches import Batches, Video, generator_of, make_batch, stacked, text_of
from dcm_core.distill.config import TrainingConfig, TrainingError
from dcm_core.distill.data.dataset import TensorDataset
from dcm_core.distill.method.phases import Phases
from dcm_core.distill.parallel import Processes
from dcm_core.families import HUNYUAN_VIDEO, WAN

PHASES = Phases("semantic", 0.8, shift=5.0)
CPU = torch.device("cpu")
places = st.tuples(st.integers(0, 10), st.integers(0, 10_000), st.integers(0, 64))


def make_videos(count, words=3, height=2):
    text = Text(torch.zeros(1, words, 4))
    return [
        Video(torch.full((2, 3, height, 2), float(place)), text, text, generator_of(1, 7, place))
        for place in range(count)
    ]


@given(places, places)
def test_each_place_has_its_own_randomness(one, other):
    drawn = [torch.rand(4, generator=generator_of(*place)).tolist() for place in (one, one, other)]
    assert drawn[0] == drawn[1]
    assert (drawn[0] == drawn[2]) == (one == other)


def test_neighbouring_steps_and_elements_share_no_randomness():
    drawn = {
        tuple(torch.rand(4, generator=generator_of(*place)).tolist())
        for place in itertools.product(range(3), range(9), range(9))
    }
    assert len(drawn) == 3 * 9 * 9


def test_a_batch_is_its_videos_one_by_one():
    together = make_batch(make_videos(3), PHASES, CPU)
    apart = [make_batch([video], PHASES, CPU) for video in make_videos(3)]
    for name in ("x0", "noise", "index", "level", "level_noise"):
        assert torch.equal(getattr(together, name), torch.cat([getattr(batch, name) for batch in apart])), name
    assert together.text.context.shape == (3, 3, 4)
    assert set(together.index.tolist()) <= set(PHASES.owned.tolist())
    assert not torch.equal(together.noise, together.level_noise)


def test_videos_of_several_kinds_are_batches_with_their_shares():
    videos = [*make_videos(2), *make_videos(1, words=5), *make_videos(1, height=4), *make_videos(1)]
    batches = list(stacked(videos, PHASES, CPU))
    assert [(tuple(batch.x0.shape), batch.text.context.shape[1], share) for batch, share in batches] == [
        ((3, 2, 3, 2, 2), 3, 0.6),
        ((1, 2, 3, 2, 2), 5, 0.2),
        ((1, 2, 3, 4, 2), 3, 0.2),
    ]


def test_images_are_batched_with_the_text():
    videos = make_videos(3)
    images = [torch.full((1, 5, 3, 2, 2), float(place)) for place in range(3)]
    seen = [torch.full((1, 2, 8), float(place)) for place in range(3)]
    videos = [
        dataclasses.replace(video, text=dataclasses.replace(video.text, concat=image, extras={"clip_fea": clip_fea}))
        for video, image, clip_fea in zip(videos, images, seen, strict=True)
    ]
    batch = make_batch(videos, PHASES, CPU)
    assert torch.equal(batch.text.concat, torch.cat(images)) and torch.equal(
        batch.text.extras["clip_fea"], torch.cat(seen)
    )
    assert batch.no_text.concat is None
    emptied = videos[1].emptied((2, 7, 4, 6))
    assert torch.equal(emptied.text.concat, torch.zeros(1, 5, 7, 4, 6)) and emptied.no_text.concat is None
    assert torch.equal(emptied.x0, torch.zeros(2, 7, 4, 6)) and emptied.text.extras == videos[1].text.extras


def batches(**settings):
    """Batches of two clips in memory: one with three captions, the other with one; the embeddings are the captions' numbers."""

    def text(value):
        return [[torch.full((1, 3, 4), float(value)), {}]]

    latents, texts = (
        [torch.full((2, 3, 2, 2), float(index)) for index in range(2)],
        [text(1), text(2), text(3), text(4)],
    )
    data = TensorDataset(latents, texts, [[0, 1, 2], 3], text(9), empty=text(0))
    config = TrainingConfig("semantic", batch_size=2, boundary=0.8, shift=5.0, **settings)
    rest = {"guidance": None, "processes": Processes(), "device": CPU, "latent_in": lambda latent: latent}
    return Batches(data, range(2), config, PHASES, WAN, **rest)


def drawn(batches, steps=200):
    """(clip, caption) of every element of these steps."""
    found = []
    for step in range(steps):
        for batch, _ in batches.of_step(step):
            found += zip(batch.x0[:, 0, 0, 0, 0].tolist(), batch.text.context[:, 0, 0].tolist(), strict=True)
    return found


def test_a_caption_is_drawn_for_each_step():
    found = drawn(batches())
    assert found == drawn(batches()) != drawn(batches(seed=1))
    assert {caption for clip, caption in found if clip == 1} == {4}
    shares = [found.count((0, caption)) / 200 for caption in (1, 2, 3)]
    assert sum(shares) == 1 and min(shares) > 0.25
    assert batches().held_out(0, 0).text.context.unique().tolist() == [1], "always the first one"


def test_captions_are_dropped_and_nothing_else_changes():
    plain, some, all_ = batches(), batches(caption_dropout=0.25), batches(caption_dropout=1.0)
    dropped = [caption == 0 for _, caption in drawn(some)]
    assert 0.2 < sum(dropped) / len(dropped) < 0.3
    assert {caption for _, caption in drawn(all_, 10)} == {0}
    for step in range(10):
        ((one, _),), ((other, _),) = plain.of_step(step), all_.of_step(step)
        for name in ("x0", "noise", "index", "level", "level_noise"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name
        assert torch.equal(one.no_text.context, other.no_text.context)
    assert all_.held_out(0, 0).text.context.unique().tolist() == [1]


def test_only_valid_tokens_of_a_text_are_taken():
    context = torch.arange(8.0).view(1, 4, 2).half()
    mask = torch.tensor([[1, 1, 0, 0]])
    text = text_of([[context, {"attention_mask": mask}]], WAN, None)
    assert torch.equal(text.context, context[:, :2].float()) and text.extras == {}


def test_what_a_family_needs_beside_the_text():
    entries = {"pooled_output": torch.ones(1, 768)}
    text = text_of([[torch.zeros(1, 4, 2), entries]], HUNYUAN_VIDEO, 6.0)
    assert torch.equal(text.extras["y"], torch.ones(1, 768)) and text.extras["guidance"].tolist() == [6.0]
    assert "guidance" not in text_of([[torch.zeros(1, 4, 2), entries]], HUNYUAN_VIDEO, None).extras
    with pytest.raises(TrainingError, match="has no pooled_output, which HunyuanVideo needs"):
        text_of([[torch.zeros(1, 4, 2), {}]], HUNYUAN_VIDEO, 6.0)
