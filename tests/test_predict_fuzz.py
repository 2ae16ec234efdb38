"""Damaged files of every kind: no crash, no hang, no flood of memory, every failure named.

`experiments/predict_fuzz.ipynb` does the same with 2,000 files; what makes and damages them is here.
"""
import random
import re
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_volumes import write_dicom, write_e2e, write_topcon, write_vol, write_xml

from kdoct.data.phantom import simulate_bscan
from kdoct.data.problems import PROBLEMS
from kdoct.data.sandbox import READ_PROBLEMS
from kdoct.deploy.engines import Engine
from kdoct.deploy.predict import Predictor
from kdoct.evaluate.decisions import Decision
from kdoct.evaluate.outliers import Outlier

NAMES = ('Zzyzx', 'Quilla', '19610203')   # the patient, who stands in every header that has room
KINDS = (
    'jpg',
    'progressive.jpg',
    'png',
    'tif',
    'pages.tif',
    'dcm',
    'vol',
    'xml',
    'e2e',
    'fda',
    'fds',
)


# --- good files

def good(kind, folder):
    "Bytes of a good file of four B-scans or one, and those of the files beside it."
    scans = np.stack(
        [
            simulate_bscan(seed=0, patient=1, eye=0, slice=i, height=96, width=128).image
            for i in range(4)
        ]
    )
    images, path = [Image.fromarray(a) for a in scans], folder/f'good.{kind}'
    match kind:
        case 'jpg': images[0].save(path, comment=NAMES[0].encode())
        case 'progressive.jpg': images[0].save(path, progressive=True)
        case 'png': images[0].save(path)
        case 'tif': images[0].save(path, compression='tiff_adobe_deflate', artist=NAMES[0])
        case 'pages.tif':
            how = dict(append_images=images[1:], compression='tiff_lzw', artist=NAMES[0])
            images[0].save(path, save_all=True, **how)
        case 'dcm': write_dicom(path, scans)
        case 'vol': write_vol(path, scans)
        # one exponent, grey in the mantissa
        case 'e2e': write_e2e(path, [('R', (60 << 10) + scans.astype(np.uint16)*4)])
        case 'fda': write_topcon(path, scans, jpeg=True)
        case 'fds': write_topcon(path, scans.astype(np.uint16))
        case 'xml':
            path = write_xml(folder/'xml', scans)
            return path.read_bytes(), {p.name: p.read_bytes() for p in path.parent.glob('*.tif')}
    return path.read_bytes(), {}


# --- and how they are damaged

EXTREMES = [
    b'\0\0\0\0',
    b'\xff\xff\xff\xff',
    b'\xff\xff\xff\x7f',
    b'\x7f\xff\xff\xff',
    b'\0\0\0\x80',
    b'\1\0\0\0',
]


def damaged(data, how, where, value):
    "A file's bytes, damaged once; `where` is in 0..1, `value` any whole number."
    at = int(where*max(len(data) - 1, 0))
    match how:
        case 'flip': return data[:at] + bytes([data[at] ^ (1 << value % 8)]) + data[at + 1:] if data else data
        case 'byte': return data[:at] + bytes([value % 256]) + data[at + 1:]
        case 'extreme': return data[:at] + EXTREMES[value % len(EXTREMES)] + data[at + 4:]
        case 'cut': return data[:at]
        case 'lose': return data[:at] + data[at + value % 64:]
        case 'zeros': return data[:at] + bytes(min(value % 4096, len(data) - at)) + data[at + value % 4096:]
        case 'twice': return data[:at] + data[at:at + value % 512] + data[at:]
        case 'noise': return data[:at] + random.Random(value).randbytes(value % 64) + data[at:]


HOW = ('flip', 'flip', 'byte', 'extreme', 'extreme', 'cut', 'lose', 'zeros', 'twice', 'noise')


def drawn(data, seed):
    "A file's bytes, damaged one to eight times; half of the places are in the first 512 bytes, where headers are."
    rng = random.Random(seed)
    for _ in range(rng.choice((1, 1, 2, 4, 8))):
        near = min(1., 512/max(len(data), 1)) if rng.random() < .5 else 1.
        data = damaged(data, rng.choice(HOW), rng.random()*near, rng.getrandbits(32))
    return data


