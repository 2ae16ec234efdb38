"Clinical files: read as libraries read them, refused in time where damaged, and no name gets out."
import io
import os
import resource
import struct
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from kdoct.core.files import KdoctError
from kdoct.data import volumes
from kdoct.data.images import decode_image, inspect_file, read_image_bytes
from kdoct.data.problems import BadImage
from kdoct.data.sandbox import bad_image
from kdoct.data.scans import Scan, display_grey
from kdoct.data.volumes import SIDE_FILES, SYSTEM_FILES, find_files, passed_over, read_scans

pydicom = pytest.importorskip("pydicom")


def textured(seed=0, n=3, h=64, w=80):
    "B-scans with structure, uint8 (n, h, w)."
    rng = np.random.default_rng(seed)
    return np.clip(
        120 + 60 * np.sin(np.arange(h) / 5)[:, None] + rng.normal(0, 20, (n, h, w)), 1, 254
    ).astype(np.uint8)


def images(path): return [np.asarray(s.image) for s in read_scans(path)]


def refusal(path):
    "What is said of a file that cannot be read."
    with pytest.raises(KdoctError) as e: list(read_scans(path))
    return str(e.value)


# --- writers; where a library has the structure, it writes

def write_dicom(path, frames, bits=8, **elements):
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid
    a, d = np.asarray(frames), pydicom.Dataset()
    d.file_meta = pydicom.dataset.FileMetaDataset()
    d.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    d.SOPClassUID, d.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.77.1.5.4", generate_uid()
    d.PatientName, d.PatientBirthDate, d.PatientID = "Zzyzx^Quilla", "19610203", "Study-07"
    d.NumberOfFrames, d.Rows, d.Columns, d.SamplesPerPixel = (
        len(a),
        *a.shape[1:3],
        3 if a.ndim == 4 else 1,
    )
    d.PhotometricInterpretation = "RGB" if a.ndim == 4 else "MONOCHROME2"
    if a.ndim == 4: d.PlanarConfiguration = 0
    d.BitsAllocated, d.BitsStored, d.HighBit, d.PixelRepresentation = (
        8 if bits == 8 else 16,
        bits,
        bits - 1,
        0,
    )
    d.PixelData = a.astype("u1" if bits == 8 else "<u2").tobytes() + bytes(
        a.size % 2 if bits == 8 else 0
    )
    for k, v in elements.items(): setattr(d, k, v)
    d.save_as(path, enforce_file_format=True)
    return path


def write_vol(
    path, bscans, header=300, lie=61440, version=b"HSF-OCT-103", patient=b"Study-07"
):
    n, h, w = bscans.shape
    head = bytearray(2048)
    head[:len(version)] = version
    for at, v in ((12, w), (16, n), (20, h), (100, lie)):
        head[at:at + 4] = int(v).to_bytes(4, "little")
    head[84:86], head[140:164] = b"OD", patient.ljust(24, b"\0")
    part = bytes(12) + header.to_bytes(4, "little") + bytes(header - 16)
    values = (np.exp(bscans.astype(np.float32)/255*8.285 - 8.3) - 2.44e-4).astype("<f4")
    path.write_bytes(bytes(head) + b"".join(part + v.tobytes() for v in values))
    return path


def write_e2e(path, series, patient=b"Study-07", eye_kinds=(11, 3)):
    "An .e2e file of oct-converter's structures; `series`: eye letter, uint16 codes (n, h, w) each."
    from oct_converter.readers.binary_structs import e2e_binary as e2e
    person = (
        b"Quilla".ljust(31, b"\0")
        + b"Zzyzx".ljust(66, b"\0")
        + (19610203).to_bytes(4, "little")
        + b"F"
        + patient.ljust(25, b"\0")
    )
    records = [(9, -1, 0, -1, person)]
    for k, (eye, codes) in enumerate(series, 1):
        records += [
            (kind, -1, 0, k, bytes({11: 14, 3: 4}[kind]) + eye.encode() + bytes(80))
            for kind in eye_kinds
        ]
        for i, c in enumerate(codes):
            head = dict(
                size=c.nbytes, type=35652097, unknown=c.size, height=c.shape[0], width=c.shape[1]
            )
            records.append(
                (
                    1073741824,
                    2 * i,
                    1,
                    k,
                    e2e.image_structure.build(head) + c.astype("<u2").tobytes(),
                )
            )
    first, data, entries = 36 + 52, b"", b""
    start = first + 52 + 44*len(records)
    for kind, slice, ind, k, content in records:
        ids = dict(
            patient_db_id=5,
            study_id=6,
            series_id=k & 0xFFFFFFFF,
            slice_id=slice,
            ind=ind,
            type=kind,
        )
        zero = dict(unknown=0, unknown2=0, unknown3=0, unknown4=0, unknown5=0)
        entries += e2e.sub_directory_structure.build(
            {**zero, **ids, "pos": first, "start": start + len(data), "size": len(content)}
        )
        data += (
            e2e.chunk_structure.build(
                {**zero, **ids, "magic3": "MDbData", "pos": start + len(data), "size": len(content)}
            )
            + content
        )
    chain = dict(magic2="MDbDir", version=100, unknown=[0]*10, unknown3=0)
    path.write_bytes(
        e2e.header_structure.build(dict(magic1="CMDb", version=100, unknown=[0] * 10))
        + e2e.main_directory_structure.build(
            {**chain, "num_entries": 0, "current": first, "prev": 0}
        )
        + e2e.main_directory_structure.build(
            {**chain, "num_entries": len(records), "current": first, "prev": 0}
        )
        + entries
        + data
    )
    return path


def jpeg2000(a, **options):
    "A picture without loss."
    buf = io.BytesIO()
    Image.fromarray(a).save(buf, "JPEG2000", irreversible=False, **options)
    return buf.getvalue()


def write_topcon(path, pixels, jpeg=False, name="Zzyzx Müller", corrected=None):
    "An .fda or .fds file of oct-converter's structures; uint8 (jpeg) or uint16 pixels (n, h, w)."
    from oct_converter.readers.binary_structs import fda_binary, fds_binary
    n, h, w = pixels.shape
    if jpeg:
        head = fda_binary.oct_header.build(
            dict(
                scan_mode=2, unknown1=0, unknown2=0, width=w, height=h, number_slices=n, unknown3=0
            )
        )
        data = head + b"".join(len(j).to_bytes(4, "little") + j for j in map(jpeg2000, pixels))
    else:
        head = fds_binary.oct_header.build(
            dict(
                scan_mode=2,
                width=w,
                height=h,
                bits_per_pixel=16,
                number_slices=n,
                format=1,
                size=2 * pixels.size,
            )
        )
        data = head + pixels.astype("<u2").tobytes()
    capture = fds_binary.capture_info_02_header.build(
        dict(eye=0, scan_mode=2, session_id=1, label="", cap_date=[2026, 1, 1, 0, 0, 0])
    )
    patient = (
        b"Study-07".ljust(32, b"\0") + name.encode("cp1252").ljust(72, b"\0") + b"\1" + bytes(800)
    )
    parts = {
        b"@PATIENT_INFO_02": patient,
        b"@CAPTURE_INFO_02": capture,
        b"@IMG_JPEG" if jpeg else b"@IMG_SCAN_03": data,
    }
    if corrected is not None:
        head = dict(
            scan_mode=2,
            width=w,
            height=h,
            bits_per_pixel=16,
            number_slices=len(corrected),
            format=1,
            size=2 * corrected.size,
        )
        parts = {
            b"@IMG_MOT_COMP_03": fda_binary.oct_header_2.build(head)
            + corrected.astype("<u2").tobytes(),
            **parts,
        }
    path.write_bytes(
        fda_binary.header.build(dict(file_code="FOCT", file_type="FDA", major_ver=2, minor_ver=0))
        + b"".join(bytes([len(k)]) + k + len(v).to_bytes(4, "little") + v for k, v in parts.items())
        + b"\0"
    )
    return path


def write_xml(folder, bscans, extra=""):
    folder.mkdir()
    for i, b in enumerate(bscans): Image.fromarray(b).save(folder/f"B{i}.tif")
    url = "<ExamURL>file:///\\\\server\\B{}.tif</ExamURL>"
    image = f"<Image><ImageType><Type>OCT</Type></ImageType><ImageData>{url}</ImageData></Image>"
    made = "".join(image.format(i) for i in range(len(bscans)))
    series = f"<Series><ID>9</ID><Laterality>R</Laterality>{made}</Series>"
    person = "<ID>1</ID><PatientID>Study-07</PatientID><LastName>Zzyzx-Müller</LastName>"
    patient = f"<Patient>{person}<Study>{series}</Study></Patient>"
    (folder/"e.xml").write_text(f"{extra}<HEDX><BODY>{patient}</BODY></HEDX>", "latin-1")
    return folder/"e.xml"


# --- real files

def test_the_vol_with_a_lying_header_is_read_as_eyepy_reads_it(shared_data):
    eyepy = pytest.importorskip("eyepy")
    path = shared_data/"volumes"/"synthetic_10_bscans.vol"
    scans = list(read_scans(path))
    want = eyepy.import_heyex_vol(path).data
    assert np.array_equal([np.asarray(s.image) for s in scans], want)
    assert [(s.slice, s.n_slices, s.eye, s.patient) for s in scans] == [
        (i, 10, "OD", "Study-01") for i in range(10)
    ]
    assert "61440" in scans[0].notes[0] and "3656" in scans[0].notes[0]
    # it holds 0 to 254, not 0 to 1: white, as eyepy shows it, but not silently
    assert "far above 1" in scans[0].notes[1]


