"""Pictures held out of training, on which the error is measured."""

from dataclasses import replace
from typing import NamedTuple

from ...errors import CascadeError, counted
from ..settings import DataSettings, ValidationSettings
from .access import Access
from .cache import key_of
from .pictures import Skipped, TrainingPicture
from .sources import companions_of, find_all, find_pictures


class FoundPictures(NamedTuple):
    """The pictures to train on, those that are left out, and those that are held out."""

    trained: list[TrainingPicture]
    skipped: list[Skipped]
    held_out: list[TrainingPicture]


def find_and_hold_out(data: DataSettings, validation: ValidationSettings, access: Access) -> FoundPictures:
    """Lists the pictures of `data`, without those that `validation` holds out of training. Raises CascadeError.

    Held-out pictures are chosen by their names, so that they are the same for every seed.
    """
    pictures, skipped = find_all(data, access)
    if not validation.every:
        return FoundPictures(pictures, skipped, [])
    if validation.share:
        drawn = sorted(pictures, key=lambda each: key_of("held out", each.set, each.name))
        held_out = drawn[: max(round(validation.share * len(pictures)), 1)]
    else:
        held_out, more = find_pictures(validation.folder, validation.tars, access, companions_of(data))
        skipped = [*skipped, *more]
    places = {(each.path, each.offset) for each in held_out}
    trained = [each for each in pictures if (each.path, each.offset) not in places]
    if not trained:
        raise CascadeError(
            f"validation holds out all of {counted(len(pictures), 'picture')}, so none is left to train on; hold "
            "fewer out."
        )
    return FoundPictures(trained, skipped, held_out)


def as_they_are(data: DataSettings) -> DataSettings:
    """The settings for held-out pictures: each is shown once, uncropped, with its caption."""
    plain = DataSettings(folder=".")
    same = {
        name: getattr(plain, name)
        for name in ("flip", "crops", "crop_zoom", "repeat", "shuffle_tags", "tag_dropout", "unmasked_share")
    }
    sets = tuple(replace(each, repeat=1, weight=1.0) for each in data.sets)
    return replace(data, caption_dropout=0.0, image_prompt_dropout=0.0, sets=sets, **same)
