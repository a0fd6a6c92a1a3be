"""Rows of pictures with a title each, the same seeds below each other."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

GAP, SHOWN = 4, 96  # pixels; smaller pictures are enlarged to about the second


def save_grid(rows: Mapping[str, Tensor], path: Path) -> None:
    """Write a PNG of pictures (N, 3, H, W) in [-1, 1] by row title; rows may differ in N."""
    height, width = next(iter(rows.values())).shape[-2:]
    times = max(1, round(SHOWN / max(height, width)))
    cell_h, cell_w = height * times + GAP, width * times + GAP
    font = ImageFont.load_default(size=max(12, cell_h // 8))
    margin = max(round(font.getlength(title)) for title in rows) + 3 * GAP
    sheet = Image.new("RGB", (margin + cell_w * max(map(len, rows.values())), cell_h * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    for line, (title, pictures) in enumerate(rows.items()):
        draw.text((GAP, line * cell_h + cell_h // 3), title, fill="black", font=font)
        for column, picture in enumerate(pictures):
            pixels = ((picture.float() / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
            shown = Image.fromarray(pixels).resize((width * times, height * times), Image.Resampling.NEAREST)
            sheet.paste(shown, (margin + column * cell_w, line * cell_h))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
