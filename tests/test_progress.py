"What long commands show of their progress: in a terminal, in a log, from a kernel, from a training."
import io
import json
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import nbformat
import pytest
import typer
from conftest import copied_run
from nbformat.v4 import new_code_cell, new_markdown_cell

from kdoct.app import costs as C
from kdoct.app import crossval as V
from kdoct.app.cli import app, main
from kdoct.core import progress as P
from kdoct.core.files import KdoctError
from kdoct.core.presets import preset
from kdoct.core.progress_line import ProgressLine
from kdoct.core.runs import create_run, planned_stages


class Terminal(io.StringIO):
    "A stream that takes itself for a terminal."
    def isatty(self): return True


EPOCH = dict(what='epoch 1/2 done', loss=dict(loss=.5), share=.5, left=9., of_stage=True, ends=True)


# --- where a report goes

DYING = """import os, sys
with open(sys.argv[1], 'a') as f: f.write('{"what": "epoch 1/9"}\\n{"what": "epoch 2')
os._exit(9)"""


def test_of_a_process_that_dies_in_a_word_the_words_before_it_are_heard():
    heard = []
    with P.followed(heard.append) as file:
        subprocess.run([sys.executable, '-c', DYING, str(file)], check=False)
    assert heard == [dict(what='epoch 1/9')] and not file.exists()


def test_two_workers_side_by_side_are_heard_apart(monkeypatch):
    first, second = [], []
    with P.followed(first.append) as a, P.followed(second.append) as b:
        for file, fold in ((a, 0), (b, 1), (a, 0)):
            monkeypatch.setenv(P.PROGRESS_FILE, str(file))
            P.report(what=f'fold {fold}')
    assert [r['what'] for r in first] == ['fold 0', 'fold 0']
    assert [r['what'] for r in second] == ['fold 1']


def test_a_work_goes_on_where_nobody_follows_it_any_more(monkeypatch, tmp_path):
    monkeypatch.setenv(P.PROGRESS_FILE, str(tmp_path / 'gone' / 'reports.jsonl'))
    assert list(P.counted_off('abc', 'audit')) == ['a', 'b', 'c']


def test_nothing_is_reported_where_nobody_hears_it(monkeypatch):
    monkeypatch.delenv(P.PROGRESS_FILE, raising=False)
    assert not P.is_heard()
    monkeypatch.setattr(P.Count, 'say', lambda self: pytest.fail('reported'))
    assert list(P.counted_off('ab', 'audit')) == ['a', 'b']


def test_a_day_of_reports_stays_small():
    "A training of 100 batches a second: about one report in five seconds after an hour."
    now = [0.]
    throttle, written = P.Throttle(lambda: now[0]), 0
    for _ in range(36_000):
        now[0] += 2.4
        written += throttle.due()
    assert written < 86_400 / 4


