"""What every task shares: optimizer groups, schedule, penalties, checkpoints of trained parts, when coordinate() is called."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from small_runs import adam, clip, digits, fit, lora, trained, trainer, vit
from torch import Tensor, nn

from vision_peft.engine.adapter import Adapter, Clock, Evidence, Method, trainable
from vision_peft.engine.callback import AdapterCallback
from vision_peft.errors import UserError
from vision_peft.tasks.fewshot_classification import FewShotClassification
from vision_peft.tasks.heads import LinearHead, TextHead


class GainAdapter(Adapter):
    """W' = g W; the penalty is (g - 3)^2."""

    def __init__(self, penalty: float) -> None:
        super().__init__()
        self.gain, self.strength = nn.Parameter(torch.ones(1)), penalty
        self.register_buffer("calls", torch.zeros(()))

    def initialize(self, W: Tensor, evidence: Evidence) -> None:
        self.gain.fill_(1.0)

    def weight(self, W: Tensor) -> Tensor:
        return self.gain * W

    def penalty(self) -> Tensor:
        return self.strength * (self.gain - 3).square().sum()


class Gain(Method):
    """One number a weight, with roles of its own rate, and a record of its calls."""

    def __init__(self, penalty: float = 0.0, ratio: float = 1.0) -> None:
        self.penalty, self.ratio = penalty, ratio
        self.clocks: list[Clock] = []
        self.lrs: list[float] = []  # as coordinate() saw them

    def adapter(self, site, shared) -> GainAdapter:
        return GainAdapter(self.penalty)

    def coordinate(self, adapters, shared, clock: Clock) -> None:
        assert not torch.is_grad_enabled()
        self.clocks.append(clock)
        self.lrs.append(clock.group(next(iter(adapters.values())).gain)["lr"])
        for adapter in adapters.values():
            adapter.calls += 1

    def param_groups(self, adapters, shared, lr: float) -> list[dict[str, Any]]:
        first, *rest = trainable(adapters.values())
        return [{"params": [first], "name": "first", "lr": lr * self.ratio, "weight_decay": 0.0}, {"params": rest, "name": "rest"}]

    def count(self, site) -> int:
        return 1


class Rates(pl.Callback):
    """The learning rates that every optimizer step ran with, by group, and those left at the end."""

    def __init__(self) -> None:
        self.steps: dict[str, list[float]] = {}

    def look(self, trainer) -> None:
        for group in trainer.optimizers[0].param_groups:
            self.steps.setdefault(group["name"], []).append(group["lr"])

    def on_train_batch_start(self, trainer, task, batch, batch_idx) -> None:
        self.look(trainer)

    def on_train_end(self, trainer, task) -> None:
        self.groups = trainer.optimizers[0].param_groups
        self.look(trainer)


def run(folder, method: Method | None = None, data=None, steps: int = 4, targets: str = "vision.5.attn.{q,v}", **options):
    of_trainer = {key: options.pop(key) for key in list(options) if key in ("accumulate_grad_batches", "max_epochs", "callbacks")}
    task = FewShotClassification(vit(), LinearHead("zeros"), **{"optimizer": adam(), **options})
    rates = Rates()
    of_trainer["callbacks"] = [rates, *of_trainer.get("callbacks", [])]
    fit(folder, task, data or digits(), method, targets, max_steps=steps, **of_trainer)
    return task, rates


# ---- groups ----


def test_groups_of_the_head_and_of_the_method(tmp_path):
    task, rates = run(tmp_path, Gain(ratio=8.0), schedule="constant", head_lr=0.5)
    groups = {group["name"]: group for group in rates.groups}
    assert {name: group["lr"] for name, group in groups.items()} == {"head": 0.5, "first": pytest.approx(8e-2), "rest": 1e-2}
    assert {name: group["weight_decay"] for name, group in groups.items()} == {"head": 0.01, "first": 0.0, "rest": 0.01}
    assert {id(p) for p in groups["head"]["params"]} == {id(task.head.weight), id(task.head.bias)}
    everything = [p for group in rates.groups for p in group["params"]]
    assert len(everything) == 4
    assert {id(p) for p in everything} == {id(p) for p in task.parameters() if p.requires_grad}


