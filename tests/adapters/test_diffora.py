"""DiffoRA: the relaxed search by hand, who is selected, one pair for the rest, and that the levels take turns."""

from __future__ import annotations

import copy

import pytest
import torch
from fakes import site
from torch import nn

from vision_peft.adapters.diffora import DiffoRA, layer_and_type
from vision_peft.engine.adapter import Clock
from vision_peft.engine.adapter_set import AdapterSet
from vision_peft.engine.install import attach, merge, unmerge
from vision_peft.engine.store import load_adapter, save_adapter
from vision_peft.errors import UserError

WIDTH = 6


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.mid, self.down = nn.Linear(WIDTH, 10), nn.Linear(10, 10), nn.Linear(10, WIDTH)

    def forward(self, x):
        return x + self.down(torch.tanh(self.mid(torch.tanh(self.up(x)))))


def network() -> nn.Sequential:
    """Three layers `0`, `1`, `2` of three modules, of types `#.up`, `#.mid`, `#.down`."""
    torch.manual_seed(3)
    return nn.Sequential(*(Block() for _ in range(3)))


def attached(**options) -> tuple[nn.Module, AdapterSet]:
    net = network()
    return net, attach(net, DiffoRA(rank=2, **options), "all")


def stir(adapters: AdapterSet) -> None:
    with torch.no_grad():
        for parameter in adapters.adapters.parameters():
            parameter.normal_()


def select(adapters: AdapterSet, logits: list[float]) -> None:
    with torch.no_grad():
        adapters.shared.logits.copy_(torch.tensor(logits))
        method = adapters.method
        adapters.shared.select(method.rho, method.scope, method.sharing)


def update(adapters: AdapterSet, net: nn.Module, name: str) -> torch.Tensor:
    W = net.get_submodule(name).weight
    return (adapters.named_adapters()[name].weight(W) - W).detach()


def key(adapters: AdapterSet, number: int) -> str:
    return f"adapters.{adapters.shared.names[number].replace('.', '/')}"


def steps(net: nn.Module, adapters: AdapterSet, count: int, total: int, optimizer=None):
    """Real training steps; yields what moved in each: logits, pairs."""
    optimizer = optimizer or torch.optim.AdamW(adapters.param_groups(1e-2), lr=1e-2)
    torch.manual_seed(1)
    for step in range(count):
        x, target = torch.randn(16, WIDTH), torch.randn(16, WIDTH)
        optimizer.zero_grad()
        ((net(x) - target).square().mean() + adapters.penalty()).backward()
        before = copy.deepcopy(adapters.state_dict())
        adapters.adjust_gradients(Clock(step, total, 0, optimizer))
        optimizer.step()
        now = adapters.state_dict()
        moved = {name for name in now if not torch.equal(now[name], before[name])}
        adapters.coordinate(Clock(step + 1, total, 0, optimizer))
        yield "shared.logits" in moved, any(name.endswith((".A", ".B")) for name in moved)


ORDER = [0.1, 0.9, 0.5, 0.3, 0.2, 0.1, 0.4, 0.6, 0.8]  # up, mid, down of the three layers


# ---- the search ----


def test_the_relaxed_update_and_the_gradient_of_a_logit():
    net, adapters = attached(alpha=6.0)
    stir(adapters)
    with torch.no_grad():
        adapters.shared.logits.copy_(torch.linspace(-2, 2, 9))
    number, adapter = 4, adapters.named_adapters()["1.mid"]
    gamma = torch.sigmoid(torch.tensor(0.0))
    dense = 3 * (adapter.B @ adapter.A).detach()
    torch.testing.assert_close(update(adapters, net, "1.mid"), gamma * dense, rtol=1e-4, atol=1e-5)
    G = torch.randn(10, 10)
    (adapter.weight(net[1].mid.weight) * G).sum().backward()
    by_hand = torch.zeros(9)
    by_hand[number] = gamma * (1 - gamma) * (G * dense).sum()
    torch.testing.assert_close(adapters.shared.logits.grad, by_hand, rtol=1e-4, atol=1e-5)


