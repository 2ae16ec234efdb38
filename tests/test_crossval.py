"Stages in processes of their own: the user's own command, two writers, failures and resumption."
import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import prepared
import pytest
from click.testing import CliRunner
from jupyter_client.manager import KernelManager
from papermill.cli import papermill
from PIL import Image

from kdoct.app.cli import main
from kdoct.app.crossval import RUN_HEADING, run_stage, stage_cells
from kdoct.app.kernels import StageKernel
from kdoct.app.stages import open_stage
from kdoct.core.files import outputs_root
from kdoct.core.presets import preset
from kdoct.core.runs import STAGES, create_run, open_run

ROOT = Path(__file__).parent.parent
ENV = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}


def typed(*arguments):
    "papermill as a user types it, in a process of its own."
    command = [sys.executable, '-m', 'papermill', *map(str, arguments)]
    env = {**ENV, 'KDOCT_OUTPUTS': os.environ['KDOCT_OUTPUTS']}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)


def refused(capsys, *arguments):
    "The message with which `kdoct` ends."
    with pytest.raises(SystemExit) as e: main([*map(str, arguments)])
    assert e.value.code == 1
    return capsys.readouterr().err


@pytest.mark.slow
def test_papermill_without_a_teacher_names_the_command_that_trains_it():
    done = typed('nbs/04_distill.ipynb', '-p', 'fold', '2')   # no output path
    assert done.returncode == 1
    assert 'There is no teacher for fold 2' in done.stderr
    assert 'papermill nbs/03_teacher.ipynb' in done.stderr and '-p fold 2' in done.stderr


@pytest.mark.slow
def test_papermill_with_a_misspelt_parameter_is_refused(tmp_path, monkeypatch):
    nbformat.write(stage_cells(nbformat.read(ROOT/'nbs'/'03_teacher.ipynb', 4)), tmp_path/'t.ipynb')
    monkeypatch.setenv('PYTHONPATH', str(ROOT))
    arguments = (tmp_path/'t.ipynb', tmp_path/'out.ipynb', '-p', 'folds', '2')
    done = CliRunner().invoke(papermill, [*map(str, arguments), '--no-progress-bar'])
    assert done.exit_code == 1 and "Did you mean 'fold'?" in str(done.exception)


TRAIN = ("from kdoct.core.runs import open_run; from kdoct.distill.teacher import train_teacher; "
         "train_teacher(open_run('two'), 0)")


@pytest.mark.slow
def test_two_processes_never_train_the_same_fold(tmp_path):
    from kdoct.data.stage import prepare_data
    run = create_run('two', preset('tiny', **{'teacher.epochs': 4}))
    prepare_data(run)
    errors = [tmp_path/'first', tmp_path/'second']
    both = [prepared.start(TRAIN, folder=ROOT, errors=file) for file in errors]
    for p in both: p.join()
    lost = [file.read_text() for p, file in zip(both, errors, strict=True) if p.exitcode]
    # The slower one finds the lock held, or, if it was that slow, the finished teacher.
    assert len(lost) <= 1 and all(
        "Another process is working on teacher of fold 0" in s for s in lost
    )
    assert run.stage('fold_0/teacher')['status'] == 'done'


@pytest.fixture
def folder(tmp_path):
    "Four classes of six patients in a plain folder, and one broken file."
    for c in range(4):
        (tmp_path/f'C{c}').mkdir()
        for i in range(12):
            Image.effect_noise((64, 48), 20 + 20*c).save(tmp_path/f'C{c}'/f'p{c}{i//2}_{i}.png')
    (tmp_path/'C0'/'p00_x.png').write_bytes(b'')
    return tmp_path


def test_a_kernel_that_has_done_its_work_is_not_interrupted(monkeypatch):
    "A signal between two of its messages would stand in the log as an error."
    signals = []
    async def noted(self): signals.append('interrupt')
    monkeypatch.setattr(KernelManager, '_async_interrupt_kernel', noted)
    kernel = StageKernel(kernel_name='python3')
    kernel.start_kernel()
    kernel.shutdown_kernel()
    assert signals == [] and not kernel.is_alive()


def test_the_work_that_a_user_breaks_off_is_interrupted(monkeypatch):
    signals = []
    async def noted(self): signals.append('interrupt')
    monkeypatch.setattr(KernelManager, '_async_interrupt_kernel', noted)
    kernel = StageKernel(kernel_name='python3')
    kernel.start_kernel()
    try: raise KeyboardInterrupt
    except KeyboardInterrupt: kernel.shutdown_kernel()
    assert signals == ['interrupt']


