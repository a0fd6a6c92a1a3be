"""The adapter folder: what goes in comes out, and everything that does not fit is one line that says what."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path

import pytest
import torch
from kinds import KINDS, adapted, quietly, small
from safetensors.torch import load_file, save_file
from torch import nn

from vision_peft.engine import store
from vision_peft.engine.adapter import method_names
from vision_peft.engine.fingerprint import fingerprint
from vision_peft.engine.install import activate, attach, detach, installed, merge, unmerge
from vision_peft.engine.store import load_adapter, load_strictly, read_config, save_adapter
from vision_peft.errors import UserError


def build() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 10), nn.GELU(), nn.Linear(10, 6), nn.BatchNorm1d(6)).eval()


def trained(network: nn.Module, method: str = "lora", **options) -> nn.Module:
    adapters = adapted(network, small(method), lambda network: network(x()), **options)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return adapters


@pytest.fixture
def saved(tmp_path) -> Path:
    network = build()
    trained(network)
    return save_adapter(tmp_path / "adapter", network)


def x() -> torch.Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(2))


def edit(folder: Path, **changes) -> None:
    path = folder / store.CONFIG
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, **changes}))


def edit_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / store.WEIGHTS)
    change(tensors)
    save_file(tensors, folder / store.WEIGHTS)


def assert_refused(folder: Path, match: str, network: nn.Module | None = None, **options) -> None:
    """Refused with one line that names the folder, and the network is as it was."""
    network = network if network is not None else build()
    before, flags = network(x()), [p.requires_grad for p in network.parameters()]
    with pytest.raises(UserError, match=match) as caught:
        load_adapter(network, folder, **options)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    assert not installed(network)
    assert torch.equal(network(x()), before)
    assert [p.requires_grad for p in network.parameters()] == flags


# round trips


@pytest.mark.parametrize("method", method_names())
def test_round_trip(method, tmp_path):
    network = build()
    adapters = trained(network, method, seed=11)
    folder = save_adapter(tmp_path / "deep" / "adapter", network, seed=11)
    fresh = build()
    loaded = quietly(load_adapter, fresh, folder)
    assert torch.equal(fresh(x()), network(x()))
    assert loaded.method.hyperparameters() == adapters.method.hyperparameters()
    assert [site.name for site in loaded.sites] == [site.name for site in adapters.sites]
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert [path.name for path in folder.parent.iterdir()] == ["adapter"]
    detach(fresh)


def test_round_trip_with_parts_facts_and_a_card(tmp_path):
    network, head = build(), nn.Linear(6, 3)
    trained(network)
    folder = save_adapter(
        tmp_path / "a", network, parts={"head": head}, extra={"classes": ["cat", "dog"]}, backbone={"name": "tiny"}, card="# Mine\n"
    )
    config = read_config(folder)
    assert config["classes"] == ["cat", "dog"]
    assert config["backbone"] == {"name": "tiny", "fingerprint": fingerprint(build())}
    assert (folder / "README.md").read_text() == "# Mine\n"
    other = nn.Linear(6, 3)
    load_adapter(fresh := build(), folder, parts={"head": other})
    assert torch.equal(other(fresh(x())), head(network(x())))
    load_adapter(again := build(), folder)  # without its parts
    assert torch.equal(again(x()), network(x()))
    wrong = nn.Linear(6, 4)
    assert_refused(folder, r"\(head\): 'bias' has shape \(3,\), expected \(4,\)", parts={"head": wrong})


def test_the_chosen_set_is_saved_and_loads_beside_another(tmp_path):
    network = build()
    trained(network, name="one")
    one = network(x())
    trained(network, "dora", name="two")
    two = network(x())
    folders = {name: save_adapter(tmp_path / name, network, name=name) for name in ("one", "two")}
    fresh = build()
    for name, folder in folders.items():
        load_adapter(fresh, folder, name=name)
    assert torch.equal(fresh(x()), two)
    activate(fresh, "one")
    assert torch.equal(fresh(x()), one)
    with pytest.raises(UserError, match="'one' is already attached"):
        load_adapter(fresh, folders["one"], name="one")


def test_saving_while_merged_saves_the_same(tmp_path):
    network = build()
    trained(network, "svfit")
    before = network(x())
    merge(network)
    folder = save_adapter(tmp_path / "a", network)
    unmerge(network)
    load_adapter(fresh := build(), folder)
    assert torch.equal(fresh(x()), before)


def test_named_sites_are_needed_on_load_too(tmp_path):
    from vision_peft.engine.site import enumerate_sites, renamer

    network = build()
    sites = enumerate_sites(network, renamer([(r"(\d)", r"vision.\1")]))
    trained(network, sites=sites)
    folder = save_adapter(tmp_path / "a", network)
    assert_refused(folder, r"no layer 'vision\.0'")
    load_adapter(fresh := build(), folder, sites=sites)
    assert torch.equal(fresh(x()), network(x()))


def test_an_older_folder_is_replaced_whole(saved):
    network = build()
    trained(network, "bitfit")
    save_adapter(saved, network)
    load_adapter(fresh := build(), saved)
    assert torch.equal(fresh(x()), network(x()))
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


# writing that fails


def test_a_folder_with_other_things_is_left_alone(saved):
    (saved / "thesis.tex").write_text("years of work")
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    network = build()
    trained(network)
    with pytest.raises(UserError, match="not an adapter folder"):
        save_adapter(saved, network)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


@pytest.mark.parametrize("victim", ["save_file", "json.dumps", "os.replace"])
def test_an_existing_folder_is_kept_whole_when_writing_fails(saved, victim, monkeypatch):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    network = build()
    trained(network, "dora")

    def disk_full(*args, **kwargs):
        raise OSError("no space left on device")

    owner, _, name = f"store.{victim}".rpartition(".")
    monkeypatch.setattr({"store": store, "store.json": json, "store.os": os}[owner], name, disk_full)
    with pytest.raises(OSError, match="no space"):
        save_adapter(saved, network)
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert not [path for path in saved.parent.iterdir() if path != saved and any(path.iterdir())]


def test_an_existing_folder_is_back_when_the_exchange_fails_in_the_middle(saved, monkeypatch):
    replace, calls = os.replace, []

    def second_fails(*args):
        calls.append(args)
        if len(calls) == 2:
            raise OSError("no space left on device")
        replace(*args)

    network = build()
    trained(network, "dora")
    monkeypatch.setattr(os, "replace", second_fails)
    with pytest.raises(OSError, match="no space"):
        save_adapter(saved, network)
    monkeypatch.undo()
    assert read_config(saved)["method"]["name"] == "lora"


def test_facts_that_are_not_json_leave_no_folder(tmp_path):
    network = build()
    trained(network)
    with pytest.raises(TypeError, match="JSON"):
        save_adapter(tmp_path / "a", network, extra={"x": torch.zeros(1)})
    assert not list(tmp_path.iterdir())


# reading what does not fit


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


# fingerprints


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


# known defects


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