def test_no_logit_has_a_gradient_while_b_is_zero():
    net, adapters = attached()
    net(torch.randn(4, WIDTH)).square().mean().backward()
    assert not adapters.shared.logits.grad.any()


@pytest.mark.parametrize("logit, share", [(30.0, 1.0), (-200.0, 0.0)])
def test_logits_at_infinity_give_lora_or_the_frozen_weight(logit, share):
    net, adapters = attached(alpha=2.0)
    stir(adapters)
    with torch.no_grad():
        adapters.shared.logits.fill_(logit)
    adapter = adapters.named_adapters()["0.up"]
    torch.testing.assert_close(update(adapters, net, "0.up"), share * (adapter.B @ adapter.A).detach(), rtol=1e-4, atol=1e-5)


def test_softmax_over_the_modules_of_a_layer():
    _, adapters = attached(relaxation="softmax")
    with torch.no_grad():
        adapters.shared.logits.copy_(torch.tensor(ORDER))
    expected = 3 * torch.tensor(ORDER).view(3, 3).softmax(1).flatten()
    found = torch.stack([adapters.shared.gamma(number) for number in range(9)])
    torch.testing.assert_close(found.detach(), expected)


# ---- the selection ----


def test_two_of_three_in_every_layer():
    _, adapters = attached()  # ceil(0.5 * 3) = 2
    select(adapters, ORDER)
    assert adapters.shared.selected.view(3, 3).tolist() == [[False, True, True], [True, True, False], [False, True, True]]
    assert adapters.shared.pair.tolist() == [0, 1, 2, 3, 4, 5, 0, 7, 8]  # up of layers 0 and 2 share; down of layer 1 is alone


def test_the_largest_of_all():
    _, adapters = attached(scope="global", rho=0.3)  # ceil(2.7) = 3
    select(adapters, ORDER)
    assert adapters.shared.selected.nonzero().flatten().tolist() == [1, 7, 8]
    assert adapters.shared.pair.tolist() == [0, 1, 2, 0, 4, 2, 0, 7, 8]


def test_of_equal_logits_the_first_is_selected():
    _, adapters = attached(rho=0.3)
    select(adapters, [0.0] * 9)
    assert adapters.shared.selected.view(3, 3).tolist() == [[True, False, False]] * 3


def test_rho_1_is_lora_everywhere():
    net, adapters = attached(rho=1.0, alpha=4.0)
    stir(adapters)
    select(adapters, ORDER)
    assert adapters.shared.pair.tolist() == list(range(9))
    for name, adapter in adapters.named_adapters().items():
        torch.testing.assert_close(update(adapters, net, name), 2 * (adapter.B @ adapter.A).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_rho_0_without_sharing_is_the_frozen_network(dropout):
    net, adapters = attached(rho=0.0, sharing=False, dropout=dropout)
    stir(adapters)
    select(adapters, ORDER)
    x = torch.randn(4, WIDTH, requires_grad=True)
    torch.testing.assert_close(net(x), network()(x))
    net(x).sum().backward()
    assert x.grad.any()


def test_some_frozen_some_not_learns():
    net, adapters = attached(rho=0.3, sharing=False)
    select(adapters, ORDER)
    assert adapters.shared.pair.tolist() == [-1, 1, -1, 3, -1, -1, -1, -1, 8]
    stir(adapters)
    net(torch.randn(4, WIDTH)).square().mean().backward()
    with_gradient = {name for name, adapter in adapters.named_adapters().items() if adapter.A.grad is not None and adapter.A.grad.any()}
    assert with_gradient == {"0.mid", "1.up", "2.down"}


# ---- sharing ----


def test_those_left_out_use_one_parameter_whose_gradient_is_the_sum():
    net, adapters = attached()
    select(adapters, ORDER)
    stir(adapters)
    named = adapters.named_adapters()
    G = torch.randn(2, 10, WIDTH)
    forms = [named[name].factored(net.get_submodule(name).weight) for name in ("0.up", "2.up")]
    assert forms[0].A is forms[1].A is named["0.up"].A
    own = []
    for name, g in zip(("0.up", "2.up"), G):
        adapters.zero_grad()
        (named[name].weight(net.get_submodule(name).weight) * g).sum().backward()
        own.append(named["0.up"].B.grad.clone())
    adapters.zero_grad()
    sum((named[name].weight(net.get_submodule(name).weight) * g).sum() for name, g in zip(("0.up", "2.up"), G)).backward()
    torch.testing.assert_close(named["0.up"].B.grad, own[0] + own[1])
    assert named["2.up"].B.grad is None


def test_types_of_different_shape_do_not_share():
    net = nn.ModuleList([nn.ModuleDict({"fc": nn.Linear(4, 4), "out": nn.Linear(4, 4)}), nn.ModuleDict({"fc": nn.Linear(4, 6)})])
    adapters = attach(net, DiffoRA(rank=2, rho=0.0), "all")
    adapters.shared.select(0.0, "layer", True)
    assert adapters.shared.pair.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "name, expected",
    [
        ("vision.3.attn.q", ("vision.3", "vision.#.attn.q")),
        ("text.11.mlp.fc1", ("text.11", "text.#.mlp.fc1")),
        ("blocks.2.1.conv_pw", ("blocks.2.1", "blocks.#.#.conv_pw")),
        ("layers.0.mlp.2", ("layers.0", "layers.#.mlp.2")),
        ("layer1.0.conv2", ("layer1.0", "layer1.#.conv2")),
        ("0", ("", "0")),
        ("0.up", ("0", "#.up")),
        ("attn.q", ("", "attn.q")),
    ],
)
def test_layers_and_types_by_name(name, expected):
    assert layer_and_type(name) == expected


