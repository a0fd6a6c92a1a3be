"""A grid of pictures on one HTML page that needs no other file."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from html import escape
from pathlib import Path

HEAD = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Samples</title><style>
body { font: 14px/1.4 system-ui, sans-serif; margin: 1.5rem; } img { max-width: 100%; image-rendering: pixelated; }
td, th { text-align: left; padding: 0.15rem 1rem 0.15rem 0; }
</style></head><body>
"""


def write_page(grid: Path, rows: Mapping[str, str], settings: Mapping[str, object], path: Path) -> None:
    """The PNG `grid`, what each of its rows is, and how it was drawn."""
    data = base64.b64encode(grid.read_bytes()).decode()
    lines = [f"<tr><th>{escape(title)}</th><td>{escape(text)}</td></tr>" for title, text in rows.items()]
    drawn = ", ".join(f"{escape(name)} {escape(str(value))}" for name, value in settings.items())
    body = f'<img src="data:image/png;base64,{data}" alt="">\n<table>{"".join(lines)}</table>\n<p>{drawn}</p>'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{HEAD}{body}\n</body></html>\n")
