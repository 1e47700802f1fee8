"""The demo's recipe: its losses against those of the core, its data, and what a toy of each network learns."""

import json
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch
from torch import nn

from cascade_nodes.cascade_core import StageB, StageC
from cascade_nodes.cascade_core.checkpoints import load_model, read_safetensors, write_safetensors
from cascade_nodes.cascade_core.diffusion.schedule import log_snr, noise_cond
from cascade_nodes.cascade_core.networks.inference import infer_config
from cascade_nodes.cascade_core.text.encoder import build_text_model, encode_tokens
from cascade_nodes.cascade_core.text.tokenizer import build_small_vocabulary, save_vocabulary
from cascade_nodes.cascade_core.training.losses import diffusion_loss
from cascade_nodes.cascade_core.vision import build_vision_model
from cascade_nodes.demo import job as jobs
from cascade_nodes.demo import recipe, train, train_encoders
from cascade_nodes.demo.captions import holds, parse, verbalise, vocabulary
from cascade_nodes.demo.captured_loss import CapturedLoss
from cascade_nodes.demo.clip_states import image_embeddings, text_states
from cascade_nodes.demo.dataset import alone, captions, edited, tokenise
from cascade_nodes.demo.job import FINISHED, Job, own_tokenizer
from cascade_nodes.demo.layout import (
    GRID,
    NAMELESS,
    NOTHING,
    PLACE_SHARE,
    VALUES_SHARE,
    cells_loss,
    cells_of,
    layout_loss,
    layout_of,
    place_error,
)
from cascade_nodes.demo.losses import NoiseLevels, epsilon_loss, outline_weights, share_right
from cascade_nodes.demo.network_task import Batch
from cascade_nodes.demo.places import contrasted, misplaced, placed, turned
from cascade_nodes.demo.pool import Pool
from cascade_nodes.demo.scenes import BACKGROUNDS, COLOURS, INVERSE, SHAPES, held_out_reason
from cascade_nodes.demo.stage_b_data import StageBData
from cascade_nodes.demo.stage_c_data import StageCData
from cascade_nodes.demo.wide_scenes import sample_wide
from cascade_nodes.demo.world import pack, render, sample_scenes

CPU = torch.device("cpu")


def a_job(folder: Path, network: str = "stage_b", **options) -> Job:
    settings = replace(recipe.SETTINGS[network], batch_size=4, steps=4, precision="fp32")
    return Job(settings, folder / "work" / network, folder, folder, CPU, 64, **options)


@pytest.mark.parametrize(("config", "network"), [(recipe.STAGE_B, StageB), (recipe.STAGE_C, StageC)])
def test_a_file_without_its_configuration_is_read_rightly(config, network):
    """Heads are 64 wide in both, as `infer_config` takes them to be."""
    with torch.device("meta"):
        built = network.from_config(config)
    _, inferred = infer_config(built.state_dict())
    same = network.from_config(inferred | {"dropout": config["dropout"]}).config
    assert same == built.config


def test_the_networks_are_small_enough():
    for config, network in ((recipe.STAGE_B, StageB), (recipe.STAGE_C, StageC)):
        with torch.device("meta"):
            numbers = sum(p.numel() for p in network.from_config(config).parameters())
        assert 2 * numbers + 100_000 <= 16 * 2**20


def test_text_states_are_those_of_the_text_encoder():
    torch.manual_seed(0)
    tokenizer = own_tokenizer()
    model = build_text_model({**recipe.TEXT, "vocab_size": len(tokenizer)}).eval()
    tokens = tokenise(
        ["a red star", "", "a small blue ring above a large green heart on sand"], tokenizer
    ).long()
    expected = encode_tokens(model, tokens, tokenizer.end_token)
    found = text_states(model, tokens, tokenizer.end_token)
    for name in ("states", "pooled"):
        assert torch.allclose(getattr(found, name), getattr(expected, name), atol=1e-5)


def test_image_embeddings_are_those_of_the_image_encoder():
    torch.manual_seed(0)
    model = build_vision_model({**recipe.VISION, "num_hidden_layers": 2}).eval()
    pixels = torch.randn(2, 3, 96, 96)
    assert torch.allclose(image_embeddings(model, pixels), model(pixel_values=pixels).image_embeds, atol=1e-5)


