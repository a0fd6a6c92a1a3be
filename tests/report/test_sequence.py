"""Measures of a sequence: by hand, and of a model that never changes."""

from __future__ import annotations

import pytest

from vision_peft.report.sequence import mean, measures, text_table

R = [[0.9, 0.4, 0.2], [0.7, 0.8, 0.3], [0.6, 0.75, 0.5]]


def test_by_hand():
    found = measures(R)
    assert found["Transfer"] == [None, pytest.approx(0.4), pytest.approx(0.25)]
    assert found["Average"] == [pytest.approx(2.2 / 3), pytest.approx(0.65), pytest.approx(1 / 3)]
    assert found["Last"] == [0.6, 0.75, 0.5]
    assert found["Forgetting"] == [pytest.approx(0.3), pytest.approx(0.05), None]
    assert mean(found["Transfer"]) == pytest.approx(0.325) and mean(found["Forgetting"]) == pytest.approx(0.175)


def test_a_model_that_never_changes():
    row = [0.0, 0.5, 0.25, 1.0]
    found = measures([row] * 4)
    assert mean(found["Transfer"]) == pytest.approx(sum(row[1:]) / 3)  # a true zero is a value, and the first column has no transfer
    assert found["Average"] == found["Last"] == row
    assert mean(found["Forgetting"]) == 0


def test_measures_wait_for_the_last_task():
    part, whole = (text_table(["a", "b", "c"], [0.1, 0.2, 0.3], rows, "x") for rows in (R[:2], R))
    assert "Transfer" not in part and "| after b | 70.0 | 80.0 | 30.0 | 60.0 |" in part
    assert "| Transfer | - | 40.0 | 25.0 | 32.5 |" in whole and "| zero-shot | 10.0 | 20.0 | 30.0 | 20.0 |" in whole
