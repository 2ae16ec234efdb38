"A bundle that is not what was sealed, or could do harm, is refused with a reason, and nothing large is read before."
import json
import os
import pickle
import shutil
import struct
import sys
import tracemalloc
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from kdoct.core.files import KdoctError, sha256_file
from kdoct.deploy.bundle import (
    check_name,
    new_keys,
    open_sealed,
    read_tensors,
    seal,
    strict_json,
    tensor_table,
)


def message(*fields):
    "A protobuf message of (number, bytes or int) fields."
    def varint(n):
        out = b""
        while n > 127: out, n = out + bytes([n & 127 | 128]), n >> 7
        return out + bytes([n])
    return b"".join(
        varint(k << 3 | 2) + varint(len(v)) + v
        if isinstance(v, bytes)
        else varint(k << 3) + varint(v)
        for k, v in fields
    )


def onnx_of(*tensor): return message((8, message((2, 17))), (7, message((5, message(*tensor)))))


FLOATS = ((1, 4), (2, 1), (8, b"w"), (9, b"\0" * 16))  # a tensor of four float32 numbers
OPENVINO = ('<net><layers><layer type="Const"><data element_type="f32" shape="4" offset="0" '
            'size="16"/></layer></layers></net>')


def fill(folder):
    "Files of every kind that a bundle has."
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        dict(w=np.arange(8, dtype=np.float32), b=np.ones((2, 2), np.float32)),
        folder / "model.safetensors",
    )
    (folder / "model.json").write_text('{"classes": ["CNV", "NORMAL"]}')
    (folder / "MODEL_CARD.md").write_text("# A student\n")
    (folder / "model.onnx").write_bytes(onnx_of(*FLOATS))
    (folder / "openvino.xml").write_text(OPENVINO)
    (folder / "openvino.bin").write_bytes(bytes(range(16)))
    return folder


@pytest.fixture
def bundle(tmp_path):
    folder = fill(tmp_path / "bundle")
    seal(folder, dict(name="a student"))
    return folder


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    pytest.importorskip("cryptography")
    return new_keys(tmp_path_factory.mktemp("keys") / "maker.pem")


def refused(folder, why, **options):
    "The reason that is given, which holds `why` and says what to do."
    with pytest.raises(KdoctError) as e: open_sealed(folder, **options)
    assert why in e.value.problem, e.value.problem
    assert e.value.fix
    return e.value


def relist(folder, **changes):
    "Somebody who makes a bundle by hand: hashes and sizes of the files as they are, and `changes` of the list."
    about = json.loads((folder / "bundle.json").read_text())
    for name, f in about["files"].items():
        if (folder / name).is_file():
            f.update(bytes=(folder / name).stat().st_size, sha256=sha256_file(folder / name))
    about["files"].update(changes)
    (folder / "bundle.json").write_text(json.dumps(about))


def test_a_bundle_opens_as_sealed(bundle):
    about = open_sealed(bundle)
    assert (
        about["name"] == "a student"
        and about["signed"] is False
        and about["signature"] == "not signed"
    )
    assert sorted(about["files"]) == [
        "MODEL_CARD.md",
        "model.json",
        "model.onnx",
        "model.safetensors",
        "openvino.bin",
        "openvino.xml",
    ]


# --- what was changed on the way

@pytest.mark.parametrize(
    "name", ["model.safetensors", "model.json", "MODEL_CARD.md", "model.onnx", "openvino.xml", "openvino.bin"]
)
def test_a_changed_byte_is_refused(bundle, name):
    data = bytearray((bundle / name).read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / name).write_bytes(data)
    assert name in refused(bundle, "its SHA-256 is not the one in bundle.json").problem


def test_a_missing_file_is_refused(bundle):
    (bundle / "model.onnx").unlink()
    refused(bundle, "missing: model.onnx")


@pytest.mark.parametrize("name", ["extra.safetensors", "model.pth", "sub/extra.json", ".hidden", "run\x1b[31m.py"])
def test_a_file_that_is_not_listed_is_refused(bundle, name):
    (bundle / name).parent.mkdir(exist_ok=True)
    (bundle / name).write_bytes(b"x")
    assert "\x1b" not in refused(bundle, "not listed").problem, "a terminal would obey the name"


