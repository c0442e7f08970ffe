"""Numbers and their nouns, in texts at hand for one of everything."""

import re
from pathlib import Path

import pytest
import torch

from dcm_core.convert import Conversion
from dcm_core.distill.data.dataset import TensorDataset
from dcm_core.errors import DCMError, ScheduleError, counted
from dcm_core.extract import Extraction, LayerReport
from dcm_core.files.conditioning import describe_conditioning
from dcm_core.inspection.magnitude import Profile
from dcm_core.schedule import check_sigmas


def test_a_number_gives_its_noun_the_form():
    assert [counted(number, "step") for number in (0, 1, 2)] == ["0 steps", "1 step", "2 steps"]
    assert [counted(number, "patch", "patches") for number in (1, 3)] == ["1 patch", "3 patches"]
    assert [counted(number, "tensor is", "tensors are") for number in (1, 2)] == ["1 tensor is", "2 tensors are"]


def said(refused, *args):
    with pytest.raises(DCMError) as error:
        refused(*args)
    return str(error.value)


def one_latent():
    data = TensorDataset([torch.zeros(16, 1, 2, 2)], [[[torch.zeros(1, 1, 8), {}]]], [0], [[torch.zeros(1, 1, 8), {}]])
    return said(data.split, 1, 0)


def test_one_of_everything_is_said_in_the_singular():
    texts = [
        describe_conditioning([[torch.zeros(1, 1, 8), {}]]),
        str(Conversion("Wan 2.1", Path("base"), 1, None, "")),
        str(Extraction(Path("x"), {"a": LayerReport(1, 1.0, 1.0)}, ("b",), 1)),
        "; ".join(filter(None, Profile({}, {}, True, {"a": ("in", 0)}, ("b",)).summary().values())),
        said(check_sigmas, torch.tensor([[1.0, 0.0]])),
        one_latent(),
    ]
    for text in texts:
        assert re.search(r"\b1 [a-z]", text), text
        assert not re.search(r"\b1 (?:[a-z-]+ )?[a-z]+s\b(?<!is)(?<!unless)(?<!has)", text), text


def test_none_and_many_are_said_in_the_plural():
    with pytest.raises(ScheduleError, match="have 0 steps"):
        check_sigmas(torch.tensor([1.0]))
    assert describe_conditioning([[torch.zeros(1, 2, 8), {}]] * 3).startswith("3 prompts, 2 tokens of")
