"Figures for few and many classes, absent classes, and pictures that cannot be read."
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from simulated_models import models

from kdoct.core.files import KdoctError
from kdoct.evaluate import figures
from kdoct.evaluate.figure_style import save_figure
from kdoct.evaluate.metrics import simulate_predictions

SEVEN = ('COVID-19', 'Viral pneumonia', 'Lung opacity', 'Normal', 'E', 'F', 'G')


@pytest.mark.parametrize('classes', [('A', 'B'), SEVEN], ids=['two', 'seven'])
def test_figures_for_few_and_many_classes(tmp_path, classes):
    m = models(80, classes)
    made = {
        'confusion': figures.confusion_figure(m),
        'roc': figures.roc_figure(m),
        'reliability': figures.reliability_figure(m)}
    for name, fig in made.items():
        with Image.open(save_figure(fig, tmp_path/f'{name}.png', dpi=999)) as im:
            assert im.width > 400 and im.width <= 150*fig.get_figwidth() + 1
    assert len([a for a in figures.roc_figure(m).axes if a.get_visible()]) == len(classes)


def test_figures_with_an_absent_class():
    m = {r: df[df.label != 'DME'].reset_index(drop=True) for r, df in models().items()}
    assert 'no image of this class' in figures.roc_figure(m).axes[1].texts[0].get_text()
    # the row of the absent class stays empty
    assert len(figures.confusion_figure(m).axes[0].texts) == 12


def test_no_pyplot_figure_is_left_open():
    import matplotlib.pyplot as plt
    before = plt.get_fignums()
    (
        figures.confusion_figure(models()),
        figures.counts_figure(
            pd.DataFrame({'label': ['A'], 'role': ['train'], 'images': [3], 'groups': [2]})
        ),
    )
    assert plt.get_fignums() == before


def test_worst_mistakes_are_errors_surest_first_and_repeatable():
    df = simulate_predictions(80, 2.)
    w = figures.worst_mistakes(df, 10)
    assert (w.label != w.predicted).all() and w.confidence.is_monotonic_decreasing
    pd.testing.assert_frame_equal(
        w, figures.worst_mistakes(df.sample(frac=1, random_state=0), 10)
    )


def test_an_unreadable_picture_says_so_in_its_place():
    def gone(path): raise KdoctError(f'{path} is truncated', fix='copy it again')
    fig = figures.mistakes_figure(simulate_predictions(40, 2.), gone, n=3)
    assert all('is truncated' in ' '.join(a.texts[0].get_text().split()) for a in fig.axes[:3])


def test_a_model_without_mistakes_has_a_figure(tmp_path):
    df = simulate_predictions(10)
    for c in ('CNV', 'DME', 'DRUSEN', 'NORMAL'): df[f'logit_{c}'] = 9.*(df.label == c)
    save_figure(
        figures.mistakes_figure(df, lambda p: np.zeros((8, 8), np.uint8)),
        tmp_path / 'm.png',
    )
    assert (tmp_path/'m.png').stat().st_size > 0


def test_counts_refuse_an_image_without_label():
    folds = pd.DataFrame(
        {'path': ['a', 'b'], 'group': ['1', '2'], 'fold': 0, 'role': ['train', 'test']}
    )
    assert figures.counts_of(folds, pd.Series({'a': 'X', 'b': 'X'})).images.tolist() == [
        1,
        1,
    ]
    with pytest.raises(KdoctError, match='no label'):
        figures.counts_of(folds, pd.Series({'a': 'X'}))
