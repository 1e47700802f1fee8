"""CascadeLoRAApply on the headless host: what it changes, what it leaves alone, what it says."""

import pytest
import torch

from cascade_nodes.cascade_core import StageC
from cascade_nodes.cascade_core.adapters import Adapter, LearnedToken, LowRank, write_adapter
from cascade_nodes.cascade_core.checkpoints import read_safetensors, write_safetensors
from cascade_nodes.cascade_core.errors import CascadeError
from cascade_nodes.headless import Executor, run_graph
from cascade_nodes.headless.results import Observer
from cascade_nodes.nodes.conditioning import CascadeTextEncode
from cascade_nodes.nodes.hosts import reporting
from cascade_nodes.nodes.hosts.reporting import reporting_to
from cascade_nodes.nodes.lora import CascadeLoRAApply
from cascade_nodes.tests.comfyui.graphs import tiny
from cascade_nodes.tests.headless.record_comfyui import node
from cascade_nodes.tests.nodes.graph import load, text_to_image
from cascade_nodes.tests.nodes.tiny import CONFIGS, TEXT_WIDTH

ATTENTION = [f"{way}_blocks.{i}.2.attention.attn" for way in ("down", "up") for i in (0, 1)]
TEXT = "text_model.encoder.layers.{}.self_attn.q_proj"
RANK = 3


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def low_rank(seed: int, width: int, **more) -> LowRank:
    return LowRank(randn(RANK, width, seed=seed), randn(width, RANK, seed=seed + 1), alpha=1.0, **more)


def stage_c_changes(seed: int) -> dict[str, LowRank]:
    parts = ("to_q", "to_v", "out_proj")
    return {f"{block}.{part}": low_rank(seed + i, 32) for i, block in enumerate(ATTENTION) for part in parts}


def text_changes(seed: int) -> dict[str, LowRank]:
    return {TEXT.format(i): low_rank(seed + i, TEXT_WIDTH) for i in range(2)}


@pytest.fixture(scope="module")
def loras(models, tmp_path_factory):
    """LoRA files in several dialects, in a folder of their own beside the tiny cascade."""
    root = tmp_path_factory.mktemp("more_models")
    folder = root / "loras"
    stage_c = StageC.from_config(CONFIGS["stage_c"]).config
    first, second = stage_c_changes(1), stage_c_changes(7)
    words = (LearnedToken("[sun]", 0.1 * randn(2, TEXT_WIDTH, seed=5)),)
    write(folder / "both.safetensors", "kohya", first, text_changes(3))
    write(folder / "model.safetensors", "diffusers", second)
    write(folder / "text.safetensors", "kohya", {}, text_changes(9))
    write(folder / "tokens.safetensors", "onetrainer", first, tokens=words)
    official = Adapter(
        "x", "official", full_attention(2), tokens=(LearnedToken("", randn(1, TEXT_WIDTH, seed=6), 3),)
    )
    write_adapter(folder / "official.safetensors", official, "official", stage_c)
    write_safetensors(folder / "embedding.safetensors", {"clip_g": words[0].vectors}, {})
    patch = pytest.MonkeyPatch()
    patch.setenv("CASCADE_MODELS", f"{models}:{root}")
    yield folder
    patch.undo()


def full_attention(seed: int) -> dict[str, LowRank]:
    """All layers that the official trainer's filter finds."""
    parts = ("to_q", "to_k", "to_v", "out_proj")
    return {f"{block}.{part}": low_rank(seed + i, 32) for i, block in enumerate(ATTENTION) for part in parts}


def write(path, dialect, stage_c=None, text=None, tokens=()):
    write_adapter(path, Adapter(path.name, dialect, stage_c or {}, text or {}, tokens), dialect)


@pytest.fixture(scope="module")
def sockets(loras):
    return load()


def apply(sockets, file, strength_model=1.0, strength_clip=1.0, **more):
    """The sockets with a LoRA, and what the node shows."""
    output = CascadeLoRAApply.execute(
        sockets["stage_c"], f"{file}.safetensors", strength_model, strength_clip, sockets["clip"], **more
    )
    return {**sockets, "stage_c": output[0], "clip": output[1]}, output.ui["text"] if output.ui else []


def latent(sockets, prompt="a red star"):
    return text_to_image(sockets, prompt=prompt)["stage_c"]


def states(sockets, prompt="a red star"):
    return CascadeTextEncode.execute(sockets["clip"], prompt, "")[0][0][0]


def weights(sockets):
    return {
        name: weight
        for value in (sockets["stage_c"], sockets["clip"])
        for network, _ in value.networks()
        for name, weight in network.state_dict().items()
    }


