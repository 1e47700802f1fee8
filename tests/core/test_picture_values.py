"""Pictures and masks as a caller gives them: each is read as it is meant, or refused with a sentence."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cascade_nodes.cascade_core import CascadeError
from cascade_nodes.cascade_core.pictures import as_image, as_mask

BYTES = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3) * 3
EXPECTED = torch.from_numpy(BYTES.astype(np.float32) / 255)[None]  # (1, 4, 6, 3)
GREY = torch.from_numpy(BYTES[..., 0].astype(np.float32) / 255)


@pytest.mark.parametrize(
    "picture",
    [
        Image.fromarray(BYTES),
        BYTES,
        torch.from_numpy(BYTES),
        BYTES[None],
        EXPECTED[0],
        EXPECTED[0].requires_grad_(),
        EXPECTED.double().numpy(),
        EXPECTED.numpy().astype(">f4"),
        BYTES[::-1, ::-1][::-1, ::-1],  # negative strides
        np.concatenate([BYTES, BYTES[..., :1]], axis=-1),  # alpha is left out
        [Image.fromarray(BYTES)],
    ],
)
def test_one_picture_is_the_same_in_every_form(picture):
    assert torch.equal(as_image(picture), EXPECTED)


def test_a_picture_is_read_from_its_file(tmp_path):
    Image.fromarray(BYTES).save(tmp_path / "picture.png")
    for picture in (tmp_path / "picture.png", str(tmp_path / "picture.png")):
        assert torch.equal(as_image(picture), EXPECTED)
    assert torch.equal(as_image((tmp_path / "picture.png").read_bytes()), EXPECTED)


@pytest.mark.parametrize(
    "picture", [GREY, GREY[..., None], BYTES[..., 0], BYTES[..., :1], Image.fromarray(BYTES[..., 0])]
)
def test_grey_is_read_as_rgb(picture):
    assert torch.equal(as_image(picture), GREY[None, ..., None].expand(-1, -1, -1, 3))


def test_pictures_of_a_list_are_a_batch():
    both = as_image([Image.fromarray(BYTES), EXPECTED])
    assert torch.equal(both, torch.cat([EXPECTED, EXPECTED]))
    with pytest.raises(CascadeError, match="image holds pictures of several sizes"):
        as_image([BYTES, BYTES[:2]], "image")


def test_an_opened_picture_is_turned_as_its_file_is(tmp_path):
    path = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by a quarter
    Image.fromarray(BYTES).save(path, exif=exif)
    assert as_image(path).shape == (1, 6, 4, 3)
    with Image.open(path) as opened:
        assert torch.equal(as_image(opened), as_image(path))
        assert opened.size == (6, 4)  # the caller's own is left as it was


@pytest.mark.parametrize(
    "mask",
    [
        GREY > 0.2,
        (GREY > 0.2).numpy(),
        (GREY > 0.2).to(torch.uint8),
        (GREY > 0.2).to(torch.uint8) * 255,
        (GREY > 0.2).long()[None],
        (GREY > 0.2)[..., None],
        (GREY > 0.2).float(),
        Image.fromarray((GREY > 0.2).numpy()),
    ],
)
def test_one_mask_is_the_same_in_every_form(mask):
    assert torch.equal(as_mask(mask), (GREY > 0.2).float()[None])


WRONG: list[tuple[Any, str]] = [
    (EXPECTED * 255, "holds values from 0 to 213; give floats from 0 to 1, or uint8 from 0 to 255"),
    (EXPECTED * 2 - 1, "holds values from -1 to"),
    (BYTES.astype(np.int64), "holds values of torch.int64; give floats"),
    (BYTES > 3, "holds values of torch.bool; give floats"),
    (BYTES.astype(object), "is an array of object; give floats"),
    (BYTES.astype("U9"), "is an array of <U9; give floats"),
    (np.zeros(3, dtype=[("a", "f4"), ("b", "i4")]), "is an array of"),
    (EXPECTED[0].movedim(-1, 0), r"has the shape \(3, 4, 6\); give \(height, width, 3\)"),
    (EXPECTED[..., :2], r"has the shape \(1, 4, 6, 2\)"),
    (torch.zeros(0, 4, 3), r"has the shape \(0, 4, 3\)"),
    (np.float32(0), "is of type float32"),
    (torch.tensor(0.5), r"has the shape \(\)"),
    (torch.full((4, 6, 3), torch.nan), "holds NaN or infinity"),
    (np.full((4, 6, 3), 1e300), "holds NaN or infinity"),
    (EXPECTED.to_sparse(), "is a sparse tensor; give a dense one of real numbers"),
    (EXPECTED.to("meta"), "is a meta tensor"),
    (EXPECTED.to(torch.complex64), "is a complex tensor"),
    (torch.zeros(4, 6, 3, dtype=torch.bits8), "is a tensor of torch.bits8"),
    ([], "is an empty list"),
    ([[EXPECTED]], "is of type list; give a PIL image"),
    (None, "is of type NoneType"),
    (3, "is of type int"),
    (lambda: None, "is of type function"),
    ("https://example.org/a.png", "is the address 'https://example.org/a.png'; download it"),
    (
        Image.fromarray(GREY.numpy()),
        "cannot be read: it holds floating-point values that do not go from 0 to 255",
    ),
    (Image.new("RGB", (0, 6)), "has no pixels"),
    ("nowhere/\0.png", "cannot be read"),
    ("nowhere/" + "x" * 10**6, "cannot be read"),
    ("nowhere/\ud800.png", "cannot be read"),
    (Path("."), "cannot be read"),
    (b"not a picture", "is not a picture"),
]


def sentence(read: Callable[..., Any], value: Any) -> str:
    with pytest.raises(CascadeError) as error:
        read(value, "the argument")
    text = str(error.value)
    assert text.isprintable()
    assert text.endswith(".")
    assert len(text) < 500
    return text


@pytest.mark.parametrize(("picture", "message"), WRONG, ids=[str(number) for number in range(len(WRONG))])
def test_what_is_not_a_picture_is_refused(picture, message):
    assert re.search(message, sentence(as_image, picture))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (GREY * 255, "the argument holds values from 0 to"),
        (GREY - 1, "holds values from -1 to"),
        ((GREY * 255).long(), "holds values from 0 to"),
        (GREY[None, None], r"has the shape \(1, 1, 4, 6\); give \(height, width\)"),
        (GREY.to_sparse(), "is a sparse tensor"),
        (torch.zeros(0, 4), r"has the shape \(0, 4\)"),
        ("mask.png\n", "cannot be read"),
        (3, "is of type int"),
    ],
)
def test_what_is_not_a_mask_is_refused(mask, message):
    assert re.search(message, sentence(as_mask, mask))


def test_a_picture_that_was_closed_is_refused(tmp_path):
    Image.fromarray(BYTES).save(tmp_path / "picture.png")
    picture = Image.open(tmp_path / "picture.png")
    picture.close()
    with pytest.raises(CascadeError, match="image cannot be read"):
        as_image(picture, "image")
