"Foundation weights (RETFound's layouts: MAE, DINOv2) as a start, and a fine-tuned transformer as a teacher."
import argparse

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed, resample_patch_embed

from kdoct.app.report import report_html
from kdoct.core.files import KdoctError, read_json
from kdoct.core.presets import preset
from kdoct.core.runs import create_run
from kdoct.data.stage import prepare_data
from kdoct.deploy.model_card_facts import model_card_facts
from kdoct.distill.student import train_baseline, train_student
from kdoct.distill.teacher import train_teacher
from kdoct.evaluate.comparison_figures import compare_students
from kdoct.evaluate.stage import evaluate_fold
from kdoct.models import backbones, folders

MAE, DINO = 'vit_tiny_patch16_224', 'vit_small_patch14_dinov2'
CLASSES = ['NORMAL', 'DRUSEN', 'DME', 'CNV']
REAL = timm.create_model


@pytest.fixture(autouse=True)
def small_transformers(monkeypatch):
    "timm's transformers of the same layout with two blocks of width 32."
    monkeypatch.setattr(timm, 'create_model', small)


def small(name, *args, **kwargs):
    if name.startswith('vit_'): kwargs = dict(embed_dim=32, depth=2, num_heads=2) | kwargs
    return REAL(name, *args, **kwargs)


def encoder(arch, size, seed=1, **kwargs):
    torch.manual_seed(seed)
    net = small(arch, img_size=size, num_classes=0, **kwargs).eval()
    with torch.no_grad():   # so that no tensor is as it begins
        for p in net.parameters(): p.add_(.05*torch.randn_like(p))
    return net


def mae_checkpoint(net, **more):
    "As RETFound's MAE saves it: with decoder, optimiser, and the arguments of the command."
    decoder = {'mask_token': torch.zeros(1, 1, 16), 'decoder_pos_embed': torch.zeros(1, 17, 16),
               'decoder_embed.weight': torch.zeros(16, 32), 'decoder_norm.weight': torch.ones(16),
               'decoder_blocks.0.norm1.weight': torch.ones(16),
               'decoder_pred.bias': torch.zeros(768)}
    optimiser = dict(state={0: dict(step=3, exp_avg=torch.zeros(2))}, param_groups=[dict(lr=1e-3)])
    return dict(model={**net.state_dict(), **decoder}, optimizer=optimiser, epoch=799,
                scaler=dict(scale=1.), args=argparse.Namespace(model='mae', lr=1e-3, **more))


def dino_checkpoint(net, key='teacher', chunked=True):
    "As DINOv2 saves its teacher: the encoder in chunks, beside the heads of the loss."
    def name(k):
        return k.replace('blocks.0.', 'blocks.0.0.').replace('blocks.1.', 'blocks.1.1.')
    state = {f'backbone.{name(k) if chunked else k}': v for k, v in net.state_dict().items()}
    heads = {'dino_head.mlp.0.weight': torch.zeros(8, 32), 'ibot_head.mlp.0.bias': torch.zeros(8)}
    return {key: {**state, 'backbone.mask_token': torch.zeros(1, 32), **heads}}


def started(arch, path, size, n=4):
    recipe = preset('tiny', **{'teacher.arch': arch, 'teacher.weights': str(path)}).teacher
    return backbones.create_classifier(recipe, n, size)


def saved(tmp_path, thing, name='RETFound.pth'):
    torch.save(thing, tmp_path/name)
    return tmp_path/name


def features(net, x):
    body = net.body.eval()
    return body.forward_head(body.forward_features(x), pre_logits=True)


@pytest.mark.parametrize('arch', [MAE, 'vit_large_patch16_224.mae'])
def test_mae_weights_give_the_features_of_the_same_weights_loaded_by_hand(arch, tmp_path):
    theirs, x = encoder(arch, 64), torch.rand(2, 3, 64, 64)
    net = started(arch, saved(tmp_path, mae_checkpoint(theirs)), 64)
    with torch.no_grad(): assert torch.equal(features(net, x), theirs(x))
    assert net.body.get_classifier().out_features == 4
    assert net.changes['left_out'] == ['mask_token', 'decoder_pos_embed', 'decoder_embed',
                                       'decoder_norm', 'decoder_blocks', 'decoder_pred']
    assert 'positions' not in net.changes


@pytest.mark.parametrize('key', ['teacher', 'model'])
@pytest.mark.parametrize('chunked', [True, False])
def test_dinov2_weights_give_the_features_of_those_loaded_by_hand(key, chunked, tmp_path):
    theirs, x = encoder(DINO, 56), torch.rand(2, 3, 56, 56)
    assert 'blocks.1.ls1.gamma' in theirs.state_dict()
    net = started(DINO, saved(tmp_path, dino_checkpoint(theirs, key, chunked)), 56)
    with torch.no_grad(): assert torch.equal(features(net, x), theirs(x))
    assert net.changes == dict(left_out=['dino_head', 'ibot_head', 'mask_token'])


