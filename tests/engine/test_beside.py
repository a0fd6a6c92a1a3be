"""What is trained whole beside a method: a second active set, its optimizer group, its place in the adapter folder."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from vision_peft.adapters.full import Full
from vision_peft.adapters.lora import LoRA
from vision_peft.engine.install import attach, installed, merge, unmerge
from vision_peft.engine.store import load_adapter, read_config, save_adapter
from vision_peft.errors import UserError


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 12), nn.LayerNorm(12), nn.Linear(12, 5)).eval()


def both(module: nn.Module):
    lora = attach(module, LoRA(rank=2), "0")
    whole = attach(module, Full(), ["1", "2"], name="trained", beside=True)
    for parameter in (*lora.parameters(), *whole.parameters()):
        nn.init.normal_(parameter, std=0.3)
    return lora, whole


def test_both_sets_act_and_merge():
    module, x = network(), torch.randn(4, 8)
    plain = module(x)
    lora, whole = both(module)
    adapted = module(x)
    D = {name.replace("/", "."): adapter for name, adapter in whole.named_adapters().items()}
    hidden = nn.functional.linear(x, lora.named_adapters()["0"].weight(module[0].weight), module[0].bias)
    scale, shift = (D[f"1.{name}"].weight(module[1].get_parameter(name)[:, None])[:, 0] for name in ("weight", "bias"))
    last = D["2.bias"].weight(module[2].bias[:, None])[:, 0]
    expected = nn.functional.linear(nn.functional.layer_norm(hidden, (12,), scale, shift), D["2"].weight(module[2].weight), last)
    torch.testing.assert_close(adapted, expected, atol=1e-5, rtol=1e-5)
    merge(module)
    torch.testing.assert_close(module(x), adapted, atol=1e-5, rtol=1e-5)
    unmerge(module)
    assert not torch.equal(plain, adapted)


def test_the_folder_holds_both_and_restores_both(tmp_path):
    module, x = network(), torch.randn(4, 8)
    bare = copy.deepcopy(module)
    both(module)
    save_adapter(tmp_path / "adapter", module)
    stored = read_config(tmp_path / "adapter")
    assert stored["sites"] == ["0"] and stored["beside"]["trained"]["sites"] == ["1.weight", "1.bias", "2", "2.bias"]
    load_adapter(bare, tmp_path / "adapter")
    assert set(installed(bare)) == {"default", "trained"}
    assert torch.equal(bare(x), module(x))


def test_no_tensor_is_in_two_active_sets():
    module = network()
    attach(module, LoRA(rank=2), "0")
    with pytest.raises(UserError, match="0 is adapted already, as 0"):
        attach(module, Full(), ["0"], name="trained", beside=True)
    assert set(installed(module)) == {"default"}


def test_optimizer_groups_have_their_own_name_and_rate():
    module = network()
    _, whole = both(module)
    whole.label, whole.lr = "trained/", 1e-4
    [group] = whole.param_groups(1e-3)
    assert group["name"] == "trained/adapter" and group["lr"] == 1e-4
