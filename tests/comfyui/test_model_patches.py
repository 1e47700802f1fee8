"""Patches of other nodes on a MODEL take effect, or a notice names them, as docs/comfyui-nodes.md states for each."""

import re
import time

import pytest

from cascade_nodes.tests.comfyui.checkout import PACK
from cascade_nodes.tests.comfyui.graphs import PRIOR, demo
from cascade_nodes.tests.headless.record_comfyui import node

PAGE = (PACK / "docs" / "comfyui-nodes.md").read_text(encoding="utf-8")
NATIVE_TABLE, PACKS_TABLE = PAGE.split("## What packs put on a MODEL")
ROWS = re.findall(
    r"^\| (`.*?) \| \*\*(works|is not used|has no effect|fails|is refused)\*\*(.*)\|$", NATIVE_TABLE, re.M
)
NATIVE = {name: (verdict, more) for names, verdict, more in ROWS for name in re.findall(r"`([^`]+)`", names)}
PACKS = {
    "AutomaticGuidance": "works", "ClonesTwice": "works", "FewerSigmas": "works", "Failing": "fails",
    "ForgottenOption": "has no effect", "Injected": "works", "OtherAttention": "works", "OtherCosine": "works",
    "OwnGuidanceAfter": "works", "PerturbedSometimes": "has no effect", "PictureAdapter": "has no effect",
    "ReplacedLayer": "works", "SkimmedGuidance": "works", "StepCache": "works", "ThreeArguments": "works",
    "Thresholding": "works", "Wrapped, outer_sample": "works", "Wrapped, sampler_sample": "works",
    "Wrapped, predict_noise": "works", "Wrapped, calc_cond_batch": "works", "Wrapped, apply_model": "works",
    "Wrapped, diffusion_model": "works",
}  # fmt: skip
EXPECTED = {**{name: verdict for name, (verdict, _) in NATIVE.items()}, **PACKS}
NEWER = {"ModelAttentionBackend", "NAGuidance", "ScaleROPE", "TemporalScoreRescaling"}  # not in the oldest
# A hard mask, and the kernel that is used anyway, change nothing; bf16 rounds otherwise from one sampler to the next.
NO_EFFECT_HERE, OTHER_ROUNDING = {"DifferentialDiffusion", "ModelAttentionBackend"}, {"ModelComputeDtype"}
SAID_BY_ANOTHER_NAME = {"ModelSamplingAuraFlow": "ModelSamplingSD3", "ScaleROPE": "rope_options",
                        "ForgottenOption": "only_their_sampler_reads"}  # fmt: skip


def test_every_case_is_on_the_page_and_every_name_on_the_page_is_a_case(measured):
    assert set(measured["ours"]) == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_becomes_of_it_what_the_page_says(measured, checkout, name):
    found, verdict = measured["ours"][name], EXPECTED[name]
    if name in NEWER and "node" in found and checkout.version == "0.3.64":
        assert found["node"].startswith("AttributeError")
    elif verdict == "works":
        assert found["effect"] > 1e-3 or name in NO_EFFECT_HERE
        assert found["against KSampler"] < 1e-2 or name in OTHER_ROUNDING
        assert found["against KSampler"] < found["effect"] / 3 or name in NO_EFFECT_HERE | OTHER_ROUNDING
        told = " ".join([*found["notices"], *found["told"]])
        assert not any(words in told for words in ("changes nothing", "instead", "left the MODEL"))
    elif verdict in ("has no effect", "is not used"):
        assert found["effect"] < 1e-4
        (sentence,) = found["notices"]
        assert SAID_BY_ANOTHER_NAME.get(name, name) in sentence
        assert name == "ForgottenOption" or len(found["told"]) == 1  # by KSampler too
    elif verdict == "fails":
        assert re.match(rf"CascadeError: {name}, which patched the MODEL, failed on Stage C", found["error"])
        assert found["by KSampler"] == found["error"]
    else:
        assert re.match(r"CascadeError: This node looks for '\w+' of the MODEL's network", found["node"])


@pytest.mark.parametrize(
    "name", ["CascadeGuidance", "OwnGuidanceAfter", "PerpNeg", "RescaleCFG", "ThreeArguments", "Thresholding"]
)
def test_a_guidance_wins_over_cfg_rescale(measured, name):
    (sentence,) = measured["ours"][name]["notices with cfg_rescale"]
    shown = name.replace("CascadeGuidance", "Cascade Guidance")
    assert sentence == f"The MODEL's own guidance is used ({shown}); cfg_rescale 0.7 of this node is not."


def test_a_guidance_that_goes_on_with_ours_is_not_told(measured):
    assert measured["ours"]["CFGNorm"]["notices with cfg_rescale"] == []


