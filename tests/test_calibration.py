"The temperature is the likeliest, and says when it is not one."
import numpy as np
import pytest

from kdoct.evaluate.calibration import BOUNDS, fit_temperature
from kdoct.evaluate.metrics import log_softmax, logits_of, simulate_predictions, targets_of


@pytest.mark.parametrize('factor', [.3, 1., 4.])
def test_temperature_undoes_a_scale(factor):
    df = simulate_predictions(200, 2.)
    one, many = (fit_temperature(f*logits_of(df), targets_of(df))[0] for f in (1, factor))
    assert many == pytest.approx(factor*one, rel=1e-3)


def test_temperature_is_the_minimum_of_the_nll_of_many_images():
    df = simulate_predictions(4000, 1.5)
    z, y = logits_of(df), targets_of(df)
    def nll(t): return -log_softmax(z/t)[np.arange(len(y)), y].mean()
    t, note = fit_temperature(z, y)
    assert note == '' and all(nll(t) <= nll(t*f) for f in (.95, .98, 1.02, 1.05))


@pytest.mark.parametrize('n', [4, 40, 400])
def test_temperature_without_a_mistake_is_as_sure_as_so_many_images_allow(n):
    y = np.arange(n) % 3
    t, note = fit_temperature(20*np.eye(3)[y], y)
    p = np.exp(log_softmax(np.array([20, 0, 0])/t))[0]
    assert p == pytest.approx((n + 1)/(n + 2), abs=1e-4) and f'no mistake in {n} images' in note


@pytest.mark.parametrize('scale,bound', [(1e-4, BOUNDS[0]), (1e4, BOUNDS[1])])
def test_temperature_says_when_it_is_at_a_bound(scale, bound):
    df = simulate_predictions(100, 1.5)
    t, note = fit_temperature(scale*logits_of(df), targets_of(df))
    assert t == bound and 'at its bound' in note
