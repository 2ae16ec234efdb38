"OFA-595 is the published network: same outputs, same names, timm's manners."
import pytest
import timm
import torch
from safetensors.torch import save_file

from kdoct.core.files import KdoctError
from kdoct.core.presets import preset
from kdoct.data.packaged_weights import probe_picture
from kdoct.models.backbones import count_parameters, create_classifier
from kdoct.models.folders import import_model_folder, load_model_folder
from kdoct.models.ofa import OFA_595, map_ofa_names


def published_config():
    "The configuration as the once-for-all package writes it, from our table."
    blocks, wide = [], 24
    for excite, act, rows in OFA_595:
        for out, kernel, stride, expand in rows:
            conv = dict(
                name="MBConvLayer",
                in_channels=wide,
                out_channels=out,
                kernel_size=kernel,
                stride=stride,
                expand_ratio=expand,
                act_func="h_swish" if act == "hard_swish" else act,
                use_se=excite,
            )
            short = (
                dict(name="IdentityLayer", in_channels=out, out_channels=out)
                if stride == 1 and wide == out
                else None
            )
            blocks.append(dict(name="ResidualBlock", conv=conv, shortcut=short))
            wide = out

    def conv(a, b, k, s, bn, act="h_swish"):
        return dict(
            name="ConvLayer",
            in_channels=a,
            out_channels=b,
            kernel_size=k,
            stride=s,
            use_bn=bn,
            act_func=act,
        )
    return dict(
        bn=dict(momentum=0.1, eps=1e-5),
        first_conv=conv(3, 24, 3, 2, True),
        blocks=blocks,
        final_expand_layer=conv(wide, 1152, 1, 1, True),
        feature_mix_layer=conv(1152, 1536, 1, 1, False),
        classifier=dict(
            name="LinearLayer", in_features=1536, out_features=1000, bias=True, dropout_rate=0.2
        ),
    )


@pytest.fixture(scope="module")
def published():
    "The same network from the once-for-all package, with weights and statistics that are not the initial ones."
    from ofa.imagenet_classification import networks
    torch.manual_seed(1)
    net = networks.MobileNetV3.build_from_config(published_config()).eval()
    for m in net.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.5, 1.5)
            torch.nn.init.uniform_(m.weight, 0.5, 1.5)
    return net


def test_ofa595_computes_what_the_once_for_all_package_computes(published):
    ours = timm.create_model("ofa595").eval()
    ours.load_state_dict(map_ofa_names(published.state_dict()))
    x = probe_picture(96)
    with torch.inference_mode():
        a, b = ours(x), published(x)
    assert b.std() > 0.01  # not flat
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_published_names_load_from_a_file_with_other_classes(published, tmp_path):
    save_file(published.state_dict(), tmp_path / "ofa.safetensors")
    recipe = preset(
        "explainable-edge", **{"student.weights": str(tmp_path / "ofa.safetensors")}
    ).student
    body = create_classifier(recipe, 3, 64).body
    assert torch.equal(body.conv_stem.weight, published.first_conv.conv.weight)
    assert count_parameters(body) == 7_603_539


def test_older_published_names_load_too(published, tmp_path):
    old = {
        k.replace(".conv.", ".mobile_inverted_conv.", 1) if k.startswith("blocks.") else k: v
        for k, v in published.state_dict().items()
    }
    assert any("mobile_inverted_conv" in k for k in old)
    assert (
        map_ofa_names(old).keys()
        == map_ofa_names(published.state_dict()).keys()
        == timm.create_model("ofa595").state_dict().keys()
    )


def test_a_model_folder_is_made_of_the_published_weights(published, tmp_path):
    save_file(published.state_dict(), tmp_path / "ofa.safetensors")
    import_model_folder(
        tmp_path / "ofa.safetensors",
        "ofa595",
        [f"c{i}" for i in range(1000)],
        tmp_path / "folder",
        96,
    )
    net, about = load_model_folder(tmp_path / "folder")
    assert about["parameters"] == 9_135_928
    x = torch.rand(1, 3, 96, 96)
    with torch.inference_mode():
        torch.testing.assert_close(net(x), published((x - net.mean)/net.std), atol=1e-4, rtol=1e-4)


def test_a_file_of_another_network_is_refused(tmp_path):
    save_file(timm.create_model("test_efficientnet").state_dict(), tmp_path / "x.safetensors")
    recipe = preset(
        "explainable-edge", **{"student.weights": str(tmp_path / "x.safetensors")}
    ).student
    with pytest.raises(KdoctError, match="does not fit ofa595"): create_classifier(recipe, 3, 64)


def test_there_are_no_weights_on_a_hub_and_that_is_said():
    recipe = preset("explainable-edge", **{"student.weights": "hub"}).student
    with pytest.raises(KdoctError, match="hub did not give weights for 'ofa595'"):
        create_classifier(recipe, 3, 64)


def test_autoformerv2_is_s3():
    assert (
        count_parameters(timm.create_model("autoformerv2_tiny"))
        == count_parameters(timm.create_model("swin_s3_tiny_224"))
        == 28_328_674
    )
