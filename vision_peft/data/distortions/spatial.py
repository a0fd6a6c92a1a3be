"""Lost resolution and misplaced pixels of pictures (3, H, W) in [0, 1]; what does not fit a small picture is left out of it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2.functional import InterpolationMode, resize, to_image

BLOCK, PATCH, REACH = 32, 16, 8  # pixels: colour blocks, moved patches, how far these move


def resized_bicubic(image: Tensor, factor: float, generator: torch.Generator) -> Tensor:
    return _down_and_up(image, factor, "bicubic")


def resized_bilinear(image: Tensor, factor: float, generator: torch.Generator) -> Tensor:
    return _down_and_up(image, factor, "bilinear")


def resized_nearest(image: Tensor, factor: float, generator: torch.Generator) -> Tensor:
    return _down_and_up(image, factor, "nearest")


def resized_lanczos(image: Tensor, factor: float, generator: torch.Generator) -> Tensor:
    """By Pillow, which alone has this filter, on 8 bits."""
    from torchvision.transforms.v2.functional import to_pil_image

    height, width = image.shape[1:]
    picture = to_pil_image((image * 255).round().to(torch.uint8))
    small = resize(picture, _smaller(height, width, factor), InterpolationMode.LANCZOS)
    return to_image(resize(small, [height, width], InterpolationMode.LANCZOS)).to(image.dtype) / 255


def pixelated(image: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Nearest pixels of a picture of 0.95 - strength ** 0.6 times the size."""
    return _down_and_up(image, 1 / (0.95 - strength**0.6), "nearest")


def jittered(image: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Five times every pixel takes the colour of a place N(0, strength^2) pixels away, in both directions."""
    height, width = image.shape[1:]
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    for _ in range(5):
        moved = strength * torch.randn(2, height, width, generator=generator)
        y, x = (2 * (place + 0.5) / side - 1 for place, side in ((rows + moved[0], height), (columns + moved[1], width)))
        grid = torch.stack([x, y], -1)[None]
        image = F.grid_sample(image[None], grid, mode="bicubic", padding_mode="reflection", align_corners=False)[0].clamp(0, 1)
    return image


def colour_blocks(image: Tensor, count: float, generator: torch.Generator) -> Tensor:
    """Squares of random colour at random places."""
    image = image.clone()
    for _ in range(int(count)):
        top, left = _place(image, BLOCK, generator)
        image[:, top : top + BLOCK, left : left + BLOCK] = torch.rand(3, 1, 1, generator=generator)
    return image


def moved_patches(image: Tensor, count: float, generator: torch.Generator) -> Tensor:
    """Squares copied to a place nearby."""
    original, image = image, image.clone()
    height, width = image.shape[1:]
    for _ in range(int(count)):
        top, left = _place(image, PATCH, generator)
        y, x = torch.randint(-REACH, REACH + 1, (2,), generator=generator).tolist()
        y, x = min(max(top + y, 0), max(height - PATCH, 0)), min(max(left + x, 0), max(width - PATCH, 0))
        patch = original[:, top : top + PATCH, left : left + PATCH]
        image[:, y : y + patch.shape[1], x : x + patch.shape[2]] = patch
    return image


def _place(image: Tensor, side: int, generator: torch.Generator) -> tuple[int, int]:
    top, left = (int(torch.randint(max(1, length - side + 1), (1,), generator=generator)) for length in image.shape[1:])
    return top, left


def _smaller(height: int, width: int, factor: float) -> list[int]:
    return [max(1, int(height / factor)), max(1, int(width / factor))]


def _down_and_up(image: Tensor, factor: float, mode: str) -> Tensor:
    height, width = image.shape[1:]
    smooth = {} if mode == "nearest" else {"align_corners": False}
    down = F.interpolate(image[None], _smaller(height, width, factor), mode=mode, **smooth, **({"antialias": True} if smooth else {}))
    return F.interpolate(down, (height, width), mode=mode, **smooth)[0].clamp(0, 1)
