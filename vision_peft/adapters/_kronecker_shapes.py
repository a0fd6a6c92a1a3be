"""How a weight is cut into the two factors of a Kronecker product."""

from __future__ import annotations

import math

from vision_peft.engine.site import Site

Shape = tuple[int, int]


def split(size: int, factor: int | None) -> Shape:
    """size = a b with a <= b, a as large as it can be; with a `factor`, that divisor (or its partner), else the largest a up to it."""
    if factor is not None and size % factor == 0:
        return min(factor, size // factor), max(factor, size // factor)
    limit = min(math.isqrt(size), size if factor is None else factor)
    small = next(a for a in range(limit, 0, -1) if size % a == 0)
    return small, size // small


def kronecker_shapes(site: Site, factor: int | None) -> tuple[Shape, Shape]:
    """Shapes (m1, n1) and (m2, n2) of the factors; m1 m2 = m, n1 n2 = n. Input channels are split, the kernel's window is the second's."""
    out, columns = site.matrix_shape
    channels = site.shape[1] if len(site.shape) > 1 else 1
    (m1, m2), (n1, n2) = split(out, factor), split(channels, factor)
    return (m1, n1), (m2, n2 * (columns // channels))