def test_a_circle_scan_which_eyepy_refuses_is_read_and_said_to_be_one(shared_data):
    eyepy = pytest.importorskip("eyepy.io.he")
    from eyepy.core.utils import from_vol_intensity
    path = shared_data/"volumes"/"spectralis_circle_scan.vol"
    scan, = read_scans(path)
    assert (scan.image.size, scan.eye, scan.patient, scan.notes) == (
        (768, 496),
        "OD",
        "HEYEX-50469",
        ("circle scan",),
    )
    want = from_vol_intensity(eyepy.HeVolReader(path).parsed_file.bscans[0].data.copy())
    assert np.array_equal(scan.image, want)


def test_the_heyex_export_is_read_as_eyepy_reads_it(shared_data):
    eyepy = pytest.importorskip("eyepy")
    path = shared_data/"volumes"/"heyex_xml"/"test_dummy.xml"
    scans = list(read_scans(path))
    assert np.array_equal([np.asarray(s.image) for s in scans], eyepy.import_heyex_xml(path).data)
    assert {(s.eye, s.patient, s.n_slices) for s in scans} == {("OD", "Study-01", len(scans))}
    assert "Doe" not in repr(scans) and "John" not in repr(scans)


def test_pictures_that_an_xml_names_do_not_come_again(shared_data):
    # the XML names ten of its eleven pictures
    found = [p.name for p in find_files(shared_data/"volumes")]
    assert found == [
        "empty.vol",
        "B11.tif",
        "test_dummy.xml",
        "spectralis_circle_scan.vol",
        "synthetic_10_bscans.vol",
    ]
    assert refusal(shared_data/"volumes"/"empty.vol").startswith("empty: empty.vol")


# --- formats of which there is no real file

def test_e2e_gives_every_volume_with_its_own_eye(tmp_path):
    pytest.importorskip("oct_converter")
    right, left = (
        np.random.default_rng(s).integers(50 << 10, 63 << 10, (n, 40, 48)).astype(np.uint16)
        for s, n in ((0, 3), (1, 2))
    )
    scans = list(read_scans(write_e2e(tmp_path/"a.e2e", [("R", right), ("L", left)])))
    assert [(s.eye, s.slice, s.n_slices) for s in scans] == [
        ("OD", 0, 3),
        ("OD", 1, 3),
        ("OD", 2, 3),
        ("OS", 0, 2),
        ("OS", 1, 2),
    ]
    assert {s.patient for s in scans} == {"Study-07"} and len({s.volume for s in scans}) == 2
    value = (1 + (left[1] & 1023)/1024)*2.**((left[1] >> 10).astype(int) - 63)
    assert np.array_equal(scans[4].image, display_grey(value.astype(np.float32)))


def test_e2e_agrees_with_the_libraries_where_the_order_of_the_mantissas_bits_does_not_matter(
    tmp_path,
):
    readers, eyepy = (
        pytest.importorskip("oct_converter.readers"),
        pytest.importorskip("eyepy.io.he"),
    )
    from eyepy.core.utils import from_e2e_intensity
    same = np.array(
        [c for c in range(45 << 10, 63 << 10) if f"{c & 1023:010b}" == f"{c & 1023:010b}"[::-1]],
        np.uint16,
    )
    codes = np.random.default_rng(0).choice(same, (3, 40, 48))
    path = write_e2e(tmp_path/"a.e2e", [("L", codes)])
    volume, = readers.E2E(path).read_oct_volume()
    assert volume.laterality == "L" and volume.patient_id == "Study-07"
    assert np.array_equal(images(path), np.rint(255*np.array(volume.volume)).astype(np.uint8))
    with eyepy.HeE2eReader(path) as reader:
        assert np.array_equal(
            images(path),
            [
                from_e2e_intensity(np.float32(s.get_bscan()))
                for s in reader.series[0].slices.values()
            ],
        )


@pytest.mark.parametrize("kinds,eye", [((11,), "OS"), ((3,), "OS"), ((), "")])
def test_e2e_names_the_eye_in_either_of_two_records(tmp_path, kinds, eye):
    pytest.importorskip("oct_converter")
    (scan,) = read_scans(
        write_e2e(tmp_path / "a.e2e", [("L", np.full((1, 40, 48), 60 << 10))], eye_kinds=kinds)
    )
    assert scan.eye == eye


def test_e2e_of_several_volumes_begins_64_bytes_later(tmp_path):
    pytest.importorskip("oct_converter")
    path = write_e2e(tmp_path/"a.e2e", [("R", np.full((2, 40, 48), 60 << 10))])
    (tmp_path/"b.e2e").write_bytes(b"E2EMultipleVolumeFile".ljust(64, b"\0") + path.read_bytes())
    assert np.array_equal(images(tmp_path/"b.e2e"), images(path))


def test_e2e_takes_what_is_not_measured_for_black_and_says_what_it_leaves_out(tmp_path):
    pytest.importorskip("oct_converter")
    path = write_e2e(tmp_path/"a.e2e", [("R", np.full((2, 40, 48), 0xffff))])
    assert {int(i.max()) for i in images(path)} == {0}
    raw = path.read_bytes()
    at = raw.rindex((35652097).to_bytes(4, "little"))
    path.write_bytes(raw[:at] + b"\x07" + raw[at + 1:])
    scan, = read_scans(path)
    assert scan.n_slices == 1 and "1 picture of unknown kinds" in scan.notes[0]


def test_an_e2e_directory_that_leads_back_to_itself_ends(tmp_path):
    pytest.importorskip("oct_converter")
    path = write_e2e(tmp_path/"a.e2e", [("R", np.full((1, 40, 48), 60 << 10))])
    raw = bytearray(path.read_bytes())
    raw[36 + 52 + 44:36 + 52 + 48] = (36 + 52).to_bytes(4, "little")
    path.write_bytes(raw)
    assert "leads back" in refusal(path)


def test_topcon_parts_are_read_though_the_name_is_not_ascii(tmp_path):
    pytest.importorskip("oct_converter")
    pixels = textured()
    fda, fds = (
        write_topcon(tmp_path / "a.fda", pixels, jpeg=True),
        write_topcon(tmp_path / "a.fds", pixels.astype(np.uint16) * 100),
    )
    assert np.array_equal(images(fda), pixels)
    assert np.array_equal(images(fds), np.rint(pixels*(255/pixels.max())).astype(np.uint8))
    for path in (fda, fds):
        first = next(read_scans(path))
        assert (first.eye, first.patient, first.n_slices, first.volume) == (
            "OD",
            "Study-07",
            3,
            "a",
        )


def test_topcon_agrees_with_oct_converter_once_that_has_the_numpy_function_it_needs(
    tmp_path, monkeypatch
):
    readers = pytest.importorskip("oct_converter.readers")
    monkeypatch.setattr(np, "fromstring", lambda b, dtype: np.frombuffer(b, dtype))
    for reader, jpeg, name in ((readers.FDA, True, "a.fda"), (readers.FDS, False, "a.fds")):
        path = write_topcon(
            tmp_path / name, textured().astype(np.uint8 if jpeg else np.uint16), jpeg, name="Zzyzx"
        )
        want = reader(path).read_oct_volume()
        assert (want.laterality, want.patient_id) == ("R", "Study-07")
        assert np.array_equal(
            images(path),
            np.rint(np.array(want.volume) * (1 if jpeg else 255 / np.max(want.volume))),
        )