def test_merged_as_unmerged_and_back_with_shared_pairs():
    net, adapters = attached()
    select(adapters, ORDER)
    stir(adapters)
    x = torch.randn(4, WIDTH)
    before, weights = net(x), [p.detach().clone() for p in net.parameters()]
    merge(net)
    torch.testing.assert_close(net(x), before, rtol=1e-4, atol=1e-4)
    unmerge(net)
    assert all(torch.equal(p, w) for p, w in zip(net.parameters(), weights))


def test_a_copy_and_a_file_share_within_themselves(tmp_path):
    net, adapters = attached()
    select(adapters, ORDER)
    stir(adapters)
    twin = copy.deepcopy(adapters)
    assert twin.shared.members[0] is twin.named_adapters()["0.up"]
    assert twin.named_adapters()["2.up"].shared is twin.shared
    save_adapter(tmp_path / "adapter", net)
    fresh = network()
    loaded = load_adapter(fresh, tmp_path / "adapter")
    assert loaded.shared.pair.tolist() == adapters.shared.pair.tolist()
    x = torch.randn(4, WIDTH)
    torch.testing.assert_close(fresh(x), net(x))


# ---- the run ----


def test_levels_take_turns_after_the_warm_up():
    """24 steps: a quarter is 6, of them the first third for the pairs alone."""
    net, adapters = attached(search=0.25, warm_up=0.33)
    turns = list(steps(net, adapters, 12, 24))
    assert turns[:6] == [(False, True), (False, True), (True, False), (False, True), (True, False), (False, True)]
    assert turns[6:] == [(False, True)] * 6


def test_the_search_ends_with_a_fresh_start_of_what_is_used():
    net, adapters = attached(search=0.25, rho=0.3)
    start = copy.deepcopy(adapters.state_dict())
    optimizer = torch.optim.AdamW(adapters.param_groups(1e-2), lr=1e-2)
    run = steps(net, adapters, 6, 24, optimizer)
    for _ in range(5):
        next(run)
    assert adapters.shared.searching and adapters.shared.selected.all()
    searched = adapters.state_dict()
    assert not [name for name in start if name.endswith((".A", ".B")) and torch.equal(searched[name], start[name])]
    next(run)
    assert not adapters.shared.searching
    assert adapters.shared.selected.view(3, 3).sum(1).tolist() == [1, 1, 1]
    for number, adapter in adapters.shared.members.items():
        used = number in adapters.shared.pair.tolist()
        assert torch.equal(adapter.A, start[f"{key(adapters, number)}.A"]) is used
        assert bool(adapter.B.any()) is not used
        assert (adapter.A in optimizer.state) is not used