@pytest.mark.slow
def test_refused_data_leave_no_run_and_the_run_goes_on_without_them(
    folder, stage_server, capsys
):
    recipe = {
        'data.source': 'folder',
        'data.root': str(folder),
        'data.group_pattern': r'(p\d+)_',
        'data.n_folds': 2,
    }
    message = refused(
        capsys, 'crossval', '--preset', 'tiny', '--folds', '0', '--run', 'mine',
        '--source', 'folder', '--data-root', folder, '--set', r"data.group_pattern='(p\d+)_'",
        '--set', 'data.n_folds=2',
    )
    assert 'data stage failed' in message and '1 empty' in message
    # the refused data leave no run, and what was found in them
    findings = outputs_root()/'audit'/'mine.csv'
    assert not (outputs_root()/'mine').exists() and str(findings) in message
    assert 'C0/p00_x.png' in findings.read_text()
    run = create_run('mine', preset('tiny', **recipe, **{'data.leave_out': ['empty']}))
    run_stage(run, 'data', 0)
    facts = json.loads(run.json.read_text())
    assert (
        facts['recipe']['data']['leave_out'] == ['empty']
        and facts['stages']['data']['images'] == 48
    )
    assert run.is_finished('data') and not run.is_finished('teacher')
    data = facts['stages']['data']
    assert data['status'] == 'done' and 'error' not in data  # the failure is over


def test_a_run_with_results_keeps_its_recipe(capsys):
    from kdoct.data.stage import prepare_data
    run = create_run('fixed', preset('tiny'))
    prepare_data(run)
    other = ('--run', 'fixed', '--set', 'data.size=96')
    assert 'data.size: 64, not 96' in refused(capsys, 'crossval', '--preset', 'tiny', *other)


@pytest.fixture
def small_demo(monkeypatch, tmp_path):
    "The demo with the networks and images of the preset for tests."
    from kdoct.core.presets import PRESETS
    monkeypatch.setenv('KDOCT_OUTPUTS', str(tmp_path))
    monkeypatch.delenv('IN_TEST', raising=False)
    monkeypatch.delenv('KDOCT_STAGE', raising=False)
    monkeypatch.setitem(PRESETS, 'demo', PRESETS['tiny'])


def made(asked, stage): return lambda run, fold: asked.append((stage, run.name, fold))


def test_a_stage_of_the_demo_run_by_hand_makes_the_stages_before_it(small_demo):
    asked = []
    run, _ = open_stage(
        fold=1, before=dict(data=made(asked, 'data'), teacher=made(asked, 'teacher'))
    )
    assert run.name == 'demo' and asked == [('data', 'demo', 1), ('teacher', 'demo', 1)]


def test_a_stage_of_another_run_makes_no_stage_before_it(small_demo):
    asked = []
    open_stage('tiny', before=dict(data=made(asked, 'data')))
    assert asked == []


def test_a_stage_that_papermill_runs_makes_no_stage_before_it(small_demo, monkeypatch):
    monkeypatch.setattr('kdoct.app.stages._injected_names', lambda: {'fold'})
    asked = []
    open_stage(before=dict(data=made(asked, 'data')))
    assert asked == []


@pytest.mark.parametrize('name', sorted({s.notebook for s in STAGES.values()}))
def test_a_stage_notebook_begins_with_its_stage_in_lines_that_fit_the_page(name):
    nb = nbformat.read(ROOT/'nbs'/f'{name}.ipynb', 4)
    assert nb.cells[1].source.startswith(RUN_HEADING)
    code = [c.source for c in stage_cells(nb).cells if c.cell_type == 'code']
    assert not [line for source in code for line in source.splitlines() if len(line) > 100]


@pytest.mark.slow
def test_papermill_is_given_a_run_called_007_and_takes_it(tmp_path):
    nbformat.write(stage_cells(nbformat.read(ROOT/'nbs'/'01_data.ipynb', 4)), tmp_path/'t.ipynb')
    run = create_run('007', preset('tiny'))
    given = ('-p', 'run', '007', '-p', 'overrides', 'data.n_folds=2')   # papermill makes it 7
    done = typed(tmp_path/'t.ipynb', tmp_path/'out.ipynb', *given)
    assert done.returncode == 0, done.stderr[-800:]
    assert (
        run.is_finished('data')
        and open_run('007').recipe.data.n_folds == 2
        and not (outputs_root() / '7').exists()
    )