def test_noise_and_its_loss_are_those_of_the_diffusion_loss():
    torch.manual_seed(1)
    x0 = torch.randn(20_000, 1, 2, 2)
    noised, r, epsilon, weight = NoiseLevels(CPU).noise(x0)
    own = epsilon_loss(torch.zeros_like(x0), epsilon, weight)["loss"]
    core = diffusion_loss(lambda noised, r: torch.zeros_like(noised), x0)["loss"]
    assert own.item() == pytest.approx(core.item(), rel=0.05)
    assert torch.equal(r[:1000], noise_cond(log_snr(torch.ones(1000))))
    assert (noised[:1000] - epsilon[:1000]).abs().max() < 0.1  # pure noise
    halves = torch.cat([torch.zeros(20_000, 1, 2, 1), torch.full((20_000, 1, 2, 1), 2.0)], dim=3)
    placed = epsilon_loss(torch.zeros_like(x0), epsilon * (halves > 0), weight, halves)["loss"]
    assert placed.item() == pytest.approx(own.item(), rel=0.05)


def test_outlines_of_small_objects_weigh_most():
    small, large = (
        render(sample_wide(12, 3, objects=(1, 0, 0), weights={"small": a, "large": b})) / 255
        for a, b in ((1, 0), (0, 1))
    )
    weights = [outline_weights(images, (64, 64)).flatten(1) for images in (small, large)]
    assert all(value.min() >= 1 for value in weights)
    assert weights[0].amax(1).mean() > 1.3 * weights[1].amax(1).mean()
    assert torch.equal(outline_weights(torch.ones(1, 3, 256, 256), (64, 64)), torch.ones(1, 1, 64, 64))


def test_a_turned_caption_is_false_by_its_relation_alone():
    rng, count = Random(0), 0
    for scene in sample_wide(60, 4, objects=(1, 1, 1)).scenes():
        right, *wrong, back = contrasted(scene, rng, 3)
        assert len(wrong) == 3
        assert holds(parse(right), scene)
        if back:
            count += 1
            before, after = parse(right), parse(back)
            assert not holds(after, scene)
            assert after.relation == INVERSE[before.relation or ""]
            assert replace(after, relation=before.relation) == before
        else:
            assert parse(right).relation is None or holds(parse(turned(right, scene)), scene)
    assert count > 15
    assert turned("a red star to the left of a blue ring", scene).endswith("to the right of a blue ring")


def test_places_are_told_and_mistaken():
    rng, told = Random(1), 0
    for scene in sample_wide(40, 6, objects=(1, 1, 0)).scenes():
        spec = placed(scene, rng)
        if spec is None:
            continue
        told += 1
        text = verbalise(spec, Random(3))
        assert holds(parse(text), scene)
        wrong = misplaced(spec, scene, rng, 2, 3)
        assert wrong
        assert text not in wrong
        assert not any(holds(parse(false), scene) for false in wrong)
    assert told > 20


def test_the_share_of_relations_that_are_told_apart():
    image, right = torch.eye(4), torch.eye(4)
    wrong = torch.stack([*torch.eye(4)[1:3], 2 * torch.eye(4)[2] + torch.eye(4)[3], torch.eye(4)[3]])
    right = torch.where(torch.tensor([[False], [False], [True], [False]]), torch.eye(4)[0], right)
    counted = torch.tensor([True, True, True, False])
    assert share_right(image, right, wrong, counted).item() == pytest.approx(2 / 3)


def test_a_run_begins_with_exported_weights(toy, monkeypatch, capsys):
    job = a_job(toy, "stage_b", start=toy)
    job.folder, job.scenes = toy / "work" / "from", 16
    seen = {}
    monkeypatch.setattr(jobs.Loop, "run", lambda loop: seen.update(loop.task.trained.state_dict()))
    train.train_stage_b(job)
    tensors, _ = read_safetensors(toy / "demo_stage_b.safetensors")
    assert all(torch.equal(seen[f"stage_b.{name}"], value.float()) for name, value in tensors.items())
    assert f"begins with {len(tensors)} of {len(tensors)} tensors" in capsys.readouterr().out


