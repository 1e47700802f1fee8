"""Pictures that are held out of training, to measure on them what was learned."""

from dataclasses import replace
from typing import NamedTuple

from ...errors import CascadeError
from ..settings import DataSettings, ValidationSettings
from .access import Access
from .cache import key_of
from .pictures import Skipped, TrainingPicture
from .sources import companions_of, find_all, find_pictures


class FoundPictures(NamedTuple):
    """What is trained on, what is left out, and what is held out."""

    trained: list[TrainingPicture]
    skipped: list[Skipped]
    held_out: list[TrainingPicture]


def find_and_hold_out(data: DataSettings, validation: ValidationSettings, access: Access) -> FoundPictures:
    """List the pictures of `data`; what `validation` measures on is not trained on. Raises CascadeError.

    Which those are follows from their names, so that it is the same for every seed.
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
            f"validation holds all {len(pictures)} pictures out, so none is left to train on; hold fewer out."
        )
    return FoundPictures(trained, skipped, held_out)


def as_they_are(data: DataSettings) -> DataSettings:
    """The settings for pictures that are measured on: each is shown once, whole, with its words."""
    plain = DataSettings(folder=".")
    same = {
        name: getattr(plain, name)
        for name in ("flip", "crops", "crop_zoom", "repeat", "shuffle_tags", "tag_dropout", "unmasked_share")
    }
    sets = tuple(replace(each, repeat=1, weight=1.0) for each in data.sets)
    return replace(data, caption_dropout=0.0, image_prompt_dropout=0.0, sets=sets, **same)
