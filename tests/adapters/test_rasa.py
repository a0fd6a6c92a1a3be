"""RaSA: who shares a pool with whom, and what a layer makes of its own and the pool's ranks."""

from __future__ import annotations

import copy

import pytest
import torch
from fakes import site
from torch import nn

from vision_peft.adapters.rasa import RaSA, layer_type
from vision_peft.engine.install import attach, installed
from vision_peft.engine.store import load_adapter, save_adapter
from vision_peft.errors import UserError


class Layer(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, hidden), nn.Linear(hidden, 8)

    def forward(self, x):
        return x + self.fc2(torch.relu(self.fc1(x)))


def network():
    torch.manual_seed(0)
    return nn.Sequential(*(Layer(hidden) for hidden in (10, 10, 14)))


def adapted(**options):
    net = network()
    adapters = attach(net, RaSA(**{"rank": 3, "shared_rank": 1, "alpha": 4.0} | options), "all", seed=3)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.add_(torch.randn_like(parameter))
    return net, adapters


@pytest.mark.parametrize(
    "name, expected",
    [("vision.3.attn.q", "vision.#.attn.q"), ("text.11.mlp.fc1", "text.#.mlp.fc1"), ("vision.0.mlp.fc2", "vision.#.mlp.fc2"), ("0", "#")],
)
def test_types(name, expected):
    assert layer_type(site(4, 4, name=name)) == expected


def test_starts_at_the_identity_with_half_of_the_scale_each():
    net = network()
    x = torch.randn(4, 8)
    before = net(x)
    adapters = attach(net, RaSA(rank=3, shared_rank=1, alpha=4.0), "all")
    torch.testing.assert_close(net(x), before, rtol=0, atol=1e-6)
    for adapter in adapters.adapters.values():
        assert adapter.e.tolist() == [1.0, 1.0]  # 4 / (2 * 2)
    for pool in adapters.shared.pools.values():
        torch.testing.assert_close(pool.e, torch.full((3, 3), 4 / (2 * 3)))
        assert pool.A.any()
        assert not pool.B.any()


@pytest.mark.parametrize("shared_rank", [1, 2])
@pytest.mark.parametrize("index, name", [(0, "fc1"), (2, "fc1"), (2, "fc2")])
def test_the_formula(shared_rank, index, name):
    net, adapters = adapted(shared_rank=shared_rank)
    W = getattr(net[index], name).weight.double()
    own, pool = adapters.adapters[f"{index}/{name}"].double(), adapters.shared.pools[f"#/{name}"].double()
    m, n = W.shape
    B = torch.cat([own.B, pool.B[:m]], 1)
    A = torch.cat([own.A, pool.A[:, :n]])
    e = torch.cat([own.e, pool.e[index]])
    assert len(e) == 3 - shared_rank + 3 * shared_rank
    torch.testing.assert_close(own.weight(W) - W, B @ torch.diag(e) @ A, rtol=1e-10, atol=1e-11)


def test_pools_have_the_largest_size():
    pools = adapted()[1].shared.pools
    assert {name: (tuple(pool.A.shape), tuple(pool.B.shape)) for name, pool in pools.items()} == {
        "#/fc1": ((3, 8), (14, 3)),
        "#/fc2": ((3, 14), (8, 3)),
    }


def test_a_pool_changes_all_layers_of_its_type_and_no_other():
    net, adapters = adapted()

    def weights():
        return {name: a.weight(getattr(net[int(name[0])], name[2:]).weight).detach() for name, a in adapters.adapters.items()}

    before = weights()
    with torch.no_grad():
        adapters.shared.pools["#/fc1"].B.add_(1)
    assert {name for name, value in weights().items() if not torch.equal(value, before[name])} == {"0/fc1", "1/fc1", "2/fc1"}


def test_the_weights_on_the_pool_belong_to_one_layer():
    net, adapters = adapted()
    pool = adapters.shared.pools["#/fc1"]
    (adapters.adapters["1/fc1"].weight(net[1].fc1.weight) * torch.randn(10, 8)).sum().backward()
    assert pool.e.grad[1].all()
    assert not pool.e.grad[[0, 2]].any()


def test_gradients_by_hand():
    """de_j = b_j^T G a_j, for own and pooled ranks alike."""
    net, adapters = adapted()
    own, pool, W = adapters.adapters["0/fc1"], adapters.shared.pools["#/fc1"], net[0].fc1.weight
    G = torch.randn_like(W)
    (own.weight(W) * G).sum().backward()
    torch.testing.assert_close(own.e.grad, torch.diag(own.B.mT @ G @ own.A.mT), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(pool.e.grad[0], torch.diag(pool.B[:10].mT @ G @ pool.A.mT), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(own.B.grad, G @ own.A.mT * own.e, rtol=1e-4, atol=1e-4)


def test_more_ranks_than_paid_for():
    net, adapters = adapted()
    W = net[2].fc1.weight.double()
    D = adapters.double().adapters["2/fc1"].weight(W) - W
    assert torch.linalg.matrix_rank(D.detach()) == 2 + 3


def test_saved_and_copied(tmp_path):
    net, _ = adapted()
    x = torch.randn(4, 8)
    before = net(x)
    save_adapter(tmp_path / "adapter", net)
    fresh = network()
    load_adapter(fresh, tmp_path / "adapter")
    torch.testing.assert_close(fresh(x), before)
    twin = installed(copy.deepcopy(net))["default"]
    assert twin.adapters["0/fc1"].pool is twin.adapters["2/fc1"].pool is twin.shared.pools["#/fc1"]


def test_counts():
    """Twelve 768 x 768 weights at r = 8, k = 1: LoRA's 147,456 and the e: 12 * 7 own and 12 * 12 of the pool."""
    sites = [site(768, 768, name=f"vision.{i}.attn.q") for i in range(12)]
    method = RaSA(rank=8, shared_rank=1)
    shared = method.shared(sites)
    own, common = sum(map(method.count, sites)), sum(p.numel() for p in shared.parameters())
    assert own + common == 147_456 + 84 + 144
    assert sum(p.numel() for each in sites for p in method.adapter(each, shared).parameters()) == own


@pytest.mark.parametrize(
    "options, message",
    [
        ({"shared_rank": 0}, "shared_rank: 0 is not between 1 and rank - 1 = 7"),
        ({"shared_rank": 8}, "shared_rank: 8"),
        ({"rank": 0}, "rank: 0 is not positive"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        RaSA(**options)


def test_a_rank_that_does_not_fit():
    with pytest.raises(UserError, match="rank: 9 does not fit"):
        attach(network(), RaSA(rank=10, shared_rank=1), "all")