def test_without_head_lr_the_head_takes_the_optimizers(tmp_path):
    _, rates = run(tmp_path, lora(), schedule="constant")
    assert {group["name"]: group["lr"] for group in rates.groups} == {"head": 1e-2, "adapter": 1e-2}


def test_nothing_but_the_parts_moves(tmp_path):
    task, _ = run(tmp_path, lora(), targets="vision.5.*")
    reference = vit().network.state_dict()
    for key, value in task.backbone.network.state_dict().items():
        assert torch.equal(value, reference[key]), key
    assert task.head.weight.any()


def test_nothing_to_train(tmp_path):
    task = FewShotClassification(clip(tmp_path), TextHead())
    with pytest.raises(UserError, match="nothing to train: no adapter method is set and the head has no parameters"):
        fit(tmp_path, task, digits(), None)


# ---- schedule ----


def test_cosine_of_the_clip_protocol(tmp_path):
    """Property 6 of the CLIP-LoRA note: 2e-4 at step 0, exactly 1e-6 at the end; with T = 500 lr(1) is 1.9999804e-4."""
    total = 500
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=2e-4)
    task = FewShotClassification(vit(), LinearHead("zeros"))
    task._trainer = trainer(tmp_path, max_steps=total)
    scheduler, rates = task._scheduler(optimizer), []
    for _ in range(total + 1):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[0] == 2e-4
    assert round(rates[1], 11) == 1.9999804e-4
    assert rates[total] == pytest.approx(1e-6, rel=1e-9)
    for step in (100, 250, 499):
        assert rates[step] == pytest.approx(1e-6 + (2e-4 - 1e-6) * (1 + math.cos(math.pi * step / total)) / 2, rel=1e-9)


@pytest.mark.parametrize("counted", [{"steps": 6}, {"steps": -1, "max_epochs": 2}])
def test_cosine_over_a_run_in_steps_or_epochs(counted, tmp_path):
    """20 pictures in batches of 8: two epochs are six steps."""
    _, rates = run(tmp_path, Gain(ratio=8.0), min_lr=1e-5, head_lr=0.1, **counted)
    for name, lr in {"head": 0.1, "first": 8e-2, "rest": 1e-2}.items():
        expected = [1e-5 + (lr - 1e-5) * (1 + math.cos(math.pi * step / 6)) / 2 for step in range(7)]
        assert rates.steps[name] == pytest.approx(expected, rel=1e-9), name


def test_warm_up_then_cosine(tmp_path):
    _, rates = run(tmp_path, lora(), steps=6, warmup_steps=2, min_lr=1e-5)
    rise = [1e-2 * (0.01 + 0.99 * step / 2) for step in range(2)]
    fall = [1e-5 + (1e-2 - 1e-5) * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(5)]
    assert rates.steps["adapter"] == pytest.approx([*rise, *fall], rel=1e-6)


def test_constant(tmp_path):
    _, rates = run(tmp_path, lora(), schedule="constant")
    assert set(rates.steps["adapter"]) == {1e-2}


def test_schedule_counts_optimizer_steps_under_accumulation(tmp_path):
    _, rates = run(tmp_path, lora(), steps=3, min_lr=1e-5, accumulate_grad_batches=2)
    assert rates.steps["adapter"][-1] == pytest.approx(1e-5, rel=1e-9)
    assert len(set(rates.steps["adapter"])) == 4


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_a_run_without_an_end_is_refused(schedule, tmp_path):
    with pytest.raises(UserError, match="trainer: give max_steps or max_epochs"):
        run(tmp_path, lora(), steps=-1, max_epochs=-1, schedule=schedule)