def test_of_several_processes_only_the_first_one_shows_anything(monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')
    monkeypatch.setenv('RANK', '1')
    screen = Terminal()
    with P.shown(screen) as line:
        line(EPOCH)
        assert not P.is_heard()
    assert screen.getvalue() == ''


# --- commands

def test_every_command_can_be_quiet_and_verbose():
    commands = typer.main.get_command(app).commands
    without = [name for name, command in commands.items()
               if not {'quiet', 'verbose'} <= {p.name for p in command.params}]
    assert len(commands) > 15 and not without


def test_an_interrupted_command_says_that_it_goes_on(monkeypatch, capsys):
    def broken_off(): raise KeyboardInterrupt
    monkeypatch.setattr('kdoct.app.cli.outputs_root', broken_off)
    with pytest.raises(SystemExit) as e: main(['runs'])
    assert e.value.code == 130 and 'goes on from here with the same command' in capsys.readouterr().err


def test_quiet_and_verbose_at_once_are_refused(capsys):
    with pytest.raises(SystemExit): main(['runs', '--quiet', '--verbose'])
    assert '--quiet and --verbose contradict each other' in capsys.readouterr().err


@pytest.fixture
def run(monkeypatch):
    "A run whose stages only report an epoch."
    def run_stage(run, stage, fold, notebooks=None, overrides=None):
        P.hearer() and P.report(**EPOCH)
    monkeypatch.setattr(V, 'run_stage', run_stage)
    return create_run('r', preset('tiny'))


def test_in_a_log_the_epochs_are_lines_and_in_a_terminal_one_line(run, monkeypatch, capsys):
    monkeypatch.setattr(ProgressLine, '__init__', quick := quick_line(ProgressLine.__init__))
    V.crossval(run, [0])
    captured = capsys.readouterr()
    assert '[2/6] fold 0, teacher ...\n' in captured.out and '\r' not in captured.err
    assert '[2/6] fold 0, teacher: epoch 1/2 done, loss 0.500' in captured.err
    screen = Terminal()
    monkeypatch.setattr(sys, 'stderr', screen)
    V.crossval(run, [0])
    shown = screen.getvalue()
    assert '\n' not in shown and '\r' in shown and 'fold 0, teacher: epoch 1/2 done' in shown
    assert quick and '...' not in capsys.readouterr().out


def quick_line(make):
    "A line that writes every epoch, however soon."
    def init(self, stream=None, verbose=False, **times): make(self, stream, verbose, pause=0.)
    return init


def test_a_quiet_command_says_nothing_of_stages(run, capsys):
    with P.at_verbosity(quiet=True, verbose=False): V.crossval(run, [0])
    captured = capsys.readouterr()
    assert captured.out == captured.err == ''


def test_a_stage_that_fails_leaves_the_terminal_free_for_the_message(run, monkeypatch):
    screen = Terminal()
    def fails(*_):
        P.report(**EPOCH)
        raise KdoctError('The teacher stage failed.', fix='Look at it.')
    monkeypatch.setattr(V, 'run_stage', fails)
    monkeypatch.setattr(sys, 'stderr', screen)
    with pytest.raises(KdoctError, match='teacher stage'): V.crossval(run, [0])
    assert re.search(r'\r +\r+$', screen.getvalue())   # the line is wiped


def test_what_a_verbose_kernel_prints_stands_above_the_line():
    screen = Terminal()
    with P.at_verbosity(quiet=False, verbose=True), P.shown(screen):
        printed = V._Printed()
        printed.write('one\ntw')
        printed.write('o\n')
    assert '  one\n' in screen.getvalue() and '  two\n' in screen.getvalue()


def test_a_kernel_that_is_killed_ends_the_command_and_is_named(tmp_path):
    "As the system does where memory is short; the command used to wait for ever."
    dying = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    cells = [new_markdown_cell('# t'), new_markdown_cell(V.RUN_HEADING), new_code_cell(dying)]
    kernel = dict(name='python3', language='python', display_name='python3')
    nb = nbformat.v4.new_notebook(cells=cells, metadata=dict(kernelspec=kernel))
    nbformat.write(nb, tmp_path / '03_teacher.ipynb')
    run = create_run('r', preset('tiny'))
    with pytest.raises(KdoctError, match='teacher stage of fold 0 failed: its process has ended'):
        V.run_stage(run, 'teacher', 0, tmp_path)
    assert run.stage('fold_0/teacher')['status'] == 'failed'


# --- a training

@pytest.fixture(scope='module')
def reported(trained_outputs, tmp_path_factory):
    "The baseline of the shared run trained again, this time heard: the run, and the reports."
    folder, heard = tmp_path_factory.mktemp('heard') / 'outputs', []
    run = copied_run(trained_outputs, folder)
    shutil.rmtree(run.stage_dir(0, 'baseline'))
    from kdoct.distill.student import train_baseline
    with pytest.MonkeyPatch.context() as patch, P.heard_by(heard.append):
        patch.setenv('KDOCT_OUTPUTS', str(folder))
        patch.setattr(P.Throttle, 'due', lambda self: True)
        train_baseline(run, 0)
    return run, heard


def test_a_training_reports_epoch_batch_losses_and_score(reported):
    heard = reported[1]
    epochs = [r['what'] for r in heard if r.get('ends')]
    assert epochs == ['epoch 1/2 done', 'epoch 2/2 done']
    first = heard[0]
    assert first['what'] == 'epoch 1/2' and first['done'] == 1 and first['unit'] == 'batches'
    assert set(first['loss']) == {'hard', 'loss'} and first['scores'] == []
    last = [r for r in heard if r.get('ends')][-1]
    assert last['share'] == 1 and last['left'] == 0 and 'validation accuracy' in last['scores'][1]
    assert [r for r in heard if r['what'] == 'predicting']
    assert json.dumps(heard)   # a kernel can send it


def test_reports_change_neither_weights_nor_records(reported, trained_outputs):
    def facts(outputs):
        folder = outputs / 'tiny' / 'fold_0' / 'baseline'
        record = json.loads((outputs / 'tiny' / 'run.json').read_text())
        files = sorted(p.name for p in folder.iterdir())
        about = json.loads((folder / 'model.json').read_text())
        return about['weights_sha256'], files, set(record['stages']['fold_0/baseline'])
    assert facts(reported[0].path.parent) == facts(trained_outputs)


# --- cost

def test_a_small_run_is_not_measured_and_says_nothing_of_its_cost(monkeypatch, capsys):
    monkeypatch.setattr(C, 'costs_elsewhere', lambda *_: pytest.fail('measured'))
    run = create_run('r', preset('demo'))
    C.estimate(C.Costs(run), planned_stages(run, [0]))
    assert capsys.readouterr().out == ''


def large(monkeypatch, seconds):
    "A run of networks that are not known to be light, whose steps take so long an image [s]."
    recipe = preset('tiny', **{'student.arch': 'test_vit', 'teacher.arch': 'resnet18'})
    costs = dict.fromkeys(recipe.roles, C.StepCost(seconds, seconds / 3))
    monkeypatch.setattr(C, 'costs_elsewhere', lambda *_: (costs, 'cpu'))
    return create_run('r', recipe)


def test_a_long_run_is_announced_with_what_makes_it_shorter(monkeypatch, capsys):
    run = large(monkeypatch, 100.)
    with P.at_verbosity(quiet=True, verbose=False):   # a warning is printed all the same
        C.estimate(C.Costs(run), planned_stages(run, [0, 1, 2]))
    out = capsys.readouterr().out
    assert out.startswith('WARNING: About ') and '3 folds x teacher, student, baseline' in out
    assert '--teacher DIR' in out and '--folds 0' in out and 'by a measured step' in out


def test_finished_folds_say_what_the_others_will_take(monkeypatch, capsys):
    run = large(monkeypatch, 100.)
    monkeypatch.setattr(C, 'costs_elsewhere', lambda *_: pytest.fail('measured'))
    for role in run.recipe.roles: run.record(f'fold_0/{role}', status='done', seconds=1200.)
    C.estimate(C.Costs(run), planned_stages(run, [1, 2])[1:])
    words = 'About 2 h 0 min on this machine (2 folds x teacher, student, baseline), by what'
    assert words in capsys.readouterr().out


def test_a_measurement_that_fails_stops_nothing(monkeypatch, capsys):
    run = large(monkeypatch, 1.)
    def fails(*_): raise KdoctError('A step could not be measured: no memory', fix='')
    monkeypatch.setattr(C, 'costs_elsewhere', fails)
    C.estimate(C.Costs(run), planned_stages(run, [0]))
    assert 'no memory' in capsys.readouterr().out


def test_a_source_that_counts_its_images_later_is_estimated_later():
    run = create_run('r', preset('tiny'))
    run = type(run)(run.path, run.recipe.override(**{'data.source': 'folder', 'data.root': '.'}))
    costs = C.Costs(run)
    C.estimate(costs, planned_stages(run, [0]))
    assert costs.images is None and costs.source == ''
    seen = SimpleNamespace(table=range(300))
    costs = C.Costs(type(run)(run.path, run.recipe, (seen, None)))
    C.estimate(costs, planned_stages(run, [0]))
    assert costs.images.test == 100