def test_after_the_search_what_is_out_of_use_rests_but_is_in_the_graph():
    net, adapters = attached(search=0.25, rho=0.0)
    list(steps(net, adapters, 6, 24))
    resting = [number for number in range(9) if number not in adapters.shared.pair.tolist()]
    assert resting == [3, 4, 5, 6, 7, 8]
    (net(torch.randn(4, WIDTH)).square().mean() + adapters.penalty()).backward()
    assert all(parameter.grad is not None for parameter in adapters.parameters())
    assert float(adapters.penalty().detach()) == 0.0
    before = copy.deepcopy(adapters.state_dict())
    optimizer = torch.optim.AdamW(adapters.param_groups(1e-2), lr=1e-2, weight_decay=0.1)
    adapters.adjust_gradients(Clock(6, 24, 0, optimizer))
    optimizer.step()
    assert torch.equal(adapters.shared.logits, before["shared.logits"])
    for number, adapter in adapters.shared.members.items():
        assert torch.equal(adapter.B, before[f"{key(adapters, number)}.B"]) is (number in resting)


def test_the_search_prefers_a_module_that_helps():
    """Two modules a layer, of which one is multiplied by nothing: its gamma sees no gradient, the other's rises."""

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dead, self.live = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            return self.live(x) + 0 * self.dead(x)

    torch.manual_seed(3)
    net = nn.Sequential(Half())
    adapters = attach(net, DiffoRA(rank=2, search=0.5), "all")
    x, target = torch.randn(64, WIDTH), torch.randn(64, WIDTH)
    optimizer = torch.optim.AdamW(adapters.param_groups(1e-2), lr=1e-2)
    for step in range(20):
        optimizer.zero_grad()
        (net(x) - target).square().mean().backward()
        adapters.adjust_gradients(Clock(step, 40, 0, optimizer))
        optimizer.step()
        adapters.coordinate(Clock(step + 1, 40, 0, optimizer))
    assert adapters.shared.selected.tolist() == [False, True]


def test_groups():
    _, adapters = attached(logit_lr=0.3)
    pairs, logits = adapters.param_groups(1e-3)
    assert (logits["lr"], logits["weight_decay"], logits["betas"]) == (0.3, 1e-3, (0.5, 0.999))
    assert logits["params"] == [adapters.shared.logits] and len(pairs["params"]) == 18


# ---- numbers ----


def test_counts_of_a_vit_b():
    """LoRA everywhere: 1,327,104; with q, k, v of 12 blocks selected and three shared pairs: 516,096; 72 logits."""
    shapes = {"attn.q": (768, 768), "attn.k": (768, 768), "attn.v": (768, 768), "attn.out": (768, 768)}
    shapes |= {"mlp.fc1": (3072, 768), "mlp.fc2": (768, 3072)}
    sites = [site(*shape, name=f"vision.{block}.{part}") for block in range(12) for part, shape in shapes.items()]
    method = DiffoRA()
    adapters = AdapterSet(method, sites)
    assert sum(method.count(each) for each in sites) == 1_327_104
    assert adapters.num_trainable() == 1_327_104 + 72
    select(adapters, [1.0, 1.0, 1.0, 0.0, 0.0, 0.0] * 12)
    used = set(adapters.shared.pair.tolist())
    assert len(used) == 36 + 3
    assert sum(method.count(sites[number]) for number in used) == 516_096


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rank": 0}, "rank: 0"),
        ({"dropout": 1.0}, "dropout: 1.0"),
        ({"rho": 1.5}, "rho: 1.5 is not in"),
        ({"scope": "block"}, "scope: 'block' is not one of layer, global"),
        ({"relaxation": "gumbel"}, "relaxation: 'gumbel'"),
        ({"search": 0.0}, "search: 0.0"),
        ({"warm_up": 1.0}, "warm_up: 1.0"),
        ({"logit_lr": 0.0}, "logit_lr: 0.0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        DiffoRA(**options)


def test_a_rank_that_does_not_fit():
    with pytest.raises(UserError, match="rank: 10 does not fit"):
        attach(nn.Sequential(nn.Linear(9, 12)), DiffoRA(rank=10), "all")