def test_topcon_gives_the_whole_volume_not_the_motion_corrected_part(tmp_path):
    pytest.importorskip("oct_converter")
    pixels = textured()
    path = write_topcon(tmp_path/"a.fds", pixels.astype(np.uint16), corrected=pixels[:1]//2)
    assert len(images(path)) == 3
    raw = path.read_bytes()
    path.write_bytes(
        raw.replace(b"@IMG_MOT_COMP_03", b"@IMG_SCAN_03").replace(
            b"\x10@IMG_SCAN_03", b"\x0c@IMG_SCAN_03"
        )
    )
    assert "the first of 2 volumes" in next(read_scans(path)).notes[0]
    path.write_bytes(raw.replace(b"@IMG_SCAN_03", b"@IMG_SCAN_99"))
    scan, = read_scans(path)
    assert "perhaps not the whole volume" in scan.notes[0]


def test_a_topcon_header_that_asks_for_more_than_there_is_is_refused(tmp_path):
    pytest.importorskip("oct_converter")
    path = write_topcon(tmp_path/"a.fds", textured().astype(np.uint16))
    raw = bytearray(path.read_bytes())
    at = raw.index(b"@IMG_SCAN_03") + 12 + 4 + 13
    raw[at:at + 4] = (4000).to_bytes(4, "little")
    path.write_bytes(raw)
    assert refusal(path).startswith("truncated: a.fds")


@pytest.mark.parametrize(
    "name",
    [
        "cube.img",
        "512x128.img",
        "P1_Macular Cube 64x3_and 80x3_x.img",
        "80x64x2.img",
        "P1_Angio (6mmx6mm)_OD.img",
    ],
)
def test_an_img_of_unsaid_or_wrong_size_is_refused(tmp_path, name):
    (tmp_path/name).write_bytes(textured().tobytes())
    assert "WIDTHxHEIGHTxB-SCANS" in refusal(tmp_path/name)


def test_an_img_is_turned_by_half_a_turn(tmp_path):
    pixels = textured()
    (tmp_path/"80x64x3.img").write_bytes(pixels[:, ::-1, ::-1].tobytes())
    assert np.array_equal(images(tmp_path/"80x64x3.img"), pixels)


@pytest.mark.parametrize(
    "begin,patient",
    [("P0017_Macular", "P0017"), ("PSmith_Macular", ""), ("Macular", ""), ("0017_Macular", "")],
)
def test_eye_and_patient_of_a_cirrus_name(tmp_path, begin, patient):
    path = tmp_path/f"{begin} Cube 200x2_3-14-2026_9-26-53_OS_sn4711_cube_z.img"
    path.write_bytes(bytes(2*1024*200))
    assert {(s.eye, s.patient, s.image.size) for s in read_scans(path)} == {
        ("OS", patient, (200, 1024))
    }


def with_values(path, values):
    "A .vol file of which all values of the B-scans are those."
    write_vol(path, textured())
    raw, at, size = path.read_bytes(), 2048 + 300, 4*64*80
    for i in range(3):
        begin = at + i*(size + 300)
        raw = (
            raw[:begin]
            + np.broadcast_to(np.asarray(values, "<f4"), (64, 80)).tobytes()
            + raw[begin + size :]
        )
    path.write_bytes(raw)
    return path


@pytest.mark.parametrize(
    "value,words",
    [
        (np.nan, "not a number"),
        (np.inf, "not a number"),
        (-0.25, "below 0"),
        ([[np.nan, -1] * 40], "below 0 or not a number"),
    ],
)
def test_a_vol_of_no_reflectivity_says_what_its_values_are(tmp_path, value, words):
    found = refusal(with_values(tmp_path/"a.vol", value))
    assert (
        found.startswith("wrong-mode: a.vol: B-scan 1") and f"all its values are {words}" in found
    )


def test_values_of_a_vol_that_only_other_maps_have_are_noted(tmp_path):
    scan = next(read_scans(with_values(tmp_path/"a.vol", np.where(np.arange(80) % 9, .01, -1.))))
    assert "OCT angiography" in " ".join(scan.notes)
    scan = next(
        read_scans(
            with_values(
                tmp_path / "a.vol", np.where(np.arange(80) % 9, 0.01, np.finfo(np.float32).max)
            )
        )
    )
    assert "OCT angiography" not in " ".join(scan.notes)   # not measured, as HEYEX marks it


@pytest.mark.parametrize("name", ["a.vol", "a.e2e", "a.fda", "a.dcm", "a.xml", "80x64x1.img"])
def test_a_picture_with_the_ending_of_a_volume_is_read_as_what_it_is(tmp_path, name):
    Image.fromarray(textured()[0]).save(tmp_path/"a.png")
    (tmp_path/"a.png").rename(tmp_path/name)
    scan, = read_scans(tmp_path/name)
    assert np.array_equal(scan.image, textured()[0]) and scan.volume == ""


@pytest.mark.parametrize("name", ["a.dcm", "a.e2e", "a.img", "a.png", "a"])
def test_a_volume_with_another_ending_is_read_as_what_it_is(tmp_path, name):
    write_vol(tmp_path/"a.vol", textured())
    (tmp_path/"a.vol").rename(tmp_path/name)
    assert np.array_equal(images(tmp_path/name), textured())


def test_zeroed_jpeg_2000_of_topcon_is_refused(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (3, 64, 80), np.uint8)
    path = write_topcon(tmp_path/"a.fda", noise, jpeg=True)
    data, coded = path.read_bytes(), jpeg2000(noise[1])
    at = data.index(coded) + len(coded)//2
    path.write_bytes(data[:at] + bytes(500) + data[at + 500:])
    assert "corrupt: a.fda: a part of the JPEG 2000 data is zeroed" in refusal(path)


def test_damaged_jpeg_of_topcon_is_refused(tmp_path):
    def part(coded):
        head = b"\2" + bytes(8) + b"".join(v.to_bytes(4, "little") for v in (80, 64, 1, 0))
        return head + len(coded).to_bytes(4, "little") + coded
    buf = io.BytesIO()
    Image.fromarray(textured()[0]).save(buf, "JPEG")
    sound = buf.getvalue()
    middle = len(sound) - 800
    assert len(images(topcon(tmp_path/"a.fda", [(b"@IMG_JPEG", part(sound))]))) == 1
    damaged = topcon(
        tmp_path / "b.fda", [(b"@IMG_JPEG", part(sound[:middle] + bytes(798) + sound[-2:]))]
    )
    assert refusal(damaged).startswith("corrupt: b.fda")


# --- other pictures of the same devices

def vol_names(folder):
    "What becomes of each .vol file: the number of its B-scans, or the kind of its refusal."
    out = {}
    for path in sorted(folder.glob("*.vol")):
        try: out[path.name] = len(list(read_scans(path)))
        except BadImage as e: out[path.name] = e.kind
    return out


def test_octa_beside_oct_is_refused_by_its_name(tmp_path):
    for name in ("12345", "12345_angio", "12345-OCTA", "octavia", "12345_angio_structure"):
        write_vol(tmp_path/f"{name}.vol", textured())
    assert vol_names(tmp_path) == {
        "12345.vol": 3,
        "12345_angio.vol": "not-a-bscan",
        "12345-OCTA.vol": "not-a-bscan",
        "octavia.vol": 3,
        "12345_angio_structure.vol": 3,
    }


def test_octa_without_a_name_is_found_by_the_header_of_the_oct_beside_it(tmp_path):
    write_vol(tmp_path/"12345.vol", textured(0))
    write_vol(tmp_path/"12345_2.vol", textured(1))
    write_vol(tmp_path/"123456.vol", textured(0, n=2))   # another exam
    (tmp_path/"12345_copy.vol").write_bytes((tmp_path/"12345.vol").read_bytes())
    assert vol_names(tmp_path) == {
        "12345.vol": 3,
        "12345_2.vol": "not-a-bscan",
        "123456.vol": 2,
        "12345_copy.vol": 3,
    }
    assert "the same header as 12345.vol" in refusal(tmp_path/"12345_2.vol")
    assert next(read_scans(tmp_path/"12345.vol")).notes[-1:] != ()


def test_two_names_with_one_header_are_noted_where_none_tells_the_oct(tmp_path):
    for seed, name in enumerate("AB"): write_vol(tmp_path/f"{name}.vol", textured(seed))
    assert "B.vol has the same header" in " ".join(next(read_scans(tmp_path/"A.vol")).notes)


@pytest.mark.parametrize("name", ["P1_Angiography 80x3_OD_FlowCube_z.img", "80x64x3_flow.img"])
def test_a_flow_cube_of_cirrus_is_refused(tmp_path, name):
    (tmp_path/name).write_bytes(textured().tobytes())
    assert refusal(tmp_path/name).startswith("not-a-bscan")


@pytest.mark.parametrize("eye", [b"OS", b"L", b"os", b" l", b"Left"])
def test_the_left_eye_in_every_spelling(tmp_path, eye):
    path = write_vol(tmp_path/"a.vol", textured(n=1))
    path.write_bytes(path.read_bytes()[:84] + eye.ljust(4, b"\0") + path.read_bytes()[88:])
    assert next(read_scans(path)).eye == "OS"


def with_e2e_kind(path, was, is_):
    "The same file with one kind of records, or type of pictures, replaced by another."
    path.write_bytes(
        path.read_bytes().replace(was.to_bytes(4, "little"), is_.to_bytes(4, "little"))
    )
    return path


def test_octa_in_an_e2e_file_is_left_out_and_said(tmp_path):
    pytest.importorskip("oct_converter")
    path = with_e2e_kind(
        write_e2e(tmp_path / "a.e2e", [("R", np.full((3, 40, 48), 60 << 10))]),
        1073741824,
        1073751901,
    )
    assert "3 of OCT angiography" in refusal(path) and refusal(path).startswith("not-a-bscan")
    both = write_e2e(tmp_path/"b.e2e", [("R", np.full((3, 40, 48), 60 << 10))])
    raw = both.read_bytes()
    # the last record's kind in the directory
    at = raw.rindex((1073741824).to_bytes(4, "little"), 0, raw.index(b"MDbData"))
    both.write_bytes(raw[:at] + (1073751901).to_bytes(4, "little") + raw[at + 4:])
    scans = list(read_scans(both))
    assert len(scans) == 2 and scans[0].notes == (
        "left out: 1 picture of OCT angiography in the file",
    )


def test_an_e2e_file_of_fundus_pictures_says_so(tmp_path):
    pytest.importorskip("oct_converter")
    path = with_e2e_kind(
        write_e2e(tmp_path / "a.e2e", [("R", np.full((2, 40, 48), 60 << 10))]), 35652097, 33620481
    )
    assert "2 infrared" in refusal(path)


@pytest.mark.parametrize(
    "tag,value",
    [
        ("<ImageType><Type>OCT</Type>", "<ImageType><Type>ANGIO</Type>"),
        ("<Laterality>R", "<Modality>OCTA</Modality><Laterality>R"),
        ("<Laterality>R", "<Type>Angiography</Type><Laterality>R"),
    ],
)
def test_angiography_in_a_heyex_export_is_no_bscan(tmp_path, tag, value):
    path = write_xml(tmp_path/"x", textured())
    path.write_text(path.read_text("latin-1").replace(tag, value, 3), "latin-1")
    assert "3 OCT angiography" in refusal(path) and refusal(path).startswith("not-a-bscan")


def test_what_else_a_heyex_export_holds_is_left_out_and_said(tmp_path):
    path = write_xml(tmp_path/"x", textured())
    path.write_text(
        path.read_text("latin-1").replace("<Type>OCT</Type>", "<Type>EnFace</Type>", 1), "latin-1"
    )
    scans = list(read_scans(path))
    assert len(scans) == 2 and scans[0].notes == (
        "pictures that are no B-scans are left out: 1 an en face picture",
    )


def topcon(path, parts):
    path.write_bytes(
        b"FOCTFDA"
        + bytes(8)
        + b"".join(bytes([len(k)]) + k + len(v).to_bytes(4, "little") + v for k, v in parts)
        + b"\0"
    )
    return path


def topcon_raw(a, claimed=None):
    n, h, w = a.shape
    return (
        b"\2"
        + b"".join(v.to_bytes(4, "little") for v in (w, h, 16, claimed or n))
        + b"\1"
        + (2 * a.size).to_bytes(4, "little")
        + a.astype("<u2").tobytes()
    )


@pytest.mark.parametrize("part", [b"@IMG_SCAN_02", b"@IMG_MOT_COMP_02", b"@IMG_MOT_COMP_03"])
def test_older_topcon_parts_are_read_where_header_and_length_agree(tmp_path, part):
    pixels = textured().astype(np.uint16)*100
    path = topcon(
        tmp_path / "a.fds", [(b"@CAPTURE_INFO_02", b"\1" + bytes(99)), (part, topcon_raw(pixels))]
    )
    assert (
        np.array_equal(images(path), np.rint(pixels * (255 / pixels.max())))
        and next(read_scans(path)).eye == "OS"
    )
    path = topcon(
        tmp_path / "b.fds",
        [(part, topcon_raw(pixels, claimed=4)), (b"@LATER", bytes(pixels.nbytes))],
    )
    assert "header asks for" in refusal(path)


def test_a_topcon_file_of_fundus_pictures_names_its_parts(tmp_path):
    assert "@IMG_FUNDUS, @IMG_TRC_02" in refusal(
        topcon(tmp_path / "a.fda", [(b"@IMG_TRC_02", bytes(9)), (b"@IMG_FUNDUS", bytes(9))])
    )


@pytest.mark.parametrize("part", [b"@PATIENT_INFO_03", b"@PATIENT_INFO", b"@PATIENT_INFO_02"])
def test_the_patient_in_every_topcon_part(tmp_path, part):
    path = topcon(
        tmp_path / "a.fds",
        [
            (part, b"Study-07".ljust(32, b"\0") + b"Quilla".ljust(700, b"\0")),
            (b"@IMG_SCAN_03", topcon_raw(textured())),
        ],
    )
    assert next(read_scans(path)).patient == "Study-07"


@pytest.mark.parametrize(
    "begin",
    [
        b"Zzyzx",
        b"Zzyzx Quilla 7",
        bytes(range(128, 160)),
        b"\x07\x9a3" + b"\xfe" * 29,
        b"M\xfcller7",
    ],
)
def test_a_topcon_part_that_may_begin_with_a_name_gives_no_patient_and_says_so(tmp_path, begin):
    path = topcon(
        tmp_path / "a.fds",
        [(b"@PATIENT_INFO_03", begin.ljust(700, b"\0")), (b"@IMG_SCAN_03", topcon_raw(textured()))],
    )
    scan = next(read_scans(path))
    assert scan.patient == "" and "patient id withheld: @PATIENT_INFO_03" in " ".join(scan.notes)


def test_colour_jpeg_2000_of_topcon_is_read(tmp_path):
    def part(pictures):
        head = (
            b"\2" + bytes(8) + b"".join(v.to_bytes(4, "little") for v in (80, 64, len(pictures), 0))
        )
        return head + b"".join(len(j).to_bytes(4, "little") + j for j in map(jpeg2000, pictures))
    grey, colour = (
        [np.stack([a] * 3, -1) for a in textured()],
        [np.stack([a, a // 2, a // 3], -1) for a in textured()],
    )
    assert np.array_equal(
        images(topcon(tmp_path / "a.fda", [(b"@IMG_JPEG", part(grey))])), textured()
    )
    assert [
        s.image.mode for s in read_scans(topcon(tmp_path / "b.fda", [(b"@IMG_JPEG", part(colour))]))
    ] == ["RGB"] * 3


def test_heyex_pictures_whose_names_have_another_unicode_form_are_found(tmp_path):
    path = write_xml(tmp_path/"x", textured())
    for i in range(3):   # as macOS unpacks it
        (tmp_path/"x"/f"B{i}.tif").rename(tmp_path/"x"/f"Mu\u0308ller{i}.tif")
    text = path.read_text("latin-1").replace("\\B", "\\M\u00fcller")
    path.write_text('<?xml version="1.0" encoding="UTF-8"?>' + text, "utf-8")
    assert np.array_equal(images(path), textured()) and [p.name for p in find_files(tmp_path)] == [
        "e.xml"
    ]


# --- DICOM

def test_dicom_of_more_than_8_bits_by_the_values_of_the_volume_or_the_window(tmp_path):
    pixels = textured().astype(np.uint16)*257
    scan = next(read_scans(write_dicom(tmp_path/"a.dcm", pixels, bits=16)))
    low, high = int(pixels.min()), int(pixels.max())
    want = np.rint(255*(pixels[0].astype(float) - low)/(high - low))
    assert np.array_equal(scan.image, want)
    assert scan.notes == (
        f"no window in the file: grey values {low} to {high} of this volume are spread over 0-255",
    )
    scan = next(
        read_scans(
            write_dicom(
                tmp_path / "b.dcm",
                pixels,
                bits=16,
                WindowCenter=[30000.5, 1],
                WindowWidth=[20001, 1],
            )
        )
    )
    want = np.rint(255*np.clip((pixels[0].astype(float) - 20000)/20000, 0, 1))
    assert np.array_equal(scan.image, want) and "window 20000 to 40000" in scan.notes[0]


def test_dicom_window_and_rescale_may_stand_in_the_shared_group(tmp_path):
    voi, scale, shared = pydicom.Dataset(), pydicom.Dataset(), pydicom.Dataset()
    voi.WindowCenter, voi.WindowWidth, voi.VOILUTFunction = 0, 510, "LINEAR_EXACT"
    scale.RescaleSlope, scale.RescaleIntercept = 2, -255
    shared.FrameVOILUTSequence, shared.PixelValueTransformationSequence = [voi], [scale]
    scan = next(
        read_scans(
            write_dicom(tmp_path / "a.dcm", textured(), SharedFunctionalGroupsSequence=[shared])
        )
    )
    assert np.array_equal(scan.image, textured()[0])   # 2 x - 255 seen from -255 to 255


def test_dicom_eye_of_each_frame(tmp_path):
    def group(side):
        g, anatomy = pydicom.Dataset(), pydicom.Dataset()
        anatomy.FrameLaterality = side
        g.FrameAnatomySequence = [anatomy]
        return g
    path = write_dicom(
        tmp_path / "a.dcm",
        textured(),
        Laterality="R",
        PerFrameFunctionalGroupsSequence=[group("L"), group("R"), group("U")],
    )
    assert [s.eye for s in read_scans(path)] == ["OS", "OD", "OD"]
    path = write_dicom(tmp_path/"b.dcm", textured(), SharedFunctionalGroupsSequence=[group("L")])
    assert {s.eye for s in read_scans(path)} == {"OS"}


def test_dicom_of_one_frame_is_a_slice_of_its_series(tmp_path):
    (scan,) = read_scans(
        write_dicom(
            tmp_path / "a.dcm", textured(n=1), InstanceNumber=12, SeriesInstanceUID="1.2.3.4"
        )
    )
    assert (scan.slice, scan.n_slices, scan.volume) == (11, None, "1.2.3.4")


def test_dicom_compressed_without_loss_is_read_and_jpeg_ls_says_what_to_install(tmp_path):
    pixels = textured()
    d = pydicom.dcmread(write_dicom(tmp_path/"a.dcm", pixels))
    d.compress(pydicom.uid.RLELossless)
    d.save_as(tmp_path/"rle.dcm")
    assert np.array_equal(images(tmp_path/"rle.dcm"), pixels)
    d = pydicom.dcmread(tmp_path/"a.dcm")
    d.PixelData = pydicom.encaps.encapsulate([jpeg2000(a, no_jp2=True) for a in pixels])
    d["PixelData"].is_undefined_length, d["PixelData"].VR = True, "OB"
    d.file_meta.TransferSyntaxUID = pydicom.uid.JPEG2000Lossless
    d.save_as(tmp_path/"j2k.dcm")
    assert np.array_equal(images(tmp_path/"j2k.dcm"), pixels)

    d.PixelData = pydicom.encaps.encapsulate([b"nothing of the kind!"]*3)
    d["PixelData"].is_undefined_length, d["PixelData"].VR = True, "OB"
    d.save_as(tmp_path/"torn.dcm")
    assert "are damaged, or" in refusal(tmp_path/"torn.dcm")

    d.file_meta.TransferSyntaxUID = pydicom.uid.JPEGLSLossless
    d.save_as(tmp_path/"jls.dcm")
    if not pydicom.pixels.get_decoder(pydicom.uid.JPEGLSLossless).is_available:
        assert "JPEG-LS" in refusal(tmp_path / "jls.dcm") and "kdoct[volumes]" in refusal(
            tmp_path / "jls.dcm"
        )


def test_a_deflated_dicom_is_refused_before_it_is_inflated(tmp_path):
    d = pydicom.dcmread(write_dicom(tmp_path/"a.dcm", np.zeros((100, 512, 512), np.uint8)))
    d.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    d.save_as(tmp_path/"b.dcm")
    tracemalloc.start()
    assert "deflated" in refusal(tmp_path/"b.dcm")
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()


def test_a_dicom_file_without_its_end_is_refused_before_the_first_bscan(tmp_path):
    path = write_dicom(tmp_path/"a.dcm", textured())
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BadImage, match="truncated: a.dcm"): next(read_scans(path))


def test_dicom_without_pydicom_names_the_extra(tmp_path, monkeypatch):
    path = write_dicom(tmp_path/"a.dcm", textured())
    monkeypatch.setitem(sys.modules, "pydicom", None)
    assert "pip install 'kdoct[volumes]'" in refusal(path)


@pytest.mark.filterwarnings("ignore")
def test_every_test_file_of_pydicom_is_read_or_refused():
    folder, read = Path(pydicom.__file__).parent/"data"/"test_files", set()
    for path in sorted(folder.glob("*.dcm")):
        try: read |= {path.name for s in read_scans(path, "other") if s.image.mode in ("L", "RGB")}
        except KdoctError as e: assert path.name in str(e)
    assert {"SC_rgb_jpeg_dcmtk.dcm", "SC_rgb_rle_2frame.dcm", "JPEG2000.dcm"} <= read


# --- pictures

def test_a_picture_is_what_decode_image_says(tmp_path):
    Image.fromarray(textured()[0]).convert("P").save(tmp_path/"a.png")
    want, notes = decode_image(read_image_bytes(tmp_path/"a.png"))
    scan, = read_scans(tmp_path/"a.png")
    assert (
        scan == Scan(want, str(tmp_path / "a.png"), notes=tuple(notes))
        and "converted" in scan.notes
    )


def test_pages_and_frames_are_the_slices_of_a_volume(tmp_path):
    a, *rest = pages = [Image.fromarray(p) for p in textured()]
    a.save(tmp_path/"a.tif", save_all=True, append_images=rest)
    a.save(tmp_path/"a.gif", save_all=True, append_images=rest)
    for name in ("a.tif", "a.gif"):
        scans = list(read_scans(tmp_path/name))
        assert [(s.slice, s.n_slices, s.volume) for s in scans] == [(i, 3, "a") for i in range(3)]
        assert all(
            np.array_equal(s.image.convert("L"), p) for s, p in zip(scans, pages, strict=True)
        )


def test_a_page_of_16_bits_is_refused(tmp_path):
    first, second = Image.fromarray(textured()[0]), Image.fromarray(textured()[0].astype(np.uint16))
    first.save(tmp_path/"a.tif", save_all=True, append_images=[second])
    assert "wrong-mode: a.tif: page 2" in refusal(tmp_path/"a.tif")


def save_tiff(path, a, **options):
    tifffile.imwrite(path, a, **options)
    return path


@pytest.mark.parametrize(
    "options",
    [
        dict(truncate=True),
        dict(imagej=True, metadata={"axes": "ZYX"}),
        dict(truncate=True, imagej=False, bigtiff=True),
    ],
)
def test_a_stack_with_one_directory_is_all_its_bscans(tmp_path, options):
    path = save_tiff(tmp_path/"a.tif", textured(n=5), **options)
    scans = list(read_scans(path))
    assert [(s.slice, s.n_slices, s.volume) for s in scans] == [(i, 5, "a") for i in range(5)]
    assert np.array_equal([np.asarray(s.image) for s in scans], textured(n=5))


def test_a_page_whose_strips_are_missing_is_refused_alike_by_audit_and_prediction(tmp_path):
    path = save_tiff(
        tmp_path / "a.tif", textured(), metadata=None, rowsperstrip=16, photometric="minisblack"
    )
    assert np.array_equal(images(path), textured())
    data = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as t: places = t.pages[1].tags["StripOffsets"].valueoffset
    data[places:places + 4] = bytes(4)
    path.write_bytes(data)
    words = "1 of the 4 strips of its pixels are missing"
    assert inspect_file(path)["problems"][0][1].startswith(words) and refusal(path).startswith(
        f"truncated: a.tif: {words}"
    )


def imagej_one_directory(path, a, images):
    "As ImageJ writes stacks of more than 4 GB: one page, the others behind it, by the description."
    tifffile.imwrite(
        path,
        a[0],
        description=f"ImageJ=1.54f\nimages={images}\nslices={images}\nloop=false\n",
        metadata=None,
    )
    path.write_bytes(path.read_bytes() + a[1:].tobytes())
    return path


def test_an_imagej_stack_with_one_directory_is_all_its_bscans(tmp_path):
    assert np.array_equal(
        images(imagej_one_directory(tmp_path / "a.tif", textured(n=4), 4)), textured(n=4)
    )


def nih_image(path, a, slices):
    "As NIH Image writes a stack: one page, the others behind it, and their number in a tag."
    header = np.zeros(1, tifffile.TIFF.NIH_IMAGE_HEADER)
    header["nSlices"] = slices
    tag = (43314, "B", len(header.tobytes()), header.tobytes(), True)
    tifffile.imwrite(path, a[0], metadata=None, extratags=[tag], byteorder="<")
    with tifffile.TiffFile(path) as t: end = t.pages.first.dataoffsets[0] + a[0].size
    path.write_bytes(path.read_bytes()[:end] + a[1:].tobytes())
    return path


def test_an_nih_image_stack_is_all_its_bscans(tmp_path):
    assert np.array_equal(images(nih_image(tmp_path/"a.tif", textured(n=4), 4)), textured(n=4))
    assert "claims 9 pictures; 1 can be found" in refusal(
        nih_image(tmp_path/"b.tif", textured(n=4), 9)
    )


def test_pictures_that_only_the_index_of_micro_manager_names_are_refused(tmp_path):
    "As in a file that it could not close: nothing leads from one directory to the next."
    path, pixels = tmp_path/"a.tif", textured()[0]
    summary = b'{"Slices": 3, "Frames": 1, "Channels": 1, "MicroManagerVersion": "1.4"}'.ljust(80)
    index = np.uint32([3453623, 3, *np.ravel([(0, i, 0, 0, 500 + i) for i in range(3)])])
    places = 40 + len(summary) + index.nbytes    # of the directory
    data = places + 2 + 10*12 + 4
    tags = [(256, 80), (257, 64), (258, 8), (259, 1), (262, 1), (273, data), (277, 1), (278, 64)]
    tags = [(tag, 4, 1, value) for tag, value in [*tags, (279, pixels.size)]]
    tags.append((51123, 2, 3, int.from_bytes(b"{}\0\0", "little")))
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *t) for t in tags)
    numbers = [54773648, 40 + len(summary), 0, 0, 0, 0, 2355492, len(summary)]
    begin = b"II*\0" + struct.pack("<9I", places, *numbers)
    path.write_bytes(begin + summary + index.tobytes() + directory + bytes(4) + pixels.tobytes())
    assert "index names 3 pictures; 1 can be found" in refusal(path)


@pytest.mark.parametrize("more", [1, 4])
def test_pictures_that_nothing_in_a_tiff_tells_of_are_refused(tmp_path, more):
    path = save_tiff(tmp_path/"a.tif", textured()[0], metadata=None)
    path.write_bytes(path.read_bytes() + textured(n=more).tobytes())
    assert f"bytes for {more} more that nothing in the file tells of" in refusal(path)


def test_other_data_in_a_tiff_of_one_picture_are_no_pictures(tmp_path):
    long = [(65000, "B", 64*80, bytes(64*80), True)]   # as layers of Photoshop are kept
    path = save_tiff(tmp_path/"a.tif", textured()[0], metadata=None, extratags=long)
    assert np.array_equal(images(path), textured()[:1])
    path = save_tiff(tmp_path/"b.tif", textured()[0], metadata=None)
    path.write_bytes(path.read_bytes() + bytes(900))
    assert np.array_equal(images(path), textured()[:1])


def test_a_stack_that_claims_more_pictures_than_it_has_is_refused(tmp_path):
    path = imagej_one_directory(tmp_path/"a.tif", textured(n=4), 9)
    assert "claims 9 pictures; 1 can be found" in refusal(path)
    path = save_tiff(tmp_path/"b.tif", textured(n=5), truncate=True)
    path.write_bytes(path.read_bytes()[:-64*80 - 1])
    assert refusal(path).startswith("truncated: b.tif")


def test_a_shortened_stack_among_others_is_refused(tmp_path):
    for name, first, second in (("a.tif", True, False), ("b.tif", False, True)):
        with tifffile.TiffWriter(tmp_path/name) as t:
            for seed, truncate in enumerate((first, second)):
                t.write(textured(seed, n=5), truncate=truncate)
        assert "claims 10 pictures; 6 can be found" in refusal(tmp_path/name)


def test_white_is_zero_in_a_stack_with_one_directory(tmp_path):
    assert np.array_equal(
        images(
            save_tiff(
                tmp_path / "a.tif", 255 - textured(n=5), photometric="miniswhite", truncate=True
            )
        ),
        textured(n=5),
    )


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.complex64, np.uint64])
def test_numbers_that_pillow_does_not_know_are_named(tmp_path, dtype):
    assert f"wrong-mode: a.tif: a TIFF of {np.dtype(dtype)}" in refusal(
        save_tiff(tmp_path / "a.tif", textured()[0].astype(dtype))
    )


