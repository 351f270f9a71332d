"""Pictures of a data set in the colours that an image processor expects, as transformers' own pipelines read them."""

from __future__ import annotations

from typing import Any

_COLOURS = "RGB"
_WIDE = ("I", "F")
"""The first letters of Pillow's modes whose numbers go beyond 255, of which a conversion to RGB cuts most off."""


def in_colours(image: Any, processor: Any) -> Any:
    """A picture in RGB, for a processor of three colours; everything that is not a picture of Pillow's as it is.

    A palette's picture has the places of its colours in the palette instead of colours, which some processors would
    take for a grey picture, and others refuse grey pictures.

    Raises:
        ValueError: if its numbers go beyond 255, so that it is not clear how they become colours.
    """
    mode = getattr(image, "mode", None)
    of_pillow = any(kind.__module__.partition(".")[0] == "PIL" for kind in type(image).__mro__)
    if not of_pillow or mode == _COLOURS or len(getattr(processor, "image_mean", None) or ()) != len(_COLOURS):
        return image
    if str(mode).startswith(_WIDE):
        raise ValueError(
            f"the image is of Pillow's mode {mode!r}, whose numbers go beyond 255: turn it into one of 'L' or 'RGB'"
        )
    return image.convert(_COLOURS)
