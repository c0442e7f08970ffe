"""What files say of themselves: typed and bounded, whatever they hold."""

import json
import re
import sys
from pathlib import Path

import peft
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from dcm_core.errors import DCMError, ExpertError
from dcm_core.files.metadata import (
    LONGEST_TEXT,
    ExpertMetadata,
    LoraSettings,
    lora_settings,
    parse_json,
    read_metadata,
    settings_beside,
)

from ..conftest import limits

ROOT = Path(__file__).parents[3]


def test_our_facts_are_read_in_one_place():
    reads = re.compile(r"""\.get\(["']dcm\.|\["dcm\.\w+"\](?! = )""")
    found = {
        path.name
        for part in ("dcm_core", "nodes")
        for path in (ROOT / part).rglob("*.py")
        if reads.search(path.read_text())
    }
    assert found == {"metadata.py"}


def test_facts_are_typed():
    found = read_metadata(
        {
            "dcm.family": "wan",
            "dcm.expert": "detail",
            "dcm.format": "1",
            "dcm.tensors": "12",
            "dcm.rank": "8",
            "dcm.alpha": "16",
            "dcm.boundary": "0.979",
            "dcm.timesteps": "[1000, 912.4]",
            "other": "x",
        }
    )
    assert found == ExpertMetadata("wan", "detail", "1", 12, 8, 16.0, 0.979, (1000.0, 912.4))
    assert read_metadata({}) == ExpertMetadata()


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("boundary", "abc", "a number between 0 and 1"),
        ("boundary", "nan", "a number between 0 and 1"),
        ("boundary", "1e999", "a number between 0 and 1"),
        ("boundary", "1.5", "a number between 0 and 1"),
        ("boundary", "0", "a number between 0 and 1"),
        ("timesteps", "5", "falling numbers"),
        ("timesteps", "[1000, 1000]", "falling numbers"),
        ("timesteps", "[2000]", "falling numbers"),
        ("timesteps", "[NaN]", "falling numbers"),
        ("timesteps", "[true]", "falling numbers"),
        ("timesteps", "[]", "falling numbers"),
        ("timesteps", '["1000"]', "falling numbers"),
        ("timesteps", "[" * 100_000, "falling numbers"),
        ("timesteps", f"[{'9' * 4000}]", "falling numbers"),
        ("expert", "both", "semantic or detail"),
        ("tensors", "-1", "a whole number"),
        ("rank", "8.0", "a whole number"),
        ("rank", "9" * 5000, "a whole number"),
        ("rank", "²", "a whole number"),
        ("alpha", "inf", "a number"),
    ],
)
def test_a_fact_that_is_none_is_named_with_what_was_expected(key, value, expected):
    with pytest.raises(ExpertError, match=rf"metadata says dcm\.{key} = '.*'; expected {expected}") as caught:
        read_metadata({f"dcm.{key}": value})
    assert len(str(caught.value)) < 400, "cut"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "thing is not valid JSON"),
        ("[NaN]", "NaN is not a number"),
        ("[" * 33 + "]" * 33, "thing is nested more than 32 levels deep"),
        ('["]",' * 33 + "0" + "]" * 33, "nested more than 32"),
        ("[" * 10**6, "nested more than 32"),
        ('{"a":' * 10**5, "nested more than 32"),
        ('"' + "x" * LONGEST_TEXT + '"', "thing has .* characters; expected at most"),
        ("9" * 10_000, "not valid JSON"),
    ],
)
def test_json_has_a_size_and_a_depth(text, message):
    with pytest.raises(ExpertError, match=message):
        parse_json(text, "thing")


def test_brackets_in_texts_are_no_depth():
    value = {"a": "[" * 500 + '"{\\'}
    assert parse_json(json.dumps(value), "thing") == value


