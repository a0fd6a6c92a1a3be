"""LoRA-MoE: tokens and experts one by one in a loop, the balance loss against autograd, and what a routed layer must survive."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from fakes import site
from torch import nn
from torch.utils.checkpoint import checkpoint

from vision_peft.adapters.lora import LoRA
from vision_peft.adapters.lora_moe import LoRAMoE
from vision_peft.engine.install import attach, installed, merge
from vision_peft.errors import UserError


def adapted(**options):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(9, 12))
    adapters = attach(network, LoRAMoE(**{"rank": 6, "experts": 3, "top_k": 2, "alpha": 3.0} | options), "all")
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.add_(torch.randn_like(parameter))
    return network, adapters


def by_hand(network, adapter, token, top_k=2):
    """One token (n,): softmax over the best logits, and the sum over their experts."""
    logits = adapter.R @ token
    best = sorted(range(len(logits)), key=lambda j: -logits[j].item())[:top_k]
    gates = torch.stack([logits[j].exp() for j in best])
    gates = gates / gates.sum()
    d = adapter.width
    y = network[0].weight @ token + network[0].bias
    for gate, j in zip(gates, best):
        y = y + adapter.scale * gate * (adapter.B[:, d * j : d * j + d] @ (adapter.A[d * j : d * j + d] @ token))
    return y


def balance_of(adapter, x, c=1e-3):
    """c E sum f p with autograd's own gradient."""
    logits = x.flatten(0, -2) @ adapter.R.mT
    p = logits.softmax(-1).mean(0)
    chosen = logits.topk(adapter.top_k).indices.flatten()
    f = torch.bincount(chosen, minlength=adapter.experts) / len(chosen)
    return c * adapter.experts * (f * p).sum()


def test_starts_at_the_identity_bit_for_bit():
    network = nn.Sequential(nn.Linear(9, 12))
    x = torch.randn(5, 9)
    before = network(x)
    attach(network, LoRAMoE(rank=6, experts=3), "all")
    assert torch.equal(network(x), before)


@pytest.mark.parametrize("top_k", [2, 3])
@pytest.mark.parametrize("shape", [(5,), (2, 4), (2, 3, 2)])
def test_token_by_token(top_k, shape):
    network, adapters = adapted(top_k=top_k)
    x = torch.randn(*shape, 9)
    y = network(x)
    assert y.shape == (*shape, 12)
    for token, output in zip(x.view(-1, 9), y.view(-1, 12)):
        torch.testing.assert_close(output, by_hand(network, adapters.adapters["0"], token, top_k), rtol=1e-4, atol=1e-4)


def test_an_expert_that_is_not_chosen_does_not_act():
    network, adapters = adapted()
    adapter, x = adapters.adapters["0"], torch.randn(1, 9)
    logits = (x @ adapter.R.mT)[0]
    worst = int(logits.argmin())
    (network(x) ** 2).sum().backward()
    blocks = adapter.A.grad.view(3, 2, 9).flatten(1).any(1)
    assert [bool(block) for block in blocks] == [j != worst for j in range(3)]


def test_gates_are_a_mean_over_the_chosen():
    _, adapters = adapted()
    gates = adapters.adapters["0"].gates(torch.randn(7, 9))
    torch.testing.assert_close(gates.sum(-1), torch.ones(7))
    assert ((gates > 0).sum(-1) == 2).all()


def test_equal_experts_are_one_lora_whatever_the_router():
    """The gates add up to one, so E copies of an expert are that expert."""
    network, adapters = adapted()
    adapter = adapters.adapters["0"]
    with torch.no_grad():
        adapter.A.copy_(adapter.A[:2].repeat(3, 1))
        adapter.B.copy_(adapter.B[:, :2].repeat(1, 3))
    x = torch.randn(5, 9)
    W = network[0].weight + adapter.scale * adapter.B[:, :2] @ adapter.A[:2]
    torch.testing.assert_close(network(x), x @ W.mT + network[0].bias, rtol=1e-4, atol=1e-4)


def test_one_expert_is_lora():
    network, adapters = adapted(rank=3, experts=1, top_k=1)
    twin = copy.deepcopy(network)
    adapter = installed(twin)["default"].adapters["0"]
    assert adapter.R is None
    plain = nn.Sequential(nn.Linear(9, 12))
    plain.load_state_dict(network.state_dict())
    lora = attach(plain, LoRA(rank=3, alpha=3.0), "all").adapters["0"]
    with torch.no_grad():
        lora.A.copy_(adapter.A), lora.B.copy_(adapter.B)
    x = torch.randn(5, 9)
    torch.testing.assert_close(twin(x), plain(x), rtol=1e-4, atol=1e-5)
    assert adapters.penalty() == 0


def test_the_balance_loss_and_its_gradient_in_the_router():
    network, adapters = adapted()
    adapter, x = adapters.adapters["0"], torch.randn(4, 5, 9)
    network(x)
    expected = balance_of(adapter, x)
    penalty = adapters.penalty()
    torch.testing.assert_close(penalty, expected)
    wanted = torch.autograd.grad(expected, adapter.R)[0]
    found = torch.autograd.grad(penalty, adapter.R)[0]
    assert wanted.abs().max() > 1e-5
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-8)


