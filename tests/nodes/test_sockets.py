"""What is refused, and in which words."""

import pytest
import torch

from cascade_nodes.cascade_core import CascadeError
from cascade_nodes.cascade_core.networks.quantisation import weight_format
from cascade_nodes.headless.registry import describe
from cascade_nodes.nodes.conditioning import CascadeImagePrompt, CascadeTextEncode
from cascade_nodes.nodes.extension import NODES
from cascade_nodes.nodes.latents import CascadeEmptyLatent
from cascade_nodes.nodes.loaders import (
    CascadeCompressorLoader,
    CascadeVisionLoader,
    StageBLoader,
    StageCLoader,
)
from cascade_nodes.nodes.sampling import CascadeDecoderSampler, CascadePriorSampler
from cascade_nodes.tests.nodes.graph import DECODER, PRIOR, load


@pytest.fixture
def sockets(tiny):
    return load()


@pytest.fixture
def prompts(sockets):
    return CascadeTextEncode.execute(sockets["clip"], "a star", "").args


def prior(model, prompts, latent, **settings):
    positive, negative = prompts
    return CascadePriorSampler.execute(model, positive, negative, latent, **{**PRIOR, "seed": 0, **settings})[
        0
    ]


def latents(batch=1):
    return CascadeEmptyLatent.execute(64, 64, batch, 42.67).args


def test_a_model_of_another_stage(sockets, prompts):
    with pytest.raises(CascadeError) as error:
        prior(sockets["stage_b"], prompts, latents()[0])
    assert str(error.value) == (
        "The MODEL connected to Cascade Prior Sampler is tiny_stage_b.safetensors (Stage B), but Stage C "
        "is expected; "
        "connect Load Stage C."
    )


def test_no_model(prompts):
    with pytest.raises(CascadeError, match="Cascade Prior Sampler got no MODEL; connect Load Stage C"):
        prior(None, prompts, latents()[0])


def test_a_model_that_is_none_of_ours(prompts):
    with pytest.raises(CascadeError, match="is a Linear, but Stage C is expected"):
        prior(torch.nn.Linear(1, 1), prompts, latents()[0])


def test_a_latent_of_the_other_stage(sockets, prompts):
    with pytest.raises(
        CascadeError, match=r"shape \(1, 4, 16, 16\), but tiny_stage_c.*samples latents of 16 channels"
    ):
        prior(sockets["stage_c"], prompts, latents()[1])


def test_text_states_of_another_width(sockets):
    wide = [[torch.zeros(1, 77, 1280), {"pooled_output": torch.zeros(1, 1280)}]]
    with pytest.raises(CascadeError) as error:
        prior(sockets["stage_c"], (wide, wide), latents()[0])
    assert str(error.value) == (
        "positive: text states of width 1280 do not fit tiny_stage_c.safetensors (Stage C), which takes "
        "64; load the "
        "text encoder that belongs to this model."
    )


def test_stage_b_takes_only_the_pooled_vector(sockets):
    c, b = latents()
    wide = [[torch.zeros(1, 77, 1280), {"pooled_output": torch.zeros(1, 1280)}]]
    with pytest.raises(CascadeError, match="the pooled text vector of width 1280"):
        CascadeDecoderSampler.execute(sockets["stage_b"], wide, wide, c, b, seed=0, **DECODER)
    states = [[torch.zeros(1, 77, 1280), {"pooled_output": torch.zeros(1, 64)}]]
    CascadeDecoderSampler.execute(sockets["stage_b"], states, states, c, b, seed=0, **DECODER)


def test_no_pooled_vector(sockets):
    bare = [[torch.zeros(1, 77, 64), {}]]
    with pytest.raises(CascadeError, match="positive has no pooled text vector"):
        prior(sockets["stage_c"], (bare, bare), latents()[0])


def test_batches_that_do_not_match(sockets, prompts):
    positive, negative = prompts
    pair_latent, _ = latents(2)
    _, three = latents(3)
    with pytest.raises(CascadeError, match="Sampler holds 2 latents, but latent holds 3"):
        CascadeDecoderSampler.execute(
            sockets["stage_b"], positive, negative, pair_latent, three, seed=0, **DECODER
        )
    with pytest.raises(CascadeError, match="holds 2 latents but 1 batch indices"):
        prior(sockets["stage_c"], prompts, {**pair_latent, "batch_index": [0]})


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"sampler": "euler"}, "sampler is 'euler'; choose one of ddpm, ddim, lcm, dpmpp_2m"),
        ({"denoise": 1.5}, "denoise is 1.5"),
        ({"steps": 0}, "steps is 0"),
        ({"cfg_rescale": 2.0}, "cfg_rescale is 2.0"),
        ({"shift": 0.0}, "shift is 0.0"),
    ],
)
def test_settings_out_of_range(sockets, prompts, setting, message):
    with pytest.raises(CascadeError, match=message):
        prior(sockets["stage_c"], prompts, latents()[0], **setting)


def test_nan_in_a_weight_is_named(sockets, prompts):
    weight = sockets["stage_c"].network.clip_txt_mapper.weight
    weight.data[0, 0] = float("nan")
    with pytest.raises(CascadeError, match=r"The weight clip_txt_mapper.weight of tiny_stage_c.safetensors"):
        prior(sockets["stage_c"], prompts, latents()[0])