@pytest.mark.parametrize(
    ("metadata", "files", "expected"),
    [
        ({}, {}, None),
        ({}, {"adapter_config.json": {"lora_alpha": 8, "r": 4}}, LoraSettings("adapter_config.json", 8, rank=4)),
        (
            {},
            {
                "lora_config.json": {
                    "step": 9,
                    "lora_params": {"lora_rank": 4, "lora_alpha": 8, "target_modules": ["q"]},
                }
            },
            LoraSettings("lora_config.json", 8, rank=4),
        ),
        ({}, {"lora_config.json": {"rank": 4, "alpha": 8}}, LoraSettings("lora_config.json", 8, rank=4)),
        (
            {},
            {"adapter_config.json": {"use_rslora": True, "lora_alpha": 8.5}},
            LoraSettings("adapter_config.json", 8.5, root=True),
        ),
        (
            {},
            {"adapter_config.json": {"lora_alpha": 8, "r": 4, "rank_pattern": {"q": 2}}},
            LoraSettings("adapter_config.json", 8),
        ),
        (
            {},
            {"adapter_config.json": {"lora_alpha": 8, "alpha_pattern": {r"^blocks\.0\.q$": 2, r".*\.k": 3, "v": 4}}},
            LoraSettings("adapter_config.json", 8, (("^blocks.0.q", 2), ("k", 3), ("v", 4))),
        ),
        (
            {},
            {"adapter_config.json": {"peft_type": "LORA"}, "lora_config.json": {"alpha": 8}},
            LoraSettings("lora_config.json", 8),
        ),
        (
            {"lora_adapter_metadata": {"transformer.lora_alpha": 8, "transformer.r": 4, "text_encoder.lora_alpha": 1}},
            {},
            LoraSettings("its metadata lora_adapter_metadata", 8, rank=4),
        ),
        ({"lora_adapter_metadata": {"lora_alpha": 8}}, {}, LoraSettings("its metadata lora_adapter_metadata", 8)),
        (
            {"lora_config": {"r": 4, "lora_alpha": 8}},
            {"adapter_config.json": {"lora_alpha": 1}},
            LoraSettings("its metadata lora_config", 8, rank=4),
        ),
        (
            {"lora_config": {"peft_type": "LORA"}},
            {"adapter_config.json": {"lora_alpha": 1}},
            LoraSettings("adapter_config.json", 1),
        ),
        ({"ss_network_alpha": "1", "ss_network_dim": "32"}, {}, None),
    ],
)
def test_what_trainers_write(tmp_path, metadata, files, expected):
    for name, values in files.items():
        (tmp_path / name).write_text(json.dumps(values))
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    path = tmp_path / "lora.safetensors"
    assert lora_settings(texts, path) == expected
    assert [file.name for file in settings_beside(path)] == list(files)


@pytest.mark.parametrize(
    ("values", "module", "rank", "scale"),
    [
        ({"alpha": 8}, "blocks.0.q", 4, 2),
        ({"alpha": 8, "root": True}, "blocks.0.q", 4, 4),
        ({"alpha": 8, "rank": 4}, "blocks.0.q", 16, None),
        ({"alpha": None}, "blocks.0.q", 4, None),
        ({"alpha": 8, "alphas": (("q", 2), ("0.q", 16))}, "blocks.0.q", 4, 0.5),
        ({"alpha": 8, "alphas": (("^q", 2), ("^blocks.0.q", 16))}, "blocks.0.q", 4, 4),
        ({"alpha": 8, "alphas": (("q", 2),)}, "blocks.0.xq", 4, 2),
    ],
)
def test_the_scale_of_a_layer(values, module, rank, scale):
    assert LoraSettings("x", **values).scale(module, rank) == scale


LAYERS = ("blocks.0.q", "blocks.1.q", "blocks.1.xq", "out")


@given(
    rank=st.integers(1, 9),
    alpha=st.integers(1, 9) | st.floats(0.5, 9),
    ranks=st.dictionaries(st.sampled_from(["q", "^out", "1.q", "blocks.0.q", "^q"]), st.integers(1, 9), max_size=3),
    alphas=st.dictionaries(st.sampled_from(["q", "^out", "1.q", "blocks.0.q", "^q"]), st.integers(1, 9), max_size=3),
    root=st.booleans(),
    bias=st.booleans(),
)
@settings(suppress_health_check=list(HealthCheck), deadline=None)
def test_the_scale_that_peft_itself_gives_each_layer(tmp_path, rank, alpha, ranks, alphas, root, bias):
    """A configuration that PEFT wrote, read here and made into layers there."""
    model = nn.Module()
    for name in LAYERS:
        parent = model
        for part in name.split(".")[:-1]:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        parent.add_module(name.split(".")[-1], nn.Linear(2, 2))
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        rank_pattern=ranks,
        alpha_pattern=alphas,
        use_rslora=root,
        lora_bias=bias,
        target_modules=list(LAYERS),
    )
    config.save_pretrained(tmp_path)
    # as PEFT finds it in the file, whose entries are in another order
    peft.inject_adapter_in_model(peft.LoraConfig.from_pretrained(str(tmp_path)), model)
    found = lora_settings({}, tmp_path / "adapter_model.safetensors")
    for name in LAYERS:
        layer = model.get_submodule(name)
        own = layer.lora_A["default"].weight.shape[0]
        assert found.scale(name, own) == pytest.approx(layer.scaling["default"], rel=1e-6)
        assert found.scale(name, own + 1) is None, "the settings of another file"


def test_a_rank_for_a_regular_expression_is_not_looked_into(tmp_path):
    peft.LoraConfig(r=4, lora_alpha=8, rank_pattern={"blocks.(0|1).q": 2}).save_pretrained(tmp_path)
    found = lora_settings({}, tmp_path / "adapter_model.safetensors")
    assert [found.scale("blocks.0.q", rank) for rank in (2, 4)] == [4, 2]


