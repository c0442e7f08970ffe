"""The texts of the pack in each language: complete, English as in the code, and served by the host."""

import json
import re

import pytest

from .server import ROOT

LOCALES = ROOT / "locales"
HAN, KANA, HANGUL = "一-鿿", "぀-ヿ", "가-힣"
# the script of a language, the scripts it never holds, and a character set that lacks its neighbours' forms of a character
SCRIPTS = {"zh": (HAN, KANA + HANGUL, "gb2312"), "ja": (KANA, HANGUL, "cp932"), "ko": (HANGUL, HAN + KANA, "cp949")}
TRANSLATED = list(SCRIPTS)
# segments of our categories that the front end translates itself; other texts for them would change every pack's nodes
FRONT_END_CATEGORIES = {"conditioning", "loaders", "sampling", "training"}
# inputs that KSampler has, too
SHARED_INPUTS = ("model", "positive", "negative", "latent_image", "seed", "steps", "cfg", "denoise")
# Old front ends read these in a locale's text as syntax, new ones show them in tooltips: no escape serves both. A text that needs
# them stays in the code, whose texts are shown as they are where English has none.
SYNTAX = set("{}@|")
# What stays as it is in every language, beside the options that a tooltip explains.
LITERAL = re.compile(
    r"`[^`]+`"
    r"|\w+(?:/[\w.<>]*[\w>])+"  # a path
    r"|(?<!\w)\.[a-z]+"
    r"|(?<![\w.])\d+(?:\.\d+)?"
    r"|\w+_\w+"
    r"|\b\w*[A-Z]\w*[A-Z]\w*?(?=s?\b)"  # LoRA, HunyuanVideo, A14B
    r"|\b(?:Wan|Euler|fp8|diffusers|cfg|alpha|cond|auto|generic)\b"
)
TERMS = {
    "semantic expert": ("语义专家", "セマンティックエキスパート", "시맨틱 전문가"),
    "detail expert": ("细节专家", "ディテールエキスパート", "디테일 전문가"),
    "expert": ("专家", "エキスパート", "전문가"),
    "boundary": ("边界", "境界", "경계"),
    "sigma": ("Sigma", "シグマ", "시그마"),
    "noise levels": ("噪声水平", "ノイズレベル", "노이즈 레벨"),
    "high-noise": ("高噪声", "高ノイズ", "고노이즈"),
    "low-noise": ("低噪声", "低ノイズ", "저노이즈"),
    "schedule": ("调度", "スケジュール", "스케줄"),
    "shift": ("移位", "シフト", "시프트"),
    "guidance": ("引导", "ガイダンス", "가이던스"),
    "strength": ("强度", "強度", "강도"),
    "latent": ("Latent", "潜在", "잠재"),
    "checkpoint": ("Checkpoint", "チェックポイント", "체크포인트"),
    "base model": ("基础模型", "ベースモデル", "베이스 모델"),
    "family": ("模型系列", "モデルファミリー", "모델 계열"),
    "rank": ("秩", "ランク", "랭크"),
    "low-rank": ("低秩", "低ランク", "저랭크"),
    "distils": ("蒸馏", "蒸留", "증류"),
    "consistency": ("一致性", "一貫性", "일관성"),
    "temporal coherence": ("时间连贯性", "時間的コヒーレンス", "시간적 일관성"),
    "feature matching": ("特征匹配", "特徴マッチング", "특징 매칭"),
    "loss": ("损失", "損失", "손실"),
    "held-out": ("留出", "ホールドアウト", "홀드아웃"),
    "teacher": ("教师模型", "教師モデル", "교사 모델"),
    "discriminator": ("判别器", "識別器", "판별자"),
    "learning rate": ("学习率", "学習率", "학습률"),
    "optimiser": ("优化器", "オプティマイザ", "옵티마이저"),
    "text encoder": ("文本编码器", "テキストエンコーダ", "텍스트 인코더"),
    "text embeddings": ("文本嵌入", "テキスト埋め込み", "텍스트 임베딩"),
    "clips": ("片段", "クリップ", "클립"),
    "caption": ("描述文本", "キャプション", "캡션"),
}

