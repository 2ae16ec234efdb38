"Two distances written out, their threshold, and pictures that are no B-scans."
import numpy as np
import pytest
import torch
from simulated_decisions import features

from kdoct.core.result_sections import DecideRecipe
from kdoct.evaluate.decisions import fit_decision
from kdoct.evaluate.metrics import simulate_predictions
from kdoct.evaluate.outliers import _covariance, distance, fit_outlier, outlier_pictures


def written_out(o, x, i):
    "One of the two distances, with its covariance as a matrix."
    used = o.axes[i].any(1)
    axes = o.axes[i][used].astype(float)
    along = axes.T @ np.diag(o.scale[i][used] - o.residual[i]) @ axes
    inverse = np.linalg.inv(along + o.residual[i]*np.eye(x.shape[1]))
    away = x - o.mean[i].astype(float)
    return np.sqrt(np.einsum('nd,de,ne->n', away, inverse, away)/x.shape[1])


def test_distance_is_the_larger_of_two_written_out():
    o, x = fit_outlier(features(200)@features(32, 2) + 3), 9*features(9, 3)
    direction = x/np.linalg.norm(x, axis=1, keepdims=True)
    want = np.maximum(written_out(o, x, 0), written_out(o, direction, 1))
    np.testing.assert_allclose(o.score(x), want, rtol=1e-3)
    tensors = {k: torch.from_numpy(v) for k, v in o.arrays().items()}
    t = distance(torch.from_numpy(x), **tensors)
    np.testing.assert_allclose(t.numpy(), o.score(x), rtol=1e-5)


def test_axes_are_the_principal_ones_and_the_rest_has_their_mean_variance():
    x = features(400) * np.r_[[9, 8, 7], np.ones(29)].astype(np.float32)
    o, cov = fit_outlier(x, .8), np.cov(x, rowvar=False)
    v = np.sort(np.linalg.eigvalsh(cov))[::-1]
    np.testing.assert_allclose(o.scale[0][:3], v[:3], rtol=1e-4)
    k = int(o.axes[0].any(1).sum())
    assert k == 3 and o.residual[0] == pytest.approx(v[3:].mean(), rel=1e-4)


def test_short_and_long_features_of_the_usual_direction_and_other_directions_are_far():
    x = features(300) + 4
    o, usual = fit_outlier(x), features(50, 9) + 4
    for far in (.01*features(50, 8), 3*usual, usual*np.sign(features(1, 7))):
        assert o.score(far).min() > o.score(usual).max()


def test_many_images_are_summed_in_pieces():
    x = features(100) + 5
    mean, cov = _covariance(x, 7)
    np.testing.assert_allclose(mean, x.mean(0), rtol=1e-6)
    np.testing.assert_allclose(cov, np.cov(x, rowvar=False), rtol=1e-4, atol=1e-6)


def test_few_images_and_dead_features_still_have_a_distance():
    f = features(20, d=64)
    f[:, 10:30] = 0
    o = fit_outlier(f)
    assert np.isfinite(o.score(f)).all() and (o.residual > 0).all()
    far = f.copy()
    far[:, 12] = 9
    assert o.score(far).min() > o.score(f).max()


def test_the_flag_keeps_its_share_of_new_patients():
    shares = []
    for seed in range(40):
        val = simulate_predictions(60, seed=seed)
        d = fit_decision(val, features(len(val), seed), features(200, 99), DecideRecipe())
        shares.append((d.outlier.score(features(200, 500 + seed)) > d.outlier.threshold).mean())
    assert .01 < np.mean(shares) <= .05


@pytest.mark.parametrize('shape', [(6, 50, 50), (6, 50, 50, 3)])
def test_outlier_pictures_keep_size_and_colours(shape):
    x = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    for kind, v in outlier_pictures(x).items():
        assert v.shape == shape and v.dtype == np.uint8 and (v != x).any(), kind
