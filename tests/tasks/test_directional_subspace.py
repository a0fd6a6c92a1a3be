"""The loss of hybrid domain adaptation on embeddings: what the method note says can be checked."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vision_peft.linalg.subspace import Subspace
from vision_peft.tasks.directional_subspace import direction_loss, distance_loss, perpendiculars

DRAW = torch.Generator().manual_seed(0)
SOURCE = F.normalize(torch.randn(5, 30, generator=DRAW), dim=1)
SPACES = {name: Subspace.of(F.normalize(torch.randn(4, 30, generator=DRAW), dim=1)) for name in ("a", "b")}
HALF = {"a": 0.5, "b": 0.5}


def test_perpendiculars_are_unit_and_orthogonal_to_the_hull():
    for name, way in perpendiculars(SOURCE, SPACES).items():
        torch.testing.assert_close(way.norm(dim=1), torch.ones(5))
        assert (way @ SPACES[name].basis.float().mT).abs().max() < 1e-5


def test_along_the_shortest_way_the_direction_is_perfect_and_the_distance_falls():
    space = {"a": SPACES["a"]}
    way = SPACES["a"].project(SOURCE) - SOURCE
    whole = distance_loss(SOURCE, space, {"a": 1.0})
    for share in (0.25, 0.5, 1.0):
        adapted = SOURCE + share * way
        for mode in ("per_domain", "combined"):
            assert float(direction_loss(SOURCE, adapted, space, {"a": 1.0}, mode)) == pytest.approx(0, abs=1e-5)
        assert float(direction_loss(SOURCE, adapted, space, {"a": 1.0}, "in_subspace")) == pytest.approx(0, abs=1e-5)
        torch.testing.assert_close(distance_loss(adapted, space, {"a": 1.0}), (1 - share) ** 2 * whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", ["per_domain", "combined", "in_subspace"])
def test_at_the_start_the_loss_is_known_and_gradients_are_small(mode):
    adapted = SOURCE.clone().requires_grad_()
    loss = direction_loss(SOURCE, adapted, SPACES, HALF, mode)
    loss.backward()
    assert float(loss) == (0 if mode == "in_subspace" else 1)
    assert adapted.grad.norm() < 1 / 0.05


def test_order_and_scale_of_domains():
    adapted = F.normalize(SOURCE + 0.3 * torch.randn(5, 30, generator=DRAW), dim=1)
    turned = dict(reversed(SPACES.items()))
    for mode in ("per_domain", "combined", "in_subspace"):
        torch.testing.assert_close(
            direction_loss(SOURCE, adapted, SPACES, HALF, mode), direction_loss(SOURCE, adapted, turned, HALF, mode)
        )
    same = {"a": SPACES["a"], "b": SPACES["a"]}
    alone = {"a": SPACES["a"]}
    torch.testing.assert_close(distance_loss(adapted, same, HALF), distance_loss(adapted, alone, {"a": 1.0}))
    torch.testing.assert_close(direction_loss(SOURCE, adapted, same, HALF), direction_loss(SOURCE, adapted, alone, {"a": 1.0}))


def test_both_terms_together_reach_both_domains():
    """Free embeddings instead of a generator: the distances to two hulls fall together, and a weight of 0 leaves a domain alone."""
    found = {}
    for weights in ({"a": 0.5, "b": 0.5}, {"a": 1.0, "b": 0.0}):
        adapted = SOURCE.clone().requires_grad_()
        optimizer = torch.optim.Adam([adapted], 0.02)
        for _ in range(150):
            optimizer.zero_grad()
            loss = distance_loss(adapted, SPACES, weights) + direction_loss(SOURCE, adapted, SPACES, weights)
            loss.backward()
            optimizer.step()
        found[weights["b"]] = [float(space.distance(adapted.detach(), 1).mean()) for space in SPACES.values()]
    start = [float(space.distance(SOURCE, 1).mean()) for space in SPACES.values()]
    assert all(now < 0.6 * before for now, before in zip(found[0.5], start))
    assert found[0.0][0] < 0.2 * start[0] and found[0.0][1] > 0.8 * start[1]


def test_with_one_start_distances_and_directions_are_along_one_way():
    mean = SOURCE.mean(0)
    way = perpendiculars(mean[None], SPACES)["a"]
    space, whole = {"a": SPACES["a"]}, {"a": 1.0}
    moved = SOURCE + 0.3 * way
    assert float(direction_loss(SOURCE, moved, space, whole, start=mean)) == pytest.approx(0, abs=1e-5)
    beside = torch.linalg.qr(torch.cat([way, torch.randn(4, 30, generator=DRAW)]).mT).Q.mT[1:]  # perpendicular to the way
    torch.testing.assert_close(
        distance_loss(SOURCE + beside[0], space, whole, start=mean), distance_loss(SOURCE, space, whole, start=mean), rtol=1e-4, atol=1e-5
    )
    left = ((SPACES["a"].mean.float() - SOURCE) @ way[0]).square().mean()
    torch.testing.assert_close(distance_loss(SOURCE, space, whole, start=mean), left, rtol=1e-4, atol=1e-5)