each_language = pytest.mark.parametrize("language", ["en", *TRANSLATED])
each_translation = pytest.mark.parametrize("language", TRANSLATED)


def read(language, name):
    return json.loads((LOCALES / language / f"{name}.json").read_text(encoding="utf-8"))


def flat(tree, path=()):
    """Path of keys -> text, in the order of the file."""
    if not isinstance(tree, dict):
        return {path: tree}
    return {key: text for name, branch in tree.items() for key, text in flat(branch, (*path, name)).items()}


def slots(items):
    return {key: {"name": item.display_name or item.id, "tooltip": item.tooltip} for key, item in items}


@pytest.fixture(scope="module")
def schemas(node):
    return {name: cls.GET_SCHEMA() for name, cls in node.classes.items()}


@pytest.fixture(scope="module")
def english(schemas):
    """What the code says, in the form of a locale."""
    return flat(
        {
            name: {
                "display_name": schema.display_name,
                "description": schema.description,
                "inputs": slots((item.id, item) for item in schema.inputs),
                "outputs": slots((str(number), item) for number, item in enumerate(schema.outputs)),
            }
            for name, schema in schemas.items()
        }
    )


@pytest.fixture
def pairs(english, language):
    """Path -> English text, translation."""
    translation = flat(read(language, "nodeDefs"))
    return {path: (text, translation[path]) for path, text in english.items()}


def short(name):
    """A node's name as texts call it, without the words in brackets that it is found by."""
    return name.split(" (")[0]


def sentences(pairs):
    return {path: pair for path, pair in pairs.items() if path[-1] in ("description", "tooltip")}


def test_the_languages():
    assert {path.name for path in LOCALES.iterdir()} == {"en", *TRANSLATED}


@each_language
@pytest.mark.parametrize("name", ["main", "nodeDefs"])
def test_files_are_plain_utf_8(language, name):
    """Written in one way: no escapes, and no key twice."""
    expected = json.dumps(read(language, name), ensure_ascii=False, indent=2) + "\n"
    assert (LOCALES / language / f"{name}.json").read_bytes().decode("utf-8") == expected
    assert {path.name for path in (LOCALES / language).iterdir()} == {"main.json", "nodeDefs.json"}


def test_english_is_what_the_code_says(english):
    assert list(flat(read("en", "nodeDefs")).items()) == [item for item in english.items() if not SYNTAX & set(item[1])]


@each_language
@pytest.mark.parametrize("side", ["semantic", "detail"])
def test_training_settings_are_explained_in_every_language(language, side, module, schemas):
    """In English by the setting's own help, which the command line's documentation has, too."""
    config, name = module("dcm_core.distill.config"), f"DCMTrain{side.capitalize()}Expert"
    inputs = read(language, "nodeDefs")[name]["inputs"]
    assert {item.id for item in schemas[name].inputs} & config.SETTINGS.keys() <= inputs.keys()
    for name in config.SETTINGS.keys() & inputs.keys():
        assert (inputs[name]["tooltip"] == config.SETTINGS[name].help_for(side)) == (language == "en"), name


@each_translation
def test_every_text_is_translated_and_no_other(language, english):
    assert list(flat(read(language, "nodeDefs"))) == list(english)


@each_language
def test_no_text_is_syntax_to_the_front_end(language):
    texts = {**flat(read(language, "nodeDefs")), **flat(read(language, "main"))}
    assert {path: text for path, text in texts.items() if SYNTAX & set(text)} == {}


@each_translation
def test_sentences_are_in_the_script_of_the_language(language, pairs):
    own, foreign, charset = SCRIPTS[language]
    for path, (text, translated) in sentences(pairs).items():
        assert translated != text and re.search(f"[{own}]", translated), path
    for path, (_, translated) in pairs.items():
        assert translated and translated == translated.strip(), path
        assert not re.search(f"[{foreign}]", translated), path
        assert translated.encode(charset, "replace").decode(charset) == translated, path