def test_metadata_of_diffusers_are_read_in_the_same_way():
    config = peft.LoraConfig(r=4, lora_alpha=6, use_rslora=True).to_dict()
    text = json.dumps({f"transformer.{name}": value for name, value in config.items()})
    assert lora_settings({"lora_adapter_metadata": text}).scale("q", 4) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "says that the LoRA is DoRA, which cannot be switched during sampling"),
        ({"layer_replication": [[0, 2]]}, "is made for replicated layers, which cannot"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights = 'pissa_niter_4': .*the base that was changed"),
        ({"init_lora_weights": "olora"}, "path_initial_model_for_weight_conversion"),
        ({"peft_type": "LOKR"}, "is for the method 'LOKR'. Experts use plain LoRA"),
        ({"task_type": "PAINTING"}, "adapter_config.json is not a LoRA configuration of PEFT .*PAINTING"),
        ({"target_modules": [[]]}, "is not a LoRA configuration of PEFT"),
        ({"r": "4"}, "r is '4'; expected a number"),
        ({"rank_pattern": [4]}, "rank_pattern is .*expected at most"),
        ({"alpha_pattern": {"(a+)+b": 1}}, "a regular expression"),
    ],
)
def test_peft_settings_that_make_no_expert_are_named(tmp_path, settings, message):
    values = {"peft_type": "LORA", "r": 4, "lora_alpha": 8} | settings
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    with pytest.raises(ExpertError, match=message):
        lora_settings({}, tmp_path / "lora.safetensors")


def test_settings_of_a_newer_peft_are_read(tmp_path):
    values = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "of_next_year": True, "runtime_config": 3}
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    assert lora_settings({}, tmp_path / "lora.safetensors") == LoraSettings("adapter_config.json", 8, rank=4)


def test_without_peft_the_fix_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 8}))
    with pytest.raises(ExpertError, match=r"the package peft, which cannot be imported .*requirements\.txt"):
        lora_settings({}, tmp_path / "lora.safetensors")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "is not a table"),
        ('{"lora_alpha": "8"}', "adapter_config.json: lora_alpha is '8'; expected a number"),
        ('{"lora_alpha": 1e999}', "lora_alpha is inf; expected a number"),
        ('{"lora_alpha": true}', "lora_alpha is True; expected a number"),
        ('{"alpha_pattern": [1]}', "alpha_pattern is .*expected at most"),
        ('{"alpha_pattern": {"q": "x"}}', "q is 'x'; expected a number"),
        (
            '{"alpha_pattern": {"(a+)+b": 1}}',
            r"alpha_pattern has '\(a\+\)\+b', a regular expression; expected a plain layer name",
        ),
        ('{"alpha_pattern": {"q|k": 1}}', "a regular expression"),
        ("\udcff", "adapter_config.json beside the expert cannot be read"),
    ],
)
def test_settings_that_cannot_be_read_are_named(tmp_path, text, message):
    (tmp_path / "adapter_config.json").write_text(text, errors="surrogateescape")
    with pytest.raises(ExpertError, match=message):
        lora_settings({}, tmp_path / "lora.safetensors")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.just("LORA") | st.lists(inner) | st.dictionaries(st.text(), inner),
)
names = st.sampled_from(
    [
        "peft_type",
        "use_dora",
        "target_modules",
        "eva_config",
        "lora_alpha",
        "alpha",
        "r",
        "rank",
        "alpha_pattern",
        "rank_pattern",
        "use_rslora",
        "lora_params",
        "transformer.lora_alpha",
    ]
)
tables = st.dictionaries(
    names | st.text(max_size=9), json_values | st.dictionaries(st.text(max_size=30), st.integers() | st.floats())
)
repeated = st.builds(
    lambda part, times: part * times,
    st.sampled_from(["[", '{"a":', "9", '"\\"', "(a+)+", "-", "[],"]),
    st.sampled_from([1, 40, 200_000]),
)
texts = st.text() | json_values.map(json.dumps) | tables.map(json.dumps) | repeated
keys = st.sampled_from(
    [f"dcm.{fact}" for fact in ("family", "expert", "format", "tensors", "rank", "alpha", "boundary", "timesteps")]
)


@given(facts=st.dictionaries(keys, texts), inner=texts, beside=texts)
@settings(suppress_health_check=list(HealthCheck), max_examples=150, deadline=None)
def test_mangled_metadata_is_read_or_refused(tmp_path, facts, inner, beside):
    (tmp_path / "adapter_config.json").write_text(beside, encoding="utf-8", errors="replace")
    with limits():
        for read in (
            lambda: read_metadata(facts),
            lambda: lora_settings({"lora_adapter_metadata": inner}),
            lambda: (found := lora_settings({}, tmp_path / "x.safetensors")) and found.scale("blocks.0.self_attn.q", 4),
        ):
            try:
                read()
            except DCMError as error:
                assert len(str(error)) < 2000
