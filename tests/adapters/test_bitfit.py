"""BitFit trains the biases of the targeted layers, and nothing else."""

from __future__ import annotations

import torch
from fakes import site
from torch import nn

from vision_peft.adapters.bitfit import BitFit
from vision_peft.engine.install import attach


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 4, bias=False), nn.Conv1d(1, 3, 2))


def test_the_biases_and_nothing_else():
    adapters = attach(network(), BitFit(), "all")
    assert [site.name for site in adapters.sites] == ["0.bias", "1.bias", "3.bias"]
    assert adapters.num_trainable() == 5 + 5 + 3 == sum(BitFit().count(site) for site in adapters.sites)


def test_the_offset_is_added_to_the_bias():
    model = nn.Sequential(nn.Linear(6, 5))
    adapters = attach(model, BitFit(), "all")
    x = torch.randn(3, 6)
    before = model(x)
    with torch.no_grad():
        adapters.adapters["0/bias"].D.copy_(torch.arange(5.0)[:, None])
    torch.testing.assert_close(model(x) - before, torch.arange(5.0).expand(3, 5))
    assert torch.equal(model[0].bias, model.state_dict()["0.bias"])


def test_training_is_that_of_the_biases_themselves():
    """Three steps of SGD on the offsets land where three steps on the biases do."""
    ours = nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 4)).double().float()
    theirs = nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 4))
    theirs.load_state_dict(ours.state_dict())
    adapters = attach(ours, BitFit(), "all")
    biases = [theirs[0].bias, theirs[2].bias]
    x, target = torch.randn(8, 6), torch.randn(8, 4)
    for model, parameters in ((ours, adapters.parameters()), (theirs, biases)):
        optimizer = torch.optim.SGD(parameters, lr=0.3)
        for _ in range(3):
            optimizer.zero_grad()
            (model(x) - target).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(ours(x), theirs(x))


def test_count_and_hyperparameters():
    assert BitFit().count(site(768, role="bias")) == 768
    assert BitFit().hyperparameters() == {}
