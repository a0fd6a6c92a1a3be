"""Two processes give the adapter of one process with the same global batch."""

from __future__ import annotations


def test_two_processes_equal_one(runner):
    one = runner.fit("one", "--data.batch_size", "16", "--trainer.max_steps", "6")
    assert one.returncode == 0, one.stderr
    two = runner.fit(
        "two", "--data.batch_size", "8", "--trainer.max_steps", "6", "--trainer.devices", "2", "--trainer.strategy", "ddp"
    )
    assert two.returncode == 0, two.stderr
    expected, found = runner.adapter("one"), runner.adapter("two")
    assert expected.keys() == found.keys()
    assert max(float((expected[key] - found[key]).abs().max()) for key in expected) < 1e-5
    moved = [key for key in expected if key.endswith(".B") and float(expected[key].abs().max()) > 1e-4]
    assert moved, "nothing was trained"