def test_two_prompts_cannot_be_sampled_headless(sockets, prompts):
    positive, negative = prompts
    with pytest.raises(CascadeError, match="positive holds 2 prompts, but exactly one"):
        prior(sockets["stage_c"], (positive * 2, negative), latents()[0])


def test_image_prompts(sockets, prompts):
    positive, negative = prompts
    vision = CascadeVisionLoader.execute("tiny_vision.safetensors")[0]
    image = torch.rand(2, 40, 50, 3)
    with_image = CascadeImagePrompt.execute(positive, vision, image, 0.5)[0]
    assert CascadeImagePrompt.execute(positive, vision, image, 0.0)[0] is positive
    assert "unclip_conditioning" not in positive[0][1]
    entry = with_image[0][1]["unclip_conditioning"][0]
    assert entry["clip_vision_output"].image_embeds.shape == (2, 48)
    assert entry["strength"] == 0.5
    plain = prior(sockets["stage_c"], (positive, negative), latents()[0])["samples"]
    varied = prior(sockets["stage_c"], (with_image, negative), latents()[0])["samples"]
    assert (plain - varied).abs().max() > 1e-3


def test_files_of_another_kind(tiny):
    with pytest.raises(
        CascadeError, match=r"tiny_stage_b.safetensors is a Stage B checkpoint.*Stage C is expected"
    ):
        StageCLoader.execute(str(tiny / "unet" / "tiny_stage_b.safetensors"), "auto")


def test_precisions(tiny):
    half = StageBLoader.execute("tiny_stage_b.safetensors", "bf16")[0]
    assert half.network.clip_mapper.weight.dtype == torch.bfloat16
    eight_bit = StageBLoader.execute("tiny_stage_b.safetensors", "fp8")[0]
    assert eight_bit.engine.precision == "fp8"
    assert weight_format(eight_bit.network) == torch.float8_e4m3fn
    assert eight_bit.network.clip_mapper.weight.dtype == torch.float32
    with pytest.raises(CascadeError, match="dtype 'int4' is not known"):
        StageBLoader.execute("tiny_stage_b.safetensors", "int4")


WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
# What ComfyUI hands to a node where a graph gives a value in place of a connection, and what other nodes might.
NOT_CONNECTED = [
    0, 1.5, "x", True, {}, {"samples": 1}, {"samples": None}, {"samples": torch.zeros(3)}, [1], [[1]], [["a", {}]],
    [[torch.zeros(2), 3]], "x" * 10**6, None, torch.zeros(0), torch.zeros(3),
    torch.zeros(1, 8, 8, 3, dtype=torch.uint8),
]  # fmt: skip


@pytest.fixture
def connected(sockets, prompts):
    """Values that a node takes, by its class, an input's name and its description."""
    compressor = CascadeCompressorLoader.execute("tiny_compressor.safetensors", "tiny_previewer.safetensors")[
        0
    ]
    semantic, latent = latents()
    picture = torch.rand(1, 64, 64, 3)
    values = {
        "MODEL": sockets["stage_c"], "VAE": compressor, "CLIP": sockets["clip"], "CONDITIONING": prompts[0],
        "CLIP_VISION": CascadeVisionLoader.execute("tiny_vision.safetensors")[0], "LATENT": semantic,
        "IMAGE": picture, "MASK": torch.ones(1, 64, 64), "CONTROL_NET": object(),
    }  # fmt: skip
    own = {
        ("CascadeDecoderSampler", "model"): sockets["stage_b"], ("CascadeDecoderSampler", "latent"): latent,
        ("CascadeDecode", "vae"): sockets["stage_a"], ("CascadeDecode", "samples"): latent,
        ("CascadeEncode", "stage_a"): sockets["stage_a"],
    }  # fmt: skip

    def value(cls, name, entry):
        if entry.type in WIDGETS:
            options = entry.options
            return (
                options["default"]
                if options.get("default") is not None
                else (options.get("options") or [1])[0]
            )
        return own.get((cls.__name__, name), values[entry.type])

    return value


@pytest.mark.parametrize(
    "cls",
    [cls for cls in NODES if any(entry.type not in WIDGETS for entry in describe(cls).inputs.values())],
    ids=lambda cls: cls.__name__,
)
def test_a_value_in_place_of_a_connection_is_a_sentence(cls, connected):
    """ComfyUI lets it through to the node."""
    inputs = describe(cls).inputs
    good = {name: connected(cls, name, entry) for name, entry in inputs.items()}
    for name, entry in inputs.items():
        if entry.type in WIDGETS:
            continue
        for value in NOT_CONNECTED:
            if (value is None and not entry.required) or (
                isinstance(value, torch.Tensor) and entry.type == "MASK"
            ):
                continue
            with pytest.raises(CascadeError) as error:
                cls.execute(**{**good, name: value})
            assert len(str(error.value)) < 500


def test_prompt_syntax_of_other_programs_is_named(sockets, caplog):
    output = CascadeTextEncode.execute(sockets["clip"], "a star <lora:x:1>", "")
    assert output.ui == {"cascade_syntax": [("lora", "<lora:x:1>")]}
    assert caplog.text.count("'<lora:x:1>' is read as words; a LoRA is applied by Cascade LoRA Apply") == 1
    assert CascadeTextEncode.execute(sockets["clip"], "a star", "").ui is None