def test_a_schedule_wins_over_shift(measured):
    assert measured["schedules"]["as with its shift"] == 0
    (sentence,) = measured["ours"]["ModelSamplingStableCascade"]["notices"]
    assert sentence == (
        "The MODEL's own schedule is used (ModelSamplingStableCascade, shift 8); shift 2 of this node is not."
    )
    assert "ModelSamplingStableCascade put on the MODEL (shift 0)" in measured["schedules"]["no levels"]


def test_the_same_guidance_and_shift_are_no_contradiction(measured):
    assert measured["schedules"]["agreeing"] == 0
    assert measured["schedules"]["agreeing, notices"] == []


@pytest.mark.parametrize("name", ["Injected", "OtherAttention", "ReplacedLayer"])
def test_what_plain_pytorch_alone_follows_is_told(measured, name):
    (sentence,) = measured["ours"][name]["notices"]
    assert sentence.endswith("this run does without the engine.")
    assert measured["ours"][name]["told"] == [sentence]


def test_on_the_native_model(measured):
    found = measured["native"]
    assert {name for name, one in found.items() if one["effect"] > 1e-3} == {
        "ModelSamplingStableCascade", "OtherAttention", "PerpNeg", "ReplacedLayer", "RescaleCFG",
    }  # fmt: skip
    told = {name: one["notices"] for name, one in found.items() if one["effect"] <= 1e-3}
    assert "easycache" in told.pop("EasyCache")[0]
    assert all(name in sentences[0] for name, sentences in told.items())


def test_a_soft_mask_that_a_node_changes(measured):
    masks = measured["masks"]
    assert masks["effect"] > 0.1
    assert masks["against KSampler"] < 1e-4
    assert masks["kept outside"] == 0


@pytest.mark.parametrize("scope", ["all", "one"])
def test_hooks_of_a_prompt(measured, scope):
    assert measured["hooks"][f"{scope}, effect"] > 0.1
    assert measured["hooks"][f"{scope}, against KSampler"] < 1e-4


def test_callbacks_are_called(measured):
    assert measured["callbacks"] == ["on_cleanup", "on_pre_run", "on_prepare_state"]


def test_wrappers_around_tiles_are_told(measured):
    (sentence,) = measured["tiled"]
    assert sentence.startswith("Wrapped is called for each tile")


def test_nothing_is_left_on_the_model(measured):
    assert measured["the MODEL itself"] == 0
    assert measured["the MODEL itself, notices"] == []


READERS = ("samplers", "sampler_helpers", "model_patcher", "hooks", "context_windows", "multigpu")
KEY = (
    r"model_options(?:\.get\(|\.pop\(|\.setdefault\(|\[)[\"']([a-z_0-9]+)"
    r"|[\"']([a-z_0-9]+)[\"'] (?:not )?in (?:self\.)?model_options"
)


def test_every_option_that_the_host_reads_is_on_the_page(checkout):
    files = [path for name in READERS if (path := checkout.path / "comfy" / f"{name}.py").exists()]
    keys = {"".join(pair) for path in files for pair in re.findall(KEY, path.read_text(encoding="utf-8"))}
    assert len(keys) > 8
    assert {key for key in keys if f"`{key}`" not in PACKS_TABLE} - {"transformer_options"} == set()


PATCHED = {
    "guidance": (node("RescaleCFG", model=["1", 0], multiplier=1.0), "guidance is used (RescaleCFG)"),
    "three prompts": (
        node("PerpNeg", model=["1", 0], empty_conditioning=["5", 1], neg_scale=1.0), "guidance is used (PerpNeg)",
    ),
    "schedule": (node("ModelSamplingStableCascade", model=["1", 0], shift=8.0), "shift 8); shift 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", PATCHED)
def test_the_node_shows_it(client, name):
    patch, words = PATCHED[name]
    few = {"6.width": 256, "6.height": 256, "7.steps": 3, "7.shift": 1.0, "7.cfg_rescale": 0.5, "8.steps": 1}
    plain = client.run(demo(few))
    patched = client.run(demo({**few, "101": patch, "7.model": ["101", 0]}))
    (shown,) = [data["output"] for data in patched.of("executed") if data["node"] == PRIOR]
    while not (history := client.server.get(f"/history/{patched.prompt_id}")):
        time.sleep(0.05)  # it comes after the last message
    assert history[patched.prompt_id]["outputs"][PRIOR] == shown  # which the server copied
    (sentence,) = shown["text"]
    assert words in sentence
    (without,) = [data["output"] for data in plain.of("executed") if data["node"] == PRIOR] or [{}]
    assert "text" not in without
    (one,), (other,) = client.pictures(plain), client.pictures(patched)
    assert (one != other).any()