def test_channels_whose_meaning_is_not_said_are_left_out_and_noted(tmp_path):
    two = save_tiff(
        tmp_path / "a.tif",
        np.stack([textured()[0], textured()[1]], -1),
        photometric="minisblack",
        planarconfig="contig",
        metadata=None,
    )
    scan, = read_scans(two)
    assert np.array_equal(scan.image, textured()[0]) and scan.notes == ("extra-channels",)


def test_a_stack_of_16_bits_with_one_directory_is_refused_as_such(tmp_path):
    assert "8 bits" in refusal(
        save_tiff(tmp_path / "a.tif", textured(n=5).astype(np.uint16), truncate=True)
    )


def test_channels_are_not_taken_for_slices_without_a_word(tmp_path):
    path = save_tiff(
        tmp_path / "a.tif",
        textured(n=6).reshape(3, 2, 64, 80),
        imagej=True,
        metadata={"axes": "ZCYX"},
    )
    assert "2 channels a slice" in refusal(path)
    path = save_tiff(
        tmp_path / "b.ome.tif", textured(n=6).reshape(3, 2, 64, 80), metadata={"axes": "ZCYX"}
    )
    assert "2 channels a slice" in refusal(path)
    # tifffile's default takes the first axis for channels
    scans = list(read_scans(save_tiff(tmp_path/"c.tif", textured(), imagej=True)))
    assert len(scans) == 3 and "3 channels" in scans[0].notes[0]


