"A bundle goes to the Hub and comes back; timm reads it. The Hub is a stand-in below the HTTP library."
import base64
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import imported_network
from PIL import Image

from kdoct.app.cli import main
from kdoct.core.files import KdoctError, read_json
from kdoct.deploy import hub
from kdoct.deploy.networks import open_network
from kdoct.deploy.stage import export_folder

httpx = pytest.importorskip("httpx2", reason="this version of huggingface_hub has another HTTP library")

REPO, COMMIT = "someone/oct", "c" * 40


class Hub:
    "What the Hub answers, from files in memory; `asked` are the requests."

    def __init__(self): self.files, self.asked, self.private, self.made = {}, [], None, False

    def __call__(self, request):
        path, method = request.url.path, request.method
        self.asked.append((method, path, request.headers.get("authorization")))
        if path == "/api/repos/create": return self.create(json.loads(request.content))
        if path == "/api/validate-yaml": return httpx.Response(200, json=dict(errors=[], warnings=[]))
        if not self.made: return self.missing("RepoNotFound")
        if path.startswith(f"/{REPO}/resolve/"): return self.resolve(method, path.split("/", 5)[5])
        if "/preupload/" in path: return self.preupload(json.loads(request.content))
        if "/commit/" in path: return self.commit(request.content)
        if "/tree/" in path: return self.tree()
        return httpx.Response(200, json=dict(id=REPO, sha=COMMIT, private=self.private, siblings=[]))

    def missing(self, code):
        return httpx.Response(404, headers={"X-Error-Code": code}, json=dict(error="no"))

    def create(self, wanted):
        self.made = True
        if self.private is None:
            self.private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
        return httpx.Response(200, json=dict(url=f"https://huggingface.co/{REPO}", id=REPO, name=REPO))

    def preupload(self, wanted):
        modes = [dict(path=f["path"], uploadMode="regular", shouldIgnore=False) for f in wanted["files"]]
        return httpx.Response(200, json=dict(files=modes))

    def commit(self, content):
        for line in content.decode().splitlines():
            d = json.loads(line)
            if d["key"] == "file":
                self.files[d["value"]["path"]] = base64.b64decode(d["value"]["content"])
            if d["key"] == "deletedFile": self.files.pop(d["value"]["path"], None)
        url = f"https://huggingface.co/{REPO}/commit/{COMMIT}"
        return httpx.Response(200, json=dict(commitOid=COMMIT, commitUrl=url, success=True))

    def tree(self):
        rows = [dict(type="file", path=n, size=len(b), oid="0" * 40) for n, b in self.files.items()]
        return httpx.Response(200, json=rows)

    def resolve(self, method, name):
        if name not in self.files: return self.missing("EntryNotFound")
        content = self.files[name]
        headers = {"ETag": f'"{hash(content):x}"', "X-Repo-Commit": COMMIT}
        if method == "HEAD":
            return httpx.Response(200, headers=headers | {"Content-Length": str(len(content))})
        return httpx.Response(200, headers=headers, content=content)


@pytest.fixture
def the_hub(tmp_path, monkeypatch):
    "A stand-in for the Hub, an empty cache, and somebody who is logged in."
    import huggingface_hub
    from huggingface_hub import constants
    answers = Hub()
    cache = str(tmp_path / "cache")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", cache)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    make = lambda: httpx.Client(transport=httpx.MockTransport(answers))  # noqa: E731
    huggingface_hub.set_client_factory(make)
    yield answers
    from huggingface_hub.utils import _http
    huggingface_hub.set_client_factory(_http.default_client_factory)


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    "A network of 64 px without a run, its pictures, and its bundle for timm."
    at = tmp_path_factory.mktemp("timm")
    imported_network(at, 3)
    bundle = export_folder(at / "mine", at / "pictures", at / "bundle", ["timm"])
    return SimpleNamespace(at=at, folder=at / "mine", bundle=bundle, pictures=at / "pictures")


def probabilities(bundle, pictures):
    from kdoct import Predictor
    with Predictor(bundle, engine="torch") as p:
        return np.array([[r[f"probability_{c}"] for c in p.classes] for r in p.predict([pictures])])


# --- timm

def test_timm_says_of_pictures_what_kdoct_says(exported):
    import timm
    net = timm.create_model(f"local-dir:{exported.bundle}", pretrained=True).eval()
    assert list(net.pretrained_cfg["label_names"]) == ["CNV", "DRUSEN", "NORMAL"]
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=net))
    files = sorted(exported.pictures.iterdir())
    x = torch.stack([transform(Image.open(f).convert("RGB")) for f in files])
    with torch.no_grad(): theirs = net(x).softmax(1).numpy()
    ours = probabilities(exported.bundle, exported.pictures)
    assert np.abs(theirs - ours).max() < 1e-3 < np.ptp(ours)


def test_what_timm_cannot_do_is_said_in_the_readme_and_the_record(exported, tmp_path):
    shutil.copytree(exported.folder, tmp_path / "padded")
    model = read_json(tmp_path / "padded" / "model.json")
    model["framing"] = dict(resize="pad", fill_white=True, mask_scale_bar=False)
    (tmp_path / "padded" / "model.json").write_text(json.dumps(model))
    bundle = export_folder(tmp_path / "padded", exported.pictures, formats=["timm"])
    said = open_network(bundle).about["timm"]["differences"]
    assert any("squeezes" in s for s in said) and any("white padding" in s for s in said)
    assert all(s in (bundle / "README.md").read_text() for s in said)


