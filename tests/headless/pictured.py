"""Pictures with graphs inside, as ComfyUI and other programs write them."""

import json
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

OFFICIAL = Path(__file__).parent / "official"
NAMES = sorted(path.stem for path in OFFICIAL.glob("*.json"))


def official(name: str) -> dict[str, Any]:
    """{"prompt": …, "workflow": …} of one of ComfyUI's own examples for Stable Cascade."""
    return json.loads((OFFICIAL / f"{name}.json").read_text(encoding="utf-8"))


def save_picture(path: Path, after: bool = False, **texts: Any) -> Path:
    """A picture of 6 × 4 pixels; texts: by name, as JSON where they are not texts.

    PNG has them in chunks, `after` the pixels where so asked; JPEG, WebP and AVIF in the EXIF as ComfyUI writes it: the
    prompt as Model, the others as Make and before it.
    """
    values = {name: text if isinstance(text, str) else json.dumps(text) for name, text in texts.items()}
    picture = Image.new("RGB", (6, 4), "red")
    if path.suffix == ".png":
        chunks = PngInfo()
        for name, text in values.items():
            chunks.add_text(name, text)
            chunks.chunks = [(*chunk[:2], after) for chunk in chunks.chunks]
        picture.save(path, pnginfo=chunks)
        return path
    exif = picture.getexif()
    tag = 0x010F
    for name, text in values.items():
        if name == "prompt":
            exif[0x0110] = f"prompt:{text}"
        else:
            exif[tag] = f"{name}:{text}"
            tag -= 1
    picture.save(path, exif=exif)
    return path