def test_previews_and_masks_among_the_pages_are_no_bscans(tmp_path):
    with tifffile.TiffWriter(tmp_path/"a.tif") as t:
        t.write(textured()[0], metadata=None)
        t.write(textured()[0][::2, ::2], subfiletype=1, metadata=None)
    scan, = read_scans(tmp_path/"a.tif")
    assert (
        np.array_equal(scan.image, textured()[0])
        and scan.volume == ""
        and scan.notes == ("several-pictures",)
    )
    for byteorder in "<>":
        with tifffile.TiffWriter(tmp_path/"m.tif", byteorder=byteorder) as t:
            t.write(textured()[0], metadata=None)
            t.write(textured()[0] > 120, subfiletype=4, photometric="mask", metadata=None)
        scan, = read_scans(tmp_path/"m.tif")
        assert np.array_equal(scan.image, textured()[0]) and scan.notes == ("several-pictures",)
    with tifffile.TiffWriter(tmp_path/"b.tif") as t:
        t.write(textured()[0][::2, ::2], subfiletype=1, metadata=None)
        for a in textured()[:2]: t.write(a, metadata=None)
    assert np.array_equal(images(tmp_path/"b.tif"), textured()[:2])
    assert "preview" in refusal(
        save_tiff(tmp_path / "c.tif", textured()[0], subfiletype=1, metadata=None)
    )


