"""The toy world as files: the same as single files or as tars, true to its scenes, and readable as training data."""

from io import BytesIO

import numpy as np
import torch
from PIL import Image

from cascade_nodes.cascade_core.training.data.sources import find_pictures
from cascade_nodes.demo.captions import holds, parse
from cascade_nodes.demo.render_folder import main
from cascade_nodes.demo.world import held_out_reason, render, sample_scenes


def test_pictures_are_the_scenes_and_captions_are_true(tmp_path):
    main([str(tmp_path), "--count", "12", "--seed", "5", "--captions", "3"])
    scenes = sample_scenes(12, 5)
    pictures, skipped = find_pictures(tmp_path, ())
    assert skipped == []
    assert [picture.name for picture in pictures] == [f"{number:07}.png" for number in range(12)]
    pixels = [np.array(Image.open(BytesIO(picture.read()))) for picture in pictures]
    assert torch.equal(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2), render(scenes))
    for scene, picture in zip(scenes, pictures, strict=True):
        assert len(picture.captions) == len(set(picture.captions)) == 3
        assert all(holds(parse(text), scene) for text in picture.captions)


def test_tars_hold_the_same(tmp_path):
    main([str(tmp_path / "files"), "--count", "7", "--size", "64"])
    main([str(tmp_path / "tars"), "--count", "7", "--size", "64", "--tars", "3"])
    assert sorted(path.name for path in (tmp_path / "tars").iterdir()) == [
        "0000000.tar", "0000003.tar", "0000006.tar",
    ]  # fmt: skip
    single, _ = find_pictures(tmp_path / "files", ())
    packed, _ = find_pictures(None, (str(tmp_path / "tars" / "*.tar"),))
    assert [(picture.read(), picture.captions) for picture in packed] == [
        (picture.read(), picture.captions) for picture in single
    ]


def test_other_seeds_and_splits_are_other_scenes(tmp_path):
    for name, options in (("a", ["--seed", "1"]), ("b", ["--seed", "2"]), ("c", ["--split", "held_out"])):
        main([str(tmp_path / name), "--count", "4", "--size", "64", *options])
    contents = {
        name: [path.read_bytes() for path in sorted((tmp_path / name).glob("*.png"))] for name in "abc"
    }
    assert contents["a"] != contents["b"]
    assert all(held_out_reason(scene) for scene in sample_scenes(4, 0, "held_out"))
    last_image = np.array(Image.open(BytesIO(contents["c"][3])))
    assert torch.equal(
        torch.from_numpy(last_image).permute(2, 0, 1), render(sample_scenes(4, 0, "held_out"), 64)[3]
    )
