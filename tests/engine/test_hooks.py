"""What a method may hook into: shared modules, decisions across layers, gradients before a step; modes; constant parts of a form."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_peft.engine.adapter import Adapter, Clock, Evidence, Factored, FactoredAdapter, Method, Shared
from vision_peft.engine.factored import factored_linear
from vision_peft.engine.install import attach, merge
from vision_peft.engine.store import load_adapter, save_adapter
from vision_peft.errors import UserError


class Basis(Shared):
    """A random direction (4,) that is drawn anew on load, and a trained gain."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1))
        self.register_buffer("direction", None, persistent=False)

    def initialize(self, generator: torch.Generator) -> None:
        self.direction = torch.randn(4, generator=generator)

    def penalty(self) -> Tensor:
        return self.gain.square().sum()

    def fingerprint(self) -> Tensor:
        return self.direction[:2]


class GainAdapter(Adapter):
    def __init__(self, shared: Basis) -> None:
        super().__init__()
        object.__setattr__(self, "shared", shared)
        self.s = nn.Parameter(torch.zeros(1))
        self.register_buffer("share", torch.zeros(()))

    def initialize(self, W: Tensor, evidence: Evidence) -> None:
        self.s.zero_()

    def weight(self, W: Tensor) -> Tensor:
        noise = torch.randn(()) if self.training else 0.0  # random while training only
        return W * (1 + self.s * self.shared.gain * self.shared.direction.mean() + 1e-3 * noise)


class SharedGain(Method):
    """A gain a layer, times a common one."""

    def __init__(self) -> None: ...

    def shared(self, sites) -> Basis:
        return Basis()

    def adapter(self, site, shared) -> GainAdapter:
        return GainAdapter(shared)

    def allocate(self, adapters, shared) -> None:
        for adapter in adapters.values():
            adapter.share.fill_(1 / len(adapters))

    def adjust_gradients(self, adapters, shared, clock: Clock) -> None:
        for adapter in adapters.values():
            adapter.s.grad.mul_(clock.group(adapter.s)["lr"])

    def coordinate(self, adapters, shared, clock: Clock) -> None:
        shared.gain.fill_(clock.step)

    def count(self, site) -> int:
        return 1


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).eval()


def test_allocate_sees_all_adapters_once():
    adapters = attach(network(), SharedGain(), "*")
    assert [float(each.share) for each in adapters.adapters.values()] == [0.5, 0.5]


def test_gradients_are_adjusted_by_the_optimizers_own_rate():
    net = network()
    adapters = attach(net, SharedGain(), "*")
    optimizer = torch.optim.SGD(adapters.parameters(), lr=0.25)
    net(torch.ones(2, 4)).square().sum().backward()
    before = [each.s.grad.clone() for each in adapters.adapters.values()]
    adapters.adjust_gradients(Clock(0, 1, 0, optimizer))
    for gradient, adapter in zip(before, adapters.adapters.values()):
        assert gradient.any()
        torch.testing.assert_close(adapter.s.grad, 0.25 * gradient)
    with pytest.raises(LookupError, match="no optimizer group"):
        Clock(0, 1, 0).group(adapters.shared.gain)


def test_coordinate_reaches_the_shared_module_and_its_penalty_counts():
    adapters = attach(network(), SharedGain(), "*")
    adapters.coordinate(Clock(3, 5, 0))
    assert float(adapters.penalty()) == 9.0


def test_shared_bases_depend_on_the_seed_and_are_checked_on_load(tmp_path):
    net = network()
    adapters = attach(net, SharedGain(), "*", seed=4)
    save_adapter(tmp_path / "a", net, seed=4)
    fresh = load_adapter(network(), tmp_path / "a")
    assert torch.equal(fresh.shared.direction, adapters.shared.direction)
    save_adapter(tmp_path / "b", net, seed=5)  # says it was drawn from another seed than it was
    untouched = network()
    with pytest.raises(UserError, match="shared bases: the basis recomputed on load is not the one"):
        load_adapter(untouched, tmp_path / "b")


def test_adapters_are_in_the_mode_of_their_layer():
    net = network()
    attach(net, SharedGain(), "*")
    x = torch.ones(2, 4)
    assert torch.equal(net(x), net(x))  # the adapter set itself was never told
    net.train()
    assert not torch.equal(net(x), net(x))
    frozen = copy.deepcopy(net[0].weight)
    merge(net)  # of what evaluation computes, although the network is training
    assert torch.equal(net[0].weight, frozen)


class Offset(FactoredAdapter):
    """W + B A - B0 A0, the second product constant."""

    def __init__(self, form: Factored) -> None:
        super().__init__()
        self.form = form

    def factored(self, W: Tensor) -> Factored:
        return self.form


@pytest.mark.parametrize("blocks", [1, 2])
def test_no_gradient_is_computed_for_the_constant_part(blocks):
    W, x = torch.randn(6, 5), torch.randn(7, 5)
    forms = []
    for _ in range(blocks):
        B, A = torch.randn(6 // blocks, 4, requires_grad=True), torch.randn(4, 5, requires_grad=True)
        forms.append(Factored(B, A, trained=3))
    rows = [((i * 6 // blocks, (i + 1) * 6 // blocks), form) for i, form in enumerate(forms)]
    factored_linear(x, W, None, rows, True).square().sum().backward()
    whole = torch.cat([W[start:stop] + form.B @ form.A for (start, stop), form in rows])
    leaves = [each for form in forms for each in (form.B, form.A)]
    plain = torch.autograd.grad(F.linear(x, whole).square().sum(), leaves)
    for form, B, A in zip(forms, plain[::2], plain[1::2]):
        torch.testing.assert_close(form.B.grad[:, :3], B[:, :3], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(form.A.grad[:3], A[:3], rtol=1e-4, atol=1e-4)
        assert not form.B.grad[:, 3:].any() and not form.A.grad[3:].any()


def test_the_definition_of_a_form_with_a_constant_part_is_the_whole_product():
    form = Factored(torch.randn(4, 2), torch.randn(2, 4), trained=1)
    torch.testing.assert_close(Offset(form).weight(torch.zeros(4, 4)), form.B @ form.A)
