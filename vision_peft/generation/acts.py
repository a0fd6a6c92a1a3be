"""At which times of the noise schedule an adapter acts: those it was trained at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vision_peft.errors import UserError

Acts = tuple[float, float]  # shares of the schedule, from clean (0) to noise (1)
ALWAYS: Acts = (0.0, 1.0)


def acts_of(config: Mapping[str, Any], source: object) -> Acts:
    """What an adapter's config says, ALWAYS where it says nothing.

    Raises:
        UserError: names `source`, where the config is from.
    """
    told = config.get("acts", ALWAYS)
    numbers = isinstance(told, (list, tuple)) and len(told) == 2 and all(isinstance(each, (int, float)) for each in told)
    if not numbers or not 0 <= told[0] <= told[1] <= 1:
        raise UserError(f"{source}: `acts` should be two rising shares between 0 and 1, not {told!r}")
    return told[0], told[1]
