"""The code of docs/python.md runs on the demo, its blocks one after the other, and what the page says of them holds."""

import logging
import logging.handlers
import os
import queue
import re
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from cascade_nodes import CascadeError, StableCascade
from cascade_nodes.cascade_core.pictures import as_image
from cascade_nodes.demo.door import WEIGHTS
from cascade_nodes.demo.high_resolution import squared
from cascade_nodes.demo.judge import read
from cascade_nodes.headless import run_graph
from cascade_nodes.tests.headless.published import write_sparse

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
STAR_AND_RING = [("red", "star"), ("blue", "ring")]
FOLDERS = {  # ComfyUI's, for the demo's files under published names
    "demo_stage_c.safetensors": "diffusion_models/stage_c_bf16.safetensors",
    "demo_stage_b.safetensors": "diffusion_models/stage_b_bf16.safetensors",
    "demo_stage_a.safetensors": "vae/stage_a.safetensors",
    "demo_text_encoder/model.safetensors": "text_encoders/demo/model.safetensors",
    "demo_text_encoder/vocab.json": "text_encoders/demo/vocab.json",
    "demo_text_encoder/merges.txt": "text_encoders/demo/merges.txt",
}


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> dict[str, Any]:
    """The variables after all of the page; `records` are those of its logger, `lines` what it printed."""
    folder = tmp_path_factory.mktemp("page")
    for source, target in FOLDERS.items():
        (folder / "models" / target).parent.mkdir(parents=True, exist_ok=True)
        (folder / "models" / target).symlink_to(WEIGHTS / source)
    lines: list[str] = []
    records: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    variables: dict[str, Any] = {"print": lines.append}
    handler = logging.handlers.QueueHandler(records)
    logger = logging.getLogger("cascade_nodes")
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    before = Path.cwd()
    os.chdir(folder)
    try:
        for block in BLOCKS:
            exec(compile(block.replace("1024", "256"), "docs/python.md", "exec"), variables)  # noqa: S102
    finally:
        os.chdir(before)
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
    return variables | {
        "lines": lines,
        "records": [records.get() for _ in range(records.qsize())],
        "folder": folder,
    }


def reading(picture: Image.Image, taught: bool = False):
    return read(squared(as_image(picture).movedim(-1, 1)), taught=taught)[0]


def things(picture: Image.Image, taught: bool = False) -> list[tuple[str | None, str | None]]:
    """(colour, shape) of each object, from left to right."""
    return [(o.colour, o.shape) for o in sorted(reading(picture, taught).objects, key=lambda o: o.x)]


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture).astype(int)


def test_examples_are_short():
    assert len(BLOCKS) >= 10
    assert all(sum(line != "" for line in block.splitlines()) <= 10 for block in BLOCKS)


def test_text_to_image(page):
    assert page["picture"].size == Image.open(page["folder"] / "star.png").size == (256, 256)
    assert things(page["picture"]) == things(page["quick"]) == STAR_AND_RING


def test_a_folder_of_ones_own(page):
    assert page["pictures"][0].size == (256, 256)
    with pytest.raises(CascadeError, match="closed"):
        page["published"]("a red star")
    assert page["lite"].files.find("stage_b").name == "stage_b_bf16.safetensors"


def test_files_are_chosen_as_the_page_says(tmp_path):
    for name, width, precision in (
        ("a_lite", 8, "BF16"),
        ("b_full", 16, "F32"),
        ("c_full", 16, "BF16"),
        ("d_full", 16, "BF16"),
    ):
        write_sparse(tmp_path / f"{name}.safetensors", {"clip_txt_mapper.weight": (width, width)}, precision)

    def chosen(**options: Any) -> str:
        return StableCascade.load(tmp_path, device="cpu", **options).files.find("stage_c").stem

    assert chosen() == chosen(dtype="bf16") == "c_full"
    assert chosen(dtype="fp32") == "b_full"
    assert chosen(prefer="lite") == "a_lite"
    assert chosen(stage_c="d_full.safetensors") == "d_full"


def test_several_pictures(page):
    assert [picture.size for picture in page["two"]] == [(256, 256)] * 2
    assert [things(picture) for picture in page["pair"]] == [[("green", "heart")], [("blue", "cross")]]
    tensor: Tensor = page["tensor"]
    assert tensor.shape == (1, 256, 256, 3)
    assert tensor.dtype == torch.float32
    assert 0 <= tensor.min() <= tensor.max() <= 1
    assert abs(pixels(page["two"][0]) - 255 * tensor[0].numpy()).max() < 3
    tensor.mul_(0.5)  # the caller's own: it may be changed in place


