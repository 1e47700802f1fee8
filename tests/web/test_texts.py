"""Help and translations: everything that the nodes show is explained, and nothing that is gone."""

import json
import re
from pathlib import Path

import pytest

from cascade_nodes.nodes.extension import NODES
from cascade_nodes.nodes.hosts.notices import SENTENCES
from cascade_nodes.tests.web.examples import TITLES, canvas_file
from cascade_nodes.tests.web.examples import read as read_graph
from cascade_nodes.tests.web.formats import NOTES
from cascade_nodes.tests.web.help_copies import TRADITIONAL, copies
from cascade_nodes.tests.web.sentences import sentences, words

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "web" / "docs"
INFO = {info["name"]: info for info in (node.GET_NODE_INFO_V1() for node in NODES)}
LANGUAGES = ("en", "ja", "zh")
HEADINGS = {
    "en": ["Inputs", "Outputs", "Typical values", "Errors"],
    "ja": ["入力", "出力", "よく使う値", "エラー"],
    "zh": ["输入", "输出", "常用值", "错误"],
}
# What pages show in bold beside the names of the pack's nodes, inputs and outputs: a key, and nodes of ComfyUI.
OTHER_TERMS = {
    "en": {"R", "KSampler", "SamplerCustomAdvanced", "Apply ControlNet"},
    "ja": {"R", "KSampler", "SamplerCustomAdvanced"},
    "zh": {"R", "K采样器", "自定义采样器（高级）"},
}
PRESETS = json.loads((ROOT / "web" / "presets.json").read_text(encoding="utf-8"))
SCRIPTS = {"ja": r"[\u3040-\u30ff]", "zh": r"[\u4e00-\u9fff]"}  # kana, Chinese characters


def read(language, name):
    return json.loads((ROOT / "locales" / language / name).read_text(encoding="utf-8"))


TRANSLATIONS = {
    path.stem: json.loads(path.read_text(encoding="utf-8"))
    for path in sorted((ROOT / "web" / "sentences").iterdir())
}
NODE_TEXTS = {language: read(language, "nodeDefs.json") for language in LANGUAGES}
MAIN = {language: read(language, "main.json") for language in LANGUAGES}


def inputs_of(info):
    return {
        name: entry
        for kind in ("required", "optional")
        for name, entry in info["input"].get(kind, {}).items()
    }


def english(info):
    """The texts that the schema itself has, in the form of nodeDefs.json."""
    outputs = zip(info["output_name"], info["output_tooltips"], strict=True)
    return {
        "display_name": info["display_name"],
        "description": info["description"],
        "inputs": {
            name: {"name": name, "tooltip": options["tooltip"]}
            for name, (_, options) in inputs_of(info).items()
        },
        "outputs": {
            str(slot): {"name": name, "tooltip": tooltip} for slot, (name, tooltip) in enumerate(outputs)
        },
    }


def leaves(texts, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], str]:
    """{path: text}"""
    if isinstance(texts, str):
        return {path: texts}
    return {leaf: text for key, part in texts.items() for leaf, text in leaves(part, (*path, key)).items()}


def test_english_is_what_the_nodes_say():
    assert NODE_TEXTS["en"] == {name: english(info) for name, info in INFO.items()}


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("texts", [NODE_TEXTS, MAIN], ids=["nodes", "panels"])
def test_translations_have_the_same_entries(texts, language):
    assert leaves(texts[language]).keys() == leaves(texts["en"]).keys()
    assert all(text.strip() for text in leaves(texts[language]).values())


@pytest.mark.parametrize("language", ["ja", "zh"])
def test_sentences_are_translated(language):
    for path, text in leaves(NODE_TEXTS[language]).items():
        if path[-1] in ("tooltip", "description") and not re.fullmatch(r"Stage [ABC] ?[。.]", text):
            assert re.search(SCRIPTS[language], text), f"{language} {'.'.join(path)}: {text}"


