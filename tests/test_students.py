"Several students in one run share folds, teachers and baseline; more may be added to it later."
import json
import shutil
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from kdoct.app import cli, crossval
from kdoct.core.files import KdoctError, read_json, sha256_file
from kdoct.core.overrides import parse_overrides
from kdoct.core.presets import preset
from kdoct.core.recipe import Recipe
from kdoct.core.runs import create_run, open_run, stage_command
from kdoct.data.stage import prepare_data
from kdoct.distill.student import train_student
from kdoct.distill.teacher import train_teacher
from kdoct.evaluate.all_folds import evaluate_run
from kdoct.evaluate.decide import decide_all
from kdoct.evaluate.simulated import write_simulated_stages
from kdoct.evaluate.stage import evaluate_fold

STUDENTS = {
    'soft': dict(distill=dict(temperature=8.)),
    'small': dict(arch='test_resnet', augment=dict(hflip=0.), distill=dict(alpha=0.9)),
}
NEW = dict(hard=dict(distill=dict(alpha=0., beta=1.)))
ROLES = ['teacher', 'student', 'student-soft', 'student-small', 'baseline']


def recipe(**students): return preset('tiny', students=STUDENTS | students)


# --- the recipe

@pytest.mark.parametrize(
    'text, wanted',
    [
        ('students.a.distill.method=fitnet', dict(a=dict(distill=dict(method='fitnet')))),
        ('students.a.distill.options.weight=50',
         dict(a=dict(distill=dict(options=dict(weight=50))))),
        ('students.a.epochs=3 students.b.arch=123', dict(a=dict(epochs=3), b=dict(arch='123'))),
        ('students={"a": {}}', dict(a={})),
    ],
)
def test_students_are_given_on_the_command_line(text, wanted):
    assert Recipe().override(**parse_overrides(text)).students == wanted


def test_options_of_the_method_are_given_one_by_one():
    changed = Recipe().override(**parse_overrides('distill.method=fitnet distill.options.weight=5'))
    assert (changed.distill.method, changed.distill.options) == ('fitnet', dict(weight=5))


@pytest.mark.parametrize(
    'students, fault',
    [
        ({'A-b': {}}, "students: 'A-b' is no name"),
        ({'a': dict(epoch=3)}, 'students.a.epoch: Extra inputs'),
        ({'a': dict(epochs=0)}, 'students.a.epochs: '),
        ({'a': dict(augment=dict(flip=1))}, 'students.a.augment.flip: Extra inputs'),
        ({'a': dict(distill=3)}, 'students.a.distill is 3, no fields'),
        ({'a': dict(distill=dict(alpha=0, beta=0))}, 'students.a.distill: alpha and beta are both'),
        ({'a': dict(distill=dict(options=3))}, 'students.a.distill.options: '),
        ({'a': dict(train=False, weights='x')}, 'students.a.train is false'),
        ({'a': 3}, 'students.a: '),
    ],
)
def test_a_student_that_cannot_be_is_refused_by_its_field(students, fault):
    with pytest.raises(KdoctError) as e: Recipe().override(students=students)
    assert fault in e.value.problem


def test_a_misspelt_field_of_a_student_is_answered_with_its_neighbours():
    with pytest.raises(KdoctError, match="no field 'students.a.distill.temprature'") as e:
        Recipe().override(**{'students.a.distill.temprature': 2})
    assert 'distill.temperature' in e.value.fix


def test_a_network_has_the_key_of_what_decides_it():
    one, more = recipe(), recipe(**NEW)
    assert all(one.network_key(r) == more.network_key(r) for r in ROLES)
    small = more.roles[1:]   # in this preset the teacher is trained as the baseline is
    assert len({more.network_key(r) for r in small}) == len(small)
    other = one.override(**{'distill.temperature': 2., 'decide.defer_target': 0.5})
    changed = {r for r in ROLES if one.network_key(r) != other.network_key(r)}
    assert changed == {'student', 'student-small'}   # the other has a temperature of its own
    seeded = one.override(seed=1)
    assert all(one.network_key(r) != seeded.network_key(r) for r in ROLES)


# --- a run with two further students

STAGES = dict(
    data=lambda run, fold, _: prepare_data(run),
    teacher=lambda run, fold, _: train_teacher(run, fold),
    student=train_student,
    baseline=train_student,
    decide=lambda run, fold, _: decide_all(run, fold),
    evaluate=lambda run, fold, _: evaluate_fold(run, fold, verbose=False),
)