def test_a_perfectly_balanced_router_pays_the_coefficient():
    """E sum f p is 1 when tokens and probabilities are spread evenly, and E / k when all go to the same k."""
    network, adapters = adapted(experts=3, top_k=2, balance=0.5)
    adapter = adapters.adapters["0"]
    with torch.no_grad():
        adapter.R.zero_()
    network(torch.randn(4, 9))
    torch.testing.assert_close(adapters.penalty().detach(), torch.tensor(0.5))
    with torch.no_grad():
        adapter.R[:2, 0] = 100.0
    network(torch.ones(4, 9))
    torch.testing.assert_close(adapters.penalty().detach(), torch.tensor(0.5 * 3 / 2))


def test_the_balance_loss_evens_out_the_experts():
    """A router that prefers two of three experts for every token; the penalty alone brings the third back."""
    network, adapters = adapted(balance=1.0)
    adapter = adapters.adapters["0"]
    x = torch.randn(64, 9) * 0.3
    x[:, 0] = 1
    with torch.no_grad():
        adapter.R.normal_(std=0.3)
        adapter.R[2, 0] -= 2

    def share():
        with torch.no_grad():
            return float((adapter.gates(x)[:, 2] > 0).float().mean())

    before, optimizer = share(), torch.optim.Adam([adapter.R], lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        network(x)
        adapters.penalty().backward()
        optimizer.step()
    assert before < 0.2 < 0.4 < share()


def test_no_penalty_out_of_training_twice_or_with_weight_zero():
    network, adapters = adapted()
    x = torch.randn(4, 9)
    network(x)
    assert adapters.penalty() != 0
    assert adapters.penalty() == 0
    network.eval()(x)
    assert adapters.penalty() == 0
    network, adapters = adapted(balance=0.0)
    network(x)
    assert adapters.penalty() == 0


def test_gradient_checkpointing_changes_no_gradient_and_leaves_no_graph():
    """The forward pass runs again inside the backward pass, after penalty() has been read."""
    found = []
    for run in (lambda network, x: network(x), lambda network, x: checkpoint(network, x, use_reentrant=False)):
        network, adapters = adapted(balance=0.1)
        x = torch.randn(4, 5, 9, generator=torch.Generator().manual_seed(1))
        (run(network, x).square().mean() + adapters.penalty()).backward()
        found.append({name: p.grad for name, p in adapters.named_parameters()})
        assert all(not kept.requires_grad for kept in adapters.adapters["0"].routing or ())
        twin = pickle.loads(pickle.dumps(copy.deepcopy(network))).eval()
        assert torch.equal(twin(x), network.eval()(x))
    for name, gradient in found[0].items():
        assert gradient.any()
        assert torch.equal(gradient, found[1][name])


def test_copied_between_forward_and_backward():
    network, adapters = adapted()
    x = torch.randn(4, 9)
    loss = network(x).square().mean()
    twin = copy.deepcopy(network)
    (loss + adapters.penalty()).backward()
    assert torch.equal(twin(x), network(x))


def test_dropout_acts_on_the_experts_only():
    network, adapters = adapted(dropout=0.5)
    adapter, x = adapters.adapters["0"], torch.ones(200, 9)
    assert (network(x).std(0) > 0.1).all()
    with torch.no_grad():
        adapter.B.zero_()
    assert (network(x).std(0) < 1e-5).all()
    assert torch.equal(network.eval()(x), network(x))


def test_a_half_precision_network():
    network = nn.Sequential(nn.Linear(9, 12)).bfloat16()
    adapters = attach(network, LoRAMoE(rank=6, experts=3, top_k=3), "all")
    nn.init.normal_(adapters.adapters["0"].B)
    y = network(torch.randn(5, 9).bfloat16())
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in adapters.parameters())


def test_it_cannot_be_merged():
    with pytest.raises(UserError, match="cannot be merged"):
        merge(adapted()[0])


def test_counts():
    """768 x 768, r = 8, E = 2: 12,288 and a router of 1,536."""
    method = LoRAMoE(rank=8, experts=2)
    assert method.count(site(768, 768)) == 12_288 + 1_536
    assert LoRAMoE(rank=8, experts=3).width == 3
    for each in (LoRAMoE(rank=5, experts=3), LoRAMoE(rank=4, experts=1, top_k=1), method):
        built = sum(p.numel() for p in each.adapter(site(12, 9), None).parameters())
        assert built == each.count(site(12, 9))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"experts": 0}, "experts: 0 is not positive"),
        ({"top_k": 1}, "top_k: 1 is not between 2 and the number of experts, 4"),
        ({"top_k": 5}, "top_k: 5"),
        ({"experts": 1, "top_k": 0}, "top_k: 0 is not between 1"),
        ({"balance": -1.0}, "balance: -1.0 is negative"),
        ({"dropout": 1.0}, "dropout"),
        ({"rank": 0}, "rank: 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        LoRAMoE(**options)


def test_a_rank_that_does_not_fit():
    with pytest.raises(UserError, match="rank: 10 does not fit"):
        LoRAMoE(rank=20, experts=2).adapter(site(12, 9), None)