@pytest.mark.parametrize("language", LANGUAGES)
def test_texts_hold_no_syntax_of_the_interface(language):
    """vue-i18n, through which they are shown, takes these characters for its own."""
    for path, text in leaves(NODE_TEXTS[language]).items():
        assert not re.search(r"[@|{}]", text), f"{language} {'.'.join(path)}: {text}"


@pytest.mark.parametrize("language", LANGUAGES)
def test_panels_fill_the_same_places(language):
    for path, text in leaves(MAIN["en"]).items():
        translated = leaves(MAIN[language])[path]
        assert set(re.findall(r"{\w+}", translated)) == set(re.findall(r"{\w+}", text)), path


def test_panels_say_only_what_the_locales_have():
    scripts = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "web").glob("*.js"))
    used_keys = set(re.findall(rf'"((?:{"|".join(MAIN["en"]["cascadeNodes"])})\.\w+)"', scripts))
    verdicts = re.search(r'@typedef \{("trained".+?)\} Verdict', scripts)
    assert verdicts
    used_keys |= {f"size.{name}" for name in re.findall(r'"(\w+)"', verdicts.group(1))}
    used_keys |= {f"preset.{name}" for name in PRESETS} | {f"notice.{name}" for name in SENTENCES}
    locale_keys = {f"{group}.{name}" for group, texts in MAIN["en"]["cascadeNodes"].items() for name in texts}
    assert used_keys == {key for key in locale_keys if not key.startswith(("search.", "example."))}


def test_the_texts_of_the_examples_are_translated():
    texts = set(TITLES.values())
    for graph in (read_graph(canvas_file(name)) for name in TITLES):
        texts |= {group["title"] for group in graph["groups"]}
        texts |= {node["widgets_values"][0] for node in graph["nodes"] if node["type"] in NOTES}
    for language in LANGUAGES:
        translations = MAIN[language]["cascadeNodes"]["example"]
        assert len(set(translations.values())) == len(translations)  # so that each leads back to its English
    assert set(MAIN["en"]["cascadeNodes"]["example"].values()) == texts


def test_notices_are_in_english_what_the_server_says():
    assert MAIN["en"]["cascadeNodes"]["notice"] == SENTENCES


@pytest.mark.parametrize("language", TRANSLATIONS)
def test_what_nodes_say_is_translated(language):
    tables = TRANSLATIONS[language]
    untranslated = sentences() - tables["sentences"].keys()
    assert untranslated == set(), "run python -m cascade_nodes.tests.web.sentences"
    for name, table in tables.items():
        assert table.keys() == TRANSLATIONS["ja"][name].keys()
        for text, translation in table.items():
            places = {int(place) for place in re.findall(r"{(\w+)}", translation)}
            assert places <= set(range(1, 1 + text.count("{}"))), text
            assert name != "sentences" or re.search(SCRIPTS[language], translation), text


def test_no_translation_is_of_what_nobody_says():
    said = words()
    keys = [key for table in TRANSLATIONS["ja"].values() for key in table]
    assert [key for key in keys for piece in key.split("{}") if piece.strip(" .,;:()") not in said] == []


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_sets_the_same_of_both_samplers_and_values_that_they_have(preset):
    for name, values in PRESETS[preset].items():
        assert values.keys() == {"steps", "cfg", "cfg_rescale", "shift", "sampler"}
        for setting, value in values.items():
            kind, options = inputs_of(INFO[name])[setting]
            if kind == "COMBO":
                assert value in options["options"]
            else:
                assert options["min"] <= value <= options["max"]
            if preset == "published":
                assert value == options["default"]
    assert PRESETS[preset].keys() == {"CascadePriorSampler", "CascadeDecoderSampler"}


def words_of(text: str) -> list[str]:
    """The words of a label, without what stands between them."""
    return re.findall(r"[^\s/,:()]+", text)


