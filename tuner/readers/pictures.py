"""One way from a picture file to pixels: upright, 8 bit, red green blue, on white where it is transparent."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from tuner.contract.base import printable
from tuner.contract.errors import WorkloadError
from tuner.readers.text import OPTION

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
"""Of an animation or a document of several pages, the first picture is taken."""
_TOP_16 = 65535


def read_picture(path: Path, size: int, *, crop: bool = False, option: str = OPTION) -> NDArray[np.uint8]:
    """uint8 [3, size, size]: the whole picture scaled; with `crop` the shorter side scaled and the longer one cropped
    at both ends. 16 bit are scaled to 8. Raises WorkloadError naming the file."""
    try:
        with Image.open(path) as file:
            picture = _on_white(_eight_bit(ImageOps.exif_transpose(file)))
        method = Image.Resampling.BICUBIC
        fitted = ImageOps.fit(picture, (size, size), method) if crop else picture.resize((size, size), method)
    except MemoryError:
        raise
    except Exception as error:  # of a broken file Pillow's plug-ins raise nearly anything
        why = " ".join(str(error).replace(str(path), path.name).split()) or type(error).__name__
        raise WorkloadError(
            f"{option} {printable(path)} is no readable picture ({printable(why)}); mend or remove it"
        ) from None
    return np.asarray(fitted).transpose(2, 0, 1)


def refuse_equal(pictures: Sequence[Any] | NDArray[Any], where: str) -> None:
    """Raises WorkloadError when all of several `pictures` (arrays of one shape) are the same."""
    first = np.asarray(pictures[0])
    if len(pictures) < 2 or any(
        not np.array_equal(first, np.asarray(pictures[index])) for index in range(1, len(pictures))
    ):
        return
    of_one_colour = np.ptp(first.reshape(len(first), -1), axis=1).max() == 0
    colour = f", of the one colour {tuple(first.reshape(len(first), -1)[:, 0].tolist())}" if of_one_colour else ""
    raise WorkloadError(
        f"{where}: all {len(pictures):,} training pictures are the same{colour}, so nothing can be learnt of them;"
        " give pictures that differ"
    )


def _eight_bit(picture: Image.Image) -> Image.Image:
    """Greys of 16 bit divided by 257 (Pillow would cut them off at 255). Raises ValueError for deeper ones."""
    if picture.mode == "F":
        raise ValueError("its pixels are floating-point numbers; save it with 8 or 16 bit")
    if picture.mode != "I" and not picture.mode.startswith("I;"):
        return picture
    values = np.asarray(picture).astype(np.int64)
    if values.min() < 0 or values.max() > _TOP_16:
        raise ValueError("its pixels have 32 bit; save it with 8 or 16 bit")
    clear = picture.info.get("transparency")
    if isinstance(clear, int):
        values = np.where(values == clear, _TOP_16, values)
    return Image.fromarray(np.round(values / 257).astype(np.uint8))


def _on_white(picture: Image.Image) -> Image.Image:
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    shown = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", shown.size, "white"), shown).convert("RGB")
