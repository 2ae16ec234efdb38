"""Compress medical-image classifiers by knowledge distillation.

What a user imports stands in `__all__`. Each name is loaded when it is first used, so that
`import kdoct` waits for nothing.
"""
import os
import warnings
from importlib import import_module

from .core.light_imports import import_lightly

__version__ = "0.1.0"

# fastai 2 says so when it is imported beside torch 2.15; who reads it here can do nothing about it
warnings.filterwarnings('ignore', '`torch.jit.script` is deprecated', FutureWarning)

# OpenMP's threads wait for each other by spinning, up to a hundredth of a second. Where another program has a core,
# they take it from each other, and training gets many times slower: docs/speed.md. Read before torch is loaded.
os.environ.setdefault('GOMP_SPINCOUNT', '10000')

import_lightly()

PUBLIC = {  # public name -> module that defines it
    'KdoctError': 'core.files',
    'preset': 'core.presets',
    'new_run': 'app.stages',
    'open_run': 'core.runs',
    'write_phantom': 'data.phantom_files',
    'load_model_folder': 'models.folders',
    'Distill': 'distill.callback',
    'Teachers': 'distill.teachers',
    'evaluate_run': 'evaluate.all_folds',
    'export_fold': 'deploy.stage',
    'Predictor': 'deploy.predict',
    'crossval': 'app.crossval',
    'report_html': 'app.report',
}
__all__ = list(PUBLIC)


def __getattr__(name):
    "Load a public name when it is first used."
    if name not in PUBLIC:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    value = getattr(import_module(f'{__name__}.{PUBLIC[name]}'), name)
    globals()[name] = value
    return value


def __dir__(): return sorted({*globals(), *__all__})