def test_a_file_cut_off_is_refused_by_its_size(bundle):
    os.truncate(bundle / "model.safetensors", 20)
    refused(bundle, "20 bytes, not")


# --- what a malicious maker lists

def make_pickle(path): path.write_bytes(pickle.dumps({"w": [1.0]}))


def make_torch_zip(path):
    with zipfile.ZipFile(path, "w") as z: z.writestr("archive/data.pkl", pickle.dumps({}))


@pytest.mark.parametrize("make", [make_pickle, make_torch_zip])
@pytest.mark.parametrize("name", ["model.safetensors", "openvino.bin"])
def test_a_pickle_under_another_name_is_refused(bundle, make, name):
    make(bundle / name)
    relist(bundle)
    refused(bundle, "pickle")


@pytest.mark.parametrize("name", ["model.pth", "model.pt", "model.pkl", "code.py", "lib.so", "model"])
def test_only_known_kinds_of_files_are_listed(bundle, name):
    shutil.copy(bundle / "MODEL_CARD.md", bundle / name)
    relist(bundle, **{name: dict(bytes=12, sha256=sha256_file(bundle / name))})
    refused(bundle, "no file of a bundle")


@pytest.mark.parametrize(
    "name",
    ["../a.md", "a/../../a.md", "/etc/a.md", "C:/a.md", "C:a.md", "..\\a.md", "a\\b.md", "\\\\host\\a.md", "./a.md",
     "a//b.md", "a.md/", "con.md", "a.md.", "a\n.md", "a.md\0", "Ä.md", ""],
)
def test_a_name_that_leaves_the_bundle_is_refused(bundle, name):
    relist(bundle, **{name: dict(bytes=12, sha256="0" * 64)})
    refused(bundle, "no plain name inside the bundle")


@given(st.text("ab.A1_-/\\:~ \n\0é", max_size=12))
def test_a_name_that_passes_stays_inside(name):
    try: check_name(name)
    except KdoctError: return
    assert (
        os.path.normpath(os.path.join("bundle", name)).startswith("bundle" + os.sep)
        and ":" not in name
        and "\\" not in name
    )


def test_two_names_that_one_file_system_takes_for_one_are_refused(bundle):
    (bundle / "model_card.md").write_text("x")
    relist(bundle, **{"model_card.md": dict(bytes=1, sha256="0" * 64)})
    refused(bundle, "capitals")


@pytest.mark.parametrize("target", ["file", "folder"])
def test_a_link_out_of_the_bundle_is_refused(bundle, tmp_path, target):
    secret = tmp_path / "secret.json"
    secret.write_text("{}")
    (bundle / "model.json").unlink()
    (bundle / "model.json").symlink_to(secret if target == "file" else tmp_path)
    relist(bundle)
    refused(bundle, "'model.json' is a link")


def test_bundle_json_itself_may_not_be_a_link(bundle, tmp_path):
    (bundle / "bundle.json").rename(tmp_path / "elsewhere.json")
    (bundle / "bundle.json").symlink_to(tmp_path / "elsewhere.json")
    refused(bundle, "a link")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
@pytest.mark.parametrize("name", ["bundle.json", "model.json"])
def test_a_pipe_is_refused_instead_of_waited_for(bundle, name):
    (bundle / name).unlink()
    os.mkfifo(bundle / name)
    refused(bundle, "no plain file")


# --- tensors

def write_table(path, table, data=b""):
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def tensor(shape, start, end, dtype="F32"):
    return dict(dtype=dtype, shape=shape, data_offsets=[start, end])