def far(image, reference) -> bool:
    return (image - reference).abs().max() > 1e-2 * reference.abs().max()


def test_strengths_for_model_and_text_are_apart(sockets):
    plain, text = latent(sockets), states(sockets)
    model_alone, _ = apply(sockets, "both", 0.7, 0.0)
    assert torch.equal(states(model_alone), text)
    assert far(latent(model_alone), plain)
    text_alone, _ = apply(sockets, "both", 0.0, 0.7)
    assert far(states(text_alone), text)
    assert far(latent(text_alone), plain)
    patched, _ = apply(sockets, "both", 0.7, 0.7)
    assert torch.equal(states(patched), states(text_alone))
    assert far(latent(patched), latent(text_alone))


def test_the_weights_are_the_merged_ones(sockets, models):
    """They are compared with a file into which the changes were written by hand."""
    tensors, metadata = read_safetensors(models / "diffusion_models" / "tiny_stage_c.safetensors")
    for layer, change in stage_c_changes(1).items():
        tensors[f"{layer}.weight"] = tensors[f"{layer}.weight"] + 0.6 / RANK * change.up @ change.down
    path = models / "diffusion_models" / "merged.safetensors"
    write_safetensors(path, tensors, metadata)
    merged = {**sockets, "stage_c": load_stage_c("merged.safetensors")}
    path.unlink()
    patched, _ = apply(sockets, "both", 0.6, 0.0)
    torch.testing.assert_close(latent(patched), latent(merged), rtol=1e-4, atol=1e-5)


def load_stage_c(name):
    from cascade_nodes.nodes.loaders import StageCLoader

    return StageCLoader.execute(name, "auto")[0]


def test_removed_again_everything_is_bit_identical(sockets):
    originals = {name: (weight.data_ptr(), weight.clone()) for name, weight in weights(sockets).items()}
    picture = text_to_image(sockets, prompt="a red star")["image"]
    patched, _ = apply(sockets, "both", 1.3, -0.8)
    patched, _ = apply(patched, "tokens", 0.4, 0.4)
    assert not torch.equal(text_to_image(patched, prompt="a red [sun]")["image"], picture)
    assert torch.equal(text_to_image(sockets, prompt="a red star")["image"], picture)
    for name, weight in weights(sockets).items():
        assert weight.data_ptr() == originals[name][0], name
        assert torch.equal(weight, originals[name][1]), name


def test_several_add_up_in_any_order(sockets):
    first, _ = apply(sockets, "both", 0.5, 0.5)
    one_then_other, _ = apply(first, "model", -0.3, 1.0)
    second, _ = apply(sockets, "model", -0.3, 1.0)
    other_then_one, _ = apply(second, "both", 0.5, 0.5)
    torch.testing.assert_close(latent(one_then_other), latent(other_then_one), rtol=1e-4, atol=1e-5)
    assert far(latent(one_then_other), latent(first))
    assert far(latent(one_then_other), latent(second))


def test_a_negative_strength_takes_it_back(sockets):
    patched, _ = apply(apply(sockets, "both", 0.9, 0.9)[0], "both", -0.9, -0.9)
    torch.testing.assert_close(latent(patched), latent(sockets), rtol=1e-4, atol=1e-5)
    opposite, _ = apply(sockets, "both", -0.9, 0.0)
    assert far(latent(opposite), latent(sockets))
    assert far(latent(opposite), latent(apply(sockets, "both", 0.9, 0.0)[0]))


def test_strength_zero_gives_the_inputs_back(sockets):
    output = CascadeLoRAApply.execute(sockets["stage_c"], "no such file", 0.0, 0.0, sockets["clip"])
    assert output[0] is sockets["stage_c"]
    assert output[1] is sockets["clip"]
    model_alone, _ = apply(sockets, "both", 0.0, 1.0)
    assert model_alone["stage_c"] is sockets["stage_c"]
    text_alone, _ = apply(sockets, "both", 1.0, 0.0)
    assert text_alone["clip"] is sockets["clip"]


def test_without_clip(sockets):
    output = CascadeLoRAApply.execute(sockets["stage_c"], "both.safetensors", 1.0, 1.0)
    assert output[1] is None
    assert output.ui is not None
    assert (
        output.ui["text"][1]
        == "both.safetensors also changes the text encoder; connect clip so that it does."
    )
    with_clip, _ = apply(sockets, "both", 1.0, 0.0)
    assert torch.equal(latent({**sockets, "stage_c": output[0]}), latent(with_clip))
    shown_ui = CascadeLoRAApply.execute(sockets["stage_c"], "model.safetensors", 1.0, 1.0).ui
    assert shown_ui is not None
    assert len(shown_ui["text"]) == 1  # nothing is missing


