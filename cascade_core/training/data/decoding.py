"""Pictures decoded in threads, ahead of their use."""

from collections.abc import Sequence
from concurrent.futures import Future

import torch
from torch import Tensor

from ...errors import CascadeError, printable
from .bucketing import BucketedPicture
from .pictures import Crop, PictureError
from .threads import thread_pool

View = tuple[BucketedPicture, Crop]
CACHE_BYTES = 4_000_000_000  # of decoded pictures that are kept in memory


class PictureDecoder:
    """Decodes the pictures of batches; the next batch is decoded while the present one is trained on.

    Decoded pictures are kept while there is room, so that a set that fits is decoded only once, not in every epoch.
    """

    def __init__(self) -> None:
        self.pool, self.free_bytes = thread_pool(), CACHE_BYTES
        self.pending: dict[View, Future[Tensor]] = {}
        self.cached: dict[View, Tensor] = {}

    def prefetch(self, views: Sequence[View]) -> None:
        """Begins decoding the next batch; drops prefetched pictures that were not requested."""
        self.pending = {view: self._submit(view) for view in dict.fromkeys(views) if view not in self.cached}

    def images(self, views: Sequence[View], mirrored: Tensor) -> Tensor:
        """(B, 3, H, W) uint8, as the compressor reads them; mirrored: (B,), 1 where to mirror."""
        for view in views:
            if view not in self.cached and view not in self.pending:
                self.pending[view] = self._submit(view)
        images = [self._pixels(view) for view in views]
        return torch.stack(
            [
                image.flip(-1) if flipped else image
                for image, flipped in zip(images, mirrored.tolist(), strict=True)
            ]
        )

    def _submit(self, view: View) -> Future[Tensor]:
        picture, crop = view
        return self.pool.submit(picture.pixels, picture.bucket.compressor, crop)

    def _pixels(self, view: View) -> Tensor:
        if view in self.cached:
            return self.cached[view]
        picture, _ = view
        try:
            image = self.pending[view].result()
        except PictureError as error:
            raise CascadeError(
                f"The picture {printable(picture.picture.name)} could be read as its latent was made, but no longer "
                f"({error.reason}); put it back, or start again without it."
            ) from None
        if image.nbytes <= self.free_bytes:
            self.free_bytes -= image.nbytes
            self.cached[view] = image
        return image