def test_a_tiff_that_its_tag_turns_is_turned_and_noted_page_by_page(tmp_path):
    pages = [Image.fromarray(np.rot90(a, 2).copy()) for a in textured()]
    pages[0].save(tmp_path/"one.tif", tiffinfo={274: 3})
    pages[0].save(tmp_path/"all.tif", save_all=True, append_images=pages[1:], tiffinfo={274: 3})
    for path, n in ((tmp_path/"one.tif", 1), (tmp_path/"all.tif", 3)):
        scans = list(read_scans(path))
        assert [s.notes for s in scans][:1] == [("exif-rotated",)]
        assert np.array_equal(np.asarray(scans[0].image), textured()[0]) and len(scans) == n


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_colour_planes_one_after_the_other_are_one_picture(tmp_path, compression):
    rgb = np.stack([textured()[0], textured()[1], textured()[2]])
    path = save_tiff(
        tmp_path / "a.tif",
        rgb,
        photometric="rgb",
        planarconfig="separate",
        compression=compression,
        metadata=None,
    )
    scan, = read_scans(path)
    assert np.array_equal(np.moveaxis(np.asarray(scan.image), 2, 0), rgb)


@pytest.mark.filterwarnings("ignore")
def test_three_bscans_that_tifffile_wrote_as_colours_are_not_one_picture(tmp_path):
    for n in (3, 4):
        assert f"or {n} B-scans?" in refusal(save_tiff(tmp_path/f"{n}.tif", textured(n=n)))


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(truncate=True),
        dict(imagej=True, metadata={"axes": "TZYX"}),
        dict(metadata={"axes": "TZYX"}),
    ],
)
def test_two_volumes_in_one_tiff_are_not_one(tmp_path, options):
    path = save_tiff(tmp_path/"a.tif", textured(n=10).reshape(2, 5, 64, 80), **options)
    words = refusal(path)
    assert (
        words.startswith("mixed-pages: a.tif: 2 x 5 pictures")
        and "save each volume as a file of its own" in words
    )
    assert inspect_file(path)["problems"] == [
        ("mixed-pages", words.splitlines()[0].removeprefix("mixed-pages: a.tif: "))
    ]
    path = save_tiff(
        tmp_path / "b.ome.tif", textured(n=10).reshape(2, 5, 64, 80), metadata={"axes": "TZYX"}
    )
    assert refusal(path).startswith("mixed-pages: b.ome.tif: 2 x 5 pictures")


def test_an_axis_of_one_is_no_second_axis(tmp_path):
    for options in ({}, dict(truncate=True), dict(imagej=True, metadata={"axes": "TZYX"})):
        assert np.array_equal(
            images(save_tiff(tmp_path / "a.tif", textured(n=5)[None], **options)), textured(n=5)
        )


def test_two_stacks_in_one_tiff_are_not_one_volume_and_pages_written_one_by_one_are(tmp_path):
    with tifffile.TiffWriter(tmp_path/"a.tif") as t:
        for seed in range(2): t.write(textured(seed, n=5))
    assert "2 stacks of 5, 5 pictures" in refusal(tmp_path/"a.tif")
    with tifffile.TiffWriter(tmp_path/"b.tif") as t:
        for a in textured(): t.write(a)
    assert np.array_equal(images(tmp_path/"b.tif"), textured())


def test_pages_of_other_sizes_or_kinds_are_refused_alike_by_audit_and_prediction(tmp_path):
    a, b = textured()[:2]
    for name, other in dict(
        small=b[::2, ::2], colour=np.stack([b] * 3, -1), deep=b.astype(np.uint16), mask=b > 120
    ).items():
        with tifffile.TiffWriter(tmp_path/f"{name}.tif") as t:
            for page in (a, b, other):
                t.write(page, metadata=None, photometric="rgb" if page.ndim == 3 else "minisblack")
        (kind, detail), = inspect_file(tmp_path/f"{name}.tif")["problems"]
        assert refusal(tmp_path/f"{name}.tif").startswith(f"{kind}: {name}.tif: {detail}")
        assert kind == ("wrong-mode" if name in ("deep", "mask") else "mixed-pages")


def test_smaller_copies_below_a_page_are_no_bscans_and_noted(tmp_path):
    for n in (1, 3):
        with tifffile.TiffWriter(tmp_path/"a.tif") as t:
            for a in textured(n=n):
                t.write(a, subifds=1, metadata=None)
                t.write(a[::2, ::2], subfiletype=1, metadata=None)
        scans = list(read_scans(tmp_path/"a.tif"))
        assert np.array_equal([np.asarray(s.image) for s in scans], textured(n=n)) and {
            s.notes for s in scans
        } == {("several-pictures",)}