TABLES = {
    "10 GB declared, in its place": (
        dict(w=tensor([50_000, 50_000], 0, 10**10)),
        "end at byte 10000000000 of 64",
    ),
    "10 GB declared, in 64 bytes": (
        dict(w=tensor([50_000, 50_000], 0, 64)),
        "declares 10000000000 bytes and has 64",
    ),
    "more than numbers hold": (dict(w=tensor([2**40, 2**40], 0, 64)), "declares"),
    "overlapping": (dict(a=tensor([8], 0, 32), b=tensor([10], 24, 64)), "overlap"),
    "the same bytes twice": (dict(a=tensor([16], 0, 64), b=tensor([16], 0, 64)), "overlap"),
    "a hole": (dict(a=tensor([4], 0, 16), b=tensor([8], 32, 64)), "holes"),
    "bytes behind the last": (dict(a=tensor([8], 0, 32)), "end at byte 32 of 64"),
    "before the first": (dict(a=tensor([20], -16, 64)), "place"),
    "backwards": (dict(a=tensor([16], 64, 0)), "declares"),
    "negative shape": (dict(a=tensor([-4, -4], 0, 64)), "shape"),
    "a shape of words": (dict(a=tensor(["16"], 0, 64)), "shape"),
    "a shape of truth": (dict(a=tensor([True], 0, 4)), "shape"),
    "an unknown type": (dict(a=tensor([16], 0, 64, "O")), "no such tensor"),
    "no table": ([1], "no table"),
    "no JSON": (b"{" * 50, "not JSON"),
    "deep": (b"[" * 10**6, "deep"),
    "NaN": (b'{"a": NaN}', "NaN"),
    "a tensor named twice": (b'{"a": 1, "a": 2}', "twice"),
}


@pytest.mark.parametrize("case", TABLES)
def test_a_table_that_does_not_fit_its_file_is_refused_before_anything_is_allocated(tmp_path, case):
    table, why = TABLES[case]
    write_table(tmp_path / "w.safetensors", table, b"\0" * 64)
    tracemalloc.start()
    with pytest.raises(KdoctError, match="w.safetensors") as e:
        read_tensors(tmp_path / "w.safetensors")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert why in e.value.problem and peak < 30 << 20


@pytest.mark.parametrize("data", [b"", b"\x10", struct.pack("<Q", 2**63), struct.pack("<Q", 100) + b"{}"])
def test_a_table_longer_than_its_file_is_refused(tmp_path, data):
    (tmp_path / "w.safetensors").write_bytes(data)
    with pytest.raises(KdoctError, match="not safetensors, or cut off"):
        read_tensors(tmp_path / "w.safetensors")


def test_tensors_come_back_as_saved(tmp_path):
    arrays = dict(
        a=np.arange(6, dtype=np.float32).reshape(2, 3),
        empty=np.zeros((0, 4), np.int64),
        scalar=np.array(7, np.uint8),
        yes=np.array([True]),
    )
    save_file(arrays, tmp_path / "w.safetensors", metadata=dict(format="pt"))
    for framework in ("numpy", "torch"):
        back = read_tensors(tmp_path / "w.safetensors", framework)
        assert {k: v.tolist() for k, v in back.items()} == {
            k: v.tolist() for k, v in arrays.items()
        }


@given(st.integers(0, 10**6), st.integers(0, 255))
def test_a_damaged_table_is_refused_or_reads_as_safetensors_does(tmp_path_factory, at, value):
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    save_file(dict(w=np.arange(8, dtype=np.float32), b=np.ones((2, 2), np.float32)), path)
    data = bytearray(path.read_bytes())
    data[at % len(data)] = value
    path.write_bytes(data)
    try: table = tensor_table(path)
    except KdoctError: return
    assert set(read_tensors(path)) == set(table)


# --- JSON

NO_JSON = [
    (b"[" * 10**6, "deep"),
    (b"[" * 40 + b"]" * 40, "deep"),
    (b'{"a": NaN}', "NaN"),
    (b'{"a": -Infinity}', "Infinity"),
    (b"[1e999]", "finite"),
    (b" ", "not JSON"),
    (b"\xff\xfe", "utf-8"),
    (b'{"a": 1} x', "not JSON"),
    (b'"\\ud800"', "surrogate"),
    (b"[" + b"9" * 5000 + b"]", "digits"),
]


@pytest.mark.parametrize("text, why", NO_JSON, ids=lambda v: str(v)[:12])
def test_json_that_is_none_is_refused(bundle, text, why):
    (bundle / "model.json").write_bytes(text)
    relist(bundle)
    refused(bundle, why)
    (bundle / "bundle.json").write_bytes(text)
    refused(bundle, why)


