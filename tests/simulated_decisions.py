"Decisions on simulated predictions and features, for several test files."
import json

import numpy as np

from kdoct.core.files import read_json
from kdoct.core.result_sections import DecideRecipe, EvaluateRecipe
from kdoct.evaluate.decisions import fit_decision
from kdoct.evaluate.metrics import simulate_predictions

QUICK = EvaluateRecipe(n_boot=100)


def features(n, seed=0, d=32):
    "Random features (n, d)."
    return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)


def fitted(val=None, recipe=None, seed=1, **about):
    "A decision on simulated predictions and features."
    val = simulate_predictions(80, 2., seed=seed) if val is None else val
    held, train = features(len(val), 1), features(300)
    return fit_decision(val, held, train, recipe or DecideRecipe(), **about)


def same(a, b):
    "Whether two decisions are the same to the last bit."
    def numbers(d):
        return d.temperature, d.defer_below, d.set_minimum, d.outlier.threshold, d.notes, d.volume
    arrays = b.outlier.arrays()
    alike = all(np.array_equal(v, arrays[k]) for k, v in a.outlier.arrays().items())
    return numbers(a) == numbers(b) and a.operating_points.equals(b.operating_points) and alike


def change(folder, f):
    "Change what decision.json of a folder holds."
    stored = read_json(folder/'decision.json')
    f(stored)
    (folder/'decision.json').write_text(json.dumps(stored))