@pytest.mark.parametrize("orientation", [0, 9])
def test_an_orientation_that_does_not_exist_is_said_to_be_invalid(tmp_path, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(textured()[0]).save(tmp_path/"a.png", exif=exif)
    Image.fromarray(textured()[0]).save(tmp_path/"a.tif", tiffinfo={274: orientation})
    for name in ("a.png", "a.tif"):
        scan, = read_scans(tmp_path/name)
        assert scan.notes == ("invalid-orientation",) and np.array_equal(scan.image, textured()[0])


@pytest.mark.parametrize("channels", [1, 3])
def test_a_picture_of_black_and_white_alone_is_refused_as_a_mask(channels, tmp_path):
    a = np.where(textured()[0] > 120, 255, 0).astype(np.uint8)
    one_is_grey = a.copy()
    one_is_grey[5, 5] = 90
    for name, pixels in (("a.png", a), ("b.png", one_is_grey)):
        Image.fromarray(np.stack([pixels]*channels, -1).squeeze()).save(tmp_path/name)
    assert "black or white: a mask" in refusal(tmp_path/"a.png")
    assert len(list(read_scans(tmp_path/"b.png"))) == 1


def test_one_bit_is_refused_of_pictures_as_of_dicom(tmp_path):
    write_dicom(tmp_path/"a.dcm", textured()//200, BitsStored=1, HighBit=0)
    Image.fromarray(textured()[0] > 120).save(tmp_path/"a.png")
    Image.fromarray(textured()[0] > 120).save(tmp_path/"a.gif")
    for name in ("a.png", "a.gif", "a.dcm"):
        assert "1 bit a pixel: a mask" in refusal(tmp_path/name)


@pytest.mark.parametrize(
    "options", [dict(dtype=np.int8), dict(dtype=np.float32), dict(dtype=np.int16)]
)
def test_signed_and_float_tiff_is_refused(tmp_path, options):
    assert refusal(
        save_tiff(tmp_path / "a.tif", (textured()[0].astype(int) - 128).astype(options["dtype"]))
    ).startswith("wrong-mode")


def test_a_picture_behind_a_jpeg_is_no_bscan(tmp_path):
    first, second = Image.fromarray(textured()[0]), Image.fromarray(255 - textured()[0][::2, ::2])
    first.save(tmp_path/"a.jpg", "MPO", save_all=True, append_images=[second])
    first.save(tmp_path/"one.jpg")
    second.save(tmp_path/"two.jpg")
    (tmp_path / "b.jpg").write_bytes(
        (tmp_path / "one.jpg").read_bytes() + (tmp_path / "two.jpg").read_bytes()
    )  # a gain map without the MPO header
    for name in ("a.jpg", "b.jpg"):
        scan, = read_scans(tmp_path/name)
        assert (scan.image.size, scan.volume, scan.notes) == ((80, 64), "", ("several-pictures",))


@pytest.mark.parametrize("name", ["a.jp2", "a.j2k", "jpeg_2000_named.jpg"])
def test_jpeg_2000_is_read_whatever_its_name(tmp_path, name):
    (tmp_path/name).write_bytes(jpeg2000(textured()[0], no_jp2=name.endswith("j2k")))
    scan, = read_scans(tmp_path/name)
    assert np.array_equal(scan.image, textured()[0])


def test_jpeg_2000_of_12_bits_or_without_its_end_is_refused(tmp_path):
    (tmp_path/"a.jp2").write_bytes(jpeg2000(textured()[0].astype(np.uint16)*200))
    (tmp_path/"b.jp2").write_bytes(jpeg2000(textured()[0])[:-400])
    deep = bytearray(jpeg2000(np.stack([textured()[0]]*3, -1)))
    deep[deep.index(b"\xff\x4f\xff\x51") + 42] = 11
    (tmp_path/"c.jp2").write_bytes(deep)   # Pillow would cut colour of 12 bits down to 8
    assert "16 bits" in refusal(tmp_path/"a.jp2") and "truncated" in refusal(tmp_path/"b.jp2")
    assert "12 bits" in refusal(tmp_path/"c.jp2")


@pytest.mark.parametrize("name", ["a.jpeg", "a.dcm", "a.vol", "a.tif"])
def test_a_git_lfs_pointer_is_named_as_one(tmp_path, name):
    (tmp_path / name).write_bytes(
        b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0f" * 32 + b"\nsize 196608\n"
    )
    assert "git lfs pull" in refusal(tmp_path/name)


def test_an_archive_of_arrays_is_named_as_one(tmp_path):
    np.savez_compressed(tmp_path/"octmnist.npz", train_images=np.zeros((4, 28, 28), np.uint8))
    assert "NumPy archive" in refusal(tmp_path/"octmnist.npz")


# --- HEYEX XML

def test_a_missing_tif_is_told_before_the_first_bscan(tmp_path):
    path = write_xml(tmp_path/"x", textured())
    (tmp_path/"x"/"B1.tif").unlink()
    assert "1 of the 3" in refusal(path) and "number 1" in refusal(path)


def test_a_damaged_tif_is_named_after_the_bscans_before_it(tmp_path):
    path = write_xml(tmp_path/"x", textured())
    (tmp_path/"x"/"B2.tif").write_bytes(b"II*\0nonsense")
    scans = read_scans(path)
    assert [next(scans).slice, next(scans).slice] == [0, 1]
    with pytest.raises(BadImage, match="B2.tif"): next(scans)


def test_two_series_in_one_xml_are_two_volumes_and_share_no_eye(tmp_path):
    path = write_xml(tmp_path/"x", textured())
    text = path.read_text("latin-1")
    first = text[text.index("<Series>"):text.index("</Series>") + 9]
    path.write_text(
        text.replace(
            first, first + first.replace("<ID>9</ID><Laterality>R</Laterality>", "<ID>10</ID>")
        ),
        "latin-1",
    )
    assert [s[2:6] for s in read_scans(path)] == [(i, 3, "e/9", "OD") for i in range(3)] + [
        (i, 3, "e/10", "") for i in range(3)
    ]


def test_an_xml_cannot_hide_what_is_no_picture(tmp_path):
    path = write_xml(tmp_path/"x", textured())
    path.write_text(
        path.read_text("latin-1").replace("B0.tif", "e.xml").replace("B1.tif", "scan.vol"),
        "latin-1",
    )
    (tmp_path/"x"/"scan.vol").touch()
    assert [p.name for p in find_files(tmp_path)] == ["B0.tif", "B1.tif", "e.xml", "scan.vol"]


def test_xml_that_could_grow_is_refused(tmp_path):
    assert "DOCTYPE" in refusal(
        write_xml(tmp_path / "x", textured(), '<!DOCTYPE HEDX [<!ENTITY a "aaaaaaaaaa">]>')
    )
    (tmp_path/"other.xml").write_text("<a><b/></a>")
    assert "not one that HEYEX wrote" in refusal(tmp_path/"other.xml")


# --- other numbers of B-scans than are said

@pytest.mark.parametrize("version", [b"HSF-OCT-103", b"ep-v0.6.8"])
@pytest.mark.parametrize("headers", ["alike", "named"])
def test_a_vol_with_more_bscans_than_its_header_says_is_refused(tmp_path, version, headers):
    path = write_vol(tmp_path/"a.vol", textured(n=4), version=version)
    data, size = bytearray(path.read_bytes()), 300 + 4*64*80
    data[16:20] = (3).to_bytes(4, "little")
    if headers == "named":   # the one behind is larger, and says what it is
        last = 2048 + 3*size
        data[last:last + 16] = b"HSF-BS-103".ljust(12, b"\0") + (400).to_bytes(4, "little")
        data += bytes(100)
    path.write_bytes(data)
    assert "says 3 B-scans, and there are more behind" in refusal(path)


def test_a_vol_with_fewer_bscans_than_its_header_says_is_refused_before_the_first(tmp_path):
    path = write_vol(tmp_path/"a.vol", textured(n=4), header=5000)
    path.write_bytes(path.read_bytes()[:-64*80*4])   # long enough for B-scans with small headers
    with pytest.raises(BadImage, match="truncated"): next(read_scans(path))


def test_thickness_maps_behind_the_bscans_of_a_vol_are_no_bscans(tmp_path):
    path = write_vol(tmp_path/"a.vol", textured(n=4))
    with open(path, "ab") as f: f.write(b"grid" + bytes(9*64*80))
    assert np.array_equal(images(path), textured(n=4))


# --- large files

def test_a_volume_of_gigabytes_is_read_one_bscan_at_a_time(tmp_path):
    n, h, w = 800, 1024, 1024
    path = write_vol(tmp_path/"big.vol", np.ones((1, h, w), np.uint8))
    with open(path, "r+b") as f:
        f.seek(16)
        f.write(n.to_bytes(4, "little"))
        for i in range(1, n):
            f.seek(2048 + i*(300 + 4*h*w) + 12)
            f.write((300).to_bytes(4, "little"))
        f.truncate(2048 + n*(300 + 4*h*w))   # sparse: takes little room on the disk
    tracemalloc.start()
    begin = time.perf_counter()
    assert next(read_scans(path)).n_slices == n
    assert time.perf_counter() - begin < 2 and tracemalloc.get_traced_memory()[1] < 100e6
    tracemalloc.stop()


# --- names of persons

@pytest.mark.parametrize(
    "name", ["John Zzyzx", "ZZYZX^JOHN", "Zzyzx, John", "J. Zzyzx", "Mary-Ann O'Zzyzx"]
)
def test_a_name_in_the_place_of_the_identifier_is_withheld_in_every_format(tmp_path, name):
    scans = [
        *read_scans(write_dicom(tmp_path/"a.dcm", textured(), PatientID=name, PatientName=name)),
        *read_scans(write_vol(tmp_path/"a.vol", textured(), patient=name.encode())),
    ]
    for scan in scans:
        assert scan.patient == "" and "patient id withheld: it looks like a name" in scan.notes
        assert "zzyzx" not in repr(scan).lower()


NAME_OR_BIRTH = [
    "ZZYZX",
    "Zzyzx_Quilla",
    "quillazzyzx",
    "ZZYZXQ-17",
    "ZZYZX19610203",
    "19610203",
    "1961-02-03",
    "03.02.1961",
    "030261-1234",
]


@pytest.mark.parametrize("given", NAME_OR_BIRTH)
def test_an_identifier_made_of_name_or_birth_date_is_withheld(tmp_path, given):
    pytest.importorskip("oct_converter")
    xml = write_xml(tmp_path/"xml", textured())
    date = "<Date><Year>1961</Year><Month>2</Month><Day>3</Day></Date>"
    about = f"<FirstNames>Quilla</FirstNames><Birthdate>{date}</Birthdate><Study>"
    text = xml.read_text("latin-1").replace("Study-07", given).replace("<Study>", about)
    xml.write_text(text, "latin-1")
    codes = np.full((1, 64, 80), 60 << 10, np.uint16) + textured(n=1)
    fda = write_topcon(tmp_path/"a.fda", textured(), jpeg=True, name="Quilla")
    surname = b"Quilla".ljust(32, b"\0") + b"Zzyzx".ljust(40, b"\0") + b"\2"
    birth = np.array([1961, 2, 3], "<u2").tobytes()
    raw = fda.read_bytes().replace(b"Study-07".ljust(32, b"\0"), given.encode().ljust(32, b"\0"))
    at = raw.index(b"Quilla".ljust(72, b"\0"))
    fda.write_bytes(raw[:at] + surname + birth + raw[at + len(surname + birth):])
    files = (
        xml,
        write_dicom(tmp_path/"a.dcm", textured(), PatientID=given),
        write_e2e(tmp_path/"a.e2e", [("R", codes)], patient=given.encode()),
        fda,
    )
    for path in files:
        scan = next(read_scans(path))
        assert (path.suffix, scan.patient) == (path.suffix, "")
        assert "patient id withheld: it holds the" in " ".join(scan.notes)
        assert given not in repr(scan)


def test_an_identifier_with_the_birth_date_of_a_vol_is_withheld(tmp_path):
    path = write_vol(tmp_path/"a.vol", textured(), patient=b"1961-02-03")
    head = path.read_bytes()
    path.write_bytes(head[:164] + np.array([22315.], "<f8").tobytes() + head[172:])   # days after 1899-12-30
    assert next(read_scans(path)).patient == ""


@pytest.mark.parametrize(
    "given,name",
    [
        ("P001", "P001"),
        ("ANON-7", "ANON^7"),
        ("Study-07", "Anonymous"),
        ("Patient 3", "Patient^Study"),
        ("Doering-3", "Doe^Jane"),
        ("12345", "Doe^Jane"),
    ],
)
def test_a_code_beside_a_name_is_kept(tmp_path, given, name):
    path = write_dicom(
        tmp_path/"a.dcm", textured(), PatientID=given, PatientName=name, PatientBirthDate="20000101"
    )
    assert next(read_scans(path)).patient == given


@pytest.mark.parametrize(
    "name", ["Angiolini_OS", "no_angio", "angio_free", "angiosarcoma_control", "without-OCTA"]
)
def test_only_whole_words_that_are_not_denied_name_angiography(tmp_path, name):
    assert len(list(read_scans(write_vol(tmp_path/f"{name}.vol", textured())))) == 3


@pytest.mark.parametrize("name", ["P1_angio", "P1_angio6x6", "P1-Angiography", "AngioPlex", "P1_OCTA"])
def test_whole_words_name_angiography(tmp_path, name):
    words = refusal(write_vol(tmp_path/f"{name}.vol", textured()))
    assert words.startswith("not-a-bscan") and "rename it" in words


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_a_heyex_export_in_utf_16_is_read(tmp_path, encoding):
    declared = f'<?xml version="1.0" encoding="{encoding}"?>'
    xml = write_xml(tmp_path/"xml", textured(), declared)
    xml.write_text(xml.read_text("latin-1"), encoding)
    scans = list(read_scans(xml))
    assert [s.patient for s in scans] == ["Study-07"]*3 and list(find_files(xml.parent)) == [xml]


@pytest.mark.parametrize(
    "begin,words",
    [
        (b"\0\0\0\x18ftypmp42", "a video (MP4 or MOV): save"),
        (b"RIFF\0\0\0\0AVI LIST", "a video (AVI): save"),
        (b"P5\n9 9\n255\n", "a PGM picture: save"),
        (b"\x5c\1\0\0", "a NIfTI volume: save"),
        (b"<svg xmlns", "a drawing (SVG): save"),
        (b"8BPS", "a Photoshop file: save"),
        (b"%PDF-1.4", "a PDF: save"),
        (b"\0\0\0\0\x0b\0\0\0FRAMEHEADER", "a Bioptigen .oct volume: save"),
        (b"\1\2\3\4", "export it as PNG or TIFF"),
    ],
)
def test_a_file_of_another_kind_is_named_with_what_to_do(tmp_path, begin, words):
    (tmp_path/"file").write_bytes(begin + bytes(4000))
    assert words in refusal(tmp_path/"file")


def test_a_cirrus_file_of_undeclared_size_comes_with_its_remedy_from_the_sandbox():
    error = bad_image(KdoctError("no size.", fix="Name it so."))
    assert error.detail == "no size. Name it so."


@pytest.mark.parametrize("code", ["Study 07", "AMD control 12", "0017", "A17", "Zurich"])
def test_an_identifier_with_a_blank_in_it_is_kept(tmp_path, code):
    path = write_dicom(tmp_path/"a.dcm", textured(), PatientID=code)
    assert {scan.patient for scan in read_scans(path)} == {code}


# --- folders

def test_files_come_in_one_order_and_nothing_is_lost(tmp_path):
    for name in ("b/2.png", "b/1.PNG", "a.dcm", "b.xyz", "c/d/e.tif"):
        (tmp_path/name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/name).touch()
    for name in (".hidden.png", "b/Thumbs.db", "b/DICOMDIR", "b/labels.CSV", ".git/x.png"):
        (tmp_path/name).parent.mkdir(exist_ok=True)
        (tmp_path/name).touch()
    (tmp_path/"loop").symlink_to(tmp_path, target_is_directory=True)
    found = [
        p.relative_to(tmp_path).as_posix() for p in find_files([tmp_path / "gone.png", tmp_path])
    ]
    assert found == ["gone.png", "a.dcm", "b/1.PNG", "b/2.png", "b.xyz", "c/d/e.tif", "loop"]
    assert "missing" in refusal(tmp_path/"gone.png") and "not followed" in refusal(tmp_path/"loop")
    assert {"dicomdir", "thumbs.db"} <= set(SYSTEM_FILES) and ".csv" in SIDE_FILES


def test_a_clinical_file_or_picture_under_the_name_of_a_text_is_read(tmp_path):
    write_dicom(tmp_path/"scan.txt", textured())
    write_vol(tmp_path/"volume.csv", textured())
    Image.fromarray(textured()[0]).save(tmp_path/"picture.md", "png")
    (tmp_path/"labels.csv").write_text("path,label\na.png,CNV\n")
    (tmp_path/"notes.txt").write_text("HSF is a name, DICM another")
    (tmp_path/"empty.json").touch()
    found = list(find_files(tmp_path))
    assert [p.name for p in found] == ["picture.md", "scan.txt", "volume.csv"]
    assert [len(list(read_scans(p))) for p in found] == [1, 3, 3]


@pytest.mark.parametrize("name", ["a.ipynb", "a.py", "a.yaml", "a.log", "a.html", "a.jsonl"])
def test_notebooks_and_programs_beside_pictures_are_passed_over_and_counted(name, tmp_path):
    (tmp_path/name).write_text("{}")
    Image.fromarray(textured()[0]).save(tmp_path/"b.png")
    assert [p.name for p in find_files(tmp_path)] == ["b.png"]
    assert sum(passed_over(tmp_path).values()) == 1


def test_what_is_passed_over_is_counted_by_reason(tmp_path):
    for name in (".scan.dcm", "a/.b.png", ".old/c.png", "._d.png", ".DS_Store", "e.png", "f.txt"):
        (tmp_path/name).parent.mkdir(exist_ok=True)
        (tmp_path/name).touch()
    write_dicom(tmp_path/"g.txt", textured())
    assert [p.name for p in find_files(tmp_path)] == ["e.png", "g.txt"]
    want = {"hidden": 3, "of the system": 2, ".txt (lists and texts)": 1}
    assert passed_over([tmp_path]) == want == passed_over(tmp_path)
    assert passed_over(tmp_path/"f.txt") == passed_over(tmp_path/"gone") == {}


def test_what_is_named_twice_comes_once(tmp_path):
    (tmp_path/"a").mkdir()
    for name in ("a/1.png", "a/2.png"): (tmp_path/name).touch()
    for args in (
        [tmp_path, tmp_path / "a"],
        [tmp_path / "a", tmp_path / "a" / "2.png"],
        [tmp_path / "a" / "2.png", tmp_path, tmp_path],
    ):
        assert sorted(p.name for p in find_files(args)) == ["1.png", "2.png"]


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything"
)
def test_a_folder_that_cannot_be_listed_is_told(tmp_path):
    (tmp_path/"shut").mkdir(mode=0)
    assert list(find_files(tmp_path)) == [tmp_path/"shut"]
    assert "folder" in refusal(tmp_path/"shut")


def test_a_folder_that_cannot_be_listed_is_told_not_dropped(tmp_path, monkeypatch):
    (tmp_path/"shut").mkdir()
    scandir = os.scandir
    def refuse(p):
        if str(p).endswith("shut"): raise PermissionError("no")
        return scandir(p)
    monkeypatch.setattr(os, "scandir", refuse)
    assert list(find_files(tmp_path)) == [tmp_path/"shut"] == list(find_files(tmp_path/"shut"))
    assert "can be listed" in refusal(tmp_path/"shut")


def test_a_folder_is_listed_when_it_is_reached(tmp_path, monkeypatch):
    for k in range(10):
        (tmp_path/str(k)).mkdir()
        for i in range(100): (tmp_path/str(k)/f"{i:04}.png").touch()
    listed, scandir = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda p: listed.append(p) or scandir(p))
    tracemalloc.start()
    # the folder itself, and those below so far
    for i, _ in enumerate(find_files(tmp_path)): assert len(listed) == 2 + i//100
    held = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(True, volumes.__file__)])
    tracemalloc.stop()
    assert i == 999 and sum(t.size for t in held.traces) < 100e3