def test_a_bundle_json_of_1_gb_is_not_read(bundle):
    os.truncate(bundle / "bundle.json", 1 << 30)
    tracemalloc.start()
    refused(bundle, "too many for this file")
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "[]",
        '{"bundle": 2}',
        '{"bundle": 1}',
        '{"bundle": 1, "files": {}}',
        '{"bundle": 1, "files": ["MODEL_CARD.md"]}',
        '{"bundle": 1, "files": {"MODEL_CARD.md": {}}}',
        '{"bundle": 1, "files": {"MODEL_CARD.md": {"bytes": -1, "sha256": "0"}}}',
    ],
)
def test_a_bundle_json_of_another_kind_is_refused(bundle, text):
    (bundle / "bundle.json").write_text(text)
    refused(bundle, "bundle.json")


def test_more_bytes_than_a_bundle_has_are_refused_before_they_are_read(bundle):
    relist(bundle, **{"openvino.bin": dict(bytes=1 << 40, sha256="0" * 64)})
    refused(bundle, "bytes (at most")


@given(st.binary(max_size=200))
def test_json_gives_a_value_or_a_reason(data):
    try: json.dumps(strict_json(data, "x.json"), allow_nan=False)
    except KdoctError as e: assert "x.json" in e.problem


# --- graphs

def graph_is_refused(bundle, data, why):
    (bundle / "model.onnx").write_bytes(data)
    relist(bundle)
    refused(bundle, why)


def external(location):
    return (1, 4), (2, 1), (13, message((1, b"location"), (2, location))), (14, 1)


@pytest.mark.parametrize(
    "location",
    [b"../weights.data", b"/etc/weights.data", b"sub/../../weights.data", b"nobody.data", b"C:\\weights.data", b""],
)
def test_an_onnx_whose_numbers_lie_outside_is_refused(bundle, location):
    graph_is_refused(bundle, onnx_of(*external(location)), "not of the bundle")


def test_an_onnx_whose_numbers_lie_in_a_listed_file_opens(bundle):
    (bundle / "weights.data").write_bytes(bytes(16))
    (bundle / "model.onnx").write_bytes(onnx_of(*external(b"weights.data")))
    relist(bundle, **{"weights.data": dict(bytes=16, sha256=sha256_file(bundle / "weights.data"))})
    assert open_sealed(bundle)["name"] == "a student"


def test_a_tensor_in_a_branch_of_an_onnx_graph_is_found(bundle):
    onnx = pytest.importorskip("onnx")
    w = onnx.numpy_helper.from_array(np.zeros(4, np.float32), "w")
    onnx.external_data_helper.set_external_data(w, "../secret")
    out = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [4])
    def branch():
        return onnx.helper.make_graph(
            [onnx.helper.make_node("Constant", [], ["y"], value=w)], "branch", [], [out]
        )
    node = onnx.helper.make_node("If", ["c"], ["y"], then_branch=branch(), else_branch=branch())
    graph = onnx.helper.make_graph(
        [node], "g", [onnx.helper.make_tensor_value_info("c", onnx.TensorProto.BOOL, [])], [out]
    )
    graph_is_refused(
        bundle, onnx.helper.make_model(graph).SerializeToString(), "not of the bundle: ['../secret'"
    )


@pytest.mark.parametrize(
    "dims",
    [((1, 50_000), (1, 50_000)), ((1, message((0, 50_000))[1:] * 2),), ((1, 2**63),)],
    ids=["each", "packed", "one"],
)
def test_an_onnx_tensor_of_10_gb_is_refused(bundle, dims):
    graph_is_refused(bundle, onnx_of(*dims, (2, 1), (9, b"\0" * 16)), "it declares a tensor of")


@pytest.mark.parametrize(
    "data",
    [b"x", b"\x80\x04N.", onnx_of(*FLOATS)[:-3], b"\x08\x07", b"\x3b\x00", b"\xff" * 20, b"\x08\x01" * 2_100_000],
    ids=["letter", "pickle", "cut", "no graph", "group", "endless number", "endless fields"],
)
def test_an_onnx_that_is_none_is_refused(bundle, data):
    graph_is_refused(bundle, data, "not an ONNX model")


