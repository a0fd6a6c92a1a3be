"""An adapter folder that does not fit: one line that says what, and a network that is as it was."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from kinds import quietly
from stored import assert_refused, build, edit, edit_tensors, trained
from torch import nn

from vision_peft.engine import store
from vision_peft.engine.fingerprint import fingerprint
from vision_peft.engine.install import merge
from vision_peft.engine.store import load_adapter, load_strictly, save_adapter
from vision_peft.errors import UserError


def test_another_backbone(saved):
    other = build()
    with torch.no_grad():
        other[0].weight[0, 0] += 1e-4
    edit(saved, backbone={"name": "tiny", "fingerprint": fingerprint(build())})
    assert_refused(saved, r"another backbone \(\{'name': 'tiny'\}\)", other)


def test_a_missing_layer(saved):
    edit(saved, sites=["0", "7"])
    assert_refused(saved, "no layer '7'")


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_truncated_tensors(saved, share):
    path = saved / store.WEIGHTS
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert_refused(saved, "not a complete safetensors file")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda tensors: tensors.pop("adapters.0.A"), r"key 'adapters\.0\.A' is missing"),
        (lambda tensors: tensors.update({"adapters.9.A": torch.zeros(2, 8)}), r"key 'adapters\.9\.A' is not expected"),
        (lambda tensors: tensors.update({"adapters.0.A": torch.zeros(3, 8)}), r"'adapters\.0\.A' has shape \(3, 8\), expected \(2, 8\)"),
    ],
)
def test_tensors_that_do_not_fit(saved, change, message):
    edit_tensors(saved, change)
    assert_refused(saved, message)


def test_a_file_is_missing(saved, tmp_path):
    assert_refused(tmp_path / "nowhere", "not an adapter folder")
    (saved / store.WEIGHTS).unlink()
    assert_refused(saved, "adapter_model.safetensors is missing")


@pytest.mark.parametrize("text", ["{", "", "not json", "\x00"])
def test_config_that_is_not_json(saved, text):
    (saved / store.CONFIG).write_text(text)
    assert_refused(saved, "not valid JSON")


@pytest.mark.parametrize("key", ["format", "method", "sites", "seed", "backbone", "parts"])
def test_config_without_a_key(saved, key):
    config = json.loads((saved / store.CONFIG).read_text())
    del config[key]
    (saved / store.CONFIG).write_text(json.dumps(config))
    assert_refused(saved, f"key '{key}' is missing")


def test_config_of_a_later_format(saved):
    edit(saved, format=99)
    assert_refused(saved, "format 99 is not known")


def test_unknown_method(saved):
    edit(saved, method={"name": "lorra", "hyperparameters": {}})
    with pytest.raises(UserError, match=r"unknown method 'lorra'; did you mean lora"):
        load_adapter(build(), saved)


@pytest.mark.parametrize("hyperparameters, message", [({"ranks": 2}, "cannot be made"), ({"rank": 4}, "has shape")])
def test_hyperparameters_that_do_not_fit(saved, hyperparameters, message):
    edit(saved, method={"name": "lora", "hyperparameters": hyperparameters})
    assert_refused(saved, message)


@pytest.mark.parametrize("method", ["svfit", "comp_lora"])
def test_a_basis_that_is_not_the_one_trained_with(method, tmp_path):
    """As if another LAPACK had recomputed it: the stored mark no longer agrees."""
    network = build()
    trained(network, method)
    folder = save_adapter(tmp_path / "a", network)
    for change, message in (
        (lambda tensors: tensors["adapters.0.fingerprint"].mul_(1.01), "not the one the adapter was trained with"),
        (lambda tensors: tensors.pop("adapters.0.fingerprint"), "fingerprint"),
    ):
        broken = tmp_path / "b"
        save_adapter(broken, network)
        edit_tensors(broken, change)
        with pytest.raises(UserError, match=message):
            quietly(load_adapter, build(), broken)
    quietly(load_adapter, build(), folder)


def test_a_mark_where_none_belongs(saved):
    edit_tensors(saved, lambda tensors: tensors.update({"adapters.0.fingerprint": torch.zeros(2)}))
    assert_refused(saved, "fingerprint")


def test_a_checkpoint_refuses_a_changed_basis():
    """state_dict and load_state_dict, which resuming uses, carry the mark as the folder does."""
    network, other = build(), build()
    with torch.no_grad():
        other[0].weight.copy_(torch.randn(10, 8))
    one, two = trained(network, "svfit"), trained(other, "svfit")
    with pytest.raises(UserError, match="0: the basis recomputed"):
        two.load_state_dict(one.state_dict())
    one.load_state_dict(copy.deepcopy(one.state_dict()))


def test_load_strictly_names_the_key_and_changes_nothing():
    module, source = nn.Linear(3, 2), nn.Linear(3, 2).state_dict()
    before = copy.deepcopy(module.state_dict())
    for tensors, message in (
        ({**source, "extra": torch.zeros(1)}, "where: key 'extra' is not expected"),
        ({"weight": source["weight"]}, "where: key 'bias' is missing"),
        ({**source, "weight": torch.zeros(2, 4)}, r"where: 'weight' has shape \(2, 4\), expected \(2, 3\)"),
    ):
        with pytest.raises(UserError, match=message):
            load_strictly(module, tensors, "where")
        assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


def test_loading_onto_a_merged_network_is_refused(saved):
    network = build()
    trained(network, name="other")
    merge(network)
    with pytest.raises(UserError, match="unmerge"):
        load_adapter(network, saved)


def test_a_set_that_is_not_there_cannot_be_saved(tmp_path):
    network = build()
    trained(network)
    with pytest.raises(UserError, match="no adapter set named 'nobody'"):
        save_adapter(tmp_path / "a", network, name="nobody")


def test_tensors_of_a_part_that_is_not_declared(saved):
    edit_tensors(saved, lambda tensors: tensors.update({"parts.ghost.weight": torch.zeros(1)}))
    assert_refused(saved, "ghost")


@pytest.mark.parametrize("changes", [{"backbone": {}}, {"method": {}}, {"method": "lora"}, {"sites": 3}])
def test_config_with_a_value_of_the_wrong_kind(saved, changes):
    edit(saved, **changes)
    assert_refused(saved, next(iter(changes)))


def test_extra_facts_cannot_overwrite_what_loading_needs(tmp_path):
    network = build()
    trained(network)
    with pytest.raises((UserError, ValueError)):
        save_adapter(tmp_path / "a", network, extra={"sites": []})


def test_bad_hyperparameters_and_unknown_methods_name_the_folder(saved):
    for method in ({"name": "lorra", "hyperparameters": {}}, {"name": "lora", "hyperparameters": {"rank": -1}}):
        edit(saved, method=method)
        with pytest.raises(UserError) as caught:
            load_adapter(build(), saved)
        assert str(saved) in str(caught.value)
