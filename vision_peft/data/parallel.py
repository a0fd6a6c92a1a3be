"""Work on many pictures at once: a few threads (decoders release the interpreter lock) and a bar when there is time to see it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")
Result = TypeVar("Result")

THREADS = min(4, os.cpu_count() or 1)
BAR_FROM = 500  # items; fewer are done before a bar could be read


def map_threads(function: Callable[[Item], Result], items: Sequence[Item], title: str) -> list[Result]:
    """`[function(item) for item in items]` by a small thread pool, in order; the first exception ends it."""
    with ThreadPoolExecutor(THREADS) as pool:
        results = pool.map(function, items)
        try:
            return list(tqdm(results, title, len(items), unit="img", disable=len(items) <= BAR_FROM))
        except BaseException:
            pool.shutdown(cancel_futures=True)  # else leaving the block would first work through everything still queued
            raise
