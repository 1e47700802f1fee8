"""Where training pictures come from: a folder with its subfolders, and webdataset tars."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ...errors import CascadeError, counted, printable
from ...writing import replacing
from ..settings import DataSetSettings, DataSettings
from .access import Access
from .folders import METADATA, folder_pictures
from .pictures import NONE_BESIDE, PICTURES, Companions, Skipped, TrainingPicture
from .tars import expand, tar_pictures

LEFT_OUT = "left_out.txt"  # in a run's folder
TOLD = 5  # reasons named in a sentence about pictures that are left out


def find_all(
    settings: DataSettings, access: Access | None = None
) -> tuple[list[TrainingPicture], list[Skipped]]:
    """The pictures of data.folder and data.tars, then those of each set. Raises CascadeError as `find_pictures`."""
    access = access or Access()
    pictures, skipped = [], []
    if settings.folder is not None or settings.tars:
        pictures, skipped = find_pictures(settings.folder, settings.tars, access, companions_of(settings))
    for number, each in enumerate(settings.sets):
        found, left_out = find_pictures(each.folder, each.tars, access, companions_of(settings, each))
        pictures += [replace(picture, set=number) for picture in found]
        skipped += left_out
    return pictures, skipped


def companions_of(settings: DataSettings, own: DataSetSettings | None = None) -> Companions:
    """The companions of a set's pictures, or of those in the data's own folder and tars. Raises CascadeError."""
    given = own or settings
    folder = Path(given.mask_folder) if given.mask_folder else None
    return Companions(
        given.masks or settings.masks,
        folder,
        settings.caption if given.caption is None else given.caption,
        given.caption_suffix or settings.caption_suffix,
    )


def find_pictures(
    folder: str | Path | None,
    tars: Sequence[str],
    access: Access | None = None,
    companions: Companions = NONE_BESIDE,
) -> tuple[list[TrainingPicture], list[Skipped]]:
    """Lists every picture with a caption: in the folder and its subfolders by name, then in the tars in their order.

    tars: paths or patterns such as `data/*.tar`; access: limits on reading, and the request to stop; companions: the
    files beside pictures. Raises CascadeError where no picture can be trained on.
    """
    access = access or Access()
    listing: list[TrainingPicture | Skipped] = []
    if folder is not None:
        listing += folder_pictures(Path(folder), access, companions)
    for path in expand(tars, access):
        listing += tar_pictures(path, access, companions)
    pictures = [each for each in listing if isinstance(each, TrainingPicture)]
    skipped = [each for each in listing if isinstance(each, Skipped)]
    if not pictures:
        raise _no_pictures(" and ".join(str(place) for place in (folder, *tars) if place), skipped)
    return pictures, skipped


def reasons(skipped: Sequence[Skipped]) -> str:
    """Why pictures are left out: the most frequent reason first, each with its first picture."""
    counts = Counter(each.reason for each in skipped)
    first = {each.reason: each.name for each in reversed(skipped)}
    told = [
        f"{printable(first[reason])} ({reason})" + f" and {count - 1:,} more alike" * (count > 1)
        for reason, count in counts.most_common(TOLD)
    ]
    rest = sum(count for _, count in counts.most_common()[TOLD:])
    return ", ".join(told + [f"and {rest:,} for other reasons"] * (rest > 0))


def write_left_out(path: Path, skipped: Sequence[Skipped]) -> None:
    """Lists every picture that is left out, one a line, with the reason; no file where there is none."""
    if not skipped:
        path.unlink(missing_ok=True)
        return
    with replacing(path) as temporary:
        lines = (f"{printable(each.name, 4096)}\t{each.reason}\n" for each in skipped)
        temporary.write_text("".join(lines), encoding="utf-8")


def _no_pictures(places: str, skipped: list[Skipped]) -> CascadeError:
    places = printable(places)
    if not skipped:
        return CascadeError(
            f"{places} holds no pictures; {', '.join(PICTURES)} with captions beside them are expected."
        )
    return CascadeError(
        f"{places} holds {counted(len(skipped), 'picture')}, but none to train on: {reasons(skipped)}. Put a caption "
        f"into a text file of the picture's name ({printable(Path(skipped[0].name).stem)}.txt), or into {METADATA}; an "
        "empty text file trains without words."
    )
