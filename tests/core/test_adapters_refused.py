"""LoRAs of other models, other kinds of changes, parts that are not known, and networks of another size."""

import random
from contextlib import suppress

import pytest
import torch

from cascade_nodes.cascade_core import CascadeError, StageC
from cascade_nodes.cascade_core.adapters import (
    DIALECTS,
    Adapter,
    check_fits,
    describe_adapter,
    describe_unknown,
    parse_adapter,
    to_dialect,
)
from cascade_nodes.cascade_core.adapters.names import stage_c_shapes
from cascade_nodes.cascade_core.adapters.order import SIZES
from cascade_nodes.cascade_core.checkpoints import fuse_attention
from cascade_nodes.cascade_core.text.encoder import build_text_model
from cascade_nodes.tests.core.lora_files import CONFIG, TEXT_SHAPES, change, everything, golden, kohya_file

TEXT = {layer.replace(".", "_"): shape for layer, shape in TEXT_SHAPES.items() if layer != "text_projection"}
OTHERS = {
    "Stable Diffusion 1.5": {"down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k": (320, 768)},
    "Stable Diffusion 2": {"mid_block_attentions_0_transformer_blocks_0_attn2_to_v": (1280, 1024)},
    "Stable Diffusion XL": {"input_blocks_4_1_transformer_blocks_0_attn2_to_k": (640, 2048)},
    "Stable Diffusion": {"down_blocks_0_resnets_0_conv_shortcut": (320, 320)},
    "Stable Diffusion 3": {"joint_blocks_0_x_block_attn_qkv": (4608, 1536)},
    "Flux": {"double_blocks_0_img_attn_qkv": (9216, 3072)},
    "Wan": {"blocks_0_cross_attn_k": (1536, 1536)},
    "a diffusion transformer": {"transformer_blocks_0_attn1_to_q": (64, 64)},
}


@pytest.mark.parametrize("model", list(OTHERS))
def test_a_lora_for_another_model_is_refused_by_name(model):
    """It is refused even if its text encoder's layers have the same names as ours."""
    file = kohya_file(OTHERS[model]) | kohya_file(TEXT, "lora_te_")
    with pytest.raises(CascadeError, match=rf"^style is a LoRA for {model}, not for Stable Cascade's Stage C: 18 of "
                       r"its 21 tensors match; choose a Stable Cascade LoRA\.$"):  # fmt: skip
        parse_adapter(file, {}, "style")


@pytest.mark.parametrize(
    ("key", "model"),
    [
        ("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight", "Flux"),
        ("transformer.transformer_blocks.0.attn.add_k_proj.lora_A.weight", "Stable Diffusion 3"),
        (
            "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight",
            "Stable Diffusion XL",
        ),
        ("text_encoder_2.text_model.encoder.layers.0.mlp.fc1.lora_A.weight", "Stable Diffusion XL"),
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", "Stable Diffusion XL"),
        ("diffusion_model.blocks.0.self_attn.q.lora_A.weight", "Wan"),
    ],
)
def test_other_programs_keys_for_other_models(key, model):
    with pytest.raises(CascadeError, match=rf"is a LoRA for {model}, .*: 0 of its 1 tensors match"):
        parse_adapter({key: torch.zeros(4, 2048)}, {}, "style")


def test_a_lora_that_matches_nothing():
    unknown = "lora_unet_a.lora_down.weight, lora_unet_a.lora_up.weight, lora_unet_a.alpha"
    expected = rf"^style is not a LoRA for Stable Cascade: 0 of its 3 tensors match \(unknown: {unknown}\)"
    with pytest.raises(CascadeError, match=expected):
        parse_adapter(kohya_file({"a": (4, 4)}), {}, "style")
    with pytest.raises(CascadeError, match=r"0 of its 0 tensors match; choose"):
        parse_adapter({}, {}, "style")


def test_a_text_encoders_alone_with_an_unknown_network():
    with pytest.raises(
        CascadeError, match=r"style is not a LoRA for Stable Cascade: 18 of its 21 tensors match"
    ):
        parse_adapter(kohya_file(TEXT, "lora_te_") | kohya_file({"a": (4, 4)}), {}, "style")
    assert len(parse_adapter(kohya_file(TEXT, "lora_te_"), {}, "style").text) == 6


def test_files_that_are_no_lora():
    with torch.device("meta"):
        weights = StageC(CONFIG).state_dict()
    for tensors in (weights, fuse_attention(weights)):
        with pytest.raises(
            CascadeError, match=r"stage_c holds the weights of Stage C, but a LoRA is expected here"
        ):
            parse_adapter(tensors, {}, "stage_c")
    flux = {"double_blocks.0.img_attn.qkv.weight": torch.zeros(3, 3)}
    with pytest.raises(
        CascadeError, match=r"a holds the weights of a Flux model, but a LoRA is expected here"
    ):
        parse_adapter(flux, {}, "a")