# ---- penalty ----


def test_penalty_is_in_the_loss(tmp_path):
    task, _ = run(tmp_path, Gain(penalty=0.5), steps=2)
    images, labels = torch.randn(3, 3, 32, 32), torch.tensor([0, 1, 2])
    logged: dict[str, Tensor] = {}
    task.log = lambda name, value, **options: logged.__setitem__(name, value.detach())
    total = task.training_step((images, labels), 0)
    gains = [p for p in task.parts["adapters"].parameters()]
    penalty = sum(0.5 * (g - 3).square().sum() for g in gains)
    torch.testing.assert_close(total, task.loss((images, labels)) + penalty)
    torch.testing.assert_close(logged["train/penalty"], penalty.detach())
    torch.testing.assert_close(logged["train/loss"], task.loss((images, labels)).detach())


def test_penalty_is_followed(tmp_path):
    plain, _ = run(tmp_path / "a", Gain(), steps=4)
    pulled, _ = run(tmp_path / "b", Gain(penalty=100.0), steps=4)
    gains = {run: [p.item() for p in task.parts["adapters"].parameters()] for run, task in (("plain", plain), ("pulled", pulled))}
    assert min(gains["pulled"]) > 1.01
    assert gains["pulled"] != gains["plain"]


def test_methods_without_a_penalty_log_none(tmp_path):
    task, _ = run(tmp_path, lora(), steps=1)
    logged: list[str] = []
    task.log = lambda name, value, **options: logged.append(name)
    task.training_step((torch.randn(2, 3, 32, 32), torch.tensor([0, 1])), 0)
    assert logged == ["train/loss"]


# ---- coordinate ----


