"""Learned tokens in prompts, in the encoder, and from files of every kind."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from cascade_nodes.cascade_core import CascadeError
from cascade_nodes.cascade_core.adapters import Adapter, LearnedToken
from cascade_nodes.cascade_core.adapters.embeddings import embedding_names, read_embedding
from cascade_nodes.cascade_core.adapters.tokens import NewToken, parse_new_tokens, taught_tokens
from cascade_nodes.cascade_core.checkpoints import write_safetensors
from cascade_nodes.cascade_core.text.encoder import TextEncoder, build_text_model, encode_tokens
from cascade_nodes.cascade_core.text.learned_tokens import TokenTable
from cascade_nodes.cascade_core.text.tokenizer import Tokenizer, build_small_vocabulary
from cascade_nodes.tests.golden_weights import read_golden, relative_error

LORA, _ = read_golden("stage_c_lora")
VOCABULARY, MERGES = build_small_vocabulary(["a", "red", "blue", "star", "ring", "left", "of", "stars"])
WIDTH = 32
CONFIG = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "projection_dim": 24,
    "vocab_size": len(VOCABULARY),
}
STAR, RED, RING = (VOCABULARY[f"{word}</w>"] for word in ("star", "red", "ring"))
FIRST = len(VOCABULARY)
CAT, DOG = 2368, 1929


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    torch.manual_seed(0)
    model = build_text_model(CONFIG).requires_grad_(False).eval()
    for weight in model.parameters():
        weight.normal_(std=0.3)
    return TextEncoder(model, Tokenizer.from_vocabulary(VOCABULARY, MERGES))


@pytest.fixture(scope="module")
def bundled() -> Tokenizer:
    return Tokenizer.bundled()


@pytest.fixture
def embedding(encoder) -> Tensor:
    return encoder.model.text_model.embeddings.token_embedding.weight


def vectors(count: int, seed: int = 0) -> Tensor:
    return 0.3 * torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


def adapter_of(*tokens: LearnedToken) -> Adapter:
    return Adapter("cat.safetensors", "official", tokens=tokens)


# In the prompt


def test_a_name_becomes_its_tokens(bundled):
    chunk = bundled.chunks("a photo of [fernando], a cat", {"[fernando]": [50000, 50001]})[0]
    assert [token for token, _ in chunk[:9]] == [49406, 320, 1125, 539, 50000, 50001, 267, 320, CAT]
    assert len(chunk) == 77


def test_one_weight_for_all_its_tokens(bundled):
    chunk = bundled.chunks("(cat [x]:1.3) ([x]) [x]", {"[x]": range(50000, 50003)})[0]
    assert chunk[1:11] == [(CAT, 1.3), *((50000 + i, w) for w in (1.3, 1.1, 1.0) for i in range(3))]


def test_names_in_any_case_but_not_within_words(bundled):
    names = {"star": [50000], "<Moon>": [50001], "starry": [50002], "Ω": [50003]}

    def learned(prompt: str) -> list[int]:
        return [token for chunk in bundled.chunks(prompt, names) for token, _ in chunk if token >= 50000]

    assert learned("star STAR stars superstar star's starry") == [50000, 50000, 50000, 50002]
    assert learned("<moon><MOON>s a<Moon>") == [50001, 50001, 50001]
    assert learned("Ω ωΩ") == [50003]


def test_two_names_that_differ_in_case_are_two(bundled):
    names = {"embedding:Foo": [50000], "embedding:foo": [50001]}
    chunk = bundled.chunks("embedding:Foo embedding:foo", names)[0]
    assert [token for token, _ in chunk[1:3]] == [50000, 50001]


def test_without_learned_names_nothing_changes(bundled):
    prompt = "a [cat] (dog:1.2) " * 20
    assert bundled.chunks(prompt, {"[fernando]": [50000]}) == bundled.chunks(prompt)
    assert bundled.chunks(prompt, {}) == bundled.chunks(prompt)


@pytest.mark.parametrize("count", [2, 7, 8, 20])
def test_short_ones_move_on_whole_and_long_ones_are_cut(bundled, count):
    seventy_four = "cat " * 74
    first, second = bundled.chunks(seventy_four + "[x] dog", {"[x]": range(50000, 50000 + count)})
    learned = list(range(50000, 50000 + count))
    here = 0 if count < 8 else 1
    assert [token for token, _ in first[75:]] == learned[:here] + [49407] * (2 - here)
    assert [token for token, _ in second[1 : count + 2 - here]] == [*learned[here:], DOG]


def test_more_vectors_than_a_chunk_holds(bundled):
    chunks = bundled.chunks("[x]", {"[x]": range(50000, 50200)})
    assert [token for chunk in chunks for token, _ in chunk if token >= 50000] == list(range(50000, 50200))
    assert [len(chunk) for chunk in chunks] == [77, 77, 77]


# In the encoder


def states_of(encoder: TextEncoder, rows: Tensor) -> Tensor:
    """What the encoder makes of embedded rows (n, C) between start and end, put in by hand."""
    model = encoder.model
    ids = torch.tensor(
        [[encoder.tokenizer.start_token, *[0] * len(rows), *[encoder.tokenizer.end_token] * (76 - len(rows))]]
    )

    class Given(nn.Module):
        def forward(self, tokens):
            embedded = nn.functional.embedding(tokens, table).clone()
            embedded[0, 1 : 1 + len(rows)] = rows
            return embedded

    embeddings = model.text_model.embeddings
    held, table = embeddings.token_embedding, embeddings.token_embedding.weight
    embeddings.token_embedding = Given()
    try:
        return encode_tokens(model, ids, encoder.tokenizer.end_token).states
    finally:
        embeddings.token_embedding = held


def test_vectors_stand_where_the_name_stood(encoder, embedding):
    learned = LearnedToken("[x]", vectors(3))
    rows = torch.cat([embedding[[RED]], learned.vectors, embedding[[STAR]]])
    encoded = encoder.encode(["red [x] star"], [learned])
    assert relative_error(encoded.states, states_of(encoder, rows)) <= 1e-6
    assert relative_error(encoded.states, encoder.encode(["red [x] star"]).states) > 0.1


def test_a_change_is_added_wherever_the_token_stands(encoder, embedding):
    change = LearnedToken("", vectors(1), index=STAR)
    rows = embedding[[STAR, RED, STAR]] + torch.tensor([[1.0], [0.0], [1.0]]) * change.vectors
    encoded = encoder.encode(["star red star"], [change])
    assert relative_error(encoded.states, states_of(encoder, rows)) <= 1e-6
    twice = encoder.encode(["star"], [change, change])
    assert relative_error(twice.states, states_of(encoder, embedding[[STAR]] + 2 * change.vectors)) <= 1e-6


def test_an_output_row_takes_the_states_place(encoder):
    learned = LearnedToken("[x]", vectors(2), output=True)
    zeros = replace(learned, vectors=torch.zeros(2, WIDTH), output=False)
    plain, encoded = encoder.encode(["red [x] star"], [zeros]), encoder.encode(["red [x] star"], [learned])
    assert torch.equal(encoded.states[0, 2:4], learned.vectors)
    others = [0, 1, *range(4, 77)]
    assert torch.equal(encoded.states[0, others], plain.states[0, others])
    assert torch.equal(encoded.pooled, plain.pooled)


def test_a_token_learned_at_both_ends(encoder):
    at_input, at_output = (
        LearnedToken("[x]", vectors(3)),
        LearnedToken("[x]", vectors(2, seed=1), output=True),
    )
    before = encoder.encode(["red [x] star"], [at_input])
    both = encoder.encode(["red [x] star"], [at_input, at_output])
    assert torch.equal(both.states[0, 2:4], at_output.vectors)
    assert torch.equal(both.states[0, 4:], before.states[0, 4:])
    assert torch.equal(both.pooled, before.pooled)


def test_weights_move_learned_states_too(encoder):
    learned = [LearnedToken("[x]", vectors(2))]
    weighted, plain, empty = (encoder.encode([p], learned).states for p in ("([x]:1.5) star", "[x] star", ""))
    expected = empty + torch.tensor([1.0, 1.5, 1.5, *[1.0] * 74])[:, None] * (plain - empty)
    assert relative_error(weighted, expected) <= 1e-6


def test_the_encoder_itself_is_left_alone(encoder, embedding):
    before, held = encoder.encode(["a red star"]), embedding.clone()
    learned = [LearnedToken("[x]", vectors(2)), LearnedToken("", vectors(1), index=RED)]
    assert torch.equal(
        encoder.encode(["a blue ring"], learned).states, encoder.encode(["a blue ring"]).states
    )
    assert not torch.equal(encoder.encode(["a red star"], learned).states, before.states)
    assert torch.equal(encoder.encode(["a red star"]).states, before.states)
    assert torch.equal(embedding, held)
    assert not encoder.model.text_model.embeddings.token_embedding._forward_hooks


def test_a_batch_is_its_single_runs(encoder):
    learned = [LearnedToken("[x]", vectors(2)), LearnedToken("", vectors(1), index=RED)]
    prompts = ["a [x]", "red star", "", "[x] " * 60]
    batch = encoder.encode(prompts, learned)
    for index, prompt in enumerate(prompts):
        single = encoder.encode([prompt], learned)
        assert relative_error(batch.states[index, : single.states.shape[1]], single.states[0]) <= 1e-6


def test_of_one_name_the_later_counts(encoder):
    first, later = LearnedToken("[x]", vectors(1)), LearnedToken("[x]", vectors(2, seed=1))
    assert torch.equal(
        encoder.encode(["[x]"], [first, later]).states, encoder.encode(["[x]"], [later]).states
    )


def test_gradients_reach_the_vectors(encoder):
    rows, change = nn.Parameter(vectors(2)), nn.Parameter(vectors(1))
    table = TokenTable([LearnedToken("[x]", rows), LearnedToken("", change, index=STAR)], FIRST, WIDTH)
    tokens = torch.tensor([[token for token, _ in encoder.tokenizer.chunks("[x] star", table.ids)[0]]])
    encoded = encode_tokens(encoder.model, tokens, encoder.tokenizer.end_token, table)
    encoded.pooled.square().sum().backward()
    assert rows.grad is not None
    assert (rows.grad.abs().sum(dim=1) > 0).all()
    assert change.grad is not None
    assert change.grad.abs().sum() > 0


# What a file teaches


def test_the_published_retoken():
    before = LORA["retoken.before"]  # (tokens, C)
    indices, rows = LORA["official.embeddings.indices"].tolist(), LORA["official.embeddings.embeddings"]
    tokens = [LearnedToken("", row[None], index) for index, row in zip(indices, rows, strict=True)]
    taught = taught_tokens(adapter_of(*tokens), 1.0, {}, before)
    everything = torch.arange(len(before))[None]
    table = TokenTable(taught, *before.shape)
    assert relative_error(table.embed(everything, before[None])[0], LORA["retoken.after"]) <= 1e-5
    assert relative_error(before, LORA["retoken.after"]) > 1e-2


def test_strength_multiplies_what_is_added(embedding):
    taught = taught_tokens(adapter_of(LearnedToken("", vectors(1), STAR)), -0.5, VOCABULARY, embedding)
    assert torch.equal(taught[0].vectors, -0.5 * vectors(1))
    own = LearnedToken("[x]", vectors(3))
    assert taught_tokens(adapter_of(own), 0.3, VOCABULARY, embedding) == (own,)
    assert taught_tokens(adapter_of(own), 0.0, VOCABULARY, embedding) == ()


def test_a_name_without_brackets_gets_them(embedding):
    adapter = adapter_of(*(LearnedToken(name, vectors(1)) for name in ("star", "[star]", "<star>")))
    names = [token.name for token in taught_tokens(adapter, 1.0, VOCABULARY, embedding)]
    assert names == ["[star]", "[star]", "<star>"]


def test_new_tokens_begin_as_the_mean_of_those_their_pattern_matches(embedding):
    adapter = adapter_of(*(LearnedToken("", vectors(1, seed), FIRST + seed) for seed in range(3)))
    new = [NewToken("[sun]", "^stars?</w>"), NewToken("<o>")]
    sun, o = taught_tokens(adapter, 2.0, VOCABULARY, embedding, new)  # the third is not named
    stars = embedding[[STAR, VOCABULARY["stars</w>"]]].mean(dim=0, keepdim=True)
    assert (sun.name, sun.index, o.name) == ("[sun]", None, "<o>")
    assert relative_error(sun.vectors, stars + 2 * vectors(1)) <= 1e-6
    assert relative_error(o.vectors, 2 * vectors(1, seed=1)) <= 1e-6
    assert taught_tokens(adapter, 1.0, VOCABULARY, embedding) == ()


def test_new_tokens_are_named_one_by_one():
    new = (NewToken("[fernando]", "^dog</w>"), NewToken("<x>"))
    assert parse_new_tokens("[fernando]  ^dog</w> ; <x>") == new
    assert parse_new_tokens("[fernando] ^dog</w>\n\n<x>\n") == new
    assert parse_new_tokens(" ;\n") == ()
    with pytest.raises(CascadeError, match="names 101 tokens; give at most 100"):
        parse_new_tokens(101 * "[x] ^dog;")


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("(a+)+$", "is not one of those that are read"),
        (".*", "is not one of those"),
        ("|".join(map(str, range(1000))), "at most 64 words"),
        ("^dog</w>", "No token of the vocabulary matches"),
    ],
)
def test_a_pattern_that_does_not_serve(embedding, pattern, words):
    adapter = adapter_of(LearnedToken("", vectors(1), FIRST))
    with pytest.raises(CascadeError, match=words):
        taught_tokens(adapter, 1.0, VOCABULARY, embedding, [NewToken("[sun]", pattern)])


def test_vectors_of_another_width_are_refused(embedding):
    adapter = adapter_of(LearnedToken("[x]", torch.zeros(1, 1280)))
    with pytest.raises(
        CascadeError, match=r"cat.safetensors teaches a token 1280 wide, but .* are 32; choose"
    ):
        taught_tokens(adapter, 1.0, VOCABULARY, embedding)


def test_nan_is_refused(embedding, tmp_path):
    with pytest.raises(CascadeError, match=r"cat.safetensors holds NaN or infinity in a learned token"):
        taught_tokens(adapter_of(LearnedToken("[x]", vectors(1).log())), 1.0, VOCABULARY, embedding)
    with pytest.raises(CascadeError, match=r"x.safetensors holds NaN or infinity"):
        read_embedding(embedding_file(tmp_path, {"clip_g": vectors(1).log()}), WIDTH)


# Embeddings in files of their own


def test_names_are_found_where_comfyui_finds_them():
    prompt = "embedding:a, (embedding:b:1.2) x embedding:dir/c.safetensors\nembedding:d[e] embedding:a,"
    assert embedding_names(prompt) == ["a,", "b", "dir/c.safetensors", "d"]
    assert embedding_names("no,embedding:a embedding: b, (embedding: \n c d:1.2) embedding:<e>") == [
        "b,",
        "c",
    ]
    for prompt in ("a embedding:", "embedding: ", "embedding: embedding:a", "(embedding::2)"):
        with pytest.raises(CascadeError, match="has embedding: without a name"):
            embedding_names(prompt)


def test_a_space_before_an_embeddings_name(tmp_path):
    tokenizer = Tokenizer.bundled()
    learned = {"embedding:cat": [90000, 90001]}
    for prompt in ("a embedding:cat hill", "a embedding: cat hill", "a embedding: \n cat hill"):
        assert (
            tokenizer.chunks(prompt, learned)[0][:6]
            == tokenizer.chunks("a embedding:cat hill", learned)[0][:6]
        )
        assert (90000, 1.0) in tokenizer.chunks(prompt, learned)[0]
    assert (90000, 1.2) in tokenizer.chunks("a (embedding: cat:1.2)", learned)[0]


def embedding_file(folder, tensors: dict[str, Tensor]):
    path = folder / "x.safetensors"
    write_safetensors(path, tensors, {})
    return path


@pytest.mark.parametrize(
    ("tensors", "rows"),
    [
        ({"clip_g": vectors(2), "clip_l": torch.zeros(2, 768)}, vectors(2)),  # ComfyUI, OneTrainer
        ({"emb_params": vectors(2).half()}, vectors(2).half().float()),  # Automatic1111
        ({"string_to_param.*": vectors(2)}, vectors(2)),
        ({"bundle_emb.<x>.clip_g": vectors(2), "lora_te_a.alpha": torch.ones(1)}, vectors(2)),
        ({"bundle_emb.<x>.string_to_param.*": vectors(2), "other": torch.ones(1)}, vectors(2)),
        ({"<anything>": vectors(1)[0]}, vectors(1)),
    ],
)
def test_every_kind_of_file(tmp_path, tensors, rows):
    assert torch.equal(read_embedding(embedding_file(tmp_path, tensors), WIDTH), rows)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (
            {"clip_g": torch.zeros(2, 768)},
            "x.safetensors holds vectors 768 wide, but the text encoder's are 32",
        ),
        ({"a": vectors(1), "b": vectors(1)}, r"x.safetensors holds 2 tensors \(first: a\), but an embedding"),
        ({"a": torch.zeros(1, 2, WIDTH)}, "but an embedding is expected"),
    ],
)
def test_other_files_are_refused(tmp_path, tensors, words):
    with pytest.raises(CascadeError, match=words):
        read_embedding(embedding_file(tmp_path, tensors), WIDTH)