def run_here(done):
    "Stages in this process, as a kernel would run them; noted in `done`."
    def run_stage(run, stage, fold, notebooks=None, overrides=None):
        done.append(stage)
        STAGES[stage.partition('-')[0]](open_run(run.name), fold, stage)
    return run_stage


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    "The outputs folder of a cross-validation's first fold, and the stages that it ran."
    folder, done = tmp_path_factory.mktemp('students'), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('KDOCT_OUTPUTS', str(folder))
        patch.setattr(crossval, 'run_stage', run_here(done))
        crossval.crossval(create_run('several', recipe()), [0])
    return folder, done


@pytest.fixture
def several(trained, outputs, monkeypatch):
    "A copy of that run, and the list of stages that run from now on."
    shutil.copytree(trained[0], outputs)
    done = []
    monkeypatch.setattr(crossval, 'run_stage', run_here(done))
    return open_run('several'), done


def changed(file): return file.stat().st_mtime_ns


def weights(run):
    "Hash and time of every network's file."
    files = sorted(run.path.glob('fold_*/*/model.safetensors'))
    return {f.parent.name: (sha256_file(f), changed(f)) for f in files}


@pytest.mark.slow
def test_all_students_are_trained_under_one_teacher(trained, several):
    run, _ = several
    assert trained[1] == ['data', *ROLES, 'decide', 'evaluate']
    about = {r: read_json(run.stage_dir(0, r)/'model.json') for r in ROLES}
    teacher = about['teacher']['weights_sha256']
    for role in ROLES[1:4]:
        assert about[role]['distilled_from']['teacher']['weights_sha256'] == teacher
    assert about['student-small']['arch'] == 'test_resnet'
    assert about['student-soft']['role'] == 'student-soft'
    assert len({about[r]['weights_sha256'] for r in ROLES[1:]}) == len(ROLES) - 1


@pytest.mark.slow
def test_a_student_is_added_to_a_finished_run_and_nothing_is_trained_again(several):
    run, done = several
    before, noted = weights(run), run.facts()
    def decided(): return {r: changed(run.stage_dir(0, r)/'decision.json') for r in ROLES}
    made = decided()
    grown = create_run('several', recipe(**NEW))
    crossval.crossval(grown, [0])
    assert done == ['student-hard', 'decide', 'evaluate']
    assert {r: w for r, w in weights(run).items() if r in before} == before
    assert decided() == made
    facts = run.facts()
    assert open_run('several').recipe == recipe(**NEW) and facts['recipe_key'] == recipe(**NEW).key
    assert facts['stages']['fold_0/teacher'] == noted['stages']['fold_0/teacher']
    table = read_json(run.fold_dir(0)/'evaluation.json')
    assert {'student-hard', *ROLES} <= set(table['table'])


@pytest.mark.slow
def test_the_command_adds_a_student_to_the_run_of_a_name_and_goes_on_by_the_name_alone(several):
    run, done = several
    command = ['crossval', '--run', 'several', '--folds', '0']
    with pytest.raises(SystemExit) as end:
        cli.main([*command, '--set', 'students.hard.distill.alpha=0 students.hard.distill.beta=1'])
    assert end.value.code == 0 and done == ['student-hard', 'decide', 'evaluate']
    assert open_run('several').recipe.students == STUDENTS | NEW
    with pytest.raises(SystemExit) as end: cli.main(command)
    assert end.value.code == 0 and len(done) == 3
    page = (run.path/'report.html').read_text()
    assert 'student-hard - baseline' in page and 'student-hard - student' in page


@pytest.mark.slow
def test_a_student_with_results_is_neither_changed_nor_left_out(several):
    run, _ = several
    changed = recipe(soft=dict(distill=dict(temperature=9.)))
    with pytest.raises(KdoctError, match='student-soft, which would be another network') as e:
        create_run('several', changed)
    assert 'students.NAME.FIELD=VALUE' in e.value.fix
    assert str(run.stage_dir(0, 'student-soft')) in e.value.fix
    with pytest.raises(KdoctError, match='student-small, which is not in this recipe'):
        create_run('several', preset('tiny', students=dict(soft=STUDENTS['soft'])))
    for field in ('student.epochs', 'teacher.epochs', 'seed', 'distill.alpha'):
        with pytest.raises(KdoctError, match=f'{field}: '):
            create_run('several', recipe(**NEW).override(**{field: 1}))
    assert open_run('several').recipe == recipe()
    create_run('several', recipe(**NEW))
    later = create_run('several', recipe(hard=dict(epochs=1)))   # it has no results yet
    assert later.recipe.training('student-hard').epochs == 1


