"""The adapter folder: what goes in comes out, and an older folder is replaced whole or kept whole."""

from __future__ import annotations

import json
import os

import pytest
import torch
from kinds import quietly
from stored import assert_refused, build, trained, x
from torch import nn

from vision_peft.engine import store
from vision_peft.engine.adapter import method_names
from vision_peft.engine.fingerprint import fingerprint
from vision_peft.engine.install import activate, detach, merge, unmerge
from vision_peft.engine.store import load_adapter, read_config, save_adapter
from vision_peft.errors import UserError

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
