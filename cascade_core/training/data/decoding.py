"""Pictures decoded in threads, ahead of their use."""

from collections.abc import Sequence
from concurrent.futures import Future

import torch
from torch import Tensor

from ...errors import CascadeError, printable
from .bucketing import BucketedPicture
from .pictures import PictureError
from .threads import thread_pool

CACHE_BYTES = 4_000_000_000  # of decoded pictures that are kept in memory


class PictureDecoder:
    """The pixels of batches; the next batch is decoded while this one is trained on.

    Decoded pictures are kept as long as there is room, so that a set that fits is decoded once and not in every epoch.
    """

    def __init__(self) -> None:
        self.pool, self.free_bytes = thread_pool(), CACHE_BYTES
        self.pending: dict[BucketedPicture, Future[Tensor]] = {}
        self.cached: dict[BucketedPicture, Tensor] = {}

    def prefetch(self, pictures: Sequence[BucketedPicture]) -> None:
        """Begin decoding the next batch; what was prefetched before and not asked for is dropped."""
        self.pending = {
            picture: self._submit(picture)
            for picture in dict.fromkeys(pictures)
            if picture not in self.cached
        }

    def images(self, pictures: Sequence[BucketedPicture], mirrored: Tensor) -> Tensor:
        """(B, 3, H, W) uint8, as the compressor reads them; mirrored: (B,), 1 where to mirror."""
        for picture in pictures:
            if picture not in self.cached and picture not in self.pending:
                self.pending[picture] = self._submit(picture)
        images = [self._pixels(picture) for picture in pictures]
        return torch.stack(
            [
                image.flip(-1) if flipped else image
                for image, flipped in zip(images, mirrored.tolist(), strict=True)
            ]
        )

    def _submit(self, picture: BucketedPicture) -> Future[Tensor]:
        return self.pool.submit(picture.pixels, picture.bucket.compressor)

    def _pixels(self, picture: BucketedPicture) -> Tensor:
        if picture in self.cached:
            return self.cached[picture]
        try:
            image = self.pending[picture].result()
        except PictureError as error:
            raise CascadeError(
                f"The picture {printable(picture.picture.name)} could be read as its latent was made, but no longer "
                f"({error.reason}); put it back, or start again without it."
            ) from None
        if image.nbytes <= self.free_bytes:
            self.free_bytes -= image.nbytes
            self.cached[picture] = image
        return image