def test_a_lora_for_the_text_alone(sockets):
    patched, ui = apply(sockets, "text")
    assert ui == ["text.safetensors (kohya): 2 layers of the text encoder, rank 3"]
    assert far(states(patched), states(sockets))


def test_tokens_of_a_lora(sockets):
    patched, ui = apply(sockets, "tokens", 0.0, 0.5)
    assert ui[1] == "Write [sun] in the prompt."
    assert far(states(patched, "a [sun]"), states(sockets, "a [sun]"))
    assert torch.equal(states(patched, "a red star"), states(sockets, "a red star"))
    without, _ = apply(sockets, "tokens", 1.0, 0.0)
    assert torch.equal(states(without, "a [sun]"), states(sockets, "a [sun]"))


def test_an_embedding_is_a_token_of_its_files_name(sockets):
    patched, ui = apply(sockets, "embedding")
    assert ui[1] == "Write [embedding] in the prompt."
    from_lora, _ = apply(sockets, "tokens")
    assert torch.equal(states(patched, "a [Embedding] star"), states(from_lora, "a [sun] star"))


def test_the_official_dialect_finds_its_layers_and_tokens(sockets, loras):
    patched, _ = apply(sockets, "official", 1.0, 1.0)
    by_name = Adapter("named.safetensors", "comfyui", full_attention(2))
    write_adapter(loras / "named.safetensors", by_name, "comfyui")
    named, _ = apply(sockets, "named", 1.0, 1.0)
    (loras / "named.safetensors").unlink()
    prompt = "red"  # without the token that the file changes
    assert far(latent(named, prompt), latent(sockets, prompt))
    conditions = CascadeTextEncode.execute(patched["clip"], prompt, "")[0][0][0]
    assert torch.equal(conditions, states(sockets, prompt)) != changes_token(sockets, prompt)
    torch.testing.assert_close(
        latent({**patched, "clip": sockets["clip"]}, prompt), latent(named, prompt), rtol=1e-4, atol=1e-5
    )


def changes_token(sockets, prompt) -> bool:
    return any(token == 3 for chunk in sockets["clip"].encoder.tokenizer.chunks(prompt) for token, _ in chunk)


def test_new_tokens_are_named_by_the_user(sockets, loras):
    size = len(sockets["clip"].encoder.tokenizer)
    rows, indices = randn(2, TEXT_WIDTH, seed=8), torch.tensor([size, size + 1])
    tensors = {"embeddings.embeddings": rows, "embeddings.indices": indices}
    write_safetensors(loras / "new.safetensors", tensors, {})
    _, ui = apply(sockets, "new")
    assert ui[1].startswith(
        "new.safetensors teaches 2 new tokens that it does not name, and they are left out"
    )
    patched, ui = apply(sockets, "new", new_tokens="[sun] ^star</w>; <moon>")
    assert ui[1:] == ["Write [sun], <moon> in the prompt."]
    star = sockets["clip"].encoder.tokenizer.tokens("star")
    row = sockets["clip"].encoder.model.text_model.embeddings.token_embedding.weight[star] + rows[:1]
    write_safetensors(loras / "row.safetensors", {"clip_g": row.contiguous()}, {})
    by_hand, _ = apply(sockets, "row")
    torch.testing.assert_close(states(patched, "a [sun]"), states(by_hand, "a [row]"))


class Listener:
    """Keeps what a node says."""

    def __init__(self):
        self.said: list[str] = []

    def notify(self, text):
        self.said.append(text)

    def step(self, step, total, preview):
        pass

    def interrupted(self):
        return False


def test_what_matches_in_part_is_said_and_not_refused(sockets, loras):
    tensors, _ = read_safetensors(loras / "both.safetensors")
    write_safetensors(
        loras / "partial.safetensors", {**tensors, "lora_unet_mystery.alpha": torch.ones(1)}, {}
    )
    listener = Listener()
    with reporting.reporting_to(listener):
        patched, ui = apply(sockets, "partial", 0.7, 0.7)
    assert ui[1].startswith("partial.safetensors holds 1 tensor of no known layer or token of Stable Cascade")
    assert listener.said == [" ".join(ui[1:])]
    assert torch.equal(latent(patched), latent(apply(sockets, "both", 0.7, 0.7)[0]))