@pytest.mark.parametrize('arch, checkpoint, patch', [(MAE, mae_checkpoint, 16),
                                                     (DINO, dino_checkpoint, 14)])
def test_positions_of_another_grid_are_resampled_as_timm_does_it(arch, checkpoint, patch, tmp_path):
    theirs = encoder(arch, 4*patch)
    net = started(arch, saved(tmp_path, checkpoint(theirs)), 6*patch)
    own = net.body.state_dict()
    want = resample_abs_pos_embed(theirs.pos_embed, [6, 6], num_prefix_tokens=1)
    assert torch.equal(own['pos_embed'], want) and own['pos_embed'].shape[1] == 37
    assert all(torch.equal(own[k], v) for k, v in theirs.state_dict().items() if k != 'pos_embed')
    assert net.changes['positions'] == '4 x 4 to 6 x 6'


def test_patches_of_another_size_are_resampled_as_timm_does_it(tmp_path):
    theirs = encoder(MAE, 64)
    net = started('vit_small_patch8_224',
                  saved(tmp_path, mae_checkpoint(theirs)), 32)
    want = resample_patch_embed(theirs.patch_embed.proj.weight, [8, 8])
    assert torch.equal(net.body.patch_embed.proj.weight, want)
    assert net.changes['patches'] == '16 x 16 px to 8 x 8 px'


class Harmful: pass


def test_the_arguments_of_a_command_are_read_and_other_objects_are_refused(tmp_path):
    theirs = encoder(MAE, 64)
    assert started(MAE, saved(tmp_path, mae_checkpoint(theirs)), 64)
    bad = saved(tmp_path, mae_checkpoint(theirs, callback=Harmful()), 'bad.pth')
    with pytest.raises(KdoctError, match='Harmful.*not plain tensors alone'): started(MAE, bad, 64)


def cut(checkpoint, drop):
    (state,) = [v for k, v in checkpoint.items() if k in ('model', 'teacher')]
    for k in [k for k in state if k.startswith(drop)]: del state[k]
    return checkpoint


@pytest.mark.parametrize('drop, what', [
    ('blocks.1.', 'blocks.1.norm1.weight is missing'),
    ('norm.', 'norm.weight is missing'),       # the last normalisation is not made up
    ('cls_token', 'cls_token is missing'),
    ('patch_embed.', 'patch_embed.proj.weight is missing'),
    ('pos_embed', 'pos_embed is missing'),
])
def test_a_checkpoint_that_lacks_a_part_is_refused(drop, what, tmp_path):
    file = saved(tmp_path, cut(mae_checkpoint(encoder(MAE, 64)), drop))
    with pytest.raises(KdoctError, match=what) as e: started(MAE, file, 96)
    assert e.value.fix


def test_positions_of_no_square_are_refused(tmp_path):
    checkpoint = mae_checkpoint(encoder(MAE, 64))
    checkpoint['model']['pos_embed'] = checkpoint['model']['pos_embed'][:, :-2]
    with pytest.raises(KdoctError, match='14 positions of patches, which are no square') as e:
        started(MAE, saved(tmp_path, checkpoint), 96)
    assert 'get them again' in e.value.fix


@pytest.mark.parametrize('kwargs', [dict(embed_dim=64), dict(depth=3), dict(init_values=1e-5)])
def test_weights_of_another_transformer_are_refused(kwargs, tmp_path):
    file = saved(tmp_path, mae_checkpoint(encoder(MAE, 64, **kwargs)))
    with pytest.raises(KdoctError, match=f'does not fit {MAE}'): started(MAE, file, 96)


def test_an_unknown_head_beside_the_encoder_is_refused(tmp_path):
    checkpoint = mae_checkpoint(encoder(MAE, 64))
    checkpoint['model']['segmenter.weight'] = torch.zeros(2)
    with pytest.raises(KdoctError, match='segmenter.weight is not known'):
        started(MAE, saved(tmp_path, checkpoint), 64)


def test_an_encoder_of_another_family_is_not_touched(tmp_path):
    net = REAL('test_efficientnet')
    state = net.state_dict() | {'decoder_norm.weight': torch.ones(2)}
    with pytest.raises(KdoctError, match='decoder_norm.weight is not known'):
        started('test_efficientnet', saved(tmp_path, state), 64)


# --- fine-tuned

