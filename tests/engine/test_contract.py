"""Every method of the catalogue on every kind of site: the contract, gradient checkpointing, slices, compile."""

from __future__ import annotations

import copy

import pytest
import torch
from kinds import KINDS, adapted, needs_view, quietly, small
from torch import nn
from torch.utils.checkpoint import checkpoint

from vision_peft.engine.adapter import method_names
from vision_peft.engine.contract import CHECKS, run_contract
from vision_peft.engine.install import installed

METHODS = method_names()
COMBINATIONS = [(method, kind) for method in METHODS for kind in KINDS if KINDS[kind].suits(small(method))]
SLICED = [kind for kind in KINDS if kind.startswith(("fused", "mha"))]


def test_the_catalogue_is_covered():
    print(f"\n{len(METHODS)} methods x {len(KINDS)} kinds of site: {len(COMBINATIONS)} combinations x {len(CHECKS)} checks")
    assert {"lora", "dora", "comp_lora", "block_lora", "svfit", "bitfit", "full"} <= set(METHODS)
    for method in METHODS:
        covered = {kind for name, kind in COMBINATIONS if name == method}
        looks = needs_view(small(method))
        expected = [kind for kind in KINDS if KINDS[kind].shows_input or not looks]
        left_out = 8 if looks else 3  # no convolution, embedding or bare matrix; no bias or norm, for methods of those
        assert len(covered) >= len(expected) - left_out, f"{method} runs on {sorted(covered)} only"


@pytest.mark.parametrize("method, kind", COMBINATIONS)
def test_contract(method, kind):
    network = KINDS[kind].network()
    before = copy.deepcopy(network.state_dict())
    checks = quietly(run_contract, network, KINDS[kind].sites(network), small(method), KINDS[kind].forward(), KINDS[kind].targets)
    assert [check.name for check in checks] == list(CHECKS)
    assert not [check for check in checks if not check.passed]
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert not installed(network)


@pytest.mark.parametrize("method, kind", COMBINATIONS)
def test_gradient_checkpointing_gives_the_same_gradients(method, kind):
    forward, network = KINDS[kind].forward(), KINDS[kind].network()
    adapters = adapted(network, small(method), forward, KINDS[kind].targets, sites=KINDS[kind].sites(network))
    _stir(adapters)
    gradients = []
    for run in (forward, lambda network: checkpoint(forward, network, use_reentrant=False)):
        torch.manual_seed(7)  # the same dropout masks, in the recomputation too
        run(network).square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in adapters.named_parameters() if p.grad is not None})
        adapters.zero_grad()
    waits = small(method).steps_to_train > 2  # some of its tensors have no gradient at this step
    assert waits or len(gradients[0]) == len(list(adapters.parameters()))
    for name, plain in gradients[0].items():
        assert plain.any() or waits, name
        assert torch.equal(plain, gradients[1][name]), name


@pytest.mark.parametrize("method, kind", [pair for pair in COMBINATIONS if pair[1] in SLICED])
def test_exchanging_two_slices_changes_the_output(method, kind):
    """Guards against adapters that land on the wrong rows: q's on v and v's on q is another function."""
    forward, network = KINDS[kind].forward(), KINDS[kind].network().eval()
    adapters = adapted(network, small(method), forward, KINDS[kind].targets, sites=KINDS[kind].sites(network))
    _stir(adapters)
    with torch.no_grad():
        before = forward(network)
        named = adapters.named_adapters()
        suffix = ".bias" if "attn.q" not in named else ""
        q, v = named[f"attn.q{suffix}"], named[f"attn.v{suffix}"]
        for one, two in zip(q.parameters(), v.parameters()):
            one.data, two.data = two.data, one.data
        after = forward(network)
    assert (after - before).abs().max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("method, kind", [("lora", "linear"), ("dora", "mha_causal_bool"), ("full", "conv")])
def test_compiled_network_computes_and_learns_the_same(method, kind):
    forward, network = KINDS[kind].forward(), KINDS[kind].network()
    adapters = adapted(network, small(method), forward, KINDS[kind].targets, sites=KINDS[kind].sites(network))
    _stir(adapters)
    results = []
    for run in (network, torch.compile(network)):
        output = forward(run)
        output.square().sum().backward()
        results.append((output.detach(), {name: p.grad.clone() for name, p in adapters.named_parameters()}))
        adapters.zero_grad()
    (plain, gradients), (compiled, others) = results
    torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-3, atol=1e-4)


# the contract itself must be able to fail


class Ignores(nn.Module):
    """Reads its layer's weight without calling the layer, so an adapter on the layer does nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x):
        return torch.nn.functional.linear(x, self.fc.weight, self.fc.bias)


def test_contract_reports_adapters_that_nothing_reads():
    x = torch.randn(4, 6)
    checks = run_contract(Ignores(), KINDS["linear"].sites(Ignores()), small("lora"), lambda network: network(x).requires_grad_())
    failed = {check.name: check.detail for check in checks if not check.passed}
    assert set(failed) >= {"trains", "acts"}
    assert "fc" in failed["trains"]


def test_contract_reports_tied_weights_of_which_one_reader_is_adapted():
    network = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False))
    network[1].weight = network[0].weight
    x = torch.randn(4, 6)
    checks = run_contract(network, KINDS["linear"].sites(network), small("lora"), lambda network: network(x))
    assert [check.name for check in checks if not check.passed] == ["merged_equals_unmerged"]


def test_contract_reports_an_error_of_the_setup_as_one_failed_check():
    network = nn.Sequential(nn.Linear(6, 6))
    checks = run_contract(network, KINDS["linear"].sites(network), small("lora"), lambda network: network(torch.ones(1, 6)), "head")
    assert [(check.name, check.passed) for check in checks] == [("attach", False)]
    assert "matches no layer" in checks[0].detail


def _stir(adapters: nn.Module) -> None:
    """Adapters as if trained: every parameter moved off its start."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