def test_refusals(sockets, loras):
    wide = {f"{ATTENTION[0]}.to_q": low_rank(1, 48)}
    write(loras / "wide.safetensors", "kohya", wide)
    write(loras / "wide_text.safetensors", "kohya", {}, {TEXT.format(0): low_rank(1, 48)})
    write_safetensors(loras / "stage.safetensors", {"clf.1.weight": torch.zeros(2, 2)}, {})
    write_safetensors(loras / "nan.safetensors", {"clip_g": torch.full((1, TEXT_WIDTH), torch.nan)}, {})
    broken = {f"{ATTENTION[0]}.to_q": LowRank(torch.full((1, 32), torch.inf), torch.zeros(32, 1))}
    write(loras / "broken.safetensors", "kohya", broken)
    cases = {
        "wide": "is a LoRA for another Stage C: of the 1 layers that it changes 1 have another size",
        "wide_text": "is a LoRA for another text encoder",
        "stage": "is not a LoRA for Stable Cascade: 0 of its 1 tensors match",
        "nan": "nan.safetensors holds NaN or infinity in a learned token",
        "broken": "broken.safetensors holds NaN or infinity in down of down_blocks",
        "absent": "No LoRA file 'absent.safetensors' was found",
    }
    for name, words in cases.items():
        with pytest.raises(CascadeError, match=words):
            apply(sockets, name)
    with pytest.raises(CascadeError, match="is a LoRA of Stage C, but the network here is Stage B"):
        CascadeLoRAApply.execute(sockets["stage_b"], "both.safetensors", 1.0, 1.0)
    with pytest.raises(CascadeError, match="The CLIP is a VAE; connect Load Cascade Text Encoder"):
        CascadeLoRAApply.execute(sockets["stage_c"], "both.safetensors", 1.0, 1.0, sockets["stage_a"])


def test_embeddings_in_the_prompt(sockets, loras):
    folder = loras.parent / "embeddings"
    vectors = {"clip_g": 0.1 * randn(2, TEXT_WIDTH, seed=5)}
    write_safetensors(folder / "within" / "sun.safetensors", vectors, {})
    write_safetensors(folder / "odd,.safetensors", vectors, {})
    from_lora, _ = apply(sockets, "tokens")
    expected = states(from_lora, "a [sun], red")
    for name in ("sun", "sun.safetensors", "within/sun"):
        assert torch.equal(states(sockets, f"a embedding:{name}, red"), expected), name
    assert torch.equal(states(sockets, "a embedding:odd, red"), states(from_lora, "a [sun] red"))


def test_an_embedding_that_is_missing_is_left_out_and_told(sockets):
    """ComfyUI does the same, but says so in its log alone."""
    for prompt, rest in (
        ("a embedding:moon", "a "),
        ("a embedding:moon, red", "a , red"),
        ("embedding:../loras/x red", " red"),
        ("(embedding:moon:1.5) red", " red"),
        ("embedding:moon", ""),
    ):
        told = Told()
        with reporting_to(told):
            assert torch.equal(states(sockets, prompt), states(sockets, rest)), prompt
        (text,) = told.texts
        assert text.startswith("The prompt asks for embedding:")
        assert text.endswith("; its name is left out of the prompt.")


class Told:
    """A sink of reports that keeps the notices."""

    def __init__(self):
        self.texts: list[str] = []

    def notify(self, text):
        self.texts.append(text)

    def step(self, step, total, preview):
        """Ignores steps."""

    def interrupted(self):
        return False


def test_in_a_graph(loras, models, tmp_path, monkeypatch):
    """The graph host runs LoRAs chained, told on a line of their own, and again where their file was replaced."""
    monkeypatch.setenv("CASCADE_MODELS", f"{models}:{loras.parent}")
    graph = tiny(
        {
            "20": node("CascadeLoRAApply", model=["1", 0], clip=["4", 0], file="tokens.safetensors",
                       strength_model=0.5, strength_clip=1.0),
            "21": node("CascadeLoRAApply", model=["20", 0], file="changing.safetensors",
                       strength_model=-0.5, strength_clip=1.0),
            "7.model": ["21", 0], "5.clip": ["20", 1], "5.positive": "a [sun]",
        }
    )  # fmt: skip
    write(loras / "changing.safetensors", "kohya", stage_c_changes(1))
    observer = Observer()
    messages: list[str] = []
    monkeypatch.setattr(observer, "node_notified", messages.append)
    executor = Executor(observer)

    def executed() -> set[str]:
        return set(run_graph(graph, output_folder=tmp_path, executor=executor).timings)

    assert executed() == set(graph)
    assert messages == ["Write [sun] in the prompt."]
    assert executed() == set()
    write(loras / "changing.safetensors", "kohya", stage_c_changes(2))
    assert executed() == {"21", "7", "8", "9", "10"}
