"""A digest of the contents of pictures and captions, whatever their folders and dates."""

import hashlib
from collections.abc import Callable, Sequence

import torch

from .cache import KEY_BYTES, Cache, Key, key_of
from .pictures import PictureError, PictureFile, TrainingPicture
from .threads import map_in_threads

END_BYTES = 65_536  # read at a picture's beginning, and at its end
# Uncompressed, so read as a whole: a change in the middle may leave length and ends unchanged.
PLAIN = (".bmp", ".tif", ".tiff")
AT_ONCE = 1000


def pictures_digest(
    pictures: Sequence[TrainingPicture],
    contents: Cache,
    image_prompts: bool,
    asked: Callable[[], None],
    named: bool = False,
) -> str:
    """A digest of the pictures in their order, with their captions and, where they are used, their image prompts.

    contents: digests of pictures read before; new ones are added. asked: called from time to time; may raise
    Interrupted.
    named: whether the pictures' names count, because they determine the crops.
    """
    files: dict[Key, PictureFile] = {}
    for picture in pictures:
        for file in _files(picture, image_prompts):
            files.setdefault(key_of(file.identity), file)
    for key in files:
        contents.keep(key, (KEY_BYTES,), torch.uint8)
    missing = [(key, file) for key, file in files.items() if key not in contents]
    for start in range(0, len(missing), AT_ONCE):
        new = {}
        for (key, _), value in map_in_threads(
            lambda item: _content(item[1]), missing[start : start + AT_ONCE], ahead=100, ask=asked
        ):
            if not isinstance(value, PictureError):
                new[key] = value
        if new:
            contents.add(list(new), torch.tensor([list(value) for value in new.values()], dtype=torch.uint8))
    digest = hashlib.blake2b(digest_size=KEY_BYTES)
    for picture in pictures:
        rows = (contents.rows.get(key_of(file.identity)) for file in _files(picture, image_prompts))
        held = [bytes(row.tolist()) if row is not None else b"" for row in rows]  # b"": an unreadable file
        of_a_set = (picture.set,) if picture.set >= 0 else ()
        more = ("masked",) * (picture.mask is not None) + (picture.name,) * named
        digest.update(key_of(repr((held, picture.captions, *of_a_set, *more))))
    return digest.hexdigest()


def _files(picture: TrainingPicture, image_prompts: bool) -> list[PictureFile]:
    """The files that determine a picture's part in training."""
    mask = [picture.mask] if picture.mask is not None else []
    return [picture, *(picture.image_prompts if image_prompts else ()), *mask]


def _content(file: PictureFile) -> bytes:
    """A digest of a picture's length, beginning and end; any change of a compressed picture shows in one of these."""
    digest = hashlib.blake2b(str(file.length).encode(), digest_size=KEY_BYTES)
    end = PictureFile(file.name, file.path, file.offset + file.length - END_BYTES, END_BYTES, file.stamp)
    whole = file.length <= 2 * END_BYTES or file.name.lower().endswith(PLAIN)
    for part in (file.read(),) if whole else (file.read(END_BYTES), end.read()):
        digest.update(part)
    return digest.digest()