@pytest.mark.parametrize(
    ("key", "algorithm"),
    [
        (
            "base_model.model.down_blocks.0.2.attention.to_q.lora_embedding_A",
            "LoRA of the token embedding by PEFT",
        ),
        ("base_model.model.down_blocks.0.2.attention.to_q.bone_block", "Bone"),
        ("base_model.model.internal_xlora_classifier.inner.0.weight", "X-LoRA"),
        ("lora_unet_clf_1.reshape_weight", "LoRA that enlarges its layers"),
        ("lora_unet_clf_1.bias_indices", "LoRA with LyCORIS' sparse residual"),
        ("oft_unet_clf_1.oft_blocks", "OFT of another program"),
        ("prompt_embeddings", "prompt, prefix or P-tuning"),
        ("down_blocks.0.2.attention.to_q.delta", "SVDiff"),
    ],
)
def test_other_algorithms_are_refused_by_name(key, algorithm):
    """Others are in test_other_adapters.py, by the keys that their own code writes."""
    with pytest.raises(
        CascadeError, match=rf"style is an adapter of another kind, {algorithm} \({key}\), which is"
    ):
        parse_adapter({key: torch.zeros(2, 2)}, {}, "style")


def test_what_is_not_known_is_kept_apart_and_named():
    layer = "down_blocks_0_2_attention_attn_to_q"
    file = kohya_file({layer: (64, 64), "someone_s_own": (4, 4)})
    file |= {f"lora_unet_{layer}.own": torch.zeros(64), "lora_unet_clf_1.alpha": torch.tensor(1.0)}
    adapter = parse_adapter(file, {}, "style")
    assert list(adapter.stage_c) == ["down_blocks.0.2.attention.attn.to_q"]
    assert len(adapter.unknown) == 5
    assert describe_unknown(adapter) == (
        "style holds 5 tensors of no known layer or token of Stable Cascade, and they are left out: "
        f"lora_unet_{layer}.own, lora_unet_someone_s_own.lora_down.weight, "
        "lora_unet_someone_s_own.lora_up.weight, …."
    )
    assert describe_unknown(everything()) is None


def test_damaged_files():
    layer = "lora_unet_clip_txt_mapper"
    file = kohya_file({"clip_txt_mapper": (64, 40)})
    for damage, reason in (
        (
            {f"{layer}.lora_up.weight": torch.zeros(64, 3)},
            r"no down \(rank, c_in\) and up \(c_out, rank\).*\(2, 40\) and",
        ),
        ({f"{layer}.lora_up.weight": torch.zeros(64)}, r"that belong together .* and \(64,\)"),
        (
            {f"{layer}.lora_down.weight": torch.zeros(2, 40, dtype=torch.int8)},
            r"torch.int8, but floating point",
        ),
        (
            {f"{layer}.dora_scale": torch.zeros(7, 1)},
            r"magnitudes of the shape \(7, 1\), but 64 rows and 40 columns",
        ),
        (
            {f"{layer}.alpha": torch.zeros(3)},
            r"has an alpha of \[0.0, 0.0, 0.0\], but one number is expected",
        ),
        ({f"{layer}.alpha": torch.tensor(torch.nan)}, r"has an alpha of nan, but one number is expected"),
        (
            {f"{layer}.lora_down.weight": torch.zeros(0, 40), f"{layer}.lora_up.weight": torch.zeros(64, 0)},
            r"that belong together \(\(0, 40\) and \(64, 0\)\)",
        ),
        (kohya_file({"clip_txt_mapper": (64, 40)}, "lora_prior_unet_"), r"changes clip_txt_mapper twice"),
        ({"bundle_emb.x.clip_g": torch.zeros(2, 2, 2)}, r"a learned token has rows \(V, C\)"),
    ):
        with pytest.raises(CascadeError, match=reason):
            parse_adapter(file | damage, {}, "style")
    del file[f"{layer}.lora_up.weight"]
    with pytest.raises(
        CascadeError, match=rf"style: {layer} has no down .* \(\(2, 40\) and none\); download it again"
    ):
        parse_adapter(file, {}, "style")


def test_a_dialect_that_is_none_and_what_a_dialect_cannot_hold():
    with pytest.raises(
        CascadeError, match=r"There is no LoRA dialect 'khoya'; choose one of official, kohya"
    ):
        to_dialect(everything(), "khoya")
    with pytest.raises(CascadeError, match=r"all.safetensors holds 7 layers of the text encoder, 2 learned tokens, "
                       r"which the dialect onetrainer_original has no keys for; choose one that can \(onetrainer, .*, "
                       r"comfyui\)\."):  # fmt: skip
        to_dialect(everything(), "onetrainer_original")


def low_rank_of(size):
    """A LoRA of all of a published Stage C's layers, without values."""
    with torch.device("meta"):
        stage_c = {layer: change(shape, 1) for layer, shape in stage_c_shapes(SIZES[size]).items()}
    return Adapter("style", "kohya", stage_c)


@pytest.fixture(scope="module")
def networks():
    with torch.device("meta"):
        return {size: StageC(config) for size, config in SIZES.items()}


