"""Any update as a LoRA: exact where the rank suffices, the best possible below, refused where LoRA has no place for it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vision_peft.adapters.bitfit import BitFit
from vision_peft.adapters.lora import LoRA
from vision_peft.adapters.svfit import SVFit
from vision_peft.engine.as_lora import as_lora
from vision_peft.engine.install import activate, attach, installed, merge
from vision_peft.errors import UserError


def trained(method, targets="*") -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A network with stirred adapters, and its updates by layer."""
    network = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 8)).eval()
    frozen = {name: network.get_parameter(name).detach().clone() for name in ("0.weight", "2.weight")}
    adapters = attach(network, method, targets)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
        updates = {}
        for site, adapter in adapters.named_adapters().items():
            if f"{site}.weight" in frozen:
                updates[site] = adapter.weight(frozen[f"{site}.weight"]) - frozen[f"{site}.weight"]
    return network, updates


@pytest.mark.parametrize("method", [LoRA(rank=3), SVFit(rank=3)])
def test_exact_where_the_rank_suffices(method):
    network, _ = trained(method)
    x = torch.randn(5, 12)
    before = network(x)
    found = as_lora(network, 3)
    assert found.error < 1e-6
    torch.testing.assert_close(network(x), before, rtol=1e-5, atol=1e-5)
    assert list(installed(network)) == ["default", "as_lora"]
    activate(network, "default")
    assert torch.equal(network(x), before)


def test_the_error_is_what_the_best_approximation_leaves():
    network, updates = trained(SVFit())
    found = as_lora(network, 2)
    tails = {site: torch.linalg.svdvals(update.double()) for site, update in updates.items()}
    own = {site: float((S[2:].square().sum() / S.square().sum()).sqrt()) for site, S in tails.items()}
    together = sum(S[2:].square().sum() for S in tails.values()) / sum(S.square().sum() for S in tails.values())
    assert found.error == pytest.approx(float(together.sqrt()), rel=1e-4)
    assert found.worst[0] == max(own, key=own.get) and found.worst[1] == pytest.approx(max(own.values()), rel=1e-4)
    for site, adapter in found.adapters.named_adapters().items():
        U, S, Vh = torch.linalg.svd(updates[site].double(), full_matrices=False)
        torch.testing.assert_close((adapter.B @ adapter.A).double(), U[:, :2] * S[:2] @ Vh[:2], rtol=1e-4, atol=1e-5)


def test_an_update_of_nothing_has_no_error():
    network = nn.Sequential(nn.Linear(6, 6))
    attach(network, SVFit(), "*")
    found = as_lora(network, 2)
    assert found.error == 0 and not any(adapter.B.any() for adapter in found.adapters.adapters.values())


def test_refused():
    network, _ = trained(SVFit())
    with pytest.raises(UserError, match="rank: 9 does not fit 2, a 8 x 10 matrix"):
        as_lora(network, 9)
    assert list(installed(network)) == ["default"]
    with pytest.raises(UserError, match="rank: 0"):
        as_lora(network, 0)
    biases, _ = trained(BitFit())
    with pytest.raises(UserError, match=r"0.bias: LoRA adapts weights only, and bitfit changes this bias tensor"):
        as_lora(biases, 2)
    dense, _ = trained(SVFit())
    merge(dense)
    with pytest.raises(UserError, match="merged"):
        as_lora(dense, 2)
