"""Pictures with their scores on one HTML page that needs no other file."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path

from PIL import Image

SIDE = 240  # pixels
HEAD = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Scores</title><style>
body { font: 14px/1.4 system-ui, sans-serif; margin: 1.5rem; display: flex; flex-wrap: wrap; gap: 1rem; }
figure { margin: 0; width: 240px; } img { max-width: 240px; max-height: 240px; } figcaption { overflow-wrap: anywhere; }
</style></head><body>
"""


def write_contact_sheet(scored: Sequence[tuple[str, float, Image.Image]], path: Path) -> None:
    """Name, score and picture of each, in the given order; pictures are shrunk copies inside the page."""
    figures = []
    for name, score, picture in scored:
        small = picture.copy()
        small.thumbnail((SIDE, SIDE))
        stream = io.BytesIO()
        small.save(stream, "JPEG", quality=85)
        data = base64.b64encode(stream.getvalue()).decode()
        image = f'<img src="data:image/jpeg;base64,{data}" alt="">'
        figures.append(f"<figure>{image}<figcaption>{score:.4f} {escape(name)}</figcaption></figure>")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(HEAD + "\n".join(figures) + "\n</body></html>\n")