# --- what is asked of them

def straw():
    "A bundle whose engine looks at every pixel."
    o = Outlier(*[np.zeros(0)]*4, threshold=2.)
    decision = Decision(('A', 'B'), 1., .6, {.1: .2}, pd.DataFrame(), o, (), {})
    def answer(x):
        m = x.reshape(len(x), -1).mean(1)/255
        return np.stack([m, 1 - m], 1), np.ones(len(x))
    return SimpleNamespace(decision=decision, classes=decision.classes, framing={}, about={},
                           engine=lambda name='', threads=0: Engine('straw', answer, 1))


def outcome(predictor, folder, kind, data, beside):
    "Predict one damaged file: 'read', or the kinds of its failures; rows are looked at on the way."
    for old in folder.iterdir(): old.unlink()
    for name, content in beside.items(): (folder/name).write_bytes(content)
    path = folder/f'damaged.{kind}'
    path.write_bytes(data)
    rows = list(predictor.predict(path))
    for r in rows:
        assert r['error'] in {'', 'engine-failed'} | PROBLEMS.keys() | READ_PROBLEMS.keys()
        assert r['error'] or 0 <= r['confidence'] <= 1
        assert not any(name in str(r) for name in NAMES)
    return ', '.join(sorted({r['error'] for r in rows} - {''})) or ('read' if rows else 'nothing')


@pytest.fixture(scope='module')
def predictor():
    with Predictor(straw(), workers=1, memory=3.) as p: yield p


@pytest.fixture(scope='module')
def folder(tmp_path_factory): return tmp_path_factory.mktemp('fuzz')


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    at = tmp_path_factory.mktemp('good')
    return {kind: good(kind, at) for kind in KINDS}


@pytest.mark.parametrize('kind', KINDS)
def test_the_good_files_are_read(predictor, folder, files, kind):
    assert outcome(predictor, folder, kind, *files[kind]) == 'read'


def most_resident(pid):
    "Largest resident memory of a process so far [bytes]."
    return 1024*int(re.search(r'VmHWM:\s+(\d+) kB', Path(f'/proc/{pid}/status').read_text())[1])


@pytest.mark.skipif(not Path('/proc/self/clear_refs').exists(), reason='only Linux tells and '
                                                                       'forgets the largest memory')
def test_damaged_files_take_no_memory(predictor, folder, files):
    "This process, which other tests may have made large, grows little; its readers stay below the limit."
    here = psutil.Process()
    Path('/proc/self/clear_refs').write_text('5')   # the largest memory is counted anew
    before = here.memory_info().rss
    for kind in KINDS:
        data, beside = files[kind]
        for seed in range(3): assert outcome(predictor, folder, kind, drawn(data, seed), beside)
    assert most_resident(here.pid) - before < 1 << 30
    readers = [most_resident(c.pid) for c in here.children()]
    assert readers and max(readers) < 4 << 30


@pytest.mark.parametrize('kind', KINDS)
def test_a_damaged_file_is_read_or_named_in_time(predictor, folder, files, kind, capfd):
    data, beside = files[kind]
    slowest = 0.
    for seed in range(9):
        start = time.monotonic()
        assert outcome(predictor, folder, kind, drawn(data, seed), beside)
        slowest = max(slowest, time.monotonic() - start)
    assert not any(name in text for name in NAMES for text in capfd.readouterr())
    assert slowest < 30   # 5 s of the processor, on a machine that may be busy


steps = st.lists(
    st.tuples(st.sampled_from(HOW), st.floats(0, 1), st.integers(0, 2**32 - 1)),
    min_size=1,
    max_size=8,
)


@settings(max_examples=50)
@given(kind=st.sampled_from(KINDS), steps=steps)
def test_no_series_of_damages_goes_unnamed(predictor, folder, files, kind, steps):
    data, beside = files[kind]
    for s in steps: data = damaged(data, *s)
    assert outcome(predictor, folder, kind, data, beside)
