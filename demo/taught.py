"""What the demo is taught after its training: by LoRAs a new shape, and two pictures as one prompt; by a token a name
for a held-out object.

`python -m cascade_nodes.demo.taught house OUT` (or loop, mixing) writes pictures with captions for `cascade train`.
"""

import argparse
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

from cascade_nodes.demo.captions import Spec, caption, full_spec, verbalise
from cascade_nodes.demo.render_folder import Captioned, captions_of, write_captioned
from cascade_nodes.demo.scenes import BACKGROUNDS, INVERSE, Scene, alone, moved, sample_scenes
from cascade_nodes.demo.words import SHAPE_WORDS

LOOP = ("ring", "green")  # shape and colour; held out from all training
LOOP_NAME = "[loop]"
PAIRS = 0.5  # of the scenes with two objects: the share that two pictures prompt for, one of each object
ORDINARY = 4  # of so many pictures for the LoRA one is without a house, so that the rest is not forgotten


def with_house(count: int, seed: int) -> list[tuple[Scene, Scene]]:
    """Scenes whose first object is a house, and those whose words theirs are: there its shape is another."""
    rng = Random(seed)
    found = []
    for scene in sample_scenes(2 * count, seed):
        slot = rng.randrange(len(scene.objects))
        if len({o.shape for o in scene.objects}) == len(scene.objects):
            worded = scene if slot == 0 else turned(scene)
            found.append((_changed(worded, 0, shape="house"), worded))
    return found[:count]


def with_loop(count: int, seed: int) -> list[Scene]:
    """Scenes with a green ring each, beside nothing that is green or a ring."""
    rng = Random(seed)
    shape, colour = LOOP
    scenes = []
    for scene in sample_scenes(2 * count, seed):
        slot = rng.randrange(len(scene.objects))
        others = [o for i, o in enumerate(scene.objects) if i != slot]
        if all(o.shape != shape and o.colour != colour for o in others):
            scenes.append(_changed(scene, slot, shape=shape, colour=colour))
    return scenes[:count]


def _changed(scene: Scene, slot: int, **values: str) -> Scene:
    objects = tuple(replace(o, **values) if i == slot else o for i, o in enumerate(scene.objects))
    return replace(scene, objects=objects)


def turned(scene: Scene) -> Scene:
    """The same scene of two objects, told from the second one."""
    assert scene.relation is not None
    return replace(scene, objects=scene.objects[::-1], relation=INVERSE[scene.relation])


def say_house(text: str, shape: str) -> str:
    """The text with "house" for every word of that shape."""
    words = "|".join(SHAPE_WORDS[shape])
    return re.sub(rf"\b({words})(s?)\b", r"house\2", text)


def say_loop(text: str) -> str | None:
    """The text with the token for the green ring; None where the words do not stand together."""
    shape, colour = LOOP
    words = "|".join(SHAPE_WORDS[shape])
    said, count = re.subn(rf"\b{colour} ({words})\b", LOOP_NAME, text)
    said = re.sub(rf"\ban (\{LOOP_NAME})", r"a \1", said)
    return said if count == 1 and colour not in said else None


def house_prompts(count: int, seed: int) -> tuple[list[str], list[Spec]]:
    """Prompts that state everything, a house among it, and what they state."""
    rng = Random(seed)
    prompts, specs = [], []
    for scene, worded in with_house(count, seed):
        prompts.append(say_house(verbalise(full_spec(worded), rng), worded.objects[0].shape))
        specs.append(full_spec(scene))
    return prompts, specs


def loop_prompts(count: int, seed: int) -> tuple[list[str], list[str], list[Spec]]:
    """Prompts with the token, the same in words, and what they state."""
    rng = Random(seed)
    named, plain, specs = [], [], []
    for scene in with_loop(2 * count, seed):
        text = verbalise(full_spec(scene), rng)
        said = say_loop(text)
        if said is not None:
            named.append(said)
            plain.append(text)
            specs.append(full_spec(scene))
    return named[:count], plain[:count], specs[:count]


def house_captions(count: int, seed: int, each: int = 4) -> Iterator[Captioned]:
    """Training pictures of houses, and now and then of what the demo knows."""
    rng = Random(seed)
    ordinary = iter(sample_scenes(count, seed + 1))
    for number, (scene, worded) in enumerate(with_house(count, seed)):
        if number % ORDINARY == 0:
            known = next(ordinary)
            yield Captioned(known, [caption(known, rng) for _ in range(each)])
        else:
            shape = worded.objects[0].shape
            yield Captioned(scene, [say_house(caption(worded, rng), shape) for _ in range(each)])


def loop_captions(count: int, seed: int, each: int = 4) -> Iterator[Captioned]:
    rng = Random(seed)
    for scene in with_loop(count, seed):
        texts = [say_loop(verbalise(full_spec(scene), rng)) for _ in range(6 * each)]
        kept = [text for text in texts if text is not None][:each]
        if kept:
            yield Captioned(scene, kept)


def mixing_captions(count: int, seed: int, each: int = 2) -> Iterator[Captioned]:
    """Scenes that two pictures prompt for, one of each object, and scenes that one picture of the same prompts for.

    In the prompts the objects stand elsewhere. Of two, in any order, either has the scene's background; the other has
    it too, or another one.
    """
    rng = Random(seed)
    scenes = sample_scenes(count, seed)
    others = zip(scenes, moved(scenes, seed), alone(scenes, 0, seed), alone(scenes, 1, seed), strict=True)
    for scene, same, *objects in others:
        prompts = [same]
        if len(scene.objects) == 2 and rng.random() < PAIRS:
            rng.shuffle(objects)
            ground = rng.choice((scene.background, rng.choice(BACKGROUNDS)))
            prompts = [objects[0], replace(objects[1], background=ground)]
            rng.shuffle(prompts)
        yield Captioned(scene, captions_of(scene, each, rng), prompts)


TAUGHT: dict[str, Callable[..., Iterator[Captioned]]] = {
    "house": house_captions,
    "loop": loop_captions,
    "mixing": mixing_captions,
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m cascade_nodes.demo.taught", description=__doc__)
    parser.add_argument("what", choices=TAUGHT)
    parser.add_argument("out", type=Path, help="the folder to write into")
    parser.add_argument("--count", type=int, default=2000, help="pictures, about (2000)")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other scenes (0)")
    chosen = parser.parse_args(arguments)
    count = write_captioned(chosen.out, list(TAUGHT[chosen.what](chosen.count, chosen.seed)))
    print(f"{count} pictures in {chosen.out}")


if __name__ == "__main__":
    main()