def test_a_real_onnx_model_opens(bundle):
    onnx = pytest.importorskip("onnx")
    w = onnx.numpy_helper.from_array(np.ones((8, 3, 3, 3), np.float32), "w")
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Conv", ["x", "w"], ["y"])],
        "g",
        [value("x", 1, ["n", 3, "h", "w"])],
        [value("y", 1, None)],
        [w],
    )
    (bundle / "model.onnx").write_bytes(onnx.helper.make_model(graph).SerializeToString())
    relist(bundle)
    assert open_sealed(bundle)["files"]["model.onnx"]["bytes"] > 864


@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_damaged_onnx_gives_a_reason_or_passes(tmp_path_factory, changes):
    from kdoct.deploy.bundle import _check_onnx
    data, path = bytearray(onnx_of(*FLOATS)), tmp_path_factory.getbasetemp() / "fuzz.onnx"
    for at, value in changes: data[at % len(data)] = value
    path.write_bytes(data)
    try: _check_onnx(path, "fuzz.onnx", {})
    except KdoctError as e: assert "fuzz.onnx" in e.problem


LIES = {
    "10 GB": (OPENVINO.replace('"16"', '"10000000000"'), "points to byte 10000000000 of 16"),
    "before": (OPENVINO.replace('"0"', '"-9"').replace('"16"', '"25"'), "points to byte"),
    "entity": (
        '<!DOCTYPE n [<!ENTITY a SYSTEM "file:///etc/hostname">]><net>&a;</net>',
        "document type",
    ),
    "cut": (OPENVINO[:40], "not XML"),
    "word": (OPENVINO.replace('"16"', '"a"'), "not XML"),
}


@pytest.mark.parametrize("text, why", LIES.values(), ids=list(LIES))
def test_an_openvino_text_that_lies_is_refused(bundle, text, why):
    (bundle / "openvino.xml").write_text(text)
    relist(bundle)
    refused(bundle, why)


# --- signatures

def test_a_signed_bundle_opens_with_its_key(tmp_path, keys):
    made = seal(fill(tmp_path / "b"), dict(name="a student"), key=keys[0])
    assert made["signed"] is True
    assert open_sealed(tmp_path / "b", public_key=keys[1]) == made


def test_a_signature_that_nobody_checked_is_not_called_one(tmp_path, keys):
    seal(fill(tmp_path / "b"), dict(name="a student"), key=keys[0])
    about = open_sealed(tmp_path / "b")
    assert about["signed"] is False and "not checked" in about["signature"]


def test_a_signature_by_another_key_is_refused(tmp_path, keys):
    seal(fill(tmp_path / "b"), dict(name="a student"), key=new_keys(tmp_path / "other.pem")[0])
    refused(tmp_path / "b", "signed by another key", public_key=keys[1])


def test_a_signature_that_claims_the_right_key_is_refused(tmp_path, keys):
    seal(fill(tmp_path / "b"), dict(name="a student"), key=new_keys(tmp_path / "other.pem")[0])
    printed = json.loads((tmp_path / "b" / "signature.json").read_text())
    seal(tmp_path / "b", dict(name="a student"), key=keys[0])
    true = json.loads((tmp_path / "b" / "signature.json").read_text())
    (tmp_path / "b" / "signature.json").write_text(json.dumps(printed | dict(key=true["key"])))
    refused(tmp_path / "b", "the signature is not of this bundle.json", public_key=keys[1])


def test_a_bundle_without_signature_is_refused_where_a_key_is_given(bundle, keys):
    refused(bundle, "it is not signed", public_key=keys[1])


def test_a_signed_bundle_that_was_listed_anew_is_refused(tmp_path, keys):
    seal(fill(tmp_path / "b"), dict(name="a student"), key=keys[0])
    (tmp_path / "b" / "model.json").write_text("{}")
    relist(tmp_path / "b")
    refused(tmp_path / "b", "the signature is not of this bundle.json", public_key=keys[1])
    assert open_sealed(tmp_path / "b")["signed"] is False, "hashes alone cannot tell who made it"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"algorithm": "none", "key": "aa", '
                                                  '"signature": "aa"}',
                                  '{"algorithm": "Ed25519", "key": "zz", "signature": "aa"}'])
