"Mean and standard deviation over folds, by slices, weights and views."
import pandas as pd
import pytest
from simulated_models import models

from kdoct.core.runs import ROLES
from kdoct.evaluate import fold_tables as F
from kdoct.evaluate import variants as V
from kdoct.evaluate.metrics import evaluate_predictions


def neh_like(df):
    return df.assign(patient_label=df.label, label=df.label.where(df.slice != 1, 'NORMAL'))


def neh_fold(k, kept='swa'):
    own = {r: neh_like(df) for r, df in models(fold=k).items()}
    # same kind of images, other logits
    other = {r: neh_like(df) for r, df in models(70, fold=k).items()}
    variants = {
        r: {('swa', V.ONE): df, ('swa', V.MANY): other[r], ('checkpoint', V.ONE): other[r]}
        for r, df in own.items()
    }
    return own, variants, dict.fromkeys(ROLES, kept)


def test_the_published_quantity_is_mean_and_population_deviation_of_the_chosen_slices():
    each = {k: neh_fold(k) for k in range(3)}
    s = F.folds_section(each, 3, ('identity', 'hflip'))
    row = s.table.loc['teacher, published selection, kept weights, averaged views']
    chosen = [
        t[t.label == t.patient_label]
        for t in (variants['teacher']['swa', V.MANY] for _, variants, _ in each.values())
    ]
    values = pd.DataFrame([evaluate_predictions(t) for t in chosen])
    for m in ('accuracy', 'sensitivity', 'specificity', 'precision', 'f1', 'auc'):
        assert row[m] == pytest.approx(values[m].mean()) and row[f'{m}_sd'] == pytest.approx(
            values[m].std(ddof=0)
        )
    assert row['is'] == 'published quantity' and 'ddof 0' in s.caption
    assert s.table['is']['teacher, all slices, kept weights, one view'] == 'main table'
    assert (
        'teacher, all slices, checkpoint, one view' in s.table.index
        and 'teacher, all slices, swa, one view' not in s.table.index
    )


def test_missing_folds_and_rows_of_the_summary_are_said():
    each = {k: neh_fold(k) for k in (0, 2)}
    del each[2][1]['teacher']['checkpoint', V.ONE]
    s = F.folds_section(each, 3, ('identity', 'hflip'))
    name = 'teacher, all slices, checkpoint, one view'
    assert 'not in this table: 1' in s.caption and s.table.note[name] == 'fold 2 has none'
    assert s.texts.folds[name] == '1' and '±' not in s.texts.loc[name, 'accuracy %']
    alone = F.folds_section({0: each[0]}, 3, ())
    assert (
        'One fold only' in alone.caption
        and not alone.texts.astype(str).apply(lambda c: c.str.contains('±')).any().any()
    )


def test_without_a_diagnosis_no_row_is_called_published():
    each = {k: (models(fold=k), {}, {}) for k in range(2)}
    s = F.folds_section(each, 2, ())
    assert (
        'published selection of slices is not known' in s.caption
        and not s.table['is'].str.contains('published').any()
    )