def test_image_to_image(page):
    assert things(page["grass"]) == STAR_AND_RING
    assert reading(page["grass"]).background == "grass"


def test_inpainting_leaves_what_lies_outside_the_mask(page):
    before, after = pixels(page["picture"]), pixels(page["inpainted"])
    assert (before[:, :128] == after[:, :128]).all()
    assert (before[:, 128:] != after[:, 128:]).any()
    assert things(page["inpainted"])[1] == ("green", "heart")


def test_outpainting_adds_room(page):
    assert page["wider"].size == (320, 256)
    seam = 256 - 32  # the mask fades into the picture over this width
    assert (pixels(page["picture"])[:, :seam] == pixels(page["wider"])[:, :seam]).all()


def test_pictures_as_prompts(page):
    assert sorted(things(page["variation"])) == sorted(STAR_AND_RING)
    assert page["mixed"].size == (256, 256)
    assert page["mixed"].tobytes() != page["variation"].tobytes()


def test_controlnet(page):
    assert things(page["recoloured"]) == [("purple", "star"), ("orange", "ring")]


def test_loras_and_learned_tokens(page):
    assert things(page["taught"], taught=True) == [("blue", "house"), ("green", "ring")]
    assert page["cascade"].loras == ()


def test_each_stage(page):
    assert page["latent"].shape == page["varied"].shape == (1, 16, 6, 6)
    assert [picture.size for picture in page["images"]] == [(256, 256)]
    assert page["encoded"].stage_c.shape == (1, 16, 6, 6)
    assert page["encoded"].stage_b.shape == (1, 4, 64, 64)
    assert things(page["again"]) == STAR_AND_RING
    assert not torch.equal(page["latent"], page["varied"])
    page["latent"].mul_(0.5)


def test_the_second_pass(page):
    assert page["large"].size == (384, 384)
    assert things(page["large"]) == STAR_AND_RING


def test_progress_previews_and_cancelling(page):
    steps = [f"stage_c: step {i} of 20" for i in range(1, 21)] + [
        f"stage_b: step {i} of 10" for i in range(1, 11)
    ]
    assert page["lines"] == [*steps, "cancelled"]
    previews = {path.name for path in page["folder"].glob("stage_*.png")}
    assert previews == {"stage_c_10.png", "stage_c_20.png", "stage_b_10.png"}


def test_the_logger_hears_of_every_stage(page):
    messages = [record.getMessage() for record in page["records"] if record.levelno == logging.DEBUG]
    assert any("Stage C" in message for message in messages)
    assert any("Stage B" in message for message in messages)


def test_a_second_thread_waits(page):
    """Each thread gets the latent that it gets alone, and no step of one falls between those of the other."""
    cascade: StableCascade = page["cascade"]
    steps: list[int] = []
    latents: dict[int, Tensor] = {}

    def make(seed: int) -> None:
        latents[seed] = cascade.prior("a red star", seed=seed, callback=lambda _: steps.append(seed))

    threads = [threading.Thread(target=make, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert steps in ([1] * 20 + [2] * 20, [2] * 20 + [1] * 20)
    assert torch.equal(latents[2], cascade.prior("a red star", seed=2))


def test_the_picture_is_that_of_the_graph(page, tmp_path):
    result = run_graph(str(ROOT / "example_workflows" / "api" / "text_to_image.json"), output_folder=tmp_path)
    assert pixels(Image.open(result.pictures[0].path)).tobytes() == pixels(page["watched"]).tobytes()


def test_the_example_of_the_readme_runs(monkeypatch, tmp_path):
    """The Japanese page shows the same code."""
    pages = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.ja.md")]
    (block,), (japanese,) = (re.findall(r"```python\n(.*?)```", page, re.DOTALL) for page in pages)
    assert re.sub(" +#.*", "", japanese) == re.sub(" +#.*", "", block)
    monkeypatch.chdir(tmp_path)
    variables: dict[str, Any] = {}
    exec(compile(block, "README.md", "exec"), variables)  # noqa: S102
    assert things(variables["picture"]) == things(variables["grey"]) == STAR_AND_RING
    assert things(variables["house"], taught=True) == [("red", "house")]
    with pytest.raises(CascadeError, match="closed"):
        variables["cascade"](variables["prompt"])
