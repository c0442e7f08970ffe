"""Two models that share a trajectory: how they are told apart, and what their experts know."""

import json

import pytest
import torch

from dcm_core.errors import ExpertError
from dcm_core.files.metadata import level_entries, read_metadata
from dcm_core.pair import COUNT, fingerprint, from_entry, make_pair, to_entry, two_bases

NAMES = [f"blocks.{block}.{layer}.{param}" for block in range(8) for layer in "qkvo" for param in ("weight", "bias")]


def model(seed, changed=0.0):
    """name -> tensor; `changed` is the relative change by more training."""
    generator, other = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(16, generator=generator) for name in NAMES}
    return {name: value * (1 + changed * torch.randn(16, generator=other)) for name, value in tensors.items()}


def values(tensors):
    return fingerprint(tensors, tensors.__getitem__)


HIGH, LOW = model(1, 0.1), model(2, 0.1)
BASES = {"semantic": values(HIGH), "detail": values(LOW)}
PAIR = make_pair(BASES, 0.875, (1000.0, 500.0))


def test_a_fingerprint_has_values_of_every_bias():
    tensors = {"b.bias": torch.tensor([1.0, 2.0]), "a.bias": torch.tensor([3.0]), "a.weight": torch.tensor([9.0])}
    found = values(tensors)
    assert len(found) == COUNT and set(found) == {1.0, 2.0, 3.0} and found[0] == 3.0
    assert values({"a.weight": torch.ones(1)}) == ()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_half_is_recognised_in_any_precision(dtype):
    """Both were trained from one model, and differ by a tenth."""
    for side, tensors in (("semantic", HIGH), ("detail", LOW)):
        assert PAIR.side_of(values({name: value.to(dtype).float() for name, value in tensors.items()})) == side


def test_a_half_that_was_trained_further_is_recognised():
    more = {name: value * (1 + 0.02 * torch.randn(16)) for name, value in HIGH.items()}
    assert PAIR.side_of(values(more)) == "semantic"


def test_another_model_is_neither():
    assert PAIR.side_of(values(model(3, 0.1))) is None
    assert PAIR.side_of(values(HIGH)[:-1]) is None


def test_experts_belong_together_by_models_and_noise_levels():
    assert make_pair(BASES, 0.875, [1000.0, 500.0]) == PAIR
    swapped = {"semantic": BASES["detail"], "detail": BASES["semantic"]}
    others = [
        make_pair(swapped, 0.875, (1000.0, 500.0)),
        make_pair(BASES, 0.9, (1000.0, 500.0)),
        make_pair(BASES, 0.875, (1000.0, 400.0)),
    ]
    assert len({PAIR.id, *(other.id for other in others)}) == 4


def test_one_model_twice_is_refused():
    assert two_bases(*BASES.values()) == BASES
    with pytest.raises(ExpertError, match=r"have the same weights; expected two different models"):
        two_bases(BASES["semantic"], BASES["semantic"])


def test_a_pair_comes_back_from_metadata():
    metadata = level_entries(0.875, (1000.0, 500.0), PAIR)
    assert read_metadata(metadata).pair == PAIR and len(metadata["dcm.pair"]) < 5000
    assert read_metadata(level_entries(0.875, None)).pair is None


@pytest.mark.parametrize(
    "change",
    [
        {"id": 5},
        {"id": ""},
        {"id": "x" * 65},
        {"semantic": "1, 2"},
        {"semantic": []},
        {"semantic": [1.0]},
        {"detail": None},
        {"detail": [float("1e300")] * COUNT},
        {"detail": ["1"] * COUNT},
        {"semantic": [0.0] * 2000, "detail": [1.0] * 2000},
        {"semantic": [0.0] * COUNT, "detail": [0.0] * COUNT},
    ],
)
def test_a_damaged_entry_is_refused(change):
    entry = to_entry(PAIR) | change
    assert from_entry(entry) is None
    with pytest.raises(ExpertError, match=r"dcm\.pair = .*expected an id and a list of numbers for each of two models"):
        read_metadata({"dcm.pair": json.dumps(entry)})


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "[" * 40, "NaN"])
def test_a_text_that_is_no_pair_is_refused(text):
    with pytest.raises(ExpertError, match=r"dcm\.pair"):
        read_metadata({"dcm.pair": text})
