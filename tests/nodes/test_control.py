"""ControlNets on the host without ComfyUI: what Stage C gets of them, at which steps, and what is refused."""

from typing import Any

import pytest
import torch

from cascade_nodes.cascade_core import CascadeError
from cascade_nodes.cascade_core.diffusion.guidance import Guider
from cascade_nodes.cascade_core.diffusion.noise import NoiseSource
from cascade_nodes.nodes.conditioning import CascadeTextEncode
from cascade_nodes.nodes.control import CascadeControlNetApply
from cascade_nodes.nodes.loaders import CascadeControlNetLoader
from cascade_nodes.nodes.sampling import CascadeDecoderSampler, CascadePriorSampler
from cascade_nodes.tests.core.sampling import sample_from
from cascade_nodes.tests.nodes import controlnets, graph

SIZE = (3, 4)
KINDS = list(controlnets.CONFIGS)
STEPS, CFG, SHIFT, SEED = 4, 3.0, 2.0, 5
SETTINGS = {
    "seed": SEED, "steps": STEPS, "cfg": CFG, "cfg_rescale": 0.7, "shift": SHIFT, "sampler": "ddim", "denoise": 1.0,
}  # fmt: skip


@pytest.fixture
def stage_c(tiny):
    return graph.load()


@pytest.fixture
def prompts(stage_c):
    return CascadeTextEncode.execute(stage_c["clip"], "a red star", "blue").args


@pytest.fixture
def load(tiny):
    """A tiny ControlNet of a kind as CONTROL_NET."""

    def load(kind: str, **changed: Any):
        name = controlnets.write_controlnet(tiny, kind, **changed)
        return CascadeControlNetLoader.execute(name)[0]

    return load


def apply(prompts, control_net, hint, strength=1.0, start=0.0, end=1.0):
    positive, negative = prompts
    return CascadeControlNetApply.execute(positive, negative, control_net, hint, strength, start, end).args


def sample(stage_c, prompts, batch=1, **changed):
    positive, negative = prompts
    latent = {"samples": torch.zeros(batch, 16, *SIZE)}
    settings = {**SETTINGS, **changed}
    return CascadePriorSampler.execute(stage_c["stage_c"], positive, negative, latent, **settings)[0][
        "samples"
    ]


@torch.no_grad()
def residuals(control_net, hint):
    """What the ControlNet itself makes of a hint: of grey the mean, at 32 pixels to a position."""
    network = control_net.network
    hint = hint.movedim(-1, 1)
    if network.config.c_in == 1:
        hint = hint.mean(1, keepdim=True)
    return network(hint)


@torch.no_grad()
def reference(stage_c, prompts, control_at, sides=("positive", "negative")):
    """The same run on the core alone; control_at(step) -> residuals or None, for both prompts or one."""
    network = stage_c["stage_c"].network

    def conditions(side, control):
        tokens, values = prompts[side == "negative"][0]
        width = network.config.c_clip_img
        return {
            "clip_text": tokens,
            "clip_text_pooled": values["pooled_output"][:, None],
            "clip_img": torch.zeros(1, 1, width),
            "control": control if side in sides else None,
        }

    count = iter(range(STEPS))

    def model(x, noise_cond):
        control = control_at(next(count))
        positive, negative = (conditions(side, control) for side in ("positive", "negative"))
        return Guider(network, positive, negative, CFG, 0.7)(x, noise_cond)

    noise = NoiseSource(SEED, 1, (16, *SIZE))
    return sample_from(model, noise.draw(), steps=STEPS, shift=SHIFT, sampler="ddim", noise=noise.draw)


