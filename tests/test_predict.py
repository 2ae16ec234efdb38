"From files to predictions: the same numbers as training's own, in the order of the files, whatever is wrong with some."
import csv
import io
import json
import os
import shutil
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import tifffile
from conftest import copied_run
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from kdoct.app.cli import main
from kdoct.core.files import KdoctError
from kdoct.data.images import inspect_file
from kdoct.data.phantom import simulate_bscan
from kdoct.data.problems import BadImage
from kdoct.data.sandbox import Reader, Sandbox, is_plain
from kdoct.deploy.bundle import new_keys, seal
from kdoct.deploy.engines import Engine
from kdoct.deploy.networks import open_bundle, pictures_taken
from kdoct.deploy.predict import Predictor, predict_files
from kdoct.deploy.result_files import results_file
from kdoct.deploy.rows import Volumes, record_fields
from kdoct.deploy.streams import Slot, predict_in_batches, read_ahead
from kdoct.evaluate.decisions import Decision
from kdoct.evaluate.outliers import Outlier
from kdoct.evaluate.patients import VolumeRule, decide_volume

CLASSES = ['CNV', 'DRUSEN', 'NORMAL']


def decision(**changes):
    o = Outlier(*[np.zeros(0)]*4, threshold=2.)
    return replace(Decision(tuple(CLASSES), 1., .6, {.1: .2}, pd.DataFrame(), o, (), {}), **changes)


def brightness(x):
    "Probabilities that a test can foresee: bright is CNV."
    m = x.reshape(len(x), -1).mean(1)/255
    return np.stack([m, 0*m, 1 - m], 1), np.ones(len(x))


def straw(answer=brightness, channels=1, **about):
    "A bundle without a network."
    return SimpleNamespace(decision=decision(), classes=CLASSES, framing={}, about=about,
                           engine=lambda name='', threads=0: Engine('straw', answer, channels))


def noise(seed, size=(48, 40), mode='L'):
    shape = size[::-1] + ((3,) if mode == 'RGB' else ())
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


@pytest.fixture
def folder(tmp_path):
    "Seven good pictures of two sizes and three bad ones between them."
    at = tmp_path/'in'
    at.mkdir()
    for i in range(7): noise(i, (48, 40) if i % 3 else (64, 40)).save(at/f'{i}.png')
    (at/'2b.png').write_bytes(b'')
    (at/'4b.jpg').write_bytes(b'\xff\xd8\xff\xe0 no JPEG')
    (at/'6b.png').write_bytes((at/'6.png').read_bytes()[:-40])
    return at


# --- the numbers are those of training

@pytest.fixture(scope='module')
def trained(exported_outputs, tmp_path_factory):
    "A tiny run with a trained network and its bundle."
    run = copied_run(exported_outputs, tmp_path_factory.mktemp('outputs'))
    return run, run.stage_dir(0, 'baseline')/'bundle'


@pytest.fixture
def shipped(trained):
    "The bundle, its predictions on test images, and the folder of these."
    run, bundle = trained
    return (
        bundle,
        pd.read_parquet(run.stage_dir(0, 'baseline') / 'predictions.parquet'),
        Path(run.stage('data')['root']),
    )


@pytest.mark.slow
@pytest.mark.parametrize(('engine', 'close'), [('torch', 1e-4), ('onnx', 1e-3)])
def test_a_test_image_gets_the_probabilities_of_the_run(shipped, engine, close):
    bundle, table, root = shipped
    with Predictor(bundle, engine=engine, batch=7) as p:
        rows = list(p.predict([root/f for f in table.path]))
        z = table.filter(like='logit_').to_numpy()/p.decision.temperature
    want = np.exp(z - z.max(1, keepdims=True))
    got = np.array([[r[f'probability_{c}'] for c in p.classes] for r in rows])
    assert np.abs(got - want/want.sum(1, keepdims=True)).max() < close
    assert [r['error'] for r in rows] == ['']*len(rows)


@pytest.mark.slow
def test_a_picture_from_memory_gets_the_row_of_its_file(shipped):
    bundle, table, root = shipped
    path = root/table.path[0]
    with Predictor(bundle, engine='torch') as p:
        (row,) = p.predict(path)
        for picture in (Image.open(path), np.asarray(Image.open(path))):
            one = p.image(picture)
            assert (
                abs(one['confidence'] - row['confidence']) < 1e-6
                and one['predicted'] == row['predicted']
            )


def test_a_turned_tiff_from_memory_is_turned_once_and_a_page_of_a_stack_is_a_picture(tmp_path):
    a = np.asarray(noise(0)).copy()
    a[:20] //= 4
    seen = []
    def look(x):
        seen.append(x[0])
        return brightness(x)
    Image.fromarray(np.rot90(a, 2).copy()).save(tmp_path/'turned.tif', tiffinfo={274: 3})
    tifffile.imwrite(tmp_path/'stack.tif', np.stack([a]*5), truncate=True)
    with Predictor(straw(look)) as p:
        for name in ('turned.tif', 'stack.tif'):
            assert p.image(Image.open(tmp_path/name))['error'] == ''
    assert [np.array_equal(s, a) for s in seen] == [True, True]


