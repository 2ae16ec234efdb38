"The protocol names what is not as usual."
import pytest
from simulated_models import official_run

from kdoct.core.presets import preset
from kdoct.core.runs import create_run
from kdoct.evaluate.metrics import simulate_predictions
from kdoct.evaluate.protocol import protocol_of


@pytest.mark.parametrize('overrides,says', [
    ({'data.fill_white': True, 'data.mask_scale_bar': True}, 'white padding replaced by '
                                                             'background; scale bar covered'),
    ({'data.resize': 'pad'}, 'made square by pad'),
    ({'data.worst_case_train': True}, "training on only slices that show the patient's diagnosis, "
                                      "test on all slices"),
    ({'evaluate.views': ['identity', 'vflip']}, 'the mean of logits over the views '
                                                'identity, vflip'),
    ({}, 'test-time views: none'),
])
def test_protocol_names_what_is_not_default(overrides, says):
    run = create_run('p', preset('tiny', **overrides))
    assert says in protocol_of(run, simulate_predictions(20).assign(patient_label='CNV'))


def test_protocol_tells_of_a_kept_leak():
    run = official_run('leaky', seen_groups=5)
    run.record('data', leak=dict(groups=5, images=7), overlap=7)
    assert 'leak is kept: 5 tested groups were trained on too, with 7 images' in protocol_of(
        run, simulate_predictions(20)
    )
    clean = official_run('clean')
    clean.record('data', leak=None, overlap=7)
    assert '7 images of tested groups outside the test part were left out' in protocol_of(
        clean, simulate_predictions(20)
    )
