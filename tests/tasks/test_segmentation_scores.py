"""Scores against MONAI's and against worked examples; losses; the threshold; prompts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from monai.metrics import DiceMetric, compute_hausdorff_distance

from vision_peft.tasks.operating_point import BINS, OperatingPoint
from vision_peft.tasks.segmentation_losses import DiceCE, DiceClDice, DiceFocal, SaltLoss, settle
from vision_peft.tasks.segmentation_metrics import cldice, hd95, mean_scores, score

ALL = np.ones((40, 40), bool)


def rectangle(top: int, left: int, bottom: int, right: int) -> np.ndarray:
    mask = np.zeros((40, 40), bool)
    mask[top:bottom, left:right] = True
    return mask


def blobs(seed: int) -> np.ndarray:
    noise = torch.rand(1, 1, 10, 10, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(noise, 40, mode="bilinear")[0, 0].numpy() > 0.6


@pytest.mark.parametrize("seed", range(4))
def test_overlap_and_distance_are_monais(seed):
    a, b = blobs(seed), blobs(seed + 50)
    found = score(a, b, ALL)
    tensors = [torch.from_numpy(each)[None, None].float() for each in (a, b)]
    assert found["dice_image"] == pytest.approx(float(DiceMetric()(*tensors)))
    assert found["dice_image"] == pytest.approx(2 * found["iou_image"] / (1 + found["iou_image"]))
    assert found["hd95_max"] == pytest.approx(float(compute_hausdorff_distance(*tensors, percentile=95)), abs=1e-4)
    assert hd95(a, b) == hd95(b, a) and found["hd95_pooled"] <= found["hd95_max"]


def test_distances_of_worked_examples():
    a, b = np.zeros((20, 20), bool), np.zeros((20, 20), bool)
    a[5, 5] = b[8, 9] = True
    assert hd95(a, b) == {"hd95_max": 5.0, "hd95_pooled": 5.0}
    assert hd95(a, b, spacing=(2.0, 0.5))["hd95_max"] == pytest.approx(math.hypot(6, 2))
    assert hd95(a, a) == {"hd95_max": 0.0, "hd95_pooled": 0.0}
    stray = rectangle(10, 10, 30, 30)
    stray[0:2, 0:2] = True
    both = hd95(stray, rectangle(12, 10, 30, 30))
    assert both["hd95_pooled"] < both["hd95_max"]


def test_empty_masks_are_scored_strictly_and_counted():
    nothing, something = np.zeros((40, 40), bool), rectangle(3, 3, 9, 9)
    perfect, missed, invented = score(nothing, nothing, ALL), score(nothing, something, ALL), score(something, nothing, ALL)
    assert perfect["dice_image"] == perfect["cldice"] == 1 and perfect["hd95_max"] == 0
    assert missed["dice_image"] == invented["dice_image"] == 0 and math.isnan(missed["hd95_max"]) and math.isnan(invented["hd95_max"])
    means = mean_scores([perfect, missed, invented, score(something, something, ALL)])
    assert means["dice_image"] == 0.5 and means["hd95_max"] == 0.0
    assert (means["without_distance"], means["empty_predictions"], means["empty_targets"]) == (2, 1, 2)
    assert means["dice_pooled"] == pytest.approx(2 * 36 / (72 + 72))


def test_only_what_is_valid_counts():
    valid = np.zeros((40, 40), bool)
    valid[:, :20] = True
    a, b = rectangle(0, 0, 10, 40), rectangle(0, 0, 10, 20)
    assert score(a, b, valid)["dice_image"] == 1 and score(a, b, ALL)["dice_image"] < 1


def test_cldice_asks_for_connections_not_for_width():
    line, thick, broken = rectangle(20, 2, 21, 38), rectangle(18, 2, 23, 38), rectangle(20, 2, 21, 38)
    broken[20, 12:28] = False
    assert cldice(thick, line) > 0.9 > cldice(broken, line)
    assert cldice(line, line) == 1
    assert cldice(ALL, ALL) == 1, "a mask that fills the picture has a skeleton, too"


# ---- losses ----


def sure(target: torch.Tensor, classes: int) -> torch.Tensor:
    if classes == 1:
        return 60.0 * target[:, None].float() - 30
    return 60.0 * torch.nn.functional.one_hot(target, classes).permute(0, 3, 1, 2).float() - 30


@pytest.mark.parametrize("loss", [DiceCE(), DiceFocal(), SaltLoss(), DiceCE(squared=True, batch=True, lambda_dice=0.8, lambda_ce=0.2)])
@pytest.mark.parametrize("classes", [1, 3])
def test_a_perfect_answer_costs_nothing_and_a_wrong_one_much(loss, classes):
    if classes > 1 and isinstance(loss, SaltLoss):
        pytest.skip("for one target")
    target = torch.randint(0, max(classes, 2), (2, 16, 16), generator=torch.Generator().manual_seed(0))
    assert loss(sure(target, classes), target) < 1e-3
    assert loss(-sure(target, classes), target) > 0.5


def test_salts_loss_by_hand():
    logits, target = torch.tensor([[[[0.3, -1.2], [2.0, 0.1]]]]), torch.tensor([[[1, 0], [1, 0]]])
    P, M = logits[0, 0].sigmoid(), target[0].float()
    dice = 1 - (2 * (P * M).sum() + 1) / (P.sum() + M.sum() + 1)

    def focal(z):
        ce = torch.nn.functional.softplus(z) - z * M
        return ((0.75 * M + 0.25 * (1 - M)) * (1 - (P * M + (1 - P) * (1 - M))) ** 3 * ce).mean()

    torch.testing.assert_close(SaltLoss()(logits, target), dice + focal(logits[0, 0]))
    torch.testing.assert_close(SaltLoss(variant="official")(logits, target), dice + focal(P))  # a sigmoid twice


def test_pixels_that_do_not_count_add_nothing():
    target = torch.randint(0, 2, (1, 8, 8))
    valid = torch.zeros(1, 8, 8, dtype=torch.bool)
    valid[:, :4] = True
    logits = torch.randn(1, 1, 8, 8, requires_grad=True)
    DiceCE()(*settle(logits, target, valid)).backward()
    assert logits.grad[:, :, :4].all() and not logits.grad[:, :, 4:].any()


def test_cldice_loss_sees_a_broken_line():
    target = torch.from_numpy(rectangle(18, 2, 23, 38)).long()[None]
    gap = target.clone()
    gap[:, :, 18:22] = 0
    off = target.clone()
    off[:, 18, :] = 0  # the same number of pixels away from the skeleton, roughly
    loss = DiceClDice(share=1.0)
    assert loss(sure(gap, 1), target) > loss(sure(off, 1), target)


# ---- the threshold ----


def test_the_threshold_is_the_best_of_an_exhaustive_search():
    rng = np.random.default_rng(0)
    cases = []
    for _ in range(3):
        target = rng.random((20, 20)) < 0.2
        cases.append((np.clip(0.3 * target + 0.15 + 0.2 * rng.standard_normal((20, 20)), 0, 1), target, rng.random((20, 20)) < 0.9))
    point = OperatingPoint(None)
    for case in cases:
        point.feed(*case)
    best = point.choose()
    thresholds = np.arange(1, BINS) / BINS
    dice = [np.mean([score(p >= t, target, valid)["dice_image"] for p, target, valid in cases]) for t in thresholds]
    assert best == pytest.approx(max(dice)) and dice[round(float(point.threshold) * BINS) - 1] == pytest.approx(max(dice))
    fixed = OperatingPoint(0.5)
    fixed.feed(*cases[0])
    fixed.choose()
    assert float(fixed.threshold) == 0.5