@pytest.mark.slow
def test_the_exit_status_says_whether_a_file_failed(shipped, tmp_path, capsys):
    bundle, table, root = shipped
    (tmp_path/'bad.png').write_bytes(b'')
    def status(*argv):
        with pytest.raises(SystemExit) as e: main(['predict', *map(str, argv)])
        return e.value.code
    assert status(bundle, root/table.path[0], '--engine', 'torch') == 0
    assert (
        status(
            bundle,
            root / table.path[0],
            tmp_path / 'bad.png',
            '--engine',
            'torch',
            '--out',
            tmp_path / 'r.csv',
        )
        == 1
    )
    assert len(pd.read_csv(tmp_path/'r.csv')) == 2
    assert status(bundle) == 2
    assert (
        status(bundle, tmp_path / 'bad.png', '--engine', 'steam') == 1
        and "no engine 'steam'" in capsys.readouterr().err
    )


@pytest.mark.slow
def test_a_signed_bundle_with_a_changed_byte_is_refused(shipped, tmp_path):
    signed, (private, public) = (
        shutil.copytree(shipped[0], tmp_path / 'signed'),
        new_keys(tmp_path / 'key'),
    )
    about = json.loads((signed/'bundle.json').read_text())
    seal(signed, {k: v for k, v in about.items() if k not in ('bundle', 'files')}, private)
    Predictor(signed, engine='torch', key=public)
    for name in sorted(p.name for p in signed.iterdir()):
        copy = shutil.copytree(signed, tmp_path/f'no-{name}')
        data = bytearray((copy/name).read_bytes())
        data[len(data)//2] ^= 1
        (copy/name).write_bytes(data)
        with pytest.raises(KdoctError): Predictor(copy, engine='torch', key=public)
    with pytest.raises(KdoctError, match='not signed'): Predictor(shipped[0], key=public)


# --- order, and what is bad

def rows_of(paths, **how):
    with Predictor(straw(), **how) as p: return list(p.predict(paths))


def test_rows_are_in_the_order_of_the_files_whatever_the_workers(folder):
    rows = [rows_of(folder, workers=w, batch=b) for w, b in ((1, 1), (4, 2), (3, 32))]
    assert rows[0] == rows[1] == rows[2]
    assert [Path(r['path']).name for r in rows[0]] == sorted(os.listdir(folder))


def test_a_bad_file_is_a_row_and_stops_nothing(folder):
    rows = {Path(r['path']).name: r for r in rows_of(folder)}
    assert {k: r['error'] for k, r in rows.items() if r['error']} == {
        '2b.png': 'empty',
        '4b.jpg': 'truncated',
        '6b.png': 'truncated',
    }
    assert all(
        r['deferred'] and r['why'] == 'not read' and not r['predicted']
        for r in rows.values()
        if r['error']
    )
    assert all(r['predicted'] for r in rows.values() if not r['error'])


def test_an_engine_that_fails_on_one_picture_fails_on_that_one(folder):
    dark = np.asarray(Image.open(folder/'3.png')).mean()
    def picky(x):
        if (np.abs(x.reshape(len(x), -1).mean(1) - dark) < 1e-9).any():
            raise RuntimeError('Smith^John')
        return brightness(x)
    with Predictor(straw(picky)) as p: rows = {Path(r['path']).name: r for r in p.predict(folder)}
    assert [k for k, r in rows.items() if r['error'] == 'engine-failed'] == ['3.png']
    assert 'Smith' not in str(rows)


def test_numbers_that_are_not_finite_are_a_failure(folder):
    def nan(x): return np.full((len(x), 3), np.nan), np.ones(len(x))
    with Predictor(straw(nan)) as p: (row,) = p.predict(folder/'1.png')
    assert row['error'] == 'engine-failed' and row['confidence'] is None


def test_a_picture_of_nothing_but_padding_stops_nothing(folder):
    Image.fromarray(np.random.default_rng(0).integers(240, 256, (64, 64), dtype=np.uint8)).save(
        folder / '3b.png'
    )  # white, and not blank
    bundle = straw()
    bundle.framing = dict(fill_white=True)
    with Predictor(bundle) as p: rows = {Path(r['path']).name: r for r in p.predict(folder)}
    assert rows['3b.png']['error'] == 'refused' and 'white padding' in rows['3b.png']['detail']
    assert rows['4.png']['predicted'] and len(rows) == 11
    assert p.image(Image.open(folder/'3b.png'))['error'] == 'refused'


def test_a_picture_without_a_retina_is_taken_whole_with_a_note(folder):
    bundle = straw()
    bundle.framing = dict(frame='retina', finder=1)
    with Predictor(bundle) as p:
        row = p.image(noise(1, (200, 200)))
        bscan = Image.fromarray(simulate_bscan(0, 1, 0, 0, height=240, width=256).image)
        assert 'no-retina' in row['notes'] and row['predicted']
        assert 'no-retina' not in p.image(bscan)['notes']


def test_what_no_reader_expects_is_a_row_and_stops_nothing(folder):
    with Predictor(straw()) as p:
        def odd(path):
            if path.name == '3.png': raise ZeroDivisionError('Smith^John')
            yield from Sandbox.scans(p.sandbox, path)
        p.sandbox.scans = odd
        rows = {Path(r['path']).name: r for r in p.predict(folder)}
    assert (
        rows['3.png']['error'] == 'reader-failed'
        and 'Smith' not in str(rows)
        and rows['4.png']['predicted']
    )


def test_a_name_that_is_no_text_can_be_written_in_every_format(tmp_path):
    noise(0).save(tmp_path/'a.png')
    try: os.rename(os.fsencode(tmp_path/'a.png'), os.fsencode(tmp_path) + b'/\xff"\n.png')
    except OSError: pytest.skip('this file system has no such names')
    (row,) = rows_of(tmp_path)
    assert row['predicted'] and row['path'].endswith('\\xff"\n.png')
    for kind in ('csv', 'json', 'jsonl', 'parquet'):
        with results_file(tmp_path/f'r.{kind}', record_fields(CLASSES)) as write: write(row)
    (back,) = csv.DictReader(open(tmp_path/'r.csv', encoding='utf-8', newline=''))
    assert (
        back['path']
        == row['path']
        == json.loads((tmp_path / 'r.jsonl').read_text())['path']
        == pd.read_parquet(tmp_path / 'r.parquet').path[0]
    )


def test_colour_is_made_grey_for_a_grey_network_and_noted(tmp_path):
    noise(0, mode='RGB').save(tmp_path/'a.png')
    Image.open(tmp_path/'a.png').convert('L').save(tmp_path/'b.png')
    a, b = rows_of(tmp_path)
    assert a['notes'] == ('colour-to-grey',) and b['notes'] == ()
    assert a['confidence'] == b['confidence']


def test_a_grey_file_is_made_colour_for_a_colour_network(tmp_path):
    noise(0).save(tmp_path/'a.png')
    seen = []
    def look(x):
        seen.append(x.shape)
        return brightness(x)
    with Predictor(straw(look, channels=3)) as p: list(p.predict(tmp_path))
    assert seen == [(1, 40, 48, 3)]


def test_predict_and_audit_refuse_the_same_pictures_with_the_same_word(tmp_path):
    black, rng = np.zeros((40, 48), np.uint8), np.random.default_rng(0)
    hot = black.copy()
    hot[3, 4] = 255
    for name, a in dict(
        black=black,
        white=black + 255,
        hot=hot,
        dark_noise=rng.integers(0, 3, (40, 48), dtype=np.uint8),
    ).items():
        Image.fromarray(a).save(tmp_path/f'{name}.png')
    noise(0).save(tmp_path/'seen.png')
    (tmp_path/'void.png').touch()
    rows = {Path(r['path']).name: r['error'] for r in rows_of(tmp_path)}
    audited = {
        p.name: [k for k, _ in inspect_file(p)['problems']]
        for p in tmp_path.iterdir()
        if p.is_file()
    }
    assert rows == {n: (found + [''])[0] for n, found in audited.items()}
    assert {n for n, e in rows.items() if e == 'blank'} == {
        'black.png',
        'white.png',
        'hot.png',
        'dark_noise.png',
    }
    with Predictor(straw()) as p: assert p.image(black)['error'] == 'blank'


def test_a_blank_bscan_of_a_volume_is_a_row_with_its_reason_and_the_rest_goes_on(tmp_path):
    pages = [noise(0), Image.fromarray(np.zeros((40, 48), np.uint8)), noise(2)]
    pages[0].save(tmp_path/'v.tif', save_all=True, append_images=pages[1:])
    rows = rows_of(tmp_path/'v.tif')
    assert [(r['slice'], r['error'], bool(r['predicted'])) for r in rows] == [
        (0, '', True),
        (1, 'blank', False),
        (2, '', True),
    ]
    volumes = Volumes(CLASSES, VolumeRule())
    for r in rows: volumes.add(r)
    (volume,) = volumes.rows()
    assert (volume['slices'], volume['used'], volume['failed']) == (3, 2, 1)


def test_a_fundus_photograph_gets_no_class_from_a_network_of_grey_pictures(tmp_path):
    y, x = np.mgrid[:240, :320]
    disc = (
        np.clip(1.2 - np.hypot((y - 120) / 115, (x - 160) / 115), 0, 1)[..., None] ** 0.3
        * (np.hypot(y - 120, x - 160) < 115)[..., None]
    )
    photo = disc*np.array([200, 100, 50]) + np.random.default_rng(0).normal(0, 5, (240, 320, 3))
    Image.fromarray(photo.clip(0, 255).astype(np.uint8)).save(tmp_path/'fundus.jpg')
    (row,) = rows_of(tmp_path)
    assert row['error'] == 'not-a-bscan' and not row['predicted'] and 'colour' in row['detail']
    with Predictor(straw(channels=3)) as p:
        assert next(p.predict(tmp_path))['notes'] == ('coloured',)   # not known what it was trained on
    # three channels, for a scale bar or because coloured pictures are what it knows
    for coloured, error in ((0, 'not-a-bscan'), (7, '')):
        with Predictor(straw(channels=3, coloured=coloured)) as p: row = next(p.predict(tmp_path))
        assert row['error'] == error and 'coloured' not in row['notes']


# --- deferral

@pytest.mark.parametrize(
    ('p', 'score', 'why'),
    [(0.9, 1.0, ''), (0.55, 1.0, 'confidence'), (0.9, 3.0, 'outlier'), (0.55, 3.0, 'confidence, outlier')],
)
def test_a_row_is_deferred_for_confidence_or_as_an_outlier(folder, p, score, why):
    def engine(x):
        return np.tile([p, 1 - p, 0], (len(x), 1)), np.full(len(x), score)
    with Predictor(straw(engine)) as predictor: (row,) = predictor.predict(folder/'1.png')
    assert (row['why'], row['deferred'], row['outlier'], row['predicted']) == (
        why,
        bool(why),
        score > 2,
        'CNV',
    )


def test_what_is_said_of_deferred_pictures_adds_up(folder, tmp_path, capsys):
    "Seven pictures: two are predicted, the others deferred for one reason or for both."
    seen = iter([(.9, 1.), (.9, 1.), (.55, 1.), (.9, 3.), (.9, 3.), (.55, 3.), (.55, 3.)])
    def engine(x):
        answers = [next(seen) for _ in x]
        return np.array([[p, 1 - p, 0] for p, _ in answers]), np.array([d for _, d in answers])
    good = [folder/f'{i}.png' for i in range(7)]
    counts = predict_files(straw(engine), good, tmp_path/'r.csv', workers=1, batch=1)
    said = capsys.readouterr().err
    assert '2 predicted, 5 deferred (1 for low confidence, 2 as outliers, 2 for both)' in said
    assert counts == dict(predicted=2, unsure=1, outliers=4, both=2)


def test_files_passed_over_for_their_names_are_counted_in_one_line(folder, tmp_path, capsys):
    (folder/'scan.txt').write_text('what was scanned')
    (folder/'.hidden.png').write_bytes((folder/'0.png').read_bytes())
    (folder/'.cache').mkdir()
    predict_files(straw(), [folder], tmp_path/'r.csv')
    (line,) = [t for t in capsys.readouterr().err.splitlines() if 'passed over' in t]
    assert line.startswith('3 entries of the folders passed over by name: 1 .txt')
    assert '2 hidden' in line and 'name the file itself' in line
    predict_files(straw(), [folder/'0.png'], tmp_path/'s.csv')
    assert 'passed over' not in capsys.readouterr().err


def test_an_empty_folder_says_what_it_was_empty_but_for(tmp_path):
    (tmp_path/'in').mkdir()
    (tmp_path/'in'/'scan.txt').write_text('')
    with pytest.raises(KdoctError, match=r'no file to read. 1 entry .* 1 \.txt'):
        predict_files('no bundle', [tmp_path/'in'], tmp_path/'r.csv')


# --- batches

@settings(max_examples=60)
@given(
    st.lists(st.sampled_from([(4, 4), (4, 8), (16, 16), None]), max_size=80),
    st.integers(1, 9),
    st.integers(1, 20),
    st.integers(1, 600),
)
def test_every_row_comes_back_once_in_order_and_few_wait(sizes, batch, rows, held):
    taken, most = [0], 0
    def slots():
        for i, s in enumerate(sizes):
            taken[0] = i + 1
            yield Slot(
                i,
                None if s is None else np.full(s, i % 256, np.uint8),
                'bad' if s is None else None,
            )
    def ask(pictures):
        assert len(pictures) <= batch and len({p.shape for p in pictures}) == 1
        return [int(p[0, 0]) for p in pictures]
    out = []
    for slot in predict_in_batches(slots(), ask, batch, rows, held):
        most = max(most, taken[0] - len(out))
        out.append((slot.about, slot.output))
    assert out == [(i, 'bad' if s is None else i) for i, s in enumerate(sizes)]
    assert most <= rows + 1


def test_what_nobody_takes_is_not_read():
    class Endless:
        read = 0
        def scans(self, path):
            self.read += 1
            yield path
    sandbox = Endless()
    rows = read_ahead(iter(range(10**9)), sandbox, lambda s: s, workers=3, files=10)
    assert [next(rows) for _ in range(3)] == [(0, 0), (1, 1), (2, 2)]
    rows.close()
    assert sandbox.read < 20 and threading.active_count() < 20


def test_a_long_volume_is_not_read_at_once():
    class Long:
        given = 0
        def scans(self, path):
            for i in range(1000):
                self.given += 1
                yield i
    sandbox = Long()
    rows = read_ahead(['v'], sandbox, lambda s: s, workers=1, scans=8)
    next(rows)
    time.sleep(.05)
    assert sandbox.given <= 10
    rows.close()


def test_few_bytes_wait_however_large_the_pictures_and_many_the_threads():
    waiting, most, lock = [0], [0], threading.Lock()
    class Large:
        def scans(self, path): yield from range(path % 4)
    def prepare(scan):
        with lock:
            waiting[0] += 1
            most[0] = max(most[0], waiting[0])
        return scan
    n = 0
    for _ in read_ahead(
        range(60), Large(), prepare, workers=6, files=40, bytes_=30, weigh=lambda s: 10
    ):
        with lock: waiting[0] -= 1
        n += 1
    # in the room, in the hands of a worker each, and of the file whose turn it is
    assert n == 90 and most[0] <= 3 + 6 + 8 + 1


# --- limits: what the reader process does may be anything

def reader_that(tmp_path, does, **limits):
    "A reader whose `read_scans` is replaced; its process starts with that."
    class Replaced(Reader):
        code = (f"import kdoct.data.sandbox as g, time, os\ndef bad(path, modality): "
                f"{does}\ng.read_scans = bad\n{Reader.code}")
    (tmp_path/'x.vol').write_bytes(b'x')
    return Replaced(**limits), tmp_path/'x.vol'


@pytest.mark.parametrize(
    ('does', 'kind'),
    [
        ('time.sleep(60)', 'too-slow'),
        ('\n while True: pass', 'too-slow'),
        ('os.abort()', 'reader-crashed'),
        ("bytearray(3 << 30)", 'too-much-memory'),
        ("print('Smith^John'); os.write(2, b'Smith^John'); raise ValueError('Smith^John')", 'reader-failed'),
    ],
)
def test_what_a_reader_does_ends_as_a_named_failure(tmp_path, does, kind, capfd):
    reader, path = reader_that(tmp_path, does, seconds=.2, memory=2.)
    try:
        with pytest.raises(BadImage) as e: list(reader.scans(path))
        # a process without memory left is not asked again
        assert (reader.process is None) == (kind != 'reader-failed')
    finally: reader.close()
    assert e.value.kind == kind and 'Smith' not in str(e.value) + ''.join(capfd.readouterr())


def test_a_volume_that_nobody_wants_to_the_end_leaves_no_process(tmp_path):
    pages = [noise(i) for i in range(30)]
    pages[0].save(tmp_path/'v.tif', save_all=True, append_images=pages[1:])
    sandbox = Sandbox()
    scans = sandbox.scans(tmp_path/'v.tif')
    next(scans)
    scans.close()
    assert sandbox.all[0].process is None
    assert len(list(sandbox.scans(tmp_path/'v.tif'))) == 30
    sandbox.close()
    assert sandbox.all[0].process is None


def test_a_picture_that_could_take_for_ever_is_read_in_another_process(tmp_path):
    noise(0).save(tmp_path/'a.jpg', progressive=True)
    noise(0).save(tmp_path/'b.jpg')
    os.mkfifo(tmp_path/'c.jpg')
    (tmp_path/'d.jpg').write_bytes(b'II*\0')
    (tmp_path/'e.vol').write_bytes((tmp_path/'b.jpg').read_bytes())
    (tmp_path/'f.vol').write_bytes(bytes(200))
    is_read_here = {n: is_plain(tmp_path/n) for n in ('a.jpg', 'b.jpg', 'd.jpg', 'e.vol', 'f.vol')}
    assert is_read_here == {
        'a.jpg': False,
        'b.jpg': True,
        'd.jpg': False,
        'e.vol': True,
        'f.vol': False,
    }  # what is in a file counts, then its name
    assert [r['error'] for r in rows_of(tmp_path/'c.jpg')] == ['not-a-file']


# --- volumes

@given(st.lists(st.integers(0, 2), min_size=1, max_size=12), st.integers(1, 4))
def test_the_worst_rule_is_the_most_severe_class_that_enough_slices_reach(shown, enough):
    p = np.eye(3)[shown]*.8 + .1
    order = ['NORMAL', 'CNV', 'DRUSEN']              # harmless to severe
    ranks = [order.index(CLASSES[k]) for k in shown]
    d = decide_volume(p, CLASSES, VolumeRule('worst', enough, severity=order))
    assert order.index(d.predicted) == sorted(ranks, reverse=True)[min(enough, len(shown)) - 1]
    assert set(d.deciding) <= {i for i, r in enumerate(ranks) if r >= order.index(d.predicted)}


def slices(n=5, **given):
    base = dict(
        path='a.vol',
        n_slices=n,
        volume='v',
        eye='OD',
        patient='7',
        error='',
        outlier=False,
        deferred=False,
    )
    probs = [[.1, .1, .8], [.9, .05, .05], [.8, .1, .1], [.1, .8, .1], [.2, .2, .6]]
    return [
        base
        | dict(slice=i)
        | {f'probability_{c}': v for c, v in zip(CLASSES, p, strict=True)}
        | given
        for i, p in enumerate(probs)
    ]


def volume_of(rows, **how):
    volumes = Volumes(
        CLASSES, VolumeRule(**dict(rule='worst', severity=('NORMAL', 'DRUSEN', 'CNV')) | how)
    )
    for r in rows: volumes.add(r)
    (out,) = volumes.rows()
    return out


def test_outliers_and_failed_slices_are_left_out_of_the_decision_and_counted():
    rows = slices()
    rows[1]['outlier'], rows[3]['error'] = True, 'corrupt'
    row = volume_of(rows, min_slices=1)
    assert (
        row['predicted'],
        row['deciding'],
        row['slices'],
        row['used'],
        row['outliers'],
        row['failed'],
    ) == ('CNV', [2], 5, 3, 1, 1)
    assert volume_of(rows)['predicted'] == 'NORMAL'         # one CNV slice is not two


def test_slices_that_a_broken_file_never_gave_have_failed():
    row = volume_of(slices(n=40))
    assert (row['slices'], row['used'], row['failed'], row['deferred'], row['why']) == (
        40,
        5,
        35,
        True,
        'most B-scans left out',
    )


def test_a_volume_without_a_usable_slice_has_no_prediction():
    row = volume_of(slices(outlier=True))
    assert (row['predicted'], row['deferred'], row['why'], row['confidence']) == (
        '',
        True,
        'no usable B-scan',
        None,
    )


def test_a_volume_that_rests_on_deferred_slices_is_deferred():
    rows = slices()
    rows[1]['deferred'] = rows[2]['deferred'] = True
    assert volume_of(rows)['why'] == 'deciding B-scans deferred'
    rows[2]['deferred'] = False
    assert not volume_of(rows)['deferred']


def test_two_files_with_the_same_volume_name_are_two_volumes():
    volumes = Volumes(CLASSES, VolumeRule())
    for r in slices() + slices(path='b.vol'): volumes.add(r)
    assert [(r['path'], r['slices']) for r in volumes.rows()] == [('a.vol', 5), ('b.vol', 5)]


# --- the command

def test_files_of_results_agree(folder, tmp_path):
    for kind in ('csv', 'json', 'jsonl', 'parquet'):
        counts = predict_files(straw(), [folder], tmp_path/f'r.{kind}')
        assert counts['failed'] == 3
    tables = [
        pd.read_csv(tmp_path / 'r.csv'),
        pd.read_json(tmp_path / 'r.json'),
        pd.read_json(tmp_path / 'r.jsonl', lines=True),
        pd.read_parquet(tmp_path / 'r.parquet'),
    ]
    for t in tables:
        assert (
            list(t) == list(record_fields(CLASSES)) and t.path.tolist() == tables[0].path.tolist()
        )
        assert np.allclose(
            t.probability_CNV.astype(float), tables[0].probability_CNV, atol=1e-6, equal_nan=True
        )


def test_without_a_file_of_results_csv_goes_to_standard_output(folder, capsys):
    predict_files(straw(), [folder])
    out, err = capsys.readouterr()
    assert len(list(csv.DictReader(out.splitlines()))) == 10
    assert 'failed (1 empty, 2 truncated)' in err and '.png' not in err


def test_an_interrupted_run_leaves_nothing_that_looks_complete(folder, tmp_path):
    def interrupted(x): raise KeyboardInterrupt
    for kind in ('csv', 'json', 'jsonl', 'parquet'):
        with pytest.raises(KdoctError, match=f'Interrupted after 0 rows; .*r.{kind}.partial'):
            predict_files(straw(interrupted), [folder], tmp_path/f'r.{kind}', tmp_path/'v.csv')
    assert all(p.endswith('.partial') for p in os.listdir(tmp_path) if p != 'in')
    predict_files(straw(), [folder], tmp_path/'r.csv')   # and the next run begins anew


def test_a_table_of_volumes_without_a_row_is_announced(folder, tmp_path, capsys):
    predict_files(straw(), [folder], tmp_path/'r.csv', tmp_path/'v.csv')
    assert "None of these files is a volume: " in capsys.readouterr().err
    assert len(pd.read_csv(tmp_path/'r.csv')) == 10


def test_a_bar_with_the_time_left_is_shown_on_a_terminal_only(folder, tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self): return self.terminal
    for terminal in (True, False):
        screen = Terminal()
        screen.terminal = terminal
        monkeypatch.setattr(sys, 'stderr', screen)
        predict_files(straw(), [folder], tmp_path/f'{terminal}.csv')
        assert ('10/10' in screen.getvalue()) == terminal and '.png' not in screen.getvalue()


@pytest.mark.parametrize(
    ('out', 'words'), [('r.csv', 'exists already'), ('r.xlsx', 'End the name'), ('no/r.csv', 'no folder')]
)
def test_a_file_of_results_that_cannot_be_is_refused_before_anything_is_read(
    folder, tmp_path, out, words
):
    (tmp_path/'r.csv').write_text('mine')
    with pytest.raises(KdoctError, match=words): predict_files('no bundle', [folder], tmp_path/out)
    assert (tmp_path/'r.csv').read_text() == 'mine'


def test_an_empty_folder_is_an_error_that_says_so(tmp_path):
    (tmp_path/'in').mkdir()
    with pytest.raises(KdoctError, match='no file to read'):
        predict_files('no bundle', [tmp_path/'in'], tmp_path/'r.csv')
    assert os.listdir(tmp_path) == ['in']


def test_another_volume_rule_than_the_evaluated_one_is_said(folder, tmp_path, capsys):
    order = ('NORMAL', 'DRUSEN', 'CNV')
    bundle = straw()
    bundle.decision = replace(bundle.decision, volume=VolumeRule('worst', 2, True, order))
    predict_files(bundle, [folder], tmp_path/'a.csv')
    assert 'by another rule' not in capsys.readouterr().err
    predict_files(bundle, [folder], tmp_path/'b.csv', volume_rule='mean')
    assert (
        'mean of the B-scans' in (err := capsys.readouterr().err)
        and 'evaluated with its own rule: most severe class on 2 B-scans' in err
    )
    predict_files(bundle, [folder], tmp_path/'c.csv', min_slices=5)
    assert 'most severe class on 5 B-scans' in capsys.readouterr().err
    with pytest.raises(KdoctError, match='order of severity'):
        predict_files(straw(), [folder], tmp_path/'d.csv', volume_rule='worst')
    with pytest.raises(KdoctError, match='no use for a number'):
        predict_files(straw(), [folder], tmp_path/'e.csv', min_slices=2)
    with pytest.raises(KdoctError, match='wants 0 B-scans'):
        predict_files(bundle, [folder], tmp_path/'f.csv', min_slices=0)


@pytest.mark.slow
@pytest.mark.parametrize('how', [{}, dict(volume_rule='mean')], ids=['default', 'the '
                                                                                'same asked for'])
def test_what_predict_says_of_volumes_is_what_evaluation_counts(trained, shipped, tmp_path, how):
    "Files of the test volumes, from pixels to the table of evaluation."
    from kdoct.core.result_sections import EvaluateRecipe
    from kdoct.evaluate.decision_tables import read_decided
    from kdoct.evaluate.volume_tables import volumes_section
    bundle, table, root = shipped
    for (patient, eye), rows in table.groupby(['patient', 'eye']):
        pages = [Image.open(root/path).convert('L') for path in rows.sort_values('slice').path]
        pages[0].save(tmp_path/f'{patient}_{eye}.tif', save_all=True, append_images=pages[1:])
    predict_files(
        bundle, [tmp_path], tmp_path / 'rows.csv', tmp_path / 'volumes.csv', engine='torch', **how
    )
    said = (
        pd.read_csv(tmp_path / 'volumes.csv')
        .assign(name=lambda d: d.path.map(lambda p: Path(p).stem))
        .set_index('name')
    )
    j = read_decided(trained[0].stage_dir(0, 'baseline'), table)
    s = volumes_section(
        {'baseline': table}, {'baseline': [j]}, j.decision.volume, EvaluateRecipe(n_boot=100)
    )
    row = s.table.loc['baseline, volumes']
    truth = (
        table.assign(name=table.patient + '_' + table.eye)
        .groupby('name')
        .label.agg(lambda y: y.iloc[0] if y.nunique() == 1 else None)
        .dropna()
    )
    # phantoms have no order of severity: eyes with slices of two classes are left out
    said = said.loc[truth.index]
    usable = said.predicted.notna()
    assert (
        len(said) == row.n_units
        and said.deferred.mean() == pytest.approx(row.deferred)
        and (said.slices == 2).all()
    )
    assert (said.predicted == truth)[usable].mean() == pytest.approx(row.accuracy) and (
        ~usable
    ).sum() == row.without
    assert s.caption.count(said.rule.iloc[0]) == 1


@pytest.mark.slow
def test_a_bundle_carries_the_rule_of_its_recipe(shipped):
    from kdoct.deploy.networks import open_bundle
    assert open_bundle(shipped[0]).decision.volume == VolumeRule('mean', 2, True)


@pytest.mark.slow
def test_a_bundle_says_what_its_pictures_are_and_an_older_one_what_its_recipe_says(
    shipped, tmp_path
):
    assert open_bundle(shipped[0]).about['modality'] == 'oct'
    assert (
        pictures_taken(dict(input_size=224), dict(source='folder', modality='radiograph'), 1)[
            'modality'
        ]
        == 'radiograph'
    )
    older = shutil.copytree(shipped[0], tmp_path/'older')
    about, model = (json.loads((older/f'{k}.json').read_text()) for k in ('bundle', 'model'))
    model['recipe']['data']['source'] = 'covid_qu_ex'
    (older/'model.json').write_text(json.dumps(model))
    for k in ('signature.json', 'bundle.json'): (older/k).unlink(missing_ok=True)
    seal(
        older,
        {
            k: v
            for k, v in about.items()
            if k not in ('modality', 'bundle', 'files', 'signed', 'signature')
        },
    )
    assert open_bundle(older).about['modality'] == 'radiograph'


def test_a_wish_that_the_bundle_cannot_fulfil_is_refused():
    with pytest.raises(KdoctError, match='no prediction sets for alpha 0.3'):
        Predictor(straw(), alpha=.3)
    with pytest.raises(KdoctError, match='order of severity'): VolumeRule('worst')
    with pytest.raises(KdoctError, match='no volume rule'): VolumeRule('best')


# --- model folders

UNDECIDED = ['deferred', 'distance', 'outlier', 'prediction_set']


@pytest.fixture
def mine(tmp_path):
    "A network that `kdoct import` has made a model folder of."
    import timm
    import torch

    from kdoct.models.folders import import_model_folder
    torch.manual_seed(0)
    net = timm.create_model('test_efficientnet', num_classes=3)
    torch.nn.init.normal_(net.classifier.weight, std=8)
    torch.save(net.state_dict(), tmp_path/'mine.pth')
    import_model_folder(tmp_path/'mine.pth', 'test_efficientnet', CLASSES, tmp_path/'mine', 48)
    return tmp_path/'mine'


def test_an_imported_network_predicts_what_it_computes_and_says_that_nothing_else_is_known(
    mine, folder, tmp_path, capsys
):
    import torch

    from kdoct.data.framing import resized
    from kdoct.models.folders import load_model_folder
    with pytest.raises(SystemExit) as e:
        main(['predict', str(mine), str(folder), '--out', str(tmp_path/'r.csv')])
    err, rows = (
        capsys.readouterr().err,
        pd.read_csv(tmp_path / 'r.csv', dtype=str, keep_default_na=False),
    )
    assert (
        e.value.code == 1
        and err.count('No decision is known') == 1
        and 'without calibration' in err
        and 'Volumes are decided' not in err
    )
    assert '7 predicted, 3 failed' in err and 'engine torch' in err
    good = rows[rows.error == '']
    assert (good[[*UNDECIDED, 'why']] == '').all(axis=None) and (good.notes == 'no-decision').all()
    x = np.stack([resized(np.asarray(Image.open(p).convert('RGB')), 48) for p in good.path])
    with torch.no_grad():
        want = (
            load_model_folder(mine)[0](torch.from_numpy(x).permute(0, 3, 1, 2) / 255)
            .softmax(1)
            .numpy()
        )
    np.testing.assert_allclose(
        good[[f'probability_{c}' for c in CLASSES]].astype(float), want, atol=1e-4
    )
    assert good.predicted.tolist() == [CLASSES[k] for k in want.argmax(1)] and np.ptp(want) > .1


@pytest.mark.parametrize('ending', ['.csv', '.json', '.jsonl', '.parquet'])
def test_what_is_not_known_is_empty_in_every_format(mine, folder, tmp_path, ending):
    predict_files(mine, [folder/'0.png'], tmp_path/f'r{ending}')
    read = {'.csv': pd.read_csv, '.parquet': pd.read_parquet}.get(ending)
    (row,) = read(tmp_path/f'r{ending}').to_dict('records') if read else \
        map(json.loads, [(tmp_path/f'r{ending}').read_text().strip('[]\n')])
    assert all(row[k] is None or row[k] != row[k] for k in UNDECIDED)
    with Predictor(mine) as p:
        assert [p.image(Image.open(folder/'0.png'))[k] for k in UNDECIDED] == [None]*4


def test_volumes_without_a_decision_are_decided_by_the_mean_and_said_so(mine, tmp_path, capsys):
    pages = [noise(i) for i in range(3)]
    pages[0].save(tmp_path/'v.tif', save_all=True, append_images=pages[1:])
    predict_files(mine, tmp_path/'v.tif', tmp_path/'r.csv', tmp_path/'v.csv')
    rows, (v,) = (
        pd.read_csv(tmp_path / 'r.csv'),
        pd.read_csv(tmp_path / 'v.csv', dtype=str, keep_default_na=False).to_dict('records'),
    )
    assert 'no rule was evaluated for this network' in capsys.readouterr().err
    mean = rows[[f'probability_{c}' for c in CLASSES]].mean()
    assert v['predicted'] == CLASSES[mean.to_numpy().argmax()] and (v['used'], v['failed']) == (
        '3',
        '0',
    )
    assert [v[k] for k in ('deferred', 'unsure', 'outliers', 'why')] == ['']*4
    with pytest.raises(KdoctError, match='order of severity'):
        predict_files(mine, tmp_path/'v.tif', tmp_path/'s.csv', volume_rule='worst')


def test_a_coloured_picture_is_noted_where_nobody_knows_what_a_network_was_trained_on(
    mine, tmp_path
):
    a = np.asarray(noise(0, mode='L'))
    Image.fromarray(np.stack([a, a//4, a//8], -1)).save(tmp_path/'fundus.png')
    Image.fromarray(np.stack([a]*3, -1)).save(tmp_path/'grey.png')
    with Predictor(mine) as p:
        notes = [r['notes'] for r in p.predict([tmp_path/'fundus.png', tmp_path/'grey.png'])]
    assert notes == [('no-decision', 'coloured'), ('no-decision',)]


def test_a_colour_photograph_is_refused_where_model_json_says_that_none_was_trained_on(
    mine, tmp_path
):
    "As `kdoct import --grey` and every training write it; the folder may lie anywhere."
    a = np.asarray(noise(0, mode='L'))
    Image.fromarray(np.stack([a, a//4, a//8], -1)).save(tmp_path/'fundus.png')
    about = json.loads((mine/'model.json').read_text())
    for coloured, error in ((False, 'not-a-bscan'), (0, 'not-a-bscan'), (True, ''), (3, '')):
        (mine/'model.json').write_text(json.dumps(about | dict(coloured=coloured)))
        with Predictor(mine) as p: (row,) = p.predict(tmp_path/'fundus.png')
        assert row['error'] == error and 'coloured' not in row['notes']


@pytest.mark.slow
def test_training_notes_in_model_json_whether_pictures_were_coloured(trained):
    about = json.loads((trained[0].stage_dir(0, 'baseline')/'model.json').read_text())
    assert about['coloured'] == 0


@pytest.mark.slow
def test_the_model_folder_of_a_run_is_predicted_with_by_its_decision(trained, shipped, tmp_path):
    "With decision.json beside it the same rows as its bundle; without it the probabilities before calibration alone."
    run, (bundle, table, root) = trained[0], shipped
    theirs, files = run.stage_dir(0, 'baseline'), [root/f for f in table.path[:6]]
    def rows(folder):
        with Predictor(folder, engine='torch') as p:
            return p.decision, p.channels, list(p.predict(files))
    assert rows(theirs)[2] == rows(bundle)[2]
    copied = shutil.copytree(
        theirs, tmp_path / 'copied', ignore=shutil.ignore_patterns('decision.*', 'bundle')
    )
    decision, channels, got = rows(copied)
    z = table.filter(like='logit_').to_numpy()[:6]
    want = np.exp(z - z.max(1, keepdims=True))
    np.testing.assert_allclose(
        [[r[f'probability_{c}'] for c in run.stage('data')['classes']] for r in got],
        want / want.sum(1, keepdims=True),
        atol=1e-4,
    )
    assert decision is None and channels == 1 and all(r[k] is None for r in got for k in UNDECIDED)


@pytest.mark.slow
def test_what_is_no_model_folder_is_refused_with_a_way_out(mine, shipped, folder, tmp_path):
    for what, says in (
        (folder, 'neither a bundle nor a model folder'),
        (tmp_path / 'nowhere', 'There is no bundle and no model folder'),
    ):
        with pytest.raises(KdoctError, match=says): Predictor(what)
    _, public = new_keys(tmp_path/'key')
    with pytest.raises(KdoctError, match='a model folder, which is not signed'):
        Predictor(mine, key=public)
    with pytest.raises(KdoctError, match='model folder has PyTorch only'):
        Predictor(mine, engine='onnx')
    with pytest.raises(KdoctError, match='no prediction sets for alpha 0.1'):
        Predictor(mine, alpha=.1)
    opened = shutil.copytree(shipped[0], tmp_path/'opened')
    (opened/'bundle.json').unlink()
    # a bundle that lost its seal does not pass for less
    with pytest.raises(KdoctError, match='no bundle.json'): Predictor(opened)
    about = json.loads((mine/'model.json').read_text())
    (mine/'model.json').write_text(json.dumps({k: v for k, v in about.items() if k != 'mean'}))
    with pytest.raises(KdoctError, match='does not say: mean'): Predictor(mine)


# --- real files

def test_real_pictures_and_volumes(shared_data, tmp_path):
    vol = shared_data/'volumes'
    counts = predict_files(
        straw(),
        [vol, shared_data / 'ucsd_oct' / 'NORMAL'],
        tmp_path / 'r.csv',
        tmp_path / 'v.csv',
        workers=1,
    )
    rows, volumes = (
        pd.read_csv(tmp_path / 'r.csv', keep_default_na=False),
        pd.read_csv(tmp_path / 'v.csv'),
    )
    ucsd = rows[rows.path.str.contains('ucsd_oct')]
    assert len(ucsd) == 200 and (ucsd.error == '').all()
    assert rows[rows.path.str.endswith('synthetic_10_bscans.vol')].slice.astype(
        int
    ).tolist() == list(range(10))
    assert rows[rows.path.str.endswith('empty.vol')].error.tolist() == ['empty']
    assert counts['failed'] == (rows.error != '').sum()
    assert (
        10 in volumes.slices.tolist()
        and (volumes.slices == volumes.used + volumes.outliers + volumes.failed).all()
    )