def test_a_signature_file_that_is_none_is_refused(bundle, keys, text):
    (bundle / "signature.json").write_text(text)
    refused(bundle, "signature.json", public_key=keys[1])


def test_sealing_again_without_a_key_takes_the_old_signature_away(tmp_path, keys):
    seal(fill(tmp_path / "b"), dict(name="a student"), key=keys[0])
    assert seal(tmp_path / "b", dict(name="a student"))["signature"] == "not signed"


def test_a_key_is_its_owners_alone_and_never_replaced(tmp_path, keys):
    if os.name == "posix": assert keys[0].stat().st_mode & 0o077 == 0
    before = keys[0].read_bytes()
    with pytest.raises(KdoctError, match="There is a key already"): new_keys(keys[0])
    assert keys[0].read_bytes() == before


@pytest.mark.parametrize("wrong", ["private", "nothing", "text", "another kind"])
def test_a_file_that_is_no_public_key_is_refused(bundle, keys, tmp_path, wrong):
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import x25519
    file = {"private": keys[0]}.get(wrong, tmp_path / "key.pub")
    if wrong == "text": file.write_text("hello")
    if wrong == "another kind":
        file.write_bytes(x25519.X25519PrivateKey.generate().public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo))
    with pytest.raises(KdoctError, match="key") as e: open_sealed(bundle, public_key=file)
    assert "kdoct make-keys FILE" in e.value.fix


def test_a_public_key_signs_nothing_and_the_private_one_is_asked_for(bundle, keys):
    with pytest.raises(KdoctError, match="no private key") as e: seal(bundle, {}, key=keys[1])
    assert "Give the private key" in e.value.fix


def test_openssl_agrees_about_the_signature(tmp_path, keys):
    "The signature can be checked without kdoct."
    if shutil.which("openssl") is None: pytest.skip("openssl is not installed")
    import subprocess
    seal(fill(tmp_path / "b"), dict(name="a student"), key=keys[0])
    (tmp_path / "sig").write_bytes(
        bytes.fromhex(json.loads((tmp_path / "b" / "signature.json").read_text())["signature"])
    )
    command = [
        "openssl",
        "pkeyutl",
        "-verify",
        "-pubin",
        "-inkey",
        keys[1],
        "-rawin",
        "-in",
        tmp_path / "b" / "bundle.json",
        "-sigfile",
        tmp_path / "sig",
    ]
    assert (
        "Success"
        in subprocess.run([str(c) for c in command], capture_output=True, text=True).stdout
    )


def test_without_cryptography_an_unsigned_bundle_opens_and_a_key_names_the_extra(
    bundle, tmp_path, monkeypatch
):
    for name in ("cryptography", "cryptography.exceptions"):
        monkeypatch.setitem(sys.modules, name, None)
    assert open_sealed(bundle)["signed"] is False
    for call in (
        lambda: open_sealed(bundle, public_key=tmp_path / "k.pub"),
        lambda: new_keys(tmp_path / "k"),
    ):
        with pytest.raises(KdoctError) as e: call()
        assert "kdoct[deploy]" in e.value.fix


# --- sealing

def test_what_could_not_be_opened_is_not_sealed(tmp_path):
    folder = fill(tmp_path / "b")
    make_torch_zip(folder / "model.safetensors")
    with pytest.raises(KdoctError, match="pickle"): seal(folder, dict(name="a student"))


def test_a_stray_file_is_named_when_sealing(tmp_path):
    folder = fill(tmp_path / "b")
    (folder / "notes.docx").write_bytes(b"x")
    with pytest.raises(KdoctError, match="notes.docx") as e: seal(folder, dict(name="a student"))
    assert "seal again" in e.value.fix


def test_a_folder_that_is_no_bundle_says_how_to_make_one(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(KdoctError) as e: open_sealed(folder)
        assert "kdoct export" in e.value.fix
