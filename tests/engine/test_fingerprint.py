"""The fingerprint of a frozen network: the same with adapters on it, another for any other network."""

from __future__ import annotations

import pytest
import torch
from kinds import KINDS, quietly, small
from stored import build
from torch import nn

from vision_peft.engine.fingerprint import fingerprint
from vision_peft.engine.install import attach, detach, merge, unmerge


@pytest.mark.parametrize("kind", ["linear", "mha", "conv", "bare"])
def test_fingerprint_sees_the_frozen_network_alone(kind):
    network = KINDS[kind].network()
    frozen = fingerprint(network)
    adapters = quietly(attach, network, small("full"), "all", sites=KINDS[kind].sites(network))
    assert fingerprint(network) == frozen
    for parameter in adapters.parameters():
        nn.init.normal_(parameter)
    merge(network)
    assert fingerprint(network) == frozen
    unmerge(network)
    detach(network)
    assert fingerprint(network) == frozen
    with torch.no_grad():
        next(network.parameters()).view(-1)[0] += 1e-6
    assert fingerprint(network) != frozen


def test_fingerprint_sees_statistics_names_shapes_and_types():
    frozen, other = fingerprint(build()), build()
    other[3].running_mean[0] += 1e-6
    assert fingerprint(other) != frozen
    assert fingerprint(build().bfloat16()) != frozen
    one, two = nn.ParameterDict({"a": nn.Parameter(torch.zeros(6))}), nn.ParameterDict({"b": nn.Parameter(torch.zeros(6))})
    reshaped = nn.ParameterDict({"a": nn.Parameter(torch.zeros(2, 3))})
    assert len({fingerprint(each) for each in (one, two, reshaped)}) == 3


def test_fingerprint_leaves_out_tables_of_the_image_size():
    small_, large = (nn.ParameterDict({"w": nn.Parameter(torch.ones(3)), "pos": nn.Parameter(torch.ones(size))}) for size in (4, 9))
    assert fingerprint(small_) != fingerprint(large)
    assert fingerprint(small_, frozenset({"pos"})) == fingerprint(large, frozenset({"pos"}))