@pytest.mark.parametrize("accumulate, steps", [(1, 5), (2, 4), (3, 3)])
def test_coordinate_once_an_optimizer_step(accumulate, steps, tmp_path):
    """Three batches an epoch: with 2 a step Lightning also steps at the end of every epoch, on one batch."""
    method = Gain()
    task, _ = run(tmp_path, method, steps=steps, accumulate_grad_batches=accumulate)
    assert [clock.step for clock in method.clocks] == list(range(1, steps + 1))
    assert {clock.total for clock in method.clocks} == {steps}
    an_epoch = math.ceil(3 / accumulate)
    assert [clock.epoch for clock in method.clocks] == [step // an_epoch for step in range(steps)]
    assert {float(value) for key, value in task.state_dict().items() if key.endswith("calls")} == {steps}


def test_coordinate_sees_the_rate_of_the_step_that_was_made(tmp_path):
    method = Gain()
    _, rates = run(tmp_path, method, steps=5, warmup_steps=2)
    ran = rates.steps["first"][:5]
    assert method.lrs == ran and len(set(ran)) > 3


# ---- checkpoints ----


def checkpoint(task: FewShotClassification) -> dict[str, Any]:
    held = {"state_dict": task.state_dict()}
    task.on_save_checkpoint(held)
    return held


def test_a_checkpoint_holds_the_parts_alone(tmp_path):
    task, _ = run(tmp_path, lora(), steps=1)
    held = checkpoint(task)
    assert held["state_dict"].keys() == trained(task).keys()
    assert {key.split(".")[0] for key in held["state_dict"]} == {"head", "adapters"}
    assert held["backbone_fingerprint"] == task.frozen_fingerprint
    assert len(task.frozen_fingerprint) == 64
    assert torch.equal(held["random_state"][0]["cpu"], torch.get_rng_state())


def test_a_checkpoint_comes_back(tmp_path):
    task, _ = run(tmp_path / "a", lora(), steps=3)
    other, _ = run(tmp_path / "b", lora(), steps=1)
    held = checkpoint(task)
    expected = {key: value.clone() for key, value in task.state_dict().items()}
    other.on_load_checkpoint(held)
    other.load_state_dict(held["state_dict"], strict=True)
    for key, value in other.state_dict().items():
        assert torch.equal(value, expected[key]), key


def test_the_random_state_is_set_once_before_the_first_step(tmp_path):
    task, _ = run(tmp_path, lora(), steps=1)
    held = checkpoint(task)
    expected = torch.rand(3)
    torch.rand(100)
    task.on_load_checkpoint(held)
    task.on_train_batch_start(None, 0)
    assert torch.equal(torch.rand(3), expected)
    task.on_train_batch_start(None, 1)
    assert not torch.equal(torch.rand(3), expected)


def test_loading_is_strict(tmp_path):
    task, _ = run(tmp_path, lora(), steps=1)

    def load(change) -> None:
        held = checkpoint(task)
        held["state_dict"] = dict(held["state_dict"])
        change(held)
        task.on_load_checkpoint(held)

    load(lambda held: None)
    with pytest.raises(UserError, match=r"checkpoint: trained key 'head\.weight' is missing"):
        load(lambda held: held["state_dict"].pop("head.weight"))
    with pytest.raises(UserError, match=r"checkpoint: trained key 'head\.more' is not expected"):
        load(lambda held: held["state_dict"].update({"head.more": torch.zeros(1)}))
    with pytest.raises(UserError, match=r"checkpoint: trained key 'backbone\..*' is not expected"):
        load(lambda held: held["state_dict"].update(task.state_dict()))
    with pytest.raises(UserError, match=r"checkpoint: 'head\.bias' has shape \(9,\), expected \(10,\)"):
        load(lambda held: held["state_dict"].update({"head.bias": torch.zeros(9)}))
    with pytest.raises(UserError, match="checkpoint: it belongs to another backbone"):
        load(lambda held: held.update(backbone_fingerprint="other"))


def test_a_checkpoint_of_another_backbone_is_refused(tmp_path):
    """Two random networks of one architecture: same keys, same shapes."""
    task, _ = run(tmp_path / "a", lora(), steps=1)
    other = FewShotClassification(vit(seed=1), LinearHead("zeros"))
    fit(tmp_path / "b", other, digits(), lora(), "vision.5.attn.{q,v}", max_steps=1)
    with pytest.raises(UserError, match="another backbone"):
        other.on_load_checkpoint(checkpoint(task))


def test_a_run_interrupted_in_this_process_goes_on(tmp_path):
    """The unit beside tests/end_to_end: optimizer, schedule, adapters and dropout continue."""
    whole, _ = run(tmp_path / "whole", lora(dropout=0.3), steps=6)
    task = FewShotClassification(vit(), LinearHead("zeros"), optimizer=adam())
    adapter = AdapterCallback(lora(dropout=0.3), "vision.5.attn.{q,v}")
    torch.manual_seed(5)

    class Save(pl.Callback):
        def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx) -> None:
            if trainer.global_step == 4:  # inside the second epoch
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    trainer(tmp_path / "half", [adapter, Save()], max_steps=6).fit(task, datamodule=digits())
    again = FewShotClassification(vit(), LinearHead("zeros"), optimizer=adam())
    torch.manual_seed(99)
    second = trainer(tmp_path / "rest", [AdapterCallback(lora(dropout=0.3), "vision.5.attn.{q,v}")], max_steps=6)
    second.fit(again, datamodule=digits(), ckpt_path=tmp_path / "half.ckpt")
    assert second.global_step == 6
    for key, value in trained(whole).items():
        assert torch.equal(trained(again)[key], value), key


def test_weights_are_read_once(tmp_path, monkeypatch):
    backbone = vit()
    loads: list[int] = []
    load = backbone.load
    monkeypatch.setattr(backbone, "load", lambda: (loads.append(1), load()))
    task = FewShotClassification(backbone, LinearHead("zeros"))
    fit(tmp_path, task, digits(), lora(), max_steps=1)
    trainer(tmp_path, []).test(task, datamodule=digits(), verbose=False)
    assert loads == [1]