@pytest.mark.slow
def test_a_student_of_a_run_is_exported_under_its_role(several, tmp_path):
    from kdoct.deploy.stage import export_fold
    run, _ = several
    out = export_fold(run, 0, 'student-soft', tmp_path/'bundle', [], images=4)
    about = json.loads((out/'bundle.json').read_text())
    assert about['source']['role'] == 'student-soft'
    assert about['source']['recipe_key'] == recipe(**NEW).network_key('student-soft')


@pytest.mark.slow
def test_students_are_explained_beside_each_other(several):
    from kdoct.explain.stage import explain_fold, explanation_sections
    run, _ = several
    quick = {'explain.images': 4, 'explain.methods': ['grad-cam']}
    run.recipe = run.recipe.override(**quick)
    shutil.rmtree(run.stage_dir(0, 'student-small'))   # not trained: not explained
    assert list(explain_fold(run, 0)['maps']) == ['teacher', 'student', 'student-soft', 'baseline']
    rows = explanation_sections(run)['maps'].table.index
    assert 'grad-cam, student-soft minus student' in rows
    assert 'grad-cam, student minus baseline' in rows


# --- what reads a run

def test_every_table_has_a_row_for_each_student_and_pairs_of_it():
    run = create_run('simulated', recipe())
    write_simulated_stages(run, 0)
    made = evaluate_fold(run, 0, verbose=False)
    assert list(made['table'].index) == ROLES
    pairs = [f'student-{n} - {other}' for n in STUDENTS for other in ('baseline', 'student')]
    assert list(made['differences'].index.unique('pair'))[2:] == pairs
    assert 'student-small, CNV' in made['sections']['classes'].table.index
    assert 'student-small: arch test_resnet, augment.hflip 0' in made['protocol']
    assert run.is_finished('evaluate', 0)


def test_a_student_that_some_folds_lack_is_named_and_left_out_of_the_pooled_tables():
    run = create_run('simulated', recipe())
    for fold in (0, 1): write_simulated_stages(run, fold)
    shutil.rmtree(run.stage_dir(1, 'student-small'))
    made = evaluate_run(run, verbose=False)
    assert list(made['table'].index) == [r for r in ROLES if r != 'student-small']
    assert 'Student-small is not in every fold' in made['protocol']


def test_maps_of_a_student_that_came_later_wait_for_every_fold():
    from kdoct.explain.stage import _in_every_fold
    table = pd.DataFrame(dict(fold=[0, 0, 1], role=['student', 'student-soft', 'student']))
    assert list(_in_every_fold(table, 'role').role) == ['student', 'student']


def test_a_stage_of_a_student_names_its_role():
    run = create_run('planned', recipe())
    command = stage_command('student-soft', run, 1)
    assert command.endswith('-p run planned -p fold 1 -p role student-soft')
    with pytest.raises(KdoctError, match="no role 'student-hard'") as e:
        train_student(run, 0, 'student-hard')
    assert '-p role student-soft or -p role student-small' in e.value.fix


@pytest.mark.parametrize(
    'role, field',
    [('student-soft', 'students.soft'), ('baseline', 'student'), ('teacher', 'teacher')],
)
def test_too_small_a_gpu_names_the_fields_of_the_student(role, field):
    from kdoct.training.results import _within_memory
    run = SimpleNamespace(recipe=recipe())
    with pytest.raises(KdoctError) as e, _within_memory(run, role): raise torch.OutOfMemoryError
    assert f'--set {field}.batch_size=4' in e.value.fix


def test_a_bundle_tells_no_folder_of_a_students_weights():
    from kdoct.deploy.stage import _shareable
    about = dict(recipe=dict(data={}, students=dict(a=dict(weights='/data/net.pth'), b={})))
    assert _shareable(about)['recipe']['students'] == dict(a=dict(weights='net.pth'), b={})
