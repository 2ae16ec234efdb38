"What a decision says of a picture; what is on disk is checked."
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file
from simulated_decisions import change, features, fitted, same

from kdoct.core.files import KdoctError, sha256_file, write_json
from kdoct.core.result_sections import DecideRecipe
from kdoct.evaluate.decisions import (
    distinct_texts,
    explained,
    fit_decision,
    load_decision,
    save_decision,
)
from kdoct.evaluate.metrics import simulate_predictions
from kdoct.evaluate.patients import VolumeRule


@given(st.floats(0, 1), st.floats(0, 1))
def test_numbers_that_are_compared_differ_as_text(a, b):
    x, y = distinct_texts(100*a, 100*b)
    assert (x == y) == (100*a == 100*b) and (float(x) < float(y)) == (100*a < 100*b)


@pytest.mark.parametrize('step', [1e-9, 1e-6, 1e-4, .1])
def test_a_confidence_is_never_said_to_be_below_itself(step):
    d = fitted()
    for p, word in ((d.defer_below - step, 'is below'), (d.defer_below + step, 'is at least')):
        sentences = explained(d, np.array([p, *[(1 - p)/3]*3]), .5)
        (sentence,) = (s for s in sentences if s.startswith('Confidence'))
        a, b = map(float, re.fullmatch(rf'Confidence: (\S+) % {word} (\S+) %\.', sentence).groups())
        assert (a < b) == (word == 'is below') and a != b


def test_an_outlier_is_deferred_and_every_word_of_it_is_of_one_function():
    d, what = fitted(), ['deferred', 'why', 'outlier']
    sure = np.array([.97, .01, .01, .01])
    far, near = d.outlier.threshold*(1 + 1e-9), d.outlier.threshold
    assert d.judge(sure[None], [far]).iloc[0][what].tolist() == [True, 'outlier', True]
    assert d.judge(sure[None], [near]).iloc[0][what].tolist() == [False, '', False]
    assert explained(d, sure, far)[0] == 'Deferred to a person (outlier).'
    assert explained(d, sure, near)[0] == 'Not deferred.'
    assert 'was not measured' in ' '.join(explained(d, sure, None))


@pytest.fixture
def folder(tmp_path):
    save_decision(tmp_path, fitted(weights_sha256='w'))
    write_json(tmp_path/'model.json', dict(weights_sha256='w'))
    return tmp_path


def test_a_decision_of_an_earlier_version_is_refused_by_name(folder):
    change(folder, lambda s: (s.pop('volume'), s.update(conformal=s.pop('prediction_sets'))))
    with pytest.raises(KdoctError, match='earlier version(.|\n)*05g_decide'):
        load_decision(folder)


def test_the_volume_rule_is_a_part_of_the_decision(tmp_path):
    order, val = ('NORMAL', 'DRUSEN', 'DME', 'CNV'), simulate_predictions(60)
    recipe = DecideRecipe(min_slices=3, drop_outliers=False)
    a = fit_decision(val, features(len(val)), features(99), recipe, order)
    save_decision(tmp_path, a)
    assert load_decision(tmp_path).volume == a.volume == VolumeRule('worst', 3, False, order)
    change(tmp_path, lambda s: s['volume'].update(severity=['NORMAL', 'CNV']))
    with pytest.raises(KdoctError, match='order of severity of other classes'):
        load_decision(tmp_path)


def test_a_decision_is_read_as_it_was_written(tmp_path):
    a = fitted(simulate_predictions(12, 2.))
    save_decision(tmp_path, a)
    assert a.notes and same(a, load_decision(tmp_path))


def changed(f): return lambda folder: change(folder, f)


HARM = {
    'no temperature': (changed(lambda s: s.pop('temperature')), 'is no decision'),
    'negative': (changed(lambda s: s.update(temperature=-1)), 'out of range'),
    'null': (changed(lambda s: s.update(temperature=None)), 'is no decision'),
    'text': (changed(lambda s: s['outlier'].update(threshold='high')), 'is no decision'),
    'points': (changed(lambda s: s.update(operating_points=[1])), 'is no decision'),
    'classes': (changed(lambda s: s.update(classes=['a', 'b'])), 'other classes'),
    'list': (lambda d: (d/'decision.json').write_text('[1, 2]'), 'is no decision'),
    'no tensors': (lambda d: (d/'decision.safetensors').unlink(), 'not the file'),
    'damaged': (lambda d: (d/'decision.safetensors').write_bytes(b'x'*99), 'not the file'),
    'trained again': (
        lambda d: write_json(d/'model.json', dict(weights_sha256='new')), 'other weights'
    ),
}


@pytest.mark.parametrize('harm,says', HARM.values(), ids=HARM)
def test_a_decision_that_was_changed_is_refused(folder, harm, says):
    harm(folder)
    with pytest.raises(KdoctError, match=says): load_decision(folder)


@pytest.mark.parametrize('arrays', [dict(mean=np.zeros(3, np.float32)), 'nan', 'shape'])
def test_statistics_of_another_shape_are_refused(folder, arrays):
    a = load_decision(folder).outlier.arrays()
    if arrays == 'nan': a['mean'] = a['mean']*np.nan
    if arrays == 'shape': a['axes'] = a['axes'][:, :, :5].copy()
    save_file(arrays if isinstance(arrays, dict) else a, folder/'decision.safetensors')
    digest = sha256_file(folder/'decision.safetensors')
    change(folder, lambda s: s['outlier'].update(sha256=digest))
    with pytest.raises(KdoctError, match='does not hold the statistics'): load_decision(folder)
