"""At which times an adapter acts, as its config says it."""

from __future__ import annotations

import pytest

from vision_peft.errors import UserError
from vision_peft.generation.acts import ALWAYS, acts_of


def test_what_is_said_and_what_is_not():
    assert acts_of({"acts": [0.1, 0.6]}, "here") == (0.1, 0.6)
    assert acts_of({}, "here") == ALWAYS == (0.0, 1.0)


@pytest.mark.parametrize("told", ["x", [0.1], [0.6, 0.1], [0, 2], ["a", "b"], None, {"low": 0}])
def test_what_is_neither_is_told_in_one_line(told):
    with pytest.raises(UserError, match=r"here: `acts` should be two rising shares between 0 and 1"):
        acts_of({"acts": told}, "here")
