"""Pictures into the network's square and back: sizes, places, orientation, exactly."""

from __future__ import annotations

import pytest
import torch

from vision_peft.data.geometry import Frame

SIZES = [(40, 64), (64, 40), (64, 64), (17, 101), (200, 90)]
GEOMETRIES = ["pad", "squash", "centre"]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_mask_comes_back_in_its_own_size_and_place(size, geometry):
    frame = Frame.of(*size, 128, geometry)
    mask = torch.zeros(1, *size)
    mask[:, size[0] // 4 : size[0] // 2, size[1] // 2 : size[1] - 3] = 1
    fitted = frame.fit(mask, labels=True)
    assert fitted.shape == (1, 128, 128)
    back = frame.restore(2 * fitted - 1) > 0
    assert back.shape == mask.shape
    wrong = (back != mask.bool()).sum()
    edge = 2 * sum(mask[0].any(axis).sum() for axis in (0, 1))
    assert wrong <= (edge if max(size) > 128 or geometry == "squash" else edge / 4)  # at most a line of pixels around it


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_points_follow_the_picture(size, geometry):
    """x, y order: a lone bright pixel of a picture that is not square is found where points() says."""
    frame = Frame.of(*size, 256, geometry)
    y, x = size[0] // 3, 2 * size[1] // 3
    picture = torch.zeros(1, *size)
    picture[0, y, x] = 1
    fitted = frame.fit(picture)[0]
    rows, columns = torch.meshgrid(torch.arange(256.0), torch.arange(256.0), indexing="ij")
    found = torch.stack([(fitted * columns).sum(), (fitted * rows).sum()]) / fitted.sum()
    there = frame.points(torch.tensor([x, y], dtype=torch.float32))
    torch.testing.assert_close(found, there, atol=0.05, rtol=0)
    torch.testing.assert_close(frame.points_back(there), torch.tensor([x, y], dtype=torch.float32), atol=1e-4, rtol=0)


def test_pad_keeps_the_aspect_and_fills_below_and_right():
    frame = Frame.of(50, 100, 64, "pad")
    fitted = frame.fit(torch.ones(1, 50, 100))
    assert torch.allclose(fitted[:, :32], torch.ones(1)) and (fitted[:, 32:] == 0).all()


def test_centre_keeps_small_pictures_as_they_are():
    picture = torch.rand(3, 30, 50)
    fitted = Frame.of(30, 50, 64, "centre").fit(picture)
    assert torch.equal(fitted[:, 17:47, 7:57], picture)
    assert torch.equal(Frame.of(30, 50, 64, "centre").restore(fitted), picture)


def test_a_picture_of_the_squares_size_passes_unchanged():
    picture = torch.rand(3, 64, 64)
    for geometry in GEOMETRIES:
        frame = Frame.of(64, 64, 64, geometry)
        assert torch.equal(frame.fit(picture), picture) and torch.equal(frame.restore(picture), picture)


def test_low_resolution_scores_are_brought_up():
    frame = Frame.of(60, 120, 64, "pad")
    scores = torch.zeros(2, 16, 16)
    scores[1] = 3.0
    back = frame.restore(scores)
    assert back.shape == (2, 60, 120) and (back[0] == 0).all() and torch.allclose(back[1], torch.tensor(3.0))
