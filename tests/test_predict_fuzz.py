"""Damaged files of every kind: no crash, no hang, no flood of memory, every failure named.

`experiments/predict_fuzz.ipynb` does the same with 2,000 files; what makes and damages them is here.
"""
import io
import random
import resource
import struct
import time
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from kdoct.data import PROBLEMS
from kdoct.decide import Decision, Outlier
from kdoct.guard import READ_PROBLEMS
from kdoct.phantom import simulate_bscan
from kdoct.predict import Predictor

NAME = 'Mustermann^Erika'   # stands in every header that has room for a name
KINDS = ('jpg', 'progressive.jpg', 'png', 'tif', 'pages.tif', 'dcm', 'vol', 'xml')


# --- good files

def pictures(n):
    return [Image.fromarray(simulate_bscan(seed=0, patient=1, eye=0, slice=i, height=96, width=128).image) for i in range(n)]


def saved(images, kind, **how):
    out = io.BytesIO()
    images[0].save(out, kind, **how)
    return out.getvalue()


def dicom(images):
    import pydicom
    from pydicom.uid import ExplicitVRLittleEndian, OphthalmicTomographyImageStorage
    d = pydicom.Dataset()
    d.file_meta = pydicom.dataset.FileMetaDataset()
    d.file_meta.TransferSyntaxUID, d.SOPClassUID, d.SOPInstanceUID = ExplicitVRLittleEndian, OphthalmicTomographyImageStorage, '1.2.3.4'
    d.PatientName, d.PatientBirthDate, d.PatientID, d.SeriesInstanceUID, d.Laterality = NAME, '19500713', 'A17', '1.2.3', 'R'
    d.NumberOfFrames, d.Rows, d.Columns, d.SamplesPerPixel = len(images), 96, 128, 1
    d.PhotometricInterpretation, d.BitsAllocated, d.BitsStored, d.HighBit, d.PixelRepresentation = 'MONOCHROME2', 8, 8, 7, 0
    d.PixelData = b''.join(im.tobytes() for im in images)
    out = io.BytesIO()
    d.save_as(out, enforce_file_format=True)
    return out.getvalue()


def vol(images):
    head = bytearray(2048)
    head[:12] = b'HSF-OCT-103\0'
    struct.pack_into('<III', head, 12, 128, len(images), 96)
    head[84:86], head[140:143], head[164:164 + len(NAME)] = b'OD', b'A17', NAME.encode()
    struct.pack_into('<I', head, 100, 256)
    scans = (struct.pack('<12sI240x', b'HSF-BS-103', 256) + (np.asarray(im, np.float32)/255).tobytes() for im in images)
    return bytes(head) + b''.join(scans)


XML = """<?xml version="1.0" encoding="UTF-8"?>
<HEDX><BODY><Patient><ID>1</ID><LastName>{last}</LastName><FirstNames>{first}</FirstNames><Birthdate><Date><Year>1950</Year>
<Month>7</Month><Day>13</Day></Date></Birthdate><PatientID>A17</PatientID><Study><ID>1</ID><Series><ID>1</ID><Laterality>R</Laterality>
<Type>Volume</Type>{images}</Series></Study></Patient></BODY></HEDX>"""
IMAGE = """<Image><ID>{i}</ID><ImageNumber>{i}</ImageNumber><Laterality>R</Laterality><ImageType><Type>OCT</Type></ImageType>
<OphthalmicAcquisitionContext><Width>128</Width><Height>96</Height></OphthalmicAcquisitionContext>
<ImageData><ExamURL>{i}.tif</ExamURL></ImageData></Image>"""


def good(kind):
    "Bytes of a good file, and those of the files beside it."
    images = pictures(4)
    pages = dict(save_all=True, append_images=images[1:], compression='tiff_lzw')
    match kind:
        case 'jpg': return saved(images, 'JPEG', comment=NAME.encode()), {}
        case 'progressive.jpg': return saved(images, 'JPEG', progressive=True), {}
        case 'png': return saved(images, 'PNG'), {}
        case 'tif': return saved(images, 'TIFF', compression='tiff_adobe_deflate', artist=NAME), {}
        case 'pages.tif': return saved(images, 'TIFF', artist=NAME, **pages), {}
        case 'dcm': return dicom(images), {}
        case 'vol': return vol(images), {}
        case 'xml':
            last, first = NAME.split('^')
            text = XML.format(last=last, first=first, images=''.join(IMAGE.format(i=i) for i in range(4)))
            return text.encode(), {f'{i}.tif': saved([im], 'TIFF') for i, im in enumerate(images)}


# --- and how they are damaged

EXTREMES = [b'\0\0\0\0', b'\xff\xff\xff\xff', b'\xff\xff\xff\x7f', b'\x7f\xff\xff\xff', b'\0\0\0\x80', b'\1\0\0\0']


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
    o = Outlier(np.zeros(2, np.float32), np.eye(2, dtype=np.float32)[:1], np.ones(1, np.float32), np.ones(1, np.float32), threshold=2.)
    decision = Decision(('A', 'B'), 1., .6, {.1: .2}, pd.DataFrame(), o, (), {})
    def engine(x):
        m = x.reshape(len(x), -1).mean(1)/255
        return dict(probabilities=np.stack([m, 1 - m], 1).astype(np.float32), outlier=np.ones(len(x), np.float32))
    return SimpleNamespace(decision=decision, classes=decision.classes, framing={}, about=dict(channels=1), engine=lambda name='', threads=0: engine)


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
        last, first = NAME.split('^')
        assert last not in (shown := str({k: v for k, v in r.items() if k != 'patient'})) and first not in shown and '1950' not in shown
    return ', '.join(sorted({r['error'] for r in rows} - {''})) or ('read' if rows else 'nothing')


@pytest.fixture(scope='module')
def predictor():
    with Predictor(straw(), workers=1, memory=3.) as p: yield p


@pytest.fixture(scope='module')
def folder(tmp_path_factory): return tmp_path_factory.mktemp('fuzz')


@pytest.mark.parametrize('kind', KINDS)
def test_the_good_files_are_read(predictor, folder, kind):
    assert outcome(predictor, folder, kind, *good(kind)) == 'read'


@pytest.mark.parametrize('kind', KINDS)
def test_a_damaged_file_is_read_or_named_in_time(predictor, folder, kind):
    data, beside = good(kind)
    slowest = 0.
    for seed in range(12):
        start = time.monotonic()
        assert outcome(predictor, folder, kind, drawn(data, seed), beside)
        slowest = max(slowest, time.monotonic() - start)
    assert slowest < 5 + 2   # the limit, and the start of a process after it
    assert max(resource.getrusage(w).ru_maxrss for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) < 4 << 20   # kB


steps = st.lists(st.tuples(st.sampled_from(HOW), st.floats(0, 1), st.integers(0, 2**32 - 1)), min_size=1, max_size=8)


@settings(max_examples=50)
@given(st.sampled_from(KINDS), steps)
def test_no_series_of_damages_goes_unnamed(predictor, folder, kind, steps):
    data, beside = good(kind)
    for s in steps: data = damaged(data, *s)
    assert outcome(predictor, folder, kind, data, beside)