def fine_tuned(size=64, pool='avg', seed=2):
    "As RETFound's fine-tuning saves it: the mean of the patches, fc_norm behind it, a head."
    torch.manual_seed(seed)
    net = small(MAE, img_size=size, num_classes=4, global_pool=pool)
    torch.nn.init.normal_(net.head.weight, std=.3)
    args = argparse.Namespace(nb_classes=4, global_pool=True)
    return net.eval(), dict(model=net.state_dict(), epoch=3, args=args)


def imported(tmp_path, size=64, **how):
    net, checkpoint = fine_tuned()
    file = saved(tmp_path, checkpoint, 'checkpoint-best.pth')
    folders.import_model_folder(file, MAE, CLASSES, tmp_path/'mine', size, 'teacher', **how)
    return net, tmp_path/'mine'


def test_a_fine_tuned_transformer_that_takes_the_mean_is_imported_as_it_is(tmp_path):
    theirs, folder = imported(tmp_path, mean=folders.IMAGENET['mean'], std=folders.IMAGENET['std'])
    net, about = folders.load_model_folder(folder)
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad(): assert torch.equal(net(x), theirs(net.prepare(x)))
    assert (about['role'], about['imported']['global_pool']) == ('teacher', 'avg')
    assert 'fc_norm.weight' in load_file(folder/'model.safetensors')


def test_a_training_starts_from_a_fine_tuned_file_or_its_folder_with_its_pooling(tmp_path):
    theirs, folder = imported(tmp_path)
    for weights in (tmp_path/'checkpoint-best.pth', folder):
        net, x = started(MAE, weights, 64, 3), torch.rand(2, 3, 64, 64)
        with torch.no_grad():
            want = theirs.forward_head(theirs.forward_features(x), pre_logits=True)
            assert torch.equal(features(net, x), want)


def test_a_fine_tuned_transformer_is_imported_for_its_own_size(tmp_path):
    with pytest.raises(KdoctError, match='of pictures of 64 px') as e: imported(tmp_path, 96)
    assert '--size 64' in e.value.fix


@pytest.mark.parametrize('arch, checkpoint, size', [(MAE, mae_checkpoint, 64),
                                                    (DINO, dino_checkpoint, 56)])
def test_a_pretrained_encoder_is_no_classifier_to_import(arch, checkpoint, size, tmp_path):
    file = saved(tmp_path, checkpoint(encoder(arch, size)))
    with pytest.raises(KdoctError, match='has no classifier') as e:
        folders.import_model_folder(file, arch, CLASSES, tmp_path/'mine', size)
    assert f'teacher.arch={arch}' in e.value.fix and 'teacher.weights=' in e.value.fix


# --- in a run

def run_with(name, **changes):
    run = create_run(name, preset('tiny', **{
        'teacher.arch': MAE, 'teacher.epochs': 1, 'student.epochs': 1, 'evaluate.n_boot': 100,
        **changes}))
    prepare_data(run)
    return run


def test_a_training_from_foundation_weights_records_and_says_what_was_changed(tmp_path, capsys):
    file = saved(tmp_path, mae_checkpoint(encoder(MAE, 96)))
    run = run_with('retfound', **{'teacher.weights': str(file), 'data.size': 64})
    about, out = train_teacher(run), capsys.readouterr().out
    start = about['weights_from']
    assert (start['kind'], start['file']) == ('file', 'RETFound.pth')
    assert start['positions'] == '6 x 6 to 4 x 4' and 'decoder_blocks' in start['left_out']
    facts = run.stage('fold_0/teacher')
    assert facts['weights_from'] == start and 'resampled from 6 x 6 to 4 x 4' in out
    for words in ('not known which images', 'only the encoder is used', 'resampled from 6 x 6'):
        assert any(words in n for n in facts['notes']), words


@pytest.mark.slow
def test_that_the_folds_of_an_imported_teacher_are_not_known_is_said_everywhere(tmp_path):
    _, mine = imported(tmp_path)
    run = run_with('own', **{'teacher.weights': str(mine), 'teacher.train': False, 'data.size': 64,
                             'students': {'soft': {}}})
    for train in (train_teacher, train_student, train_baseline): train(run)
    train_student(run, 0, 'student-soft')
    evaluate_fold(run, 0, verbose=False)
    words = 'Teacher: folds not known (imported from checkpoint-best.pth, not trained here)'
    told = read_json(run.fold_dir(0)/'evaluation.json')
    assert words in told['protocol'] and any(words in w for w in told['warnings'])
    assert words in compare_students(run, [0])[0]['comparison_models'].caption
    assert report_html(run).read_text().count('folds not known') >= 2
    for role in ('teacher', 'student'):
        card = model_card_facts({}, run, 0, role)
        assert any('folds not known' in w for w in card['warnings']), role
    warnings = model_card_facts({}, run, 0, 'baseline')['warnings']
    assert not any('folds not known' in w for w in warnings)   # it had no teacher