def test_a_text_encoder_of_another_vocabulary_gives_its_rows_by_token(tmp_path, monkeypatch):
    words = (vocabulary() - {"star", "sand"}) | {"zebra", "aardvark", ","}
    tokens, merges = build_small_vocabulary(words)
    config = recipe.TEXT | {"num_hidden_layers": 1}
    before = build_text_model(config | {"vocab_size": len(tokens)})
    folder = tmp_path / "before"
    write_safetensors(folder / "demo_text_encoder" / "model.safetensors", before.state_dict(), {})
    save_vocabulary(folder / "demo_text_encoder", tokens, merges)
    ours = own_tokenizer().backend.get_vocab()
    model = build_text_model(config | {"vocab_size": len(ours)})
    random = model.state_dict()[jobs.TOKEN_ROWS].clone()
    monkeypatch.setattr(jobs.Loop, "run", lambda loop: None)
    job = a_job(tmp_path, "layout", start=folder)
    job.train({"text": model}, lambda: lambda step: Batch([]), dict, lambda weights: None)
    rows, old = (m.state_dict()[jobs.TOKEN_ROWS] for m in (model, before))
    assert {"star</w>", "sand</w>"} <= ours.keys() - tokens.keys()
    assert sum(ours[token] != tokens[token] for token in ours if token in tokens) > 100
    for token, number in ours.items():
        assert rows[number].equal(old[tokens[token]] if token in tokens else random[number])
    name = "text_model.embeddings.position_embedding.weight"
    assert model.state_dict()[name].equal(before.state_dict()[name])


def test_stage_c_says_so_where_the_text_encoder_is_a_bag_of_words(tmp_path, capsys):
    job = a_job(tmp_path, "stage_c")
    log = tmp_path / "work" / "layout" / "log.jsonl"
    log.parent.mkdir(parents=True)
    for share, told in ((0.97, False), (0.52, True)):
        log.write_text(json.dumps({"step": 1, "relations": share}) + "\n")
        train.tell_relations(job)
        assert ("52% of the relations" in capsys.readouterr().out) is told


def test_a_pool_follows_from_the_step_alone():
    def pool(endless: bool) -> Pool:
        return Pool(lambda number: [torch.full((2,), number)], parts=3, first=1, every=10, endless=endless)

    def contents(endless: bool, *steps: int) -> list[int]:
        one = pool(endless)
        for step in steps:
            one.advance(step)
        return one.tensors[0][: one.rows].tolist()

    assert contents(False, 0) == [0, 0]
    assert contents(False, 0, 10, 19, 20, 500) == [0, 0, 1, 1, 2, 2]
    assert contents(True, *range(45)) == contents(True, 44) == [3, 3, 4, 4, 2, 2]
    one = pool(True)
    one.advance(0)
    torch.manual_seed(0)
    assert one.take(50)[0].unique().tolist() == [0]  # what is not drawn yet is never taken


def test_objects_alone_are_those_of_the_scene():
    table = sample_wide(40, 5, objects=(0, 1, 0))
    for slot in (0, 1):
        singles, scenes = alone(table, slot, 7).scenes(), table.scenes()
        for single, scene in zip(singles, scenes, strict=True):
            (lone,), o = single.objects, scene.objects[slot]
            assert (lone.shape, lone.colour, lone.size) == (o.shape, o.colour, o.size)
            assert lone.radius < lone.x < 1 - lone.radius
            assert lone.radius < lone.y < 1 - lone.radius
    grounds = [single.background == scene.background for single, scene in zip(singles, scenes, strict=True)]
    assert 0.3 < sum(grounds) / 40 < 0.9


def test_an_edit_replaces_the_last_object_alone():
    table = sample_wide(30, 8, objects=(1, 1, 1))
    changed, masks = edited(table, 3)
    count = 0
    for before, after, mask in zip(table.scenes(), changed.scenes(), masks, strict=True):
        assert held_out_reason(after) is None
        assert before.objects[:-1] == after.objects[:-1]
        last, o = after.objects[-1], before.objects[-1]
        assert (last.x, last.y, last.radius, last.size) == (o.x, o.y, o.radius, o.size)
        difference = (render([before]).int() - render([after]).int()).abs().amax((0, 1))
        assert not (difference > 60)[mask == 0].any()  # a shadow reaches a little beyond
        count += (difference > 60).any().item()
    assert count > 15


