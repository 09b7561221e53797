"""What of a batch's images belongs to some of its rows, as TRL passes images to vision-language models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# What TRL passes with images. A model's forward takes all of them but the counts per row of the batch.
COUNTS = ("num_images", "num_tiles")
BY_ROW = ("token_type_ids", "mm_token_type_ids")
BY_IMAGE = ("image_grid_thw", "image_position_ids", "image_sizes")
BY_PIXELS = ("pixel_values", "pixel_attention_mask", "spatial_shapes")
NAMES = (*COUNTS, *BY_ROW, *BY_IMAGE, *BY_PIXELS)


def of_rows(images: dict[str, Any], rows: slice) -> dict[str, Tensor]:
    """The arguments of the model's forward for `rows` of the batch.

    Args:
        images: by the names above; None where the batch has no such array. `pixel_values` has an entry for each patch
            (with `image_grid_thw`), tile, image or row.
    """
    given = {name: value for name, value in images.items() if value is not None}
    unknown = [name for name in given if name not in NAMES]
    if unknown:
        raise ValueError(
            f"{unknown[0]}: expected None, because this version of TRL passes images in a way that is not known here"
        )
    found = {name: given[name][rows] for name in BY_ROW if name in given}
    of_images = _entries(given.get("num_images"), rows)
    found |= {name: given[name][of_images] for name in BY_IMAGE if name in given}
    pixels = given.get("pixel_values")
    if pixels is None:
        return found
    by_pixels = rows
    if "image_grid_thw" in given:
        patches = given["image_grid_thw"].prod(dim=-1)
        by_pixels = _entries([x.sum().item() for x in patches.split(given["num_images"])], rows)
    elif "num_tiles" in given:
        by_pixels = _entries(given["num_tiles"], rows)
    elif "num_images" in given and len(pixels) == sum(given["num_images"]):
        by_pixels = of_images
    found["pixel_values"] = pixels[by_pixels]
    for name in ("pixel_attention_mask", "spatial_shapes"):
        if name in given:
            found[name] = given[name][by_pixels if "spatial_shapes" in given else rows]
    return found


def _entries(counts: list[int] | None, rows: slice) -> slice:
    """The entries of `rows`, of an array that has `counts[row]` entries for each row of the batch."""
    if counts is None:
        return rows
    ends = [0, *torch.tensor(counts).cumsum(0).tolist()]
    return slice(ends[rows.start], ends[rows.stop])
