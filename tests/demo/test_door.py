"""The front door and the graphs make the same pictures, to the byte, in every task; a wrong call is refused at once."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageChops, ImageOps

from cascade_nodes import CascadeError, Control, StableCascade, StageSettings
from cascade_nodes.headless import Executor, run_graph

EXAMPLES = Path(__file__).parents[2] / "example_workflows"
INPUT = EXAMPLES / "input"
SCENE = INPUT / "cascade_scene.png"
SEED = 5
PRIOR: dict[str, Any] = {"seed": SEED, "steps": 2}  # so few steps that all tasks take seconds
DECODER = StageSettings(1, cfg=1.4, cfg_rescale=0.0)
HOLE = Image.open(INPUT / "cascade_hole.png")
# The mask of LoadImage: what is transparent.
PAINTED = {
    "image": HOLE,
    "mask": ImageOps.invert(HOLE.getchannel("A")),
}
Make = Callable[[StableCascade, str], Any]


def high_resolution(cascade: StableCascade, prompt: str) -> Any:
    first = cascade(prompt, **PRIOR, decoder=DECODER, output="tensor")
    settings = StageSettings(1, cfg=1.0, cfg_rescale=0.0)
    return cascade.second_pass(
        first, prompt, size=(512, 512), seed=SEED, denoise=0.3, settings=settings, tile_size=256
    )


def lora(cascade: StableCascade, prompt: str) -> Any:
    names = [cascade.add_lora(f"demo_{name}.safetensors") for name in ("lora_house", "token_loop")]
    pictures = cascade(prompt, **PRIOR, decoder=DECODER)
    for name in names:
        cascade.remove_lora(name)
    return pictures


def few_steps(cascade: StableCascade, prompt: str) -> Any:
    name = cascade.add_lora("demo_lora_few_steps.safetensors")
    pictures = cascade(prompt, **PRIOR, cfg=1.0, sampler="lcm", decoder=DECODER)
    cascade.remove_lora(name)
    return pictures


def reconstruction(cascade: StableCascade, prompt: str) -> Any:
    encoded = cascade.encode(SCENE)
    return cascade.decode(encoded.stage_c, prompt, seed=SEED, steps=1)


def called(**options: Any) -> Make:
    return lambda cascade, prompt: cascade(prompt, **PRIOR, decoder=DECODER, **options)


TASKS: dict[str, Make] = {
    "text_to_image": called(),
    "image_to_image": called(image=SCENE, denoise=0.8),
    "inpaint": called(**PAINTED),
    "outpaint": called(image=INPUT / "cascade_narrow.png", room=(0, 0, 112, 0)),
    "image_variation": called(image_prompts=[SCENE], batch=4, cfg=4.0),
    "controlnet_canny": called(controls=[Control("demo_controlnet_canny.safetensors", image=SCENE)]),
    "controlnet_inpainting": called(
        **PAINTED, grow=1, controls=[Control("demo_controlnet_inpainting.safetensors")]
    ),
    "super_resolution": called(
        controls=[
            Control(
                "demo_controlnet_super_resolution.safetensors",
                image=INPUT / "cascade_small.png",
                reads="enlarged",
            )
        ]
    ),
    "high_resolution": high_resolution,
    "reconstruction": reconstruction,
    "lora": lora,
    "few_steps": few_steps,
}


@pytest.fixture(scope="module")
def cascade() -> StableCascade:
    return StableCascade.demo()


@pytest.fixture(scope="module")
def executor() -> Executor:
    """Keeps the networks from graph to graph."""
    return Executor()


def shortened(graph: dict[str, Any]) -> dict[str, Any]:
    for node in graph.values():
        if node["class_type"] == "CascadePriorSampler":
            node["inputs"] |= PRIOR
        if node["class_type"] == "CascadeDecoderSampler":
            node["inputs"] |= {"seed": SEED, "steps": 1}
    return graph


def prompt_of(graph: dict[str, Any]) -> str:
    (prompt,) = (n["inputs"]["positive"] for n in graph.values() if n["class_type"] == "CascadeTextEncode")
    return prompt


@pytest.mark.parametrize("task", TASKS)
def test_a_picture_is_that_of_the_graph(task, cascade, executor, tmp_path):
    graph = shortened(json.loads((EXAMPLES / "api" / f"{task}.json").read_text()))
    result = run_graph(graph, input_folder=INPUT, output_folder=tmp_path, executor=executor)
    saved = [
        picture.path for picture in result.pictures if graph[picture.node_id]["class_type"] == "SaveImage"
    ]
    pictures = TASKS[task](cascade, prompt_of(graph))
    assert len(pictures) == len(saved)
    for picture, path in zip(pictures, saved, strict=True):
        difference = ImageChops.difference(picture, Image.open(path).convert("RGB"))
        assert difference.getbbox() is None, difference.getextrema()


def test_every_example_is_compared():
    published = {"text_to_image_published", "text_to_image_checkpoints"}
    assert {path.stem for path in (EXAMPLES / "api").glob("*.json")} - published == TASKS.keys()


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"output": "array"}, "output is 'array'"),
        ({"tile_size": 64}, "tile_size is 64"),
        ({"decoder": StageSettings(1, cfg=1.0, sampler="euler")}, "sampler is 'euler'"),
        ({"size": (250, 256)}, "250 × 256"),
        ({"batch": 0}, "batch is 0"),
        ({"mask": Image.new("L", (256, 256))}, "mask was given without image"),
        ({"image_prompts": Image.new("RGB", (256, 256))}, "image_prompts"),
    ],
)
def test_a_wrong_call_is_refused_before_a_step(wrong, sentence, cascade):
    steps = []
    with pytest.raises(CascadeError, match=sentence):
        cascade("a red star", callback=steps.append, **wrong)
    assert steps == []


def test_the_second_pass_refuses_a_size(cascade):
    with pytest.raises(CascadeError, match="0 × 304"):
        cascade.second_pass(Image.new("RGB", (256, 256)), "a red star", size=(0, 304))