# --- damage

@pytest.fixture
def one_of_each(tmp_path):
    "A small file of every format."
    pages = [Image.fromarray(p) for p in textured()]
    pages[0].save(tmp_path/"a.tif", save_all=True, append_images=pages[1:], compression="tiff_lzw")
    (tmp_path/"80x64x3.img").write_bytes(textured().tobytes())
    made = [
        tmp_path / "a.tif",
        tmp_path / "80x64x3.img",
        write_vol(tmp_path / "a.vol", textured()),
        write_dicom(tmp_path / "a.dcm", textured()),
        write_dicom(
            tmp_path / "b.dcm",
            textured().astype(np.uint16) * 100,
            bits=16,
            WindowCenter=9000,
            WindowWidth=9000,
        ),
        write_xml(tmp_path / "x", textured()),
    ]
    try:
        made += [
            write_e2e(tmp_path/"a.e2e", [("R", np.full((2, 40, 48), 60 << 10))]),
            write_topcon(tmp_path/"a.fda", textured(), jpeg=True),
            write_topcon(tmp_path/"a.fds", textured().astype(np.uint16)),
        ]
    except ImportError: pass
    return made


def damaged(raw, times, rng):
    "`raw` with bytes changed anywhere or near its beginning, cut off, or with bytes put in."
    for k in range(times):
        data = np.frombuffer(raw, np.uint8).copy()
        at = rng.integers(0, [len(raw), min(len(raw), 3000)][k % 2], rng.integers(1, 8))
        data[at] = rng.integers(0, 256, len(at))
        cut = int(rng.integers(1, len(raw)))
        if k % 10 == 0: yield data[:cut].tobytes()
        elif k % 10 < 8: yield data.tobytes()
        else: yield raw[:cut] + bytes(int(rng.integers(1, 99))) + raw[cut:]


def survive(path, times, rng):
    "Scans and messages of damaged copies of a file; none takes over 5 s or raises another error."
    raw, heard = path.read_bytes(), []
    for data in damaged(raw, times, rng):
        path.write_bytes(data)
        begin = time.perf_counter()
        try: heard += [repr(s[2:]) for s in read_scans(path)]
        except KdoctError as e: heard.append(str(e))
        assert time.perf_counter() - begin < 5, heard[-1]
    path.write_bytes(raw)
    return heard


@pytest.mark.filterwarnings("ignore")
def test_damaged_files_are_read_or_refused_soon_and_no_name_gets_out(one_of_each):
    rng, before = np.random.default_rng(0), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    heard = [h.lower() for path in one_of_each for h in survive(path, 40, rng)]
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)/2**20 < 1.5, "GiB"
    assert not [h for h in heard if "zzyzx" in h or "quilla" in h or "19610203" in h]


@pytest.mark.filterwarnings("ignore")
def test_damaged_device_files_are_read_or_refused_soon_and_no_name_gets_out(shared_data, tmp_path):
    for f in (shared_data/"volumes").rglob("*.*"): (tmp_path/f.name).write_bytes(f.read_bytes())
    rng = np.random.default_rng(1)
    for name in ("test_dummy.xml", "synthetic_10_bscans.vol", "spectralis_circle_scan.vol"):
        assert not [h for h in survive(tmp_path/name, 40, rng) if "Doe" in h or "John" in h]
