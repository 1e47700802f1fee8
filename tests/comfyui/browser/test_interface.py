"""The pack in ComfyUI's own interface, in a browser: classic canvas in each version, Nodes 2.0 in the newest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cascade_nodes.cascade_core.geometry import STAGE_C_COMPRESSION, stage_c_size, whole_size
from cascade_nodes.nodes.sizes import chosen_size
from cascade_nodes.tests.comfyui.browser import browser
from cascade_nodes.tests.comfyui.checkout import CHECKOUTS, PACK, Server
from cascade_nodes.tests.headless.record_comfyui import node
from cascade_nodes.tests.web.examples import TITLES, api_file, canvas_file, read

WORKFLOWS = {name: read(canvas_file(name)) for name in TITLES}
PRESETS = json.loads((PACK / "web" / "presets.json").read_text(encoding="utf-8"))
SUBGRAPH, DEMO_SUBGRAPH = (
    json.loads((PACK / "subgraphs" / f"{name}.json").read_text(encoding="utf-8"))
    for name in ("Stable Cascade", "Stable Cascade demo")
)
PICTURE = (1280, 720)
STEPS = {7: 3, 8: 2}  # of the two samplers in text_to_image
MODES = {"classic": False, "nodes2": True}
WORDS, ENGLISH = (
    json.loads((PACK / "locales" / language / "main.json").read_text(encoding="utf-8"))["cascadeNodes"]
    for language in ("ja", "en")
)
NAMES = json.loads((PACK / "locales" / "ja" / "nodeDefs.json").read_text(encoding="utf-8"))

LOADERS = ["StageCLoader", "StageBLoader", "CascadeCheckpointLoader"]
SAMPLERS = ["CascadePriorSampler", "CascadeDecoderSampler"]
# Of our nodes those that a word must find, where there is more than one in the list.
SOUGHT = {
    "stable cascade": [*LOADERS, *SAMPLERS, "CascadeDecode"],
    "wuerstchen": [*LOADERS, *SAMPLERS, "CascadeDecode"],
    "img2img": ["CascadeEncode", "CascadeCompressorLoader"],
    "image to image": ["CascadeEncode"],
    "unclip": ["CascadeImagePrompt", "CascadeVisionLoader"],
    "image variation": ["CascadeImagePrompt"],
    "clip vision": ["CascadeImagePrompt"],
    "text to image": ["CascadeTextEncode"],
    "mask": ["CascadeEncode", "CascadeInpaintHint", "CascadeInpaintComposite", "CascadeOutpaint"],
    "size": ["CascadeEmptyLatent", "CascadeOutpaint", "CascadeUpscaleLatent"],
    "remix": ["CascadeImagePrompt"],
}

_played: dict[tuple[str, str], dict[str, Any]] = {}


@pytest.fixture(params=MODES)
def seen(request: pytest.FixtureRequest, server: Server) -> dict[str, Any]:
    """All scenarios, played once for each version and kind of nodes."""
    lacking = browser.missing()
    if lacking:
        pytest.skip(lacking)
    mode = request.param
    key = (server.checkout.version, mode)
    if key not in _played:
        Image.new("RGB", PICTURE, "teal").save(server.base / "input" / "teal.png")
        _played[key] = browser.play(
            server.url,
            nodes2=MODES[mode],
            workflows=WORKFLOWS,
            names=searched(server, mode),
            words=list(SOUGHT),
            titles=list(TITLES.values()),
            title=TITLES["lora"],
            picture="teal.png",
            subgraph=SUBGRAPH,
            demo=DEMO_SUBGRAPH,
            served=server.checkout == CHECKOUTS[-1],  # 0.3.64 offers no subgraphs of packs
            # Another seed for each page: what is cached on the server does not run, and shows no times.
            settings=[[7, "seed", len(_played)], *([node, "steps", steps] for node, steps in STEPS.items())],
        )
    return _played[key]


def our_nodes(server: Server) -> dict[str, Any]:
    """Our part of `/object_info`."""
    everything = server.get("/object_info")
    return {name: info for name, info in everything.items() if "cascade-nodes" in info["python_module"]}


def searched(server: Server, mode: str) -> list[str]:
    """The names to search for. The search is the same in Nodes 2.0, where a few are enough to show that dropping
    works.
    """
    names = [info["display_name"] for info in our_nodes(server).values()]
    return names[:3] if MODES[mode] else names


def told(seen: dict[str, Any], scenario: str) -> dict[str, Any]:
    """What a scenario saw. Asserts that it came to its end, and that no script of the page has thrown."""
    facts = seen[scenario]
    assert "failed" not in facts, facts["failed"]
    assert facts["errors"] == []
    return facts


def last(panel: dict[str, Any], lines: int) -> list[str]:
    """The last lines of a panel, which must be visible."""
    assert panel["shown"]
    return panel["lines"][-lines:]


def test_every_node_is_found_by_search_and_dropped(seen, server, request):
    facts = told(seen, "search")
    types = {info["display_name"]: name for name, info in our_nodes(server).items()}
    names = [name for name in facts if name not in ("seconds", "errors")]
    assert names == searched(server, request.node.callspec.params["seen"])
    assert {name: facts[name] for name in names} == {name: [types[name]] for name in names}


@pytest.mark.parametrize("word", SOUGHT)
def test_a_word_that_people_look_for_finds_our_nodes(seen, server, word):
    names = {name: info["display_name"] for name, info in our_nodes(server).items()}
    listed = told(seen, "words")[word]
    missed = [name for name in SOUGHT[word] if not any(names[name] in entry for entry in listed)]
    assert missed == [], listed


@pytest.mark.parametrize("name", WORKFLOWS)
def test_the_example_loads_whole_and_makes_its_prompt(seen, name):
    facts = told(seen, "examples")[name]
    assert facts["unknown"] == []
    assert facts["count"] == len(WORKFLOWS[name]["nodes"])
    assert facts["groups"] == len(WORKFLOWS[name]["groups"])
    assert facts["prompt"] == read(api_file(name))
    for saved in WORKFLOWS[name]["nodes"]:  # the panels shift no saved value
        assert (facts["values"].get(str(saved["id"])) or []) == saved["widgets_values"]


def test_templates_are_the_packs_own_under_titles_of_their_own(seen, server):
    names = server.get("/workflow_templates")["cascade-nodes"]
    assert sorted(names) == list(TITLES.values())
    own = {template["name"] for part in server.get("/templates/index.json") for template in part["templates"]}
    assert not own & set(names)
    facts = told(seen, "templates")
    assert facts["listed"] == list(TITLES.values())  # the server's list has no order
    assert facts["count"] == len(WORKFLOWS["lora"]["nodes"])


def test_templates_have_japanese_titles(seen):
    assert told(seen, "japanese")["templates"] == [
        {"title": WORDS["example"][f"title_{name}"], "nodes": len(graph["nodes"]), "picture": True}
        for name, graph in WORKFLOWS.items()
    ]


@pytest.mark.parametrize("name", WORKFLOWS)
def test_missing_models_are_offered(seen, name):
    text = told(seen, "examples")[name]["missing"]
    offered = [model for saved in WORKFLOWS[name]["nodes"] for model in saved["properties"].get("models", [])]
    for model in offered:
        assert model["name"] in text
        assert model["directory"] in text
    assert ("Missing Models" in text) == bool(offered)


def test_the_button_makes_a_picture_that_appears_in_its_node(seen, server):
    facts = told(seen, "run")
    assert (facts["picture"]["width"], facts["picture"]["height"]) == (256, 256)
    assert "filename=cascade_" in facts["picture"]["src"]
    assert list((server.base / "output").glob("cascade_*.png"))


def test_the_samplers_show_what_the_run_took(seen):
    facts = told(seen, "run")
    assert [lines[-1] for lines in facts["before"]] == ["Not run yet"] * 2
    for steps, panel in zip(STEPS.values(), facts["after"], strict=True):
        time, memory = last(panel, 2)
        assert time.startswith(f"{steps} steps · ")
        assert " a step · " in time
        assert memory == "cpu"  # which measures no run's own memory


def steps_of(facts: dict[str, Any]) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """What a size helper showed after each step, with its judgement."""
    steps = {step["what"]: step for step in facts["steps"]}
    return steps, {name: step["lines"][step["lines"].index("⇄") + 2] for name, step in steps.items()}


def read_out(width: int, height: int, compression: float) -> str:
    """The sizes of the latents that a node makes for a picture, as a panel shows them."""
    rows, columns = stage_c_size(height, width, compression)
    return f"Stage C {columns} × {rows} · Stage B {width // 8 * 2} × {height // 8 * 2} · 1 : {compression:g}"


def check_read_out(step: dict[str, Any]) -> None:
    """Asserts that the readout says what the node will make."""
    widgets = step["widgets"]
    latents = next(line for line in step["lines"] if line.startswith("Stage C"))
    assert latents == read_out(widgets["width"], widgets["height"], widgets["compression"])


def test_the_size_helper(seen):
    facts = told(seen, "sizes")
    steps, judgement = steps_of(facts)

    def size(name):
        return steps[name]["widgets"]["width"], steps[name]["widgets"]["height"]

    assert size("new") == (1024, 1024)
    assert size("16:9") == (1344, 768)
    assert size("swapped") == (768, 1344)
    assert size("2 megapixels") == (1088, 1920)
    assert size("demo") == (256, 256)
    assert size("set by hand") == (256, 2048)
    for step in steps.values():
        check_read_out(step)
    assert judgement["new"] == judgement["16:9"] == judgement["fitted"] == "Within the trained range."
    assert judgement["2 megapixels"].startswith("Larger than trained")
    assert judgement["demo"] == "The size of the bundled demo cascade."
    assert judgement["set by hand"].startswith("Longer than trained")


def test_the_size_helper_is_in_no_saved_workflow(seen):
    facts = told(seen, "sizes")
    by_hand = facts["steps"][-1]["widgets"]
    assert facts["saved"] == list(by_hand.values())
    assert facts["sent"] == by_hand


def test_the_size_helper_of_a_second_pass(seen):
    steps, judgement = steps_of(told(seen, "enlarge"))
    sizes = {name: (step["widgets"]["width"], step["widgets"]["height"]) for name, step in steps.items()}
    assert sizes["new"] == (2048, 2048)
    assert sizes["3:2"] == (2496, 1664)  # four megapixels, as before
    assert sizes["8 megapixels"] == (3584, 2368)
    for step in steps.values():
        check_read_out(step)
    assert judgement["new"] == judgement["3:2"] == judgement["fitted"]
    assert judgement["new"] == "For a second pass of Stage C use a low denoise."
    assert judgement["untrained"] == "Stage B was trained on compressions of 32 to 64."
    assert steps["fitted"]["widgets"]["compression"] == STAGE_C_COMPRESSION


def test_encode_shows_the_sizes_of_its_picture(seen):
    facts = told(seen, "encode")
    assert last(facts["unknown"], 1) == [
        "The size is the picture's; it is shown once the picture is loaded or made."
    ]
    assert facts["asked"]["lines"][0] == read_out(512, 512, STAGE_C_COMPRESSION)
    assert last(facts["known"], 2) == [
        "Stage C 30 × 17 · Stage B 320 × 180 · 1 : 42.67",
        "Within the trained range.",
    ]
    height, width = chosen_size(PICTURE[::-1], 1104, 0)
    assert facts["resized"]["lines"][0] == read_out(width, height, STAGE_C_COMPRESSION)
    assert facts["loaded"]["lines"][0] == read_out(256, 256, STAGE_C_COMPRESSION)


def test_each_step_of_undo_takes_back_one_change_of_a_panel(seen):
    facts = told(seen, "undo")
    assert facts["done"] == [[1024, 1024], [1344, 768], [768, 1344], [1088, 1920]]
    assert facts["undone"] == facts["done"][-2::-1]


def test_a_preset_sets_both_samplers_as_one_step_of_undo(seen):
    facts = told(seen, "presets")

    def settings(name):
        return [PRESETS[name][sampler] for sampler in ("CascadePriorSampler", "CascadeDecoderSampler")]

    for moment, preset in (("before", "demo"), ("few", "few"), ("detail", "detail"), ("undone", "few")):
        assert [sampler["shown"] for sampler in facts[moment]] == [preset] * 2
        assert [sampler["settings"] for sampler in facts[moment]] == settings(preset)
    first, second, over = facts["set"]  # the last is a second pass's, which is left as it is
    assert [first["settings"], second["settings"]] == settings("published")
    assert over == facts["passes"][2]


def test_a_preset_crosses_the_border_of_a_subgraph(seen):
    facts = told(seen, "borders")
    moments = {"into": "few", "outOf": "detail", "menu": "published", "whole": "detail"}
    assert {moment: facts[moment] for moment in moments} == {
        moment: PRESETS[preset] for moment, preset in moments.items()
    }
    assert "steps" in facts["ledOut"]
    assert facts["box"] == PRESETS["few"]["CascadeDecoderSampler"]["steps"]


def test_encode_knows_the_picture_of_outpaint_and_where_stage_c_is_left_out(seen):
    facts = told(seen, "behind")
    assert last(facts["padded"], 2) == [
        read_out(256, 256, STAGE_C_COMPRESSION),
        "The size of the bundled demo cascade.",
    ]
    assert last(facts["second"], 2) == [
        read_out(512, 512, STAGE_C_COMPRESSION),
        "Stage C does not run on it: any size will do.",
    ]


def test_encode_is_told_of_its_picture_by_the_run(seen):
    facts = told(seen, "made")
    assert last(facts["before"], 1) == [
        "The size is the picture's; it is shown once the picture is loaded or made."
    ]
    assert facts["after"]["lines"][0] == read_out(*PICTURE, STAGE_C_COMPRESSION)


def test_a_button_of_a_panel_is_not_cut_off(seen):
    facts = told(seen, "buttons")
    assert facts["text"].startswith("Set ")
    assert facts["whole"]
    assert facts["panel"]


def test_super_resolution_shows_the_sizes_of_what_is_made(seen):
    facts = told(seen, "scale")
    assert last(facts["unknown"], 1) == [
        "The size is the picture's; it is shown once the picture is loaded or made."
    ]
    assert facts["twice"]["lines"][0] == read_out(2 * PICTURE[0], 2 * PICTURE[1], STAGE_C_COMPRESSION)
    assert facts["twice"]["lines"][1].startswith("Larger than trained")
    height, width = whole_size(*(round(side * 1.3) for side in PICTURE[::-1]))
    assert last(facts["less"], 2) == [
        read_out(width, height, STAGE_C_COMPRESSION),
        "Within the trained range.",
    ]


def test_a_lora_says_what_it_holds(seen):
    facts = told(seen, "sentences")
    assert last(facts["before"], 1) == ["Not run yet"]
    assert facts["after"]["lines"] == ["style (kohya): rank 4.", "Left out: two."]


def test_syntax_of_other_programs_is_named_until_the_next_run(seen):
    facts = told(seen, "syntax")
    assert facts["told"]["within"]
    assert facts["told"]["whole"]
    pieces = ("<lora:ink:1>", "BREAK", "[a:b:0.5]", "{a|b}")
    for piece, line in zip(pieces, facts["told"]["all"], strict=True):
        assert line.startswith(f"{piece} is read as")
    assert facts["later"]["lines"] == []


def test_a_sampler_says_what_counts_in_the_room_that_it_has(seen):
    facts = told(seen, "notices")
    assert facts["before"]["lines"] == facts["later"]["lines"] == []
    assert facts["after"]["lines"][0] == "The MODEL's own guidance is used."
    assert facts["after"]["all"][:2] == ["The MODEL's own guidance is used.", "shift is not."]
    assert len(facts["after"]["all"]) == 3
    assert facts["after"]["within"]
    assert facts["after"]["whole"]
    assert facts["size"] == facts["sizeAfter"]


def test_no_node_of_a_template_lies_over_another_after_its_run(seen):
    assert told(seen, "run")["overlaps"] == []


def test_the_seed_of_a_training_stays(seen, server):
    """Otherwise the interface would change it after each run, and a cancelled run could not be resumed."""
    (info,) = server.get("/object_info/CascadeTrainLoRA").values()
    values = info["input"]["required"] | info["input"]["optional"]
    assert told(seen, "training")["widgets"].keys() == values.keys()


def test_a_wrong_connection_is_refused(seen):
    facts = told(seen, "connections")
    assert facts["wrong"] is None
    assert facts["right"] is True


def test_the_japanese_interface_is_japanese(seen):
    facts = told(seen, "japanese")
    for words, name in zip(facts["words"], ("CascadePriorSampler", "CascadeEmptyLatent"), strict=True):
        inputs = {entry["name"] for entry in NAMES[name]["inputs"].values()}
        assert words["title"] == NAMES[name]["display_name"]
        assert set(words["inputs"]) == inputs
        assert words["outputs"] == [entry["name"] for entry in NAMES[name]["outputs"].values()]
        assert set(words["widgets"]) - {"生成後の制御"} <= inputs
    run, sizes = facts["panels"]
    assert last(run, 1) == [WORDS["run"]["none"]]
    assert last(sizes, 1) == [WORDS["size"]["trained"]]
    assert last(facts["notice"], 1) == [WORDS["notice"]["sampler"].replace("{key}", "'a_key'")]


def test_an_example_is_japanese(seen):
    example, english = told(seen, "japanese")["example"], WORKFLOWS["few_steps"]
    keys = {text: key for key, text in ENGLISH["example"].items()}
    assert example["groups"] == [WORDS["example"][keys[group["title"]]] for group in english["groups"]]
    assert example["note"] == WORDS["example"]["note_few_steps"]
    assert not example["changed"]  # as if it had been saved so


def test_errors_and_what_a_lora_holds_are_japanese(seen):
    facts = told(seen, "japanese")["told"]
    run, english = facts["run"].split("\n")
    assert run == (
        "「Cascade デコード」の潜在表現は 16 チャンネルですが、Stage A がデコードするのは Stage B の 4 チャンネルです。"
        "「Cascade Decoder サンプラー」をつなぐか、Stage C の潜在表現を見るなら圧縮器をつないでください。"
    )
    assert english.startswith("Cascade Decode got a latent of 16 channels")  # as the help quotes it
    assert facts["refused"].startswith("file - Stage A のファイル 'gone.safetensors' が ")
    assert facts["notice"] == [
        "steps is 0; at least 1 is needed.",
        "ステップ数が 0 です。1 以上にしてください。",
    ]
    assert facts["lora"] == [
        "a.safetensors（kohya）：Stage C の 12 層、ランク 4 ～ 8、1 個の学習済みトークン（[star]）",
        "a.safetensors の情報：トリガーワード ink, red、ランク 4。",
        "Of another node.",
    ]


def test_the_help_is_japanese(seen):
    page = Path(PACK / "web" / "docs" / "CascadePriorSampler" / "ja.md").read_text(encoding="utf-8")
    headline = page.splitlines()[0].removeprefix("# ")
    assert told(seen, "japanese")["help"].splitlines()[0] == headline


def test_comfyuis_own_nodes_are_replaced_from_their_menu(seen):
    facts = told(seen, "replaced")
    assert facts["types"] == [
        "CascadeEmptyLatent", "CascadeEncode", "CascadeSuperResolutionHint", "KSampler", "LoadImage", "PreviewImage",
    ]  # fmt: skip
    assert facts["links"] == [
        "CascadeEmptyLatent 0 KSampler",
        "CascadeSuperResolutionHint 0 PreviewImage",
        "LoadImage 0 CascadeEncode",
        "LoadImage 0 CascadeSuperResolutionHint",
    ]
    assert facts["size"] == [1152, 42.67, 4, "mine", "#322"]  # bypassed, as it was
    assert facts["encode"] == [32, 0, "Cascade Encode"]


def unboxed(facts: dict[str, Any], example: str) -> dict[str, Any]:
    """The prompt that a subgraph becomes, with the ids of its example, whose nodes it must hold with other values."""
    assert facts["widgets"] == ["prompt", "negative", "width", "height", "seed"]
    (box,) = {node_id.split(":")[0] for node_id in facts["output"] if ":" in node_id}
    prompt = {node_id.removeprefix(f"{box}:"): entry for node_id, entry in facts["output"].items()}
    for entry in prompt.values():
        entry.pop("_meta", None)
        for name, value in entry["inputs"].items():
            if isinstance(value, list):
                entry["inputs"][name] = [value[0].removeprefix(f"{box}:"), value[1]]
    values = {
        "CascadeTextEncode": {"positive": "a red star", "negative": ""},
        "CascadeEmptyLatent": {"width": 256, "height": 256},
        "CascadePriorSampler": {"seed": 7},
        "CascadeDecoderSampler": {"seed": 7},
    }
    nodes = read(api_file(example))
    inside = {node_id: entry for node_id, entry in nodes.items() if entry["class_type"] != "SaveImage"}
    for entry in inside.values():
        entry.pop("_meta", None)
        entry["inputs"].update(values.get(entry["class_type"], {}))
    assert {node_id: prompt[node_id] for node_id in inside} == inside
    return prompt


def test_the_demo_in_one_box_is_its_example(seen):
    unboxed(told(seen, "subgraph")["demo"], "text_to_image")


def test_the_subgraph_is_text_to_image_in_one_box(seen, client, right_picture):
    """It is loaded by hand where a version does not offer it; what it becomes makes the demo's picture."""
    prompt = unboxed(told(seen, "subgraph")["published"], "text_to_image_checkpoints")
    loaders = {  # of the tests' networks, each by itself, in place of the published checkpoints
        ("1", 0): node("StageCLoader", file="tiny_stage_c.safetensors", dtype="auto"),
        ("1", 1): node("CascadeTextEncoderLoader", file="tiny_text_encoder"),
        ("2", 0): node("StageBLoader", file="tiny_stage_b.safetensors", dtype="auto"),
        ("2", 2): node("StageAVAE", file="tiny_stage_a.safetensors"),
    }
    del prompt["1"], prompt["2"]
    for entry in prompt.values():
        for name, value in entry["inputs"].items():
            if isinstance(value, list) and tuple(value) in loaders:
                entry["inputs"][name] = ["-".join(map(str, value)), 0]
    prompt |= {"-".join(map(str, place)): loader for place, loader in loaders.items()}
    execution = client.run(prompt)
    assert execution.error is None
    (picture,) = client.pictures(execution)
    assert np.abs(picture.astype(int) - right_picture(prompt)).max() <= 1
