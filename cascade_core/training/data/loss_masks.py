"""Masks beside pictures, which mark where a picture counts in the loss; read once, at the latents' size, and cached."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .bucketing import BucketedPicture, Crops
from .cache import Cache, Key, key_of
from .pictures import Crop, PictureError
from .threads import map_in_threads


class LossMasks:
    """Fills a cache with masks.  uint8 (h, w) each, white where the picture counts

    unmasked: the weight of positions outside of masks; where it is 0, a picture with an entirely black mask is left
    out.
    """

    def __init__(self, cache: Cache, crops: Crops, unmasked: float):
        self.cache, self.crops, self.unmasked = cache, crops, unmasked

    def fill(
        self, pictures: Sequence[BucketedPicture], ask: Callable[[], None] = lambda: None
    ) -> dict[BucketedPicture, str]:
        """Reads the masks that are not cached yet; returns the pictures that cannot be trained on, and why.

        ask: called for each mask; raises Interrupted to end the run.
        """
        masked = [each for each in pictures if each.picture.mask is not None]
        views = [(each, crop) for each in masked for crop in self.crops.all_of(each)]
        for picture, crop in views:
            self.cache.keep(_key(picture, crop), picture.bucket.latent, torch.uint8)
        missing = [(each, crop) for each, crop in views if _key(each, crop) not in self.cache]
        faults: dict[BucketedPicture, str] = {}
        new: dict[tuple[int, int], tuple[list[Key], list[Tensor]]] = {}
        for (picture, crop), mask in map_in_threads(lambda view: view[0].mask(view[1]), missing, 100, ask):
            if isinstance(mask, PictureError):
                faults[picture] = (
                    mask.reason if mask.reason.startswith("its mask") else f"its mask: {mask.reason}"
                )
                continue
            keys, rows = new.setdefault(picture.bucket.latent, ([], []))
            keys.append(_key(picture, crop))
            rows.append(mask)
        for keys, rows in new.values():
            self.cache.add(keys, torch.stack(rows))
        for picture in masked if not self.unmasked else ():
            rows = [self.cache.rows.get(_key(picture, crop)) for crop in self.crops.all_of(picture)]
            if picture not in faults and not any(row is not None and row.any() for row in rows):
                faults[picture] = "its mask is black all over (data.unmasked_weight is 0)"
        return faults

    def rows(self, pictures: Sequence[BucketedPicture]) -> Tensor | None:
        """(N, crops, h, w) of pictures of one bucket, white for those without a mask; None where none has one."""
        if all(each.picture.mask is None for each in pictures):
            return None
        white = torch.full(pictures[0].bucket.latent, 255, dtype=torch.uint8)
        return torch.stack(
            [
                torch.stack([self._row(each, crop, white) for crop in self.crops.all_of(each)])
                for each in pictures
            ]
        )

    def _row(self, picture: BucketedPicture, crop: Crop, white: Tensor) -> Tensor:
        return white if picture.picture.mask is None else self.cache.rows[_key(picture, crop)]


def _key(picture: BucketedPicture, crop: Crop) -> Key:
    mask = picture.picture.mask
    assert mask is not None
    return key_of(mask.identity, *picture.size, *picture.bucket, *crop)
