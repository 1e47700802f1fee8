"""Embeddings of the pictures that serve as image prompts of training pictures, each encoded once and cached."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ...errors import CascadeError, printable
from ...vision import ImageEncoder, preprocess_images
from .cache import Cache, Key, fingerprint, key_of
from .pictures import PictureError, PictureFile, TrainingPicture, read_whole
from .threads import map_in_threads

ENCODED_AT_ONCE = 256  # pictures
IN_A_FILE = 4096  # embeddings, of the cache


class ImagePrompts:
    """Cache of ImageEncoder.encode for image prompts, in memory or, with a folder, in mapped files."""

    def __init__(self, encoder: ImageEncoder, folder: str | Path | None = None):
        self.encoder: ImageEncoder | None = encoder
        self.width = encoder.model.config.projection_dim
        below = Path(folder).expanduser() / "image_prompts" if folder is not None else None
        self.cache = Cache(below, fingerprint(encoder.model) if below else "")

    def keys(self, pictures: Iterable[TrainingPicture]) -> list[Key]:
        """The cache keys of all prompts, each once."""
        return list(dict.fromkeys(_key(prompt) for picture in pictures for prompt in picture.image_prompts))

    def fill(
        self,
        pictures: Sequence[TrainingPicture],
        report: Callable[[int, int], None] | None = None,
        ask: Callable[[], None] = lambda: None,
    ) -> dict[TrainingPicture, str]:
        """Encodes the prompts that are not cached yet; returns the pictures with a damaged prompt, and its fault.

        report: called with the number of prompts encoded so far and in total. ask: called for each prompt; raises
        Interrupted to end the run.
        """
        prompts = {_key(prompt): prompt for picture in pictures for prompt in picture.image_prompts}
        for key in prompts:
            self.cache.keep(key, (self.width,), torch.float32)
        missing = [prompt for key, prompt in prompts.items() if key not in self.cache]
        damaged: dict[PictureFile, str] = {}
        for start in range(0, len(missing), IN_A_FILE):
            damaged |= self._encode(missing[start : start + IN_A_FILE], ask)
            if report is not None:
                report(min(start + IN_A_FILE, len(missing)), len(missing))
        bad = {
            picture: next((p for p in picture.image_prompts if p in damaged), None) for picture in pictures
        }
        return {
            picture: f"its image prompt {printable(prompt.name)}: {damaged[prompt]}"
            for picture, prompt in bad.items()
            if prompt is not None
        }

    def _encode(self, prompts: Sequence[PictureFile], ask: Callable[[], None]) -> dict[PictureFile, str]:
        """Encodes prompts into one file of the cache; returns the damaged ones."""
        encoder = self.encoder
        if encoder is None:
            raise CascadeError(
                f"The image prompt {printable(prompts[0].name)} was not encoded before the image encoder was let go; "
                "give all pictures to `fill`."
            )
        side = encoder.image_size

        def prepared(prompt: PictureFile) -> Tensor:
            return preprocess_images(read_whole(prompt.read(), side).movedim(0, -1)[None] / 255, side)

        damaged: dict[PictureFile, str] = {}
        keys: list[Key] = []
        rows: list[Tensor] = []
        waiting: list[Tensor] = []
        for prompt, pixels in map_in_threads(prepared, prompts, ENCODED_AT_ONCE, ask):
            if isinstance(pixels, PictureError):
                damaged[prompt] = pixels.reason
            else:
                keys.append(_key(prompt))
                waiting.append(pixels)
            if waiting and (len(waiting) == ENCODED_AT_ONCE or prompt is prompts[-1]):
                rows.append(encoder.encode_pixels(torch.cat(waiting)))
                waiting = []
        if rows:
            self.cache.add(keys, torch.cat(rows))
        return damaged

    def release(self) -> None:
        """Releases the encoder's memory."""
        self.encoder = None

    def embeddings(self, pictures: Sequence[TrainingPicture]) -> Tensor:
        """(B, n, E) float32 on the CPU, of pictures with n prompts each."""
        count = len(pictures[0].image_prompts)
        rows = self.cache.stack(_key(prompt) for picture in pictures for prompt in picture.image_prompts)
        return rows.unflatten(0, (len(pictures), count))


def _key(prompt: PictureFile) -> Key:
    return key_of(prompt.identity, "298 × 224")  # the resized 400 × 300; in earlier versions 299 wide
