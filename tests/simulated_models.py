"Simulated models and runs, for several test files."
import contextlib
import io

import pandas as pd

from kdoct.core.files import write_json
from kdoct.core.presets import preset
from kdoct.core.result_sections import EvaluateRecipe
from kdoct.core.runs import ROLES, create_run
from kdoct.evaluate.metrics import log_softmax, logits_of, simulate_predictions

QUICK = EvaluateRecipe(n_boot=100)


def quiet(f, *args, **kw):
    "Call `f`; return its result and what it printed."
    with contextlib.redirect_stdout(io.StringIO()) as out: return f(*args, **kw), out.getvalue()


def log_probs(df): return log_softmax(logits_of(df))


def models(n=60, classes=('CNV', 'DME', 'DRUSEN', 'NORMAL'), fold=0):
    return {
        r: simulate_predictions(n, m, classes, model=i, fold=fold)
        for i, (r, m) in enumerate(zip(ROLES, (5, 4.5, 3.5), strict=True))
    }


VIEWS = {
    'teacher.average': 'swa',
    'teacher.swa_start': 1,
    'evaluate.views': ['identity', 'hflip'],
    'data.severity': ['NORMAL', 'DRUSEN', 'DME', 'CNV'],
}


def official_run(name, seen_groups=0):
    "A run of the official protocol: 3 models on the same 40 groups; `seen_groups` of them are trained on too."
    keep = {'data.official_overlap': 'keep'} if seen_groups else {}
    run = create_run(
        name,
        preset(
            'tiny', **{'data.protocol': 'official', 'data.severity': VIEWS['data.severity'], **keep}
        ),
    )
    test, other = simulate_predictions(40), [f'other-{i}' for i in range(9)]
    seen = test.group.unique()[:seen_groups]
    rows = [(p, g, k, 'test') for k in range(3) for p, g in zip(test.path, test.group, strict=True)]
    rows += [
        (o, o, k, 'val' if i % 3 == k else 'train') for k in range(3) for i, o in enumerate(other)
    ]
    rows += [
        (f'train-{g}', g, k, 'val' if i % 3 == k else 'train')
        for k in range(3)
        for i, g in enumerate(seen)
    ]
    pd.DataFrame(rows, columns=['path', 'group', 'fold', 'role']).to_csv(run.folds_csv, index=False)
    for k in range(3):
        for i, role in enumerate(ROLES):
            df = simulate_predictions(40, 3 - i/2, model=10*k + i).assign(fold=k)
            run.stage_dir(k, role).mkdir(parents=True)
            df.to_parquet(run.stage_dir(k, role)/'predictions.parquet')
            write_json(run.stage_dir(k, role)/'model.json', dict(arch='simulated', parameters=1000))
    return run