def test_every_layer_of_its_own_size_fits(networks):
    for size, network in networks.items():
        check_fits(low_rank_of(size), network)
    check_fits(parse_adapter(golden("kohya"), {}, "golden"), CONFIG)


def test_a_lora_of_another_size_is_refused_with_counts_and_sizes(networks):
    with pytest.raises(CascadeError, match=r"^style is a LoRA for another Stage C: of the 711 layers that it changes "
                       r"352 do not exist in it \(down_blocks.0.12.depthwise, down_blocks.0.12.channelwise.0, "
                       r"down_blocks.0.12.channelwise.4, …\) and 359 have another size \(embedding.1: 2048 × 16 × 1 "
                       r"× 1 instead of 1536 × 16 × 1 × 1\); use it with the Stage C that it was made"):  # fmt: skip
        check_fits(low_rank_of("3.6 B"), networks["1 B"])
    with pytest.raises(CascadeError, match=r"of the 359 layers that it changes 359 have another size"):
        check_fits(low_rank_of("1 B"), networks["3.6 B"])
    with pytest.raises(CascadeError, match=r"of the 24 layers that it changes 24 have another size"):
        check_fits(parse_adapter(golden("kohya"), {}, "golden"), networks["1 B"])


def test_a_text_encoder_of_another_size():
    config = {"hidden_size": 12, "intermediate_size": 48, "num_hidden_layers": 12, "num_attention_heads": 1,
              "projection_dim": 10, "vocab_size": 20}  # fmt: skip
    adapter = everything()
    check_fits(adapter, build_text_model(config, "meta"), "text")
    with pytest.raises(CascadeError, match=r"a LoRA for another text encoder: of the 7 layers that it changes 2 do not "
                       r"exist in it \(text_model.encoder.layers.11.mlp.fc1"):  # fmt: skip
        check_fits(adapter, build_text_model(config | {"num_hidden_layers": 2}, "meta"), "text")


NAMES = ["lora_unet_down_blocks_0_0_depthwise", "lora_unet_clf_1", "lora_unet_up_blocks_0_2_attention_attn_in_proj",
         "lora_te_text_projection", "prior.down_blocks.0.2.attention.to_q", "x", "weights.0", "weights.1",
         "bundle_emb.a", "embeddings"]  # fmt: skip
DOWNS = [(2, 3), (2, 9), (2, 10), (2, 6, 3, 3), (2, 1, 3, 3), (2, 3, 1, 1), (2,), (0, 3), ()]
UPS = [(6, 2), (1, 2, 1, 1), (6, 2, 1, 1), (6, 3), (6, 2, 3, 3), (6, 0), (2,)]
OTHERS_OF_A_LAYER = [
    ".alpha",
    ".dora_scale",
    ".lora_magnitude_vector",
    ".embeddings",
    ".indices",
    ".clip_g",
    ".clip_g_out",
]
VALUES = [
    (),
    (1,),
    (2,),
    (6,),
    (3, 4),
    (1, 3),
    (6, 1),
    (6, 1, 1, 1),
    (1, 6, 1, 1),
    (1, 1, 1, 1),
    (0, 4),
    (2, 2, 2),
]
STATED = ["[]", "{", "null", '["a"]', '["clf.1.weight"]', '[["[a]", null]]', "1"]


def random_file(pick):
    tensors = {}
    for name in pick.sample(NAMES, pick.randint(1, 3)):
        down, up = pick.choice([(".lora_down.weight", ".lora_up.weight"), (".lora_down", ".lora_up")])
        dtype = pick.choice([torch.float32] * 9 + [torch.int64])
        tensors[name + down] = torch.ones(pick.choice(DOWNS[:3] * 3 + DOWNS), dtype=dtype)
        tensors[name + up] = torch.ones(pick.choice(UPS[:3] * 3 + UPS))
        for ending in pick.sample(OTHERS_OF_A_LAYER, pick.randint(0, 2)):
            dtype = pick.choice([torch.float32] * 4 + [torch.int64])
            tensors[name + ending] = torch.ones(pick.choice(VALUES), dtype=dtype)
    for key in pick.sample(sorted(tensors), pick.randint(0, 1)):
        del tensors[key]
    return tensors, {
        key: pick.choice(STATED) for key in pick.sample(["order", "train_tokens"], pick.randint(0, 2))
    }


def test_whatever_a_file_holds_is_read_or_refused_in_words():
    """A file that is read can also be described, written and compared with a network, or is refused in words."""
    read, written = 0, 0
    for seed in range(2000):
        tensors, metadata = random_file(random.Random(seed))
        with suppress(CascadeError):
            adapter = parse_adapter(tensors, metadata, "a", pick_config(seed))
            read += 1
            assert describe_adapter(adapter)
            assert bool(describe_unknown(adapter)) == bool(adapter.unknown)
            for dialect in DIALECTS:
                with suppress(CascadeError):
                    to_dialect(adapter, dialect, CONFIG)
                    written += 1
            check_fits(adapter, CONFIG)
    assert read > 100
    assert written > 500


def pick_config(seed):
    return CONFIG if seed % 2 else None