@pytest.mark.parametrize("language", LANGUAGES)
def test_words_to_search_for_keep_the_name_of_the_node(language):
    labels = MAIN[language]["cascadeNodes"]["search"]
    assert labels.keys() == MAIN["en"]["cascadeNodes"]["search"].keys()
    assert labels.keys() < INFO.keys()
    assert all("{name}" in label for label in labels.values())
    for node, label in labels.items():
        name = NODE_TEXTS[language][node]["display_name"].lower()
        text = label.lower().replace("{name}", name)
        # 0.3.64 looks for each word by itself: as far as here, or for all of them in the id.
        words = {"name": words_of(name), "label": words_of(label.lower().replace("{name}", ""))}
        if all(word in node.lower() for word in words["name"]):
            del words["name"]
        assert all(text.find(word) < 30 for one in words.values() for word in one), text


def test_help_is_there_for_every_node_and_no_other():
    assert {path.name for path in DOCS.iterdir()} == {*INFO, *(f"{name}.md" for name in INFO)}
    languages = {*LANGUAGES, TRADITIONAL}
    for name in INFO:
        assert {path.name for path in (DOCS / name).iterdir()} == {f"{language}.md" for language in languages}
    for page, copy in copies():
        assert copy.read_text(encoding="utf-8") == page.read_text(encoding="utf-8"), (
            "run python -m cascade_nodes.tests.web.help_copies"
        )


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("name", INFO)
def test_help_explains_the_node_as_it_is(name, language):
    text = (DOCS / name / f"{language}.md").read_text(encoding="utf-8")
    names = NODE_TEXTS[language][name]
    title, *sections = re.split(r"^## ", text, flags=re.MULTILINE)
    assert title.startswith(f"# {names['display_name']}\n\n")
    assert len(title.split("\n\n", 1)[1].strip()) > (40 if language == "zh" else 60)
    assert [section.splitlines()[0] for section in sections] == HEADINGS[language]
    for kind, section in zip(("inputs", "outputs"), sections[:2], strict=True):
        rows = re.findall(r"^\| \*\*(.+?)\*\* \| (.+) \|$", section, flags=re.MULTILINE)
        assert rows == [(entry["name"], entry["tooltip"]) for entry in names[kind].values()]
    for section in sections[2:]:
        assert re.search(r"^- ", section, flags=re.MULTILINE)


def items(name, language):
    """The list items of a help page, section by section."""
    text = (DOCS / name / f"{language}.md").read_text(encoding="utf-8")
    sections = re.split(r"^## ", text, flags=re.MULTILINE)[3:]
    return [re.findall(r"^- (.+)$", section, flags=re.MULTILINE) for section in sections]


def introduction(name, language):
    """How many paragraphs a help page begins with, and the examples that they name."""
    text = (DOCS / name / f"{language}.md").read_text(encoding="utf-8").split("\n## ")[0]
    return text.strip().count("\n\n"), re.findall(r"`\w+`", text)


@pytest.mark.parametrize("language", ["ja", "zh"])
@pytest.mark.parametrize("name", INFO)
def test_help_says_as_much_in_every_language(name, language):
    """The same paragraphs before the tables, values and errors, which are quoted as they are shown, in English."""
    assert introduction(name, language) == introduction(name, "en")
    values, errors = items(name, language)
    english_values, english_errors = items(name, "en")
    assert len(values) == len(english_values)
    quoted = [[re.findall(r"^\*(.+?)\*", error) for error in page] for page in (errors, english_errors)]
    assert quoted[0] == quoted[1]
    assert all(re.search(SCRIPTS[language], item) for item in values + errors)


@pytest.mark.parametrize("language", LANGUAGES)
def test_help_calls_things_as_the_interface_does(language):
    terms = {
        text for path, text in leaves(NODE_TEXTS[language]).items() if path[-1] in ("name", "display_name")
    }
    for name in INFO:
        text = (DOCS / name / f"{language}.md").read_text(encoding="utf-8")
        assert set(re.findall(r"\*\*(.+?)\*\*", text)) <= terms | OTHER_TERMS[language], name
