"""Where training pictures come from: a folder with its subfolders, and webdataset tars."""

from collections.abc import Sequence
from pathlib import Path

from ...errors import CascadeError
from .folders import METADATA, folder_pictures
from .pictures import PICTURES, Skipped, TrainingPicture
from .tars import expand, tar_pictures


def find_pictures(
    folder: str | Path | None, tars: Sequence[str]
) -> tuple[list[TrainingPicture], list[Skipped]]:
    """List every picture with a caption: in the folder and its subfolders by name, then in the tars in their order.

    tars: paths or patterns such as `data/*.tar`. Raises CascadeError where nothing can be trained on.
    """
    listing: list[TrainingPicture | Skipped] = []
    if folder is not None:
        listing += folder_pictures(Path(folder))
    for path in expand(tars):
        listing += tar_pictures(path)
    pictures = [each for each in listing if isinstance(each, TrainingPicture)]
    skipped = [each for each in listing if isinstance(each, Skipped)]
    if not pictures:
        raise _no_pictures(" and ".join(str(place) for place in (folder, *tars) if place), skipped)
    return pictures, skipped


def _no_pictures(places: str, skipped: list[Skipped]) -> CascadeError:
    if not skipped:
        return CascadeError(
            f"{places} holds no pictures; {', '.join(PICTURES)} with captions beside them are expected."
        )
    return CascadeError(
        f"{places} holds {len(skipped)} pictures, but none to train on, such as {skipped[0]}. Put a caption "
        f"into a text file of the picture's name ({skipped[0].name.rsplit('.', 1)[0]}.txt), or into {METADATA}; an "
        "empty text file trains without words."
    )
