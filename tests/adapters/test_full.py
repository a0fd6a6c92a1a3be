"""Full fine-tuning as offsets: the same training, with the pretrained network kept."""

from __future__ import annotations

import torch
from fakes import site
from torch import nn

from vision_peft.adapters.full import Full
from vision_peft.engine.install import adapters_off, attach


def model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 3))


def test_every_tensor_is_trained():
    network = model()
    adapters = attach(network, Full(), "all")
    assert adapters.num_trainable() == sum(p.numel() for p in network.parameters())
    assert sum(Full().count(site) for site in adapters.sites) == adapters.num_trainable()


def test_training_is_that_of_the_weights_themselves():
    """Adam on the offsets and Adam on the weights land in the same place; adapters off gives the pretrained network."""
    ours, theirs = model().eval(), model().eval()
    theirs.load_state_dict(ours.state_dict())
    x, target = torch.randn(6, 2, 5, 5), torch.randn(6, 3)
    pretrained = ours(x).detach()
    adapters = attach(ours, Full(), "all")
    for network, parameters in ((ours, adapters.parameters()), (theirs, theirs.parameters())):
        optimizer = torch.optim.Adam(parameters, lr=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            (network(x) - target).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-3, atol=1e-4)
    assert (ours(x) - pretrained).abs().max() > 0.05
    with adapters_off(ours), torch.no_grad():
        torch.testing.assert_close(ours(x), pretrained)


def test_weight_decay_pulls_towards_the_pretrained_weights():
    network = nn.Sequential(nn.Linear(4, 3))
    adapters = attach(network, Full(), "all")
    offset = adapters.adapters["0"].D
    nn.init.ones_(offset)
    offset.grad = torch.zeros_like(offset)
    torch.optim.AdamW([offset], lr=0.1, weight_decay=1.0).step()
    torch.testing.assert_close(offset.detach(), torch.full_like(offset, 0.9))


def test_counts():
    assert Full().count(site(768, 768)) == 589_824
    assert Full().count(site(64, 3, 7, 7)) == 9_408
    assert Full().count(site(768, role="bias")) == 768