def test_a_network_that_timm_does_not_have_is_refused_with_the_reason(exported, tmp_path, monkeypatch):
    from kdoct.deploy import timm_folder
    shutil.copytree(exported.folder, tmp_path / "own")
    monkeypatch.setattr(timm_folder, "_why_not", lambda arch: "it is kdoct's own")
    bundle = export_folder(tmp_path / "own", exported.pictures, formats=["timm"])
    assert not (bundle / "config.json").exists() and (bundle / "README.md").exists()
    assert "cannot be opened by timm: it is kdoct's own" in (bundle / "README.md").read_text()


@pytest.mark.parametrize(("arch", "is_own"), [("ofa595", True), ("fpn_vgg16", True), ("resnet18", False)])
def test_networks_of_kdoct_are_not_taken_for_timms(arch, is_own):
    from kdoct.deploy.timm_folder import _why_not
    assert bool(_why_not(arch)) == is_own


# --- the Hub

def test_a_bundle_goes_to_the_hub_and_comes_back_the_same(exported, the_hub, capsys):
    main_of("export", exported.bundle, "--push-to", f"hf:{REPO}")
    assert f"hf_hub:{REPO}@{COMMIT} (private)" in capsys.readouterr().out
    listed = {"bundle.json", *read_json(exported.bundle / "bundle.json")["files"]}
    assert set(the_hub.files) == listed
    opened = open_network(f"hf_hub:{REPO}")
    assert opened.about["hub"] == f"hf_hub:{REPO}@{COMMIT}"
    same = probabilities(f"hf_hub:{REPO}", exported.pictures), probabilities(exported.bundle, exported.pictures)
    assert np.array_equal(*same)


def main_of(*words):
    "Run the command; its exit status."
    with pytest.raises(SystemExit) as e: main([*map(str, words)])
    return e.value.code or 0


@pytest.fixture
def on_hub(exported, the_hub):
    "The Hub with a bundle on it."
    hub.push_bundle(exported.bundle, f"hf:{REPO}")
    return the_hub


def test_no_picture_goes_to_the_hub(exported, on_hub):
    from PIL import UnidentifiedImageError
    pictures = {p.read_bytes() for p in exported.pictures.iterdir()}
    assert not pictures & set(on_hub.files.values())
    for name in on_hub.files:
        with pytest.raises(UnidentifiedImageError): Image.open(exported.bundle / name)


def test_predict_names_the_commit_that_it_uses(on_hub, exported, tmp_path, capsys):
    assert main_of("predict", f"hf_hub:{REPO}", exported.pictures, "--out", tmp_path / "rows.csv") == 0
    assert f"hf_hub:{REPO}@{COMMIT}" in capsys.readouterr().err


def test_a_changed_file_of_the_hub_is_refused(on_hub):
    on_hub.files["MODEL_CARD.md"] = on_hub.files["MODEL_CARD.md"].replace(b"CNV", b"DME")
    with pytest.raises(KdoctError, match="changed"): open_network(f"hf_hub:{REPO}")


def test_an_unsigned_bundle_of_the_hub_is_refused_where_a_signature_is_wanted(on_hub, tmp_path):
    pytest.importorskip("cryptography", reason="the extra deploy is not installed")
    from kdoct.deploy.bundle import new_keys
    _, public = new_keys(tmp_path / "key.pem")
    with pytest.raises(KdoctError, match="not signed"): open_network(f"hf_hub:{REPO}", public)


def test_a_file_that_would_leave_the_folder_is_not_asked_for(on_hub):
    on_hub.files["bundle.json"] = json.dumps(dict(bundle=1, files={"../../x.json": {}})).encode()
    with pytest.raises(KdoctError, match="no plain name"): open_network(f"hf_hub:{REPO}")


def test_what_was_downloaded_opens_without_a_network(on_hub, outputs, monkeypatch):
    open_network(f"hf_hub:{REPO}")
    shutil.rmtree(outputs / "hub")   # the cache of huggingface_hub remains
    def unreachable(request): raise httpx.ConnectError("no route")
    import huggingface_hub
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)   # retries
    huggingface_hub.set_client_factory(
        lambda: httpx.Client(transport=httpx.MockTransport(unreachable))
    )
    assert open_network(f"hf_hub:{REPO}").about["hub"].endswith(COMMIT)
    with pytest.raises(KdoctError, match="cannot be reached"): open_network("hf_hub:someone/other")


def test_a_missing_repository_and_a_repository_of_something_else_are_said(the_hub):
    with pytest.raises(KdoctError, match="no repository someone/oct") as e: open_network(f"hf_hub:{REPO}")
    assert "HF_TOKEN" in e.value.fix
    the_hub.made = True
    with pytest.raises(KdoctError, match="no bundle of kdoct"): open_network(f"hf_hub:{REPO}")


def test_nothing_is_sent_without_a_token(exported, the_hub, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN")
    assert main_of("export", exported.bundle, "--push-to", f"hf:{REPO}") == 1
    assert "no token" in capsys.readouterr().err and not the_hub.asked


def test_a_failed_push_says_how_to_try_again(exported, the_hub, monkeypatch, capsys):
    monkeypatch.setattr(Hub, "commit", lambda self, content: httpx.Response(403, json={}))
    assert main_of("export", exported.bundle, "--push-to", f"hf:{REPO}") == 1
    said = capsys.readouterr().err
    assert "the token may not" in said.lower() and f"--push-to hf:{REPO}" in said