def test_captions_of_a_table_are_those_of_its_scenes():
    table, tokenizer = sample_wide(5, 3, objects=(1, 1, 0)), own_tokenizer()
    assert torch.equal(captions(table, 2, tokenizer, 9), captions(table.scenes(), 2, tokenizer, 9))


def test_a_loss_that_cannot_be_captured_runs_as_it_is():
    weight = nn.Parameter(torch.tensor(2.0))
    loss = CapturedLoss(lambda x: {"loss": (weight * x).sum()}, [weight])
    loss([torch.tensor([3.0, 4.0])])["loss"].backward()
    assert weight.grad is not None
    assert weight.grad.item() == 7


def learns(job: Job, steps: int) -> list[dict]:
    """Trains a scale by the clock or by steps; its log."""
    weight = nn.Linear(1, 1)

    def draw(step: int) -> Batch:
        return Batch([torch.randn(8, 1)])

    def loss(x):
        return {"loss": (weight(x) - 3 * x).square().mean()}

    written = []
    job.settings = replace(job.settings, steps=steps, warmup=2, learning_rate=1e-2, ema=0.5)
    job.train({"weight": weight}, lambda: draw, loss, written.append)
    return written


def test_a_run_by_the_clock_ends_in_time_and_goes_on(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(jobs.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(jobs.time, "time", lambda: now[0])
    rates = []
    original = jobs.Clock.ended

    def ended(self):
        now[0] += 0.25
        done = original(self)
        rates.append(self.loop.optimiser.param_groups[0]["lr"])
        return done

    monkeypatch.setattr(jobs.Clock, "ended", ended)
    learns(a_job(tmp_path, until=150.0, minutes=0.5), 10)  # stopped after 30 of 50 s
    folder = tmp_path / "work" / "stage_b"
    assert not (folder / FINISHED).exists()
    now[0] = 500.0
    (weights,) = learns(a_job(tmp_path, until=520.0), 10)
    finished = json.loads((folder / FINISHED).read_text())
    assert finished["seconds"] == 50
    assert 190 <= finished["steps"] <= 205
    assert max(rates) == pytest.approx(1e-2, rel=0.1)
    assert rates[-1] < 0.05 * max(rates)  # the learning rate came down in time
    assert weights["weight"].keys() == {"weight", "bias"}


def test_a_run_by_the_clock_writes_what_it_has_as_it_goes(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(jobs.time, "monotonic", lambda: now[0])

    def ended(self, original=jobs.Clock.ended):
        now[0] += 10
        return original(self)

    monkeypatch.setattr(jobs.Clock, "ended", ended)
    written = learns(a_job(tmp_path, fit=10.0), 10)  # 600 s
    assert len(written) == 3  # after 210 and 420 s, and in the end


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A cascade of toys trained for a few steps, and the folder of its weights."""
    folder = tmp_path_factory.mktemp("cascade")
    small = {
        "STAGE_A": recipe.STAGE_A | {"c_hidden": 8, "bottleneck_blocks": 1},
        "COMPRESSOR": recipe.COMPRESSOR | {"stages": [["fused", 1, 3, 2, 16, 1]] * 4, "c_last": 16},
        "PREVIEWER": recipe.PREVIEWER | {"c_hidden": 16},
        "TEXT": recipe.TEXT | {"num_hidden_layers": 1},
        "VISION": recipe.VISION | {"num_hidden_layers": 1, "patch_size": 32},
        "STAGE_B": recipe.STAGE_B | {"c_hidden": [8, 8, 64], "nhead": [-1, -1, 1], "blocks": [[1, 1, 1], [1, 1, 1]]},
        "STAGE_C": recipe.STAGE_C | {"c_hidden": [64, 64], "nhead": [1, 1], "blocks": [[1, 1], [1, 1]]},
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, config in small.items():
            patch.setattr(recipe, name, config)
        patch.setattr(
            train, "DetailDecoder", lambda c: nn.Sequential(nn.Conv2d(c, 3, 1), nn.Upsample(scale_factor=16))
        )
        patch.setattr(
            train_encoders,
            "EmbeddingDecoder",
            lambda width, channels=3: nn.Sequential(
                nn.Linear(width, channels * 16),
                nn.Unflatten(1, (channels, 4, 4)),
                nn.Upsample(scale_factor=12),
            ),
        )
        for name in ("stage_a", "compressor", "clip", "layout", "vision", "stage_c", "stage_b"):
            job = a_job(folder, name)
            job.scenes = 16
            train.STAGES[name](job)
        yield folder


def test_each_network_trains_and_its_file_reads_back(toy):
    for name in ("stage_a", "compressor", "previewer", "stage_b", "stage_c"):
        tensors, metadata = read_safetensors(toy / f"demo_{name}.safetensors")
        assert {t.dtype for t in tensors.values() if t.is_floating_point()} == {torch.float16}
        assert all(t.isfinite().all() for t in tensors.values())
        _, kind, _ = load_model(toy / f"demo_{name}.safetensors", dtype=torch.float32)
        assert kind == metadata["kind"] == name
    assert (toy / "work" / "stage_b" / FINISHED).exists()


def test_a_given_compressor_waits_for_its_decoders(toy, tmp_path):
    job = a_job(tmp_path, "compressor")
    job.start, job.scenes = toy, 16
    train.STAGES["compressor"](job)
    for name, changed in (("compressor", False), ("previewer", True)):
        own, given = (read_safetensors(folder / f"demo_{name}.safetensors")[0] for folder in (tmp_path, toy))
        learned = [key for key in own if key.endswith("weight")]
        assert any(not own[key].equal(given[key]) for key in learned) == changed, name


def test_what_stage_c_learns_from(toy):
    torch.manual_seed(0)
    job = a_job(toy, "stage_c")
    job.settings = replace(job.settings, batch_size=40)
    job.scenes = 16
    data = StageCData(job, own_tokenizer())
    rehearsed = {tuple((v.shape, v.dtype) for v in tensors) for tensors in data.rehearsals()}
    data.load()
    seen, drawn = {}, set()
    for step in range(30):
        noised, r, epsilon, weight, tokens, images, places = data.draw(step).tensors
        assert noised.shape == epsilon.shape
        assert len(r) == len(weight) == len(tokens) == len(images) == 40
        assert places.mean().item() == pytest.approx(1)
        drawn.add(tuple((v.shape, v.dtype) for v in data.draw(step).tensors))
        seen.setdefault((images.shape[1], *noised.shape[-2:]), []).append((tokens, images))
    square = (1, 6, 6)
    assert square in seen
    assert (2, 6, 6) in seen
    assert {shape[1:] for shape in seen if shape[0] == 1} >= {(6, 6), (5, 8)}
    assert len(drawn & rehearsed) >= 4  # captured before
    assert {shapes[5][0][1] for shapes in drawn - rehearsed} <= {3}  # three pictures as one prompt are rare
    empty = data.empty
    for shape, batches in seen.items():
        worded = torch.cat([(tokens != empty).any(1) for tokens, _ in batches])
        with_image = torch.cat([images.abs().amax((1, 2)) > 0 for _, images in batches])
        if shape[1:] != (6, 6):
            assert not with_image.any()
            continue
        expected = 0.75 if shape[0] > 1 else 0.15 + 0.75 * 0.3
        assert with_image.float().mean().item() == pytest.approx(expected, abs=0.1)
        assert (with_image & ~worded).any()
        assert (~with_image & worded).any()
        if shape[0] > 1:
            assert (with_image & worded).any()


def test_stage_b_is_rehearsed_with_the_shapes_that_it_trains_on(toy):
    data = StageBData(a_job(toy, "stage_b"))
    data.job.scenes = 16
    data.load()
    shapes = [[(v.shape, v.dtype) for v in data.draw(step).tensors] for step in range(4)]
    assert [(v.shape, v.dtype) for v in next(data.rehearsals())] in shapes


def test_nothing_held_out_is_drawn_to_learn_from(toy):
    from cascade_nodes.demo.drawing import ordinary_scenes

    job = a_job(toy, "stage_c")
    drawn = [ordinary_scenes(job, 300, n, objects=shares) for n, shares in enumerate([(), (0, 0, 1)])]
    assert all(held_out_reason(scene) is None for table in drawn for scene in table.scenes())
    assert any(held_out_reason(scene) for scene in sample_scenes(4, 1, "held_out"))


@pytest.mark.nightly
def test_stage_b_learns_a_picture(toy, monkeypatch):
    """On one batch of pure noise levels the weighted error falls well below that of predicting nothing."""
    job = a_job(toy, "stage_b")
    job.folder = toy / "work" / "again"
    job.scenes = 16
    job.settings = replace(job.settings, steps=24, warmup=2, learning_rate=5e-3)
    monkeypatch.setattr(jobs, "LOG_EVERY", 6)
    train.train_stage_b(job)
    rows = [json.loads(line) for line in (job.folder / "log.jsonl").read_text().splitlines()]
    assert rows[0]["epsilon"] == pytest.approx(1, abs=0.15)
    assert rows[-1]["epsilon"] < 0.93 * rows[0]["epsilon"]


def test_a_layout_is_read_by_kind_and_its_loss_is_least_where_all_is_right():
    scenes = sample_wide(4, 3, objects=(0, 1, 0))
    layout = layout_of(scenes, torch.device("cpu"))
    present, places = torch.full((4, 64), -20.0), torch.full((4, 64, 2), 0.5)
    large, background = torch.zeros(4, 64), torch.full((4, 5), -20.0)
    for row, scene in enumerate(scenes.scenes()):
        for o in scene.objects:
            kind = SHAPES.index(o.shape) * 8 + COLOURS.index(o.colour)
            present[row, kind], places[row, kind] = 20.0, torch.tensor([o.x, o.y])
            large[row, kind] = 20.0 if o.size == "large" else -20.0
        background[row, BACKGROUNDS.index(scene.background)] = 20.0
    right = layout_loss((present, places, large, background), layout)
    assert right["loss"].item() == pytest.approx(0, abs=1e-5)
    moved = places.clone()
    moved[..., 0] += 0.3
    assert place_error(moved, layout).tolist() == pytest.approx([0.09] * 4, abs=1e-5)
    assert layout_loss((present, moved, large, background), layout)["loss"].item() == pytest.approx(
        0.09 * PLACE_SHARE, abs=1e-4
    )


def test_cells_hold_what_stands_in_them_and_their_loss_is_least_where_all_is_right():
    table = sample_wide(4, 3, objects=(0, 1, 0))
    cells = cells_of(pack(table))
    for row, scene in enumerate(table.scenes()):
        assert (cells.shape[row] != NOTHING).sum() == len(scene.objects)
        for o in scene.objects:
            x, y = int(GRID * o.x), int(GRID * o.y)
            assert cells.shape[row, y, x] == SHAPES.index(o.shape)
            place = cells.values[row, y, x, 3:5] + torch.tensor([x, y])
            assert place.tolist() == pytest.approx([GRID * o.x, GRID * o.y], abs=1e-5)
            assert cells.values[row, y, x, 5].item() == pytest.approx(GRID * o.radius)
    packed = pack(table)
    others = packed._replace(shape=torch.where(packed.shape >= 0, len(SHAPES) + 3, -1))
    assert set(cells_of(others).shape.unique().tolist()) == {NAMELESS, NOTHING}

    logits = 20.0 * nn.functional.one_hot(cells.shape.long(), NOTHING + 1).movedim(-1, 1)
    right = cells_loss((logits, cells.values, cells.background), cells)
    assert right["loss"].item() == pytest.approx(0, abs=1e-5)
    assert right["right"] == 1
    darker = cells_loss((logits, cells.values - 0.1, cells.background), cells)
    assert darker["loss"].item() == pytest.approx(0.01 * VALUES_SHARE, abs=1e-4)
    empty = torch.zeros_like(logits)
    empty[:, NOTHING] = 20.0  # wrong of every object, right of every empty cell
    assert cells_loss((empty, cells.values, cells.background), cells)["loss"].item() == pytest.approx(
        20, abs=1e-3
    )
