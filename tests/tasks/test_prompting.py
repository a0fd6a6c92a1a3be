"""Prompts made from masks: in the network's pixels, x before y, the same for the same draw."""

from __future__ import annotations

import pytest
import torch

from vision_peft.backbones import Sam
from vision_peft.errors import UserError
from vision_peft.tasks.prompting import BoxPrompt, ClassText, MaskPrompt, NoPrompt, PointPrompt, prompt_part

DRAWS = [11, 12]


@pytest.fixture(scope="module")
def backbone() -> Sam:
    return Sam("tiny", image_size=128)


def targets(size: int = 64) -> torch.Tensor:
    """Two masks at half the network's resolution: a wide rectangle, and nothing."""
    masks = torch.zeros(2, size, size, dtype=torch.int64)
    masks[0, 10:14, 20:50] = 1
    return masks


def built(prompting, backbone):
    prompting.build(backbone, "vessel")
    return prompting


def test_points_lie_on_the_target(backbone):
    found = built(PointPrompt(positive=3, negative=2), backbone)(targets(), DRAWS)
    assert found.points.shape == (2, 5, 2) and found.labels.tolist()[0] == [1, 1, 1, 0, 0]
    x, y = (found.points[0, :, axis] / 2 for axis in (0, 1))
    inside = (x > 19.5) & (x < 50) & (y > 9.5) & (y < 14)
    assert inside.tolist() == [True, True, True, False, False]
    assert not found.labels[1].any(), "an empty target has background points alone"
    again = built(PointPrompt(positive=3, negative=2), backbone)(targets(), DRAWS)
    assert torch.equal(again.points, found.points)


def test_a_box_without_jitter_is_tight_and_jitter_stays_in_the_picture(backbone):
    tight = built(BoxPrompt(jitter=0), backbone)(targets(), DRAWS).boxes
    assert tight[0].tolist() == [40.5, 20.5, 98.5, 26.5]
    assert tight[1].tolist() == [0, 0, 127, 127]
    for draw in range(30):
        moved = built(BoxPrompt(jitter=200), backbone)(targets(), [draw, draw]).boxes[0]
        assert (moved >= 0).all() and (moved <= 127).all()
        assert (moved[:2] <= tight[0, :2]).all() and (moved[2:] >= tight[0, 2:]).all(), "sides move outwards"
        shifted = built(BoxPrompt(jitter=200, how="shift"), backbone)(targets(), [draw, draw]).boxes[0]
        assert torch.allclose(shifted[2:] - shifted[:2], tight[0, 2:] - tight[0, :2])
        assert (shifted - tight[0]).abs().max() <= 3.01, "at most half the shorter side"


def test_a_rough_mask_is_the_truth_grown_or_shrunk(backbone):
    exact = built(MaskPrompt(reach=0), backbone)(targets(), DRAWS).masks
    assert exact.shape == (2, 1, 32, 32) and set(exact[0].unique().tolist()) == {-8.0, 8.0}
    sizes = {int((built(MaskPrompt(reach=1), backbone)(targets(), [draw, 0]).masks[0] > 0).sum()) for draw in range(12)}
    assert len(sizes) == 3 and int((exact[0] > 0).sum()) in sizes


def test_a_class_name_is_one_trained_token(backbone):
    prompting = built(ClassText(), backbone)
    assert sum(parameter.numel() for parameter in prompting.parameters()) == 384 * 256 + 256 + 2 * 256
    tokens = prompting.train()(targets(), DRAWS).tokens
    assert tokens.shape == (2, 1, 256) and torch.equal(tokens[0], tokens[1]) and tokens.std() > 0
    other = ClassText()
    other.build(backbone, "nucleus")
    assert not torch.allclose(other.feature, prompting.feature, atol=0.1)
    assert set(prompt_part(prompting)) == {"prompt"} and prompt_part(NoPrompt()) == {}


def test_impossible_prompts():
    for make, message in ((lambda: PointPrompt(0), "PointPrompt"), (lambda: BoxPrompt(-1), "jitter"), (lambda: MaskPrompt(-1), "reach")):
        with pytest.raises(UserError, match=message):
            make()
