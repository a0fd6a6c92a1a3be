"""Agreement measures, ridge regression and its strength, and the regressor's folder."""

from __future__ import annotations

import json
import math
import warnings

import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.linear_model import Ridge

from vision_peft.errors import UserError
from vision_peft.quality.agreement import agreement, logistic_fit
from vision_peft.quality.opinions import Opinion
from vision_peft.quality.regressor import ALPHAS, Regressor, choose_alpha, fit
from vision_peft.quality.trial import medians, trials

RNG = np.random.default_rng(0)


def problem(count: int = 120, width: int = 30) -> tuple[np.ndarray, np.ndarray]:
    features = RNG.normal(size=(count, width)).astype(np.float32) + 3
    return features, features[:, :4].astype(np.float64) @ [1.0, -0.5, 0.3, 2.0] + 0.8 * RNG.normal(size=count)


def test_rank_correlation_survives_any_increasing_map_and_the_logistic_helps_pearson():
    opinions = np.linspace(1, 5, 60)
    curved = 1 / (1 + np.exp(-3 * (opinions - 3))) + 0.01 * RNG.normal(size=60)
    found = agreement(curved, opinions)
    assert found["srcc"] == pytest.approx(agreement(np.exp(curved), opinions)["srcc"])
    assert found["plcc"] >= found["plcc_raw"] - 1e-6
    assert found["rmse"] < 0.5
    straight = agreement(2 * opinions + 1, opinions)
    assert straight["srcc"] == straight["krcc"] == pytest.approx(1) and straight["plcc"] == pytest.approx(1) and straight["rmse"] < 1e-6


def test_the_logistic_is_found_again():
    x = np.linspace(-2, 3, 80)
    y = 4 / (1 + np.exp(-(x - 0.4) / 0.3)) + 1
    assert np.abs(logistic_fit(x, y) - y).max() < 1e-3


def test_equal_scores_have_no_agreement():
    with pytest.warns(UserWarning, match="no agreement"):
        found = agreement(np.ones(10), np.arange(10.0))
    assert all(math.isnan(value) for value in found.values())


def test_ridge_is_the_closed_form():
    features, opinions = problem()
    regressor = fit(features, opinions, 7.0)
    F, y = features.astype(np.float64), opinions
    centred = F - F.mean(0)
    slope = np.linalg.solve(centred.T @ centred + 7 * np.eye(F.shape[1]), centred.T @ (y - y.mean()))
    np.testing.assert_allclose(regressor.slope, slope, atol=1e-8)
    np.testing.assert_allclose(fit(features, opinions, 1e12)(features), np.full(len(y), y.mean()), atol=1e-4)


def test_the_strength_is_the_best_of_an_exhaustive_search():
    features, opinions = problem(60, 200)
    train, val = (features[:40], opinions[:40]), (features[40:], opinions[40:])
    models = [Ridge(alpha=alpha).fit(train[0].astype(np.float64), train[1]) for alpha in ALPHAS]
    scores = [spearmanr(model.predict(val[0]), val[1]).statistic for model in models]
    best = choose_alpha(train, val)
    assert scores[ALPHAS.index(best)] == pytest.approx(max(scores), abs=1e-9)


def test_divisions_are_scored_on_their_test_parts():
    features, scores = problem()
    opinions = [Opinion(None, score) for score in scores]
    rows = trials(opinions, features, range(4))
    assert rows == trials(opinions, features, range(4)) and len({row["srcc"] for row in rows}) > 1
    median, spread = medians(rows)["srcc"]
    assert median > 0.8 and spread < 0.2


def test_a_regressor_is_kept_without_pickle(tmp_path):
    features, scores = problem()
    regressor = fit(features, scores, 1.0)
    regressor.save(tmp_path / "r")
    loaded = Regressor.load(tmp_path / "r")
    assert np.array_equal(loaded(features), regressor(features)) and loaded.facts == {"alpha": 1.0}
    assert sorted(path.name for path in (tmp_path / "r").iterdir()) == ["regressor.json", "regressor.safetensors"]
    (tmp_path / "r" / "regressor.json").write_text(json.dumps({"format": 9}))
    with pytest.raises(UserError, match="format 9"):
        Regressor.load(tmp_path / "r")
    (tmp_path / "r" / "regressor.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match="not a whole regressor"):
        Regressor.load(tmp_path / "r")
    with pytest.raises(UserError, match="no regressor"):
        Regressor.load(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "mine.txt").write_text("keep")
        with pytest.raises(UserError, match="not a regressor's folder"):
            regressor.save(tmp_path / "other")
    assert (tmp_path / "other" / "mine.txt").read_text() == "keep"