@each_translation
def test_display_names_keep_their_prefix_and_tell_nodes_apart(language, pairs):
    names = [short(translated) for path, (_, translated) in pairs.items() if path[-1] == "display_name"]
    assert len(names) == len(set(names))
    assert [name for name in names if not name.startswith("DCM ")] == []


@each_translation
def test_inputs_and_outputs_of_a_node_have_names_of_their_own(language):
    for name, texts in read(language, "nodeDefs").items():
        for side in ("inputs", "outputs"):
            names = [slot["name"] for slot in texts.get(side, {}).values()]
            assert len(names) == len(set(names)), (name, side)


@each_translation
def test_what_no_language_translates_is_kept(language, pairs, schemas):
    """An input that is named in a text is named as the reader sees it."""
    for path, (text, translated) in sentences(pairs).items():
        literals = set(LITERAL.findall(text))
        inputs = {item.id: item for item in schemas[path[0]].inputs}
        if path[1] == "inputs":
            options = getattr(inputs[path[2]], "options", None) or []
            literals |= {option for option in options if re.search(rf"(?<!\w){re.escape(option)}(?!\w)", text)}
        for literal in literals:
            shown = pairs[path[0], "inputs", literal, "name"][1] if "_" in literal and literal in inputs else literal
            assert shown in translated, path


@each_translation
def test_nodes_are_named_as_the_reader_sees_them(language, pairs):
    names = {short(text): short(translated) for path, (text, translated) in pairs.items() if path[-1] == "display_name"}
    named = [
        (path, name)
        for path, (text, _) in sentences(pairs).items()
        for name in names
        if re.search(rf"\b{name}\b", text)
    ]
    assert named
    assert [(path, name) for path, name in named if names[name] not in pairs[path][1]] == []


@each_translation
def test_terms_are_the_same_everywhere(language, pairs):
    number = TRANSLATED.index(language)
    used = set()
    for path, (text, translated) in pairs.items():
        for term, words in TERMS.items():
            if re.search(rf"\b{term}s?\b", text.replace("_", " "), re.IGNORECASE):
                used.add(term)
                assert words[number] in translated, (path, term)
    assert used == set(TERMS)


@each_translation
def test_the_same_sentence_is_translated_once(language, pairs):
    translations = {}
    for text, translated in sentences(pairs).values():
        translations.setdefault(text, set()).add(translated)
    assert {text: found for text, found in translations.items() if len(found) > 1} == {}


@each_translation
def test_inputs_of_ksampler_are_called_as_the_front_end_calls_them(language):
    front_end = pytest.importorskip(
        "comfyui_frontend_package", reason="the host's front end is not installed as a package"
    )
    sampler = read(language, "nodeDefs")["DCMSampler"]["inputs"]
    patterns = [rf"""\b{name}:\{{name:["`]{re.escape(sampler[name]["name"])}["`]""" for name in SHARED_INPUTS]
    files = [path for folder in front_end.__path__ for path in (ROOT / folder).glob("static/assets/nodeDefs-*.js")]
    texts = [path.read_text(encoding="utf-8") for path in files]
    assert any(all(re.search(pattern, text) for pattern in patterns) for text in texts)


@each_language
def test_categories_have_a_name(language, schemas):
    segments = {segment for schema in schemas.values() for segment in schema.category.split("/")}
    texts = read(language, "main")
    assert set(texts) == {"nodeCategories"}
    assert set(texts["nodeCategories"]) == segments - FRONT_END_CATEGORIES
    for segment, text in texts["nodeCategories"].items():
        assert (text == segment) == (language == "en" or segment == "DCM"), segment


def test_the_host_serves_them(server):
    served = server.request("/i18n")
    for language in ("en", *TRANSLATED):
        assert served[language] == {**read(language, "main"), "nodeDefs": read(language, "nodeDefs")}
