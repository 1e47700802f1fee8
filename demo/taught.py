"""Training data for the demo's adapters: a new shape for a LoRA, and a name for a held-out object for a token.

`python -m cascade_nodes.demo.taught house OUT` (or loop) writes pictures with captions for `cascade train`.
"""

import argparse
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

from cascade_nodes.demo.captions import Spec, caption, full_spec, verbalise
from cascade_nodes.demo.render_folder import Captioned, write_captioned
from cascade_nodes.demo.scenes import INVERSE, Scene, sample_scenes
from cascade_nodes.demo.words import SHAPE_WORDS

LOOP = ("ring", "green")  # shape and colour; held out from all training
LOOP_NAME = "[loop]"
ORDINARY = 4  # one of this many pictures for the LoRA has no house, so that other shapes are not forgotten


def with_house(count: int, seed: int) -> list[tuple[Scene, Scene]]:
    """Pairs of a scene whose first object is a house, and the same scene with another shape, for its words."""
    rng = Random(seed)
    pairs = []
    for scene in sample_scenes(2 * count, seed):
        slot = rng.randrange(len(scene.objects))
        if len({o.shape for o in scene.objects}) == len(scene.objects):
            worded = scene if slot == 0 else turned(scene)
            pairs.append((_changed(worded, 0, shape="house"), worded))
    return pairs[:count]


def with_loop(count: int, seed: int) -> list[Scene]:
    """Scenes with a green ring, beside objects that are neither green nor rings."""
    rng = Random(seed)
    shape, colour = LOOP
    scenes = []
    for scene in sample_scenes(2 * count, seed):
        slot = rng.randrange(len(scene.objects))
        other_objects = [o for i, o in enumerate(scene.objects) if i != slot]
        if all(o.shape != shape and o.colour != colour for o in other_objects):
            scenes.append(_changed(scene, slot, shape=shape, colour=colour))
    return scenes[:count]


def _changed(scene: Scene, slot: int, **values: str) -> Scene:
    objects = tuple(replace(o, **values) if i == slot else o for i, o in enumerate(scene.objects))
    return replace(scene, objects=objects)


def turned(scene: Scene) -> Scene:
    """Swaps the two objects of a scene and inverts the relation."""
    assert scene.relation is not None
    return replace(scene, objects=scene.objects[::-1], relation=INVERSE[scene.relation])


def say_house(text: str, shape: str) -> str:
    """Replaces every word of that shape by "house"."""
    words = "|".join(SHAPE_WORDS[shape])
    return re.sub(rf"\b({words})(s?)\b", r"house\2", text)


def say_loop(text: str) -> str | None:
    """Replaces the green ring by the token; None where the words do not stand together."""
    shape, colour = LOOP
    words = "|".join(SHAPE_WORDS[shape])
    replaced, count = re.subn(rf"\b{colour} ({words})\b", LOOP_NAME, text)
    replaced = re.sub(rf"\ban (\{LOOP_NAME})", r"a \1", replaced)
    return replaced if count == 1 and colour not in replaced else None


def house_prompts(count: int, seed: int) -> tuple[list[str], list[Spec]]:
    """Prompts that state everything, including a house, and their specs."""
    rng = Random(seed)
    prompts, specs = [], []
    for scene, worded in with_house(count, seed):
        prompts.append(say_house(verbalise(full_spec(worded), rng), worded.objects[0].shape))
        specs.append(full_spec(scene))
    return prompts, specs


def loop_prompts(count: int, seed: int) -> tuple[list[str], list[str], list[Spec]]:
    """Prompts with the token, the same in words, and their specs."""
    rng = Random(seed)
    with_token, in_words, specs = [], [], []
    for scene in with_loop(2 * count, seed):
        text = verbalise(full_spec(scene), rng)
        token_text = say_loop(text)
        if token_text is not None:
            with_token.append(token_text)
            in_words.append(text)
            specs.append(full_spec(scene))
    return with_token[:count], in_words[:count], specs[:count]


def house_scenes(count: int, seed: int) -> list[tuple[Scene, Scene]]:
    """Pairs of a scene with a house and the scene that gives its words; ordinary ones among them with themselves."""
    ordinary = iter(sample_scenes(count, seed + 1))
    pairs = with_house(count, seed)
    for number in range(0, len(pairs), ORDINARY):
        scene = next(ordinary)
        pairs[number] = scene, scene
    return pairs


def house_words(pair: tuple[Scene, Scene], rng: Random, count: int) -> list[str]:
    """Captions of one of the `house_scenes`."""
    scene, worded = pair
    texts = [caption(worded, rng) for _ in range(count)]
    return texts if scene == worded else [say_house(text, worded.objects[0].shape) for text in texts]


def house_captions(count: int, seed: int, per_scene: int = 4) -> Iterator[Captioned]:
    """Training pictures of houses, mixed with ordinary ones."""
    rng = Random(seed)
    for pair in house_scenes(count, seed):
        yield Captioned(pair[0], house_words(pair, rng, per_scene))


def loop_captions(count: int, seed: int, per_scene: int = 4) -> Iterator[Captioned]:
    rng = Random(seed)
    for scene in with_loop(count, seed):
        texts = [say_loop(verbalise(full_spec(scene), rng)) for _ in range(6 * per_scene)]
        captions = [text for text in texts if text is not None][:per_scene]
        if captions:
            yield Captioned(scene, captions)


TAUGHT: dict[str, Callable[..., Iterator[Captioned]]] = {
    "house": house_captions,
    "loop": loop_captions,
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m cascade_nodes.demo.taught", description=__doc__)
    parser.add_argument("what", choices=TAUGHT)
    parser.add_argument("out", type=Path, help="the folder to write into")
    parser.add_argument("--count", type=int, default=2000, help="about how many pictures (2000)")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other scenes (0)")
    options = parser.parse_args(arguments)
    count = write_captioned(options.out, list(TAUGHT[options.what](options.count, options.seed)))
    print(f"{count} pictures in {options.out}")


if __name__ == "__main__":
    main()