def close(latent, expected):
    return torch.allclose(latent, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("kind", KINDS)
def test_stage_c_gets_what_the_network_makes_of_its_hint(kind, stage_c, prompts, load):
    net, hint = load(kind), controlnets.hint(kind)
    network_residuals = residuals(net, hint)
    received = sample(stage_c, apply(prompts, net, hint))
    assert close(received, reference(stage_c, prompts, lambda step: network_residuals))
    assert not close(received, sample(stage_c, prompts))
    half = [None if one is None else one / 2 for one in network_residuals]
    assert close(sample(stage_c, apply(prompts, net, hint, 0.5)), reference(stage_c, prompts, lambda s: half))


@pytest.mark.parametrize("kind", KINDS)
def test_strength_0_is_none_exactly(kind, stage_c, prompts, load):
    applied = apply(prompts, load(kind), controlnets.hint(kind), strength=0)
    assert applied[0] is prompts[0]
    assert applied[1] is prompts[1]
    assert torch.equal(sample(stage_c, applied), sample(stage_c, prompts))


def test_prompts_are_not_written_to(prompts, load):
    before = [list(values) for prompt in prompts for _, values in prompt]
    once = apply(prompts, load("canny"), controlnets.hint("canny"))
    twice = apply(once, load("inpaint"), controlnets.hint("inpaint"))
    assert [list(values) for prompt in prompts for _, values in prompt] == before
    assert [len(prompt[0][1]["control"]) for prompt in (*once, *twice)] == [1, 1, 2, 2]


def test_several_add_up_block_by_block(stage_c, prompts, load):
    strengths = {"canny": 0.8, "inpaint": 0.5, "super_resolution": 1.0, "identity": 2.0}
    applied, total = prompts, [torch.zeros(1, controlnets.WIDTH, *SIZE) for _ in range(controlnets.BLOCKS)]
    for kind, strength in strengths.items():
        net, hint = load(kind), controlnets.hint(kind)
        applied = apply(applied, net, hint, strength)
        for block, residual in enumerate(residuals(net, hint)):
            if residual is not None:
                total[block] = total[block] + strength * residual
    received = sample(stage_c, applied)
    assert close(received, reference(stage_c, prompts, lambda step: total))


@pytest.mark.parametrize(
    ("start", "end", "steps"),
    [
        (0.0, 0.5, {0, 1, 2}),  # both ends belong to the range, as in ComfyUI
        (0.5, 1.0, {2, 3}),
        (0.25, 0.25, {1}),
        (0.3, 0.45, set()),
        (0.0, 0.0, set()),
        (1.0, 1.0, set()),
        (0.0, 0.999, {0, 1, 2, 3}),
    ],
)
def test_only_in_a_share_of_the_steps(start, end, steps, stage_c, prompts, load):
    net, hint = load("canny"), controlnets.hint("canny")
    network_residuals = residuals(net, hint)
    received = sample(stage_c, apply(prompts, net, hint, 1.0, start, end))
    assert close(
        received, reference(stage_c, prompts, lambda step: network_residuals if step in steps else None)
    )
    if not steps:
        assert torch.equal(received, sample(stage_c, prompts))


def test_one_after_the_other(stage_c, prompts, load):
    nets = [load("canny"), load("canny", proj_blocks=[1])]
    hint = controlnets.hint("canny")
    applied = apply(apply(prompts, nets[0], hint, 1.0, 0.0, 0.3), nets[1], hint, 1.0, 0.4, 1.0)
    network_residuals = [residuals(net, hint) for net in nets]
    assert close(
        sample(stage_c, applied), reference(stage_c, prompts, lambda step: network_residuals[step > 1])
    )


def test_a_network_that_is_never_on_is_not_run(stage_c, prompts, load):
    net, hint = load("canny"), controlnets.hint("canny")
    runs = []
    net.network.register_forward_hook(lambda *ignored: runs.append(1))
    sample(stage_c, apply(prompts, net, hint, 1.0, 0.3, 0.45))
    assert runs == []
    sample(stage_c, apply(prompts, net, hint))
    assert runs == [1]  # for both prompts and all steps


@pytest.mark.parametrize("side", ["positive", "negative"])
def test_on_one_prompt_alone(side, stage_c, prompts, load):
    net, hint = load("inpaint"), controlnets.hint("inpaint")
    network_residuals = residuals(net, hint)
    applied = list(prompts)
    index = int(side == "negative")
    applied[index] = apply(prompts, net, hint)[index]
    received = sample(stage_c, applied)
    assert close(received, reference(stage_c, prompts, lambda step: network_residuals, sides=(side,)))
    without_guidance = sample(stage_c, applied, cfg=1.0)
    assert torch.equal(without_guidance, sample(stage_c, prompts, cfg=1.0)) == (side == "negative")


def test_each_picture_of_a_batch_has_its_own_hint(stage_c, prompts, load):
    net, hints = load("canny"), controlnets.hint("canny", batch=2)
    together = sample(stage_c, apply(prompts, net, hints), batch=3)
    for index, hint in enumerate((hints[:1], hints[1:], hints[:1])):  # fewer hints than pictures go round
        alone = sample(stage_c, apply(prompts, net, hint), seed=SEED + index)
        assert close(together[index : index + 1], alone)


def test_stage_b_takes_no_notice(stage_c, prompts, load):
    applied = apply(prompts, load("canny"), controlnets.hint("canny"))
    semantic, latent = {"samples": torch.randn(1, 16, *SIZE)}, {"samples": torch.zeros(1, 4, 24, 32)}
    settings = {**SETTINGS, "shift": 1.0}
    controlled, plain = (
        CascadeDecoderSampler.execute(stage_c["stage_b"], positive, negative, semantic, latent, **settings)[
            0
        ]["samples"]
        for positive, negative in (applied, prompts)
    )
    assert torch.equal(controlled, plain)


def test_a_network_for_another_stage_c_is_refused_before_it_runs(stage_c, prompts, load):
    hint = controlnets.hint("canny")
    far = load("canny", proj_blocks=[0, 4])
    with pytest.raises(
        CascadeError, match="drives residual block 4 with 32 channels, but this Stage C has 4 blocks"
    ):
        sample(stage_c, apply(prompts, far, hint))
    wide = load("canny", c_proj=48)
    wide.network.register_forward_hook(lambda *ignored: pytest.fail("it ran"))
    with pytest.raises(
        CascadeError, match="block 0 with 48 channels, but this Stage C has 32 channels there"
    ):
        sample(stage_c, apply(prompts, wide, hint, 1.0, 0.3, 0.45))


def test_a_hint_of_another_network_is_named_by_the_node_that_makes_the_right_one(prompts, load):
    with pytest.raises(
        CascadeError, match="takes a hint of 4 channels, but the image has 3; connect Cascade Inpaint"
    ):
        apply(prompts, load("inpaint"), controlnets.hint("canny"))
    with pytest.raises(CascadeError, match=r"takes a hint of 512 channels.*connect Cascade Identity Hint"):
        apply(prompts, load("identity"), controlnets.hint("inpaint"))
    control_net = load("inpaint", c_in=7)
    with pytest.raises(
        CascadeError, match=r"takes a hint of 7 channels.*connect the hint that this ControlNet"
    ):
        apply(prompts, control_net, controlnets.hint("canny"))


def test_other_values_are_refused(stage_c, prompts, load):
    net, hint = load("canny"), controlnets.hint("canny")
    with pytest.raises(CascadeError, match="got no CONTROL_NET; connect Load Cascade ControlNet"):
        apply(prompts, None, hint)
    with pytest.raises(CascadeError, match="is a MODEL, which is for another model"):
        apply(prompts, stage_c["stage_c"], hint)
    with pytest.raises(CascadeError, match=r"start is 0.7 and end 0.2"):
        apply(prompts, net, hint, 1.0, 0.7, 0.2)
    with pytest.raises(CascadeError, match="image has the shape"):
        apply(prompts, net, hint[0])
    with pytest.raises(CascadeError, match="image holds NaN"):
        apply(prompts, net, hint / 0)
