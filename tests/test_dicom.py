"DICOM: what is in the file is shown as the file says, and what cannot be shown is named."
import io
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from kdoct.data import dicom, dicom_pixels
from kdoct.data.problems import BadImage
from kdoct.data.volumes import read_scans

pydicom = pytest.importorskip("pydicom")
uid = pydicom.uid
OCT, PHOTOGRAPH = uid.OphthalmicTomographyImageStorage, uid.OphthalmicPhotography8BitImageStorage
LITTLE, BIG = uid.ExplicitVRLittleEndian, uid.ExplicitVRBigEndian


def bscans(n=3, h=40, w=48, low=0, high=255):
    "Frames with structure that reach from `low` to `high`, int64 (n, h, w)."
    a = np.sin(np.arange(h)/5)[:, None] + np.cos(np.arange(w)/7) + .1*np.arange(n)[:, None, None]
    return np.rint(low + (a - a.min())/np.ptp(a)*(high - low)).astype(int)


def data_set(**elements):
    d = pydicom.Dataset()
    for k, v in elements.items(): setattr(d, k, v)
    return d


def lut(descriptor, values):
    "A look-up table for display or of the modality."
    d = data_set(LUTDescriptor=descriptor)
    d.add_new("LUTData", "OW", np.asarray(values).astype("<u2").tobytes())
    return d


def write(path, frames, bits=16, stored=None, syntax=LITTLE, sop=OCT, **elements):
    "A DICOM file; an element that is None is left out."
    a, signed, d = np.asarray(frames), np.asarray(frames).min() < 0, pydicom.Dataset()
    d.file_meta = pydicom.dataset.FileMetaDataset()
    d.file_meta.TransferSyntaxUID = syntax
    d.SOPClassUID, d.SOPInstanceUID, d.SeriesInstanceUID, d.PatientID, d.Modality = (
        sop,
        uid.generate_uid(),
        "1.2.3",
        "Study-07",
        "OPT",
    )
    colour = a.ndim == 4
    d.NumberOfFrames, d.Rows, d.Columns, d.SamplesPerPixel = (
        len(a),
        *a.shape[1:3],
        3 if colour else 1,
    )
    if colour: d.PlanarConfiguration = 0
    d.PhotometricInterpretation = "RGB" if colour else "MONOCHROME2"
    d.BitsAllocated, d.BitsStored, d.HighBit, d.PixelRepresentation = (
        bits,
        stored or bits,
        (stored or bits) - 1,
        int(signed),
    )
    kind = "iu"[not signed] + str(bits//8)
    d.PixelData = a.astype(("<", ">")[syntax == BIG] + kind).tobytes() + bytes(
        a.size % 2 if bits == 8 else 0
    )
    for k, v in elements.items(): setattr(d, k, v) if v is not None else delattr(d, k)
    d["PixelData"].VR = "OB" if bits == 8 else "OW"
    d.save_as(path, enforce_file_format=True)
    return path


def read(path, modality="oct"): return list(read_scans(path, modality))
def pictures(path, modality="oct"):
    return np.stack([np.asarray(s.image) for s in read(path, modality)])


def notes(path, modality="oct"): return "; ".join(read(path, modality)[0].notes)


def refusal(path, modality="oct"):
    with pytest.raises(BadImage) as e: read(path, modality)
    assert str(e.value).startswith(f"{e.value.kind}: {path.name}: ")
    return str(e.value)


def spread(a, low=None, high=None):
    "Values from `low` to `high` as 0-255."
    low, high = a.min() if low is None else low, a.max() if high is None else high
    return np.rint(np.clip((a - low)*(255/(high - low)), 0, 255)).astype(np.uint8)


# --- no window

@pytest.mark.parametrize("low,high", [(0, 100), (12, 803), (0, 65535)])
def test_16_bits_without_window_are_spread_over_the_values_of_the_volume(tmp_path, low, high):
    a = bscans(low=low, high=high)
    path = write(tmp_path/"a.dcm", a)
    assert np.array_equal(pictures(path), spread(a))
    assert (
        notes(path)
        == f"no window in the file: grey values {low} to {high} of this volume are "
           f"spread over 0-255"
    )


def test_one_scale_for_a_volume_also_where_its_frames_are_decoded_twice(tmp_path, monkeypatch):
    a = bscans(high=900)*np.array([1, 2, 3])[:, None, None]
    path = write(tmp_path/"a.dcm", a)
    monkeypatch.setattr("kdoct.data.dicom_pixels.KEPT_BYTES", 0)
    assert np.array_equal(pictures(path), spread(a))


def test_frames_of_one_grey_value_in_a_volume_of_16_bits_are_refused(tmp_path):
    assert "all its values are 500" in refusal(write(tmp_path/"a.dcm", np.full((2, 40, 48), 500)))


def test_signed_values_are_spread_from_the_lowest_on(tmp_path):
    a = bscans(low=-700, high=300)
    assert np.array_equal(pictures(write(tmp_path/"a.dcm", a)), spread(a))


def test_8_bits_without_window_are_shown_as_they_are(tmp_path):
    a = bscans(low=20, high=90)
    path = write(tmp_path/"a.dcm", a, 8)
    assert np.array_equal(pictures(path), a) and notes(path) == ""
    assert np.array_equal(pictures(write(tmp_path/"b.dcm", a, 16, 8)), a)


@pytest.mark.parametrize("photometric", ["MONOCHROME2", "MONOCHROME1"])
@pytest.mark.parametrize("rows", [1, 3, 5, 6])
def test_a_few_very_bright_rows_leave_the_rest_visible(tmp_path, rows, photometric):
    a = bscans(h=100, low=100, high=900)
    a[:, 40:40 + rows] = 60000
    path = write(tmp_path/"a.dcm", a, PhotometricInterpretation=photometric)
    rest = np.delete(pictures(path), range(40, 40 + rows), axis=1)
    assert np.ptp(np.percentile(rest, (10, 90))) > 100
    assert "all but the darkest and brightest" in notes(path) and "of 100 to 60000" in notes(path)


def test_bright_rows_in_one_of_many_frames_leave_the_others_visible(tmp_path, monkeypatch):
    a = bscans(20, high=900)
    a[7, :4] = 65535
    path = write(tmp_path/"a.dcm", a)
    for kept in (1 << 27, 0):
        monkeypatch.setattr("kdoct.data.dicom_pixels.KEPT_BYTES", kept)
        assert np.ptp(np.percentile(pictures(path)[0], (10, 90))) > 100


def test_16_bits_of_one_value_but_for_a_few_bright_rows_are_refused(tmp_path):
    a = np.full((2, 300, 48), 500)
    a[:, 5:7] = 60000
    assert "98 % of its values are 500, and the others reach from 500 to 60000" in refusal(
        write(tmp_path / "a.dcm", a)
    )


@pytest.mark.parametrize(
    "elements",
    [dict(PixelPaddingValue=0xFFFF), dict(PixelPaddingValue=60000, PixelPaddingRangeLimit=0xFFFF)],
)
def test_padding_pixels_are_black_and_do_not_count(tmp_path, elements):
    a = bscans(low=12, high=803)
    padded = a.copy()
    padded[:, :5] = 0xffff
    want = spread(a, *(f(a[:, 5:]) for f in (np.min, np.max)))
    want[:, :5] = 0
    path = write(tmp_path/"a.dcm", padded, **elements)
    assert np.array_equal(pictures(path), want) and "padding pixels are black" in notes(path)


def test_padding_pixels_are_black_in_an_inverted_picture_too(tmp_path):
    a = bscans()
    a[:, :5] = 0
    got = pictures(
        write(
            tmp_path / "a.dcm", a, 8, PixelPaddingValue=0, PhotometricInterpretation="MONOCHROME1"
        )
    )
    assert not got[:, :5].any() and np.array_equal(
        got[:, 5:][a[:, 5:] > 0], 255 - a[:, 5:][a[:, 5:] > 0]
    )


@pytest.mark.parametrize(
    "padding,high", [(65535, 255), (65535, 4000), (65535, 16383), (-20000, 3000)]
)
@pytest.mark.parametrize("columns", [6, 12, 30])
def test_padding_that_the_header_does_not_name_is_refused(tmp_path, padding, high, columns):
    a = bscans(high=high)
    a[:, :, :columns] = padding
    heard = refusal(write(tmp_path/"a.dcm", a))
    assert (
        heard.startswith("wrong-mode")
        and f"{columns / 48:.0%} of its values are {padding}, and the others reach from" in heard
    )
    assert "PixelPaddingValue" in heard
    assert (
        np.ptp(pictures(write(tmp_path / "b.dcm", a, PixelPaddingValue=padding))[:, :, columns:])
        > 200
    )


def test_saturated_and_black_values_are_no_padding(tmp_path):
    for name, low, high in (("a.dcm", 20000, 65535), ("b.dcm", -30000, 30000)):
        a = np.clip(bscans(low=low, high=2*high), low, high)
        assert (
            np.array_equal(pictures(write(tmp_path / name, a)), spread(a))
            and (a == high).mean() > 0.1
        )
    a = np.where(bscans() < 90, 0, bscans(high=1000))
    assert np.array_equal(pictures(write(tmp_path/"c.dcm", a)), spread(a)) and (a == 0).mean() > .1


def test_monochrome1_is_inverted(tmp_path):
    a = bscans(low=12, high=803)
    path = write(tmp_path/"a.dcm", a, PhotometricInterpretation="MONOCHROME1")
    assert np.array_equal(pictures(path), 255 - spread(a)) and "MONOCHROME1: inverted" in notes(
        path
    )


# --- windows

@pytest.mark.parametrize("width", [1, .5, 0, -100])
def test_a_window_without_width_is_no_window_and_is_noted(tmp_path, width):
    a = bscans(low=12, high=803)
    path = write(tmp_path/"a.dcm", a, WindowCenter=400, WindowWidth=width)
    assert np.array_equal(pictures(path), spread(a))
    assert f"cannot be applied (width {width:g}, LINEAR)" in notes(path)


def test_a_narrow_window_of_kind_linear_exact_is_applied(tmp_path):
    a = bscans(high=1000)
    path = write(
        tmp_path / "a.dcm",
        a,
        WindowCenter=0.5,
        WindowWidth=1,
        VOILUTFunction="LINEAR_EXACT",
        RescaleSlope=0.001,
        RescaleIntercept=0,
    )
    assert np.abs(
        pictures(path).astype(int) - spread(a, 0, 1000)
    ).max() <= 1 and "by the window 0 to 1" in notes(path)


def test_the_first_of_several_windows_is_applied(tmp_path):
    a = bscans(high=900)
    path = write(tmp_path/"a.dcm", a, WindowCenter=[500.5, 1], WindowWidth=[401, 1])
    assert np.abs(
        pictures(path).astype(int) - spread(a, 300, 700)
    ).max() <= 1 and "by the window 300 to 700, the first of 2" in notes(path)


def test_a_sigmoid_window_is_applied(tmp_path):
    a = bscans(high=900)
    path = write(tmp_path/"a.dcm", a, WindowCenter=450, WindowWidth=300, VOILUTFunction="SIGMOID")
    want = 255/(1 + np.exp(-4*(a - 450)/300))
    assert np.abs(pictures(path) - want).max() <= 1 and "sigmoid" in notes(path)


@pytest.mark.parametrize("centre,width,detail", [
    (40, 400, "of the pixels would be white"), (60000, 1000, "would span 0 of 256"),
    (32768, 65535, "would span"), (-5000, 300, "would span 0 of 256"),
])
@pytest.mark.parametrize("photometric", ["MONOCHROME2", "MONOCHROME1"])
def test_a_window_far_off_the_values_is_no_window_and_is_noted(
    tmp_path, centre, width, detail, photometric
):
    a = bscans(low=10, high=4000) if width == 400 else bscans(low=12, high=803)
    path = write(
        tmp_path/"a.dcm", a, WindowCenter=centre, WindowWidth=width,
        PhotometricInterpretation=photometric,
    )
    want = spread(a)
    assert np.array_equal(pictures(path), 255 - want if photometric == "MONOCHROME1" else want)
    assert "is not applied" in notes(path) and "are spread over 0-255" in notes(path)
    if photometric == "MONOCHROME2": assert detail in notes(path)


def test_a_window_far_off_8_bits_leaves_them_as_they_are(tmp_path):
    a = bscans(low=60, high=200)
    path = write(tmp_path/"a.dcm", a, 8, WindowCenter=2000, WindowWidth=300)
    assert np.array_equal(pictures(path), a) and "is not applied" in notes(path)


@pytest.mark.parametrize("centre,width", [(500, 200), (700, 900), (300, 4000), (200, 400)])
def test_a_window_that_shows_something_is_applied(tmp_path, centre, width):
    a = bscans(low=0, high=900)
    path = write(tmp_path/"a.dcm", a, WindowCenter=centre, WindowWidth=width)
    low, high = centre - .5 - (width - 1)/2, centre - .5 + (width - 1)/2
    assert np.abs(pictures(path).astype(int) - spread(a, low, high)).max() <= 1
    assert "is not applied" not in notes(path)


def test_a_dark_background_is_no_sign_of_a_wrong_window(tmp_path):
    "A thin bright layer before noise, as in a B-scan: a window that cuts the noise off is sound."
    a = np.random.default_rng(0).integers(0, 60, (3, 100, 48))
    a[:, 40:55] = bscans(3, 15, low=300, high=1000)
    path = write(tmp_path/"a.dcm", a, WindowCenter=550, WindowWidth=900)
    assert "is not applied" not in notes(path)


def test_the_window_of_one_frame_may_be_wrong(tmp_path):
    a = bscans(2, high=900)
    groups = [
        data_set(FrameVOILUTSequence=[data_set(WindowCenter=c, WindowWidth=900)])
        for c in (450, 60000)
    ]
    got = pictures(write(tmp_path/"a.dcm", a, PerFrameFunctionalGroupsSequence=groups))
    assert np.abs(got[1].astype(int) - spread(a[1], a[1].min(), a[1].max())).max() <= 1
    assert np.abs(got[0].astype(int) - spread(a[0], 0, 899)).max() <= 1


def test_each_frame_has_the_window_of_its_own_group(tmp_path):
    a = bscans(2, high=900)
    groups = [
        data_set(
            FrameVOILUTSequence=[
                data_set(WindowCenter=c, WindowWidth=200, VOILUTFunction="LINEAR_EXACT")
            ]
        )
        for c in (300, 600)
    ]
    got = pictures(
        write(
            tmp_path / "a.dcm",
            a,
            PerFrameFunctionalGroupsSequence=groups,
            WindowCenter=1,
            WindowWidth=2,
        )
    )
    for g, x, c in zip(got, a, (300, 600), strict=True):
        assert np.abs(g.astype(int) - spread(x, c - 100, c + 100)).max() <= 1
    assert "its B-scans have 2 different windows; each is shown by its own" in notes(
        tmp_path / "a.dcm"
    )
    del groups[1].FrameVOILUTSequence
    assert "2 different windows" in notes(
        write(tmp_path / "b.dcm", a, PerFrameFunctionalGroupsSequence=groups)
    )
    assert "different" not in notes(
        write(tmp_path / "c.dcm", a, PerFrameFunctionalGroupsSequence=groups[:1] * 2)
    )


@pytest.mark.parametrize("depth", [8, 12, 16])
def test_a_look_up_table_for_display_goes_before_the_window(tmp_path, depth):
    a, top = bscans(high=1023), (1 << depth) - 1
    table = top - np.arange(1024)*top//1023
    path = write(
        tmp_path / "a.dcm",
        a,
        VOILUTSequence=[lut([1024, 0, depth], table)],
        WindowCenter=1,
        WindowWidth=2,
    )
    assert np.abs(
        pictures(path).astype(int) - (255 - spread(a))
    ).max() <= 1 and f"look-up table, {depth} bit" in notes(path)


def test_a_look_up_table_of_one_byte_an_entry_is_applied(tmp_path):
    a, table = bscans(high=1023), lut([1024, 0, 8], [0])
    table.LUTData = (np.arange(1024)//4).astype(np.uint8).tobytes()
    assert np.array_equal(pictures(write(tmp_path/"a.dcm", a, VOILUTSequence=[table])), a//4)
    table.LUTData = table.LUTData[:500]
    assert "1024 entries has fewer" in refusal(write(tmp_path/"b.dcm", a, VOILUTSequence=[table]))


def test_a_look_up_table_that_begins_below_zero_is_applied(tmp_path):
    a = bscans(low=-200, high=300)
    path = write(
        tmp_path / "a.dcm", a, VOILUTSequence=[lut([501, -200, 16], np.arange(501) * 65535 // 500)]
    )
    assert np.abs(pictures(path).astype(int) - spread(a)).max() <= 1


def test_a_look_up_table_of_the_modality_is_applied_before_the_values_are_spread(tmp_path):
    a = bscans(high=255)
    path = write(
        tmp_path / "a.dcm", a, ModalityLUTSequence=[lut([256, 0, 12], np.arange(256) ** 2 // 16)]
    )
    assert np.array_equal(pictures(path), spread(a**2//16))


# --- rescale

def test_the_rescale_comes_before_the_window(tmp_path):
    a = bscans(low=0, high=900)
    path = write(
        tmp_path / "a.dcm",
        a,
        RescaleSlope=2,
        RescaleIntercept=-100,
        WindowCenter=800,
        WindowWidth=1000,
        VOILUTFunction="LINEAR_EXACT",
    )
    assert np.abs(pictures(path).astype(int) - spread(2*a - 100, 300, 1300)).max() <= 1


@pytest.mark.parametrize("slope,shift", [(2, 0), (1, -50), (0.5, 10)])
def test_a_rescale_of_8_bits_without_window_is_applied_and_noted(tmp_path, slope, shift):
    a = bscans(high=100)
    path = write(tmp_path/"a.dcm", a, 8, RescaleSlope=slope, RescaleIntercept=shift)
    low, high = shift, 100*slope + shift
    assert np.array_equal(pictures(path), spread(a))
    assert f"grey values {low:g} to {high:g}" in notes(path)


def test_a_rescale_that_changes_nothing_leaves_8_bits_as_they_are(tmp_path):
    path = write(tmp_path/"a.dcm", bscans(high=100), 8, RescaleSlope=1, RescaleIntercept=0)
    assert np.array_equal(pictures(path), bscans(high=100)) and notes(path) == ""


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("kind", ["MONOCHROME1", "MONOCHROME2"])
def test_an_inverse_presentation_is_inverted_once_and_noted(tmp_path, bits, kind):
    path = write(
        tmp_path/"a.dcm", 255 - bscans(), bits, PhotometricInterpretation=kind,
        PresentationLUTShape="INVERSE",
    )
    assert np.array_equal(pictures(path), bscans()) and "inverted" in notes(path)
    assert ("PresentationLUTShape is INVERSE" in notes(path)) == (kind == "MONOCHROME2")


@pytest.mark.parametrize(
    "element,tag",
    [
        ("WindowWidth", b"\x28\0\x51\x10DS"),
        ("WindowCenter", b"\x28\0\x50\x10DS"),
        ("RescaleSlope", b"\x28\0\x53\x10DS"),
        ("NumberOfFrames", b"\x28\0\x08\0IS"),
    ],
)
def test_an_element_that_is_no_number_is_named_with_what_to_do(tmp_path, element, tag):
    path = write(
        tmp_path/"a.dcm", bscans(10), WindowCenter=10, WindowWidth=20,
        RescaleSlope=11, RescaleIntercept=0,
    )
    raw = path.read_bytes()
    at = raw.index(tag) + 8
    path.write_bytes(raw[:at] + b"xy" + raw[at + 2:])
    assert f"its {element} is no number; correct it" in refusal(path)


def test_an_impossible_or_missing_element_is_named_with_what_to_do(tmp_path):
    detail = refusal(write(tmp_path/"a.dcm", bscans(4), 16, 12, BitsAllocated=12))
    assert "its BitsAllocated is 12, not 8 or 16; correct it" in detail
    colour = np.repeat(bscans(1)[..., None], 3, -1)
    detail = refusal(write(tmp_path/"b.dcm", colour, 8, PlanarConfiguration=None))
    assert "lacks PlanarConfiguration; add what lacks" in detail


def test_a_rescale_of_slope_0_is_refused(tmp_path):
    assert "RescaleSlope is 0" in refusal(
        write(tmp_path / "a.dcm", bscans(), RescaleSlope=0, RescaleIntercept=5)
    )


@pytest.mark.parametrize(
    "element,value",
    [("RescaleSlope", b"nan "), ("RescaleSlope", b"inf "), ("RescaleIntercept", b"nan ")],
)
@pytest.mark.parametrize("bits", [8, 16])
def test_a_rescale_that_is_no_number_is_refused(tmp_path, element, value, bits):
    path = write(
        tmp_path / "a.dcm",
        bscans(),
        bits,
        RescaleSlope="1.25" if element == "RescaleSlope" else 2,
        RescaleIntercept="1.25",
    )
    raw = path.read_bytes()
    tag = {"RescaleIntercept": b"\x28\0\x52\x10DS", "RescaleSlope": b"\x28\0\x53\x10DS"}[element]
    path.write_bytes(raw.replace(tag + b"\4\x001.25", tag + b"\4\0" + value))
    assert "no pixel would keep its value" in refusal(path)


def test_a_rescale_that_falls_turns_the_picture_around(tmp_path):
    assert np.array_equal(
        pictures(write(tmp_path / "a.dcm", bscans(), 8, RescaleSlope=-1, RescaleIntercept=255)),
        255 - bscans(),
    )


# --- how pixels are stored

def test_bits_that_an_overlay_uses_are_no_part_of_the_picture(tmp_path):
    a = bscans(high=4095)
    d = pydicom.dcmread(write(tmp_path/"a.dcm", a | 0x8000*(np.arange(48) % 3 == 0), 16, 12))
    d.add_new(0x60000102, "US", 15)
    d.save_as(tmp_path/"a.dcm")
    assert np.array_equal(pictures(tmp_path/"a.dcm"), spread(a))


@pytest.mark.parametrize(
    "elements", [{}, dict(WindowCenter=2048, WindowWidth=4096), dict(HighBit=15), dict(HighBit=7)]
)
@pytest.mark.parametrize("stored,high", [(12, 4096), (12, 65535), (10, 4095), (8, 300)])
def test_values_beyond_the_bits_of_the_header_are_refused(tmp_path, stored, high, elements):
    a = bscans(high=high)
    # with HighBit 15, low bits are the others
    path = write(tmp_path/"a.dcm", a | (elements.get("HighBit") == 15), 16, stored, **elements)
    heard = refusal(path)
    assert (
        f"(BitsStored {stored}, HighBit {15 if elements.get('HighBit') == 15 else stored - 1})"
        in heard
        and "they reach from" in heard
    )


@pytest.mark.parametrize("syntax", [uid.RLELossless, uid.JPEGLSLossless, uid.JPEG2000Lossless])
def test_values_beyond_the_bits_of_the_header_are_refused_in_compressed_files(tmp_path, syntax):
    a = bscans(high=60000)
    write(tmp_path/"a.dcm", a)
    if syntax == uid.JPEGLSLossless: gdcm_copy(tmp_path/"a.dcm", tmp_path/"a.dcm", "JPEGLSLossless")
    d = pydicom.dcmread(tmp_path/"a.dcm")
    if syntax != uid.JPEGLSLossless: d.compress(syntax)
    d.save_as(tmp_path/"a.dcm")
    assert np.array_equal(pictures(tmp_path/"a.dcm"), spread(a))
    d.BitsStored, d.HighBit = 12, 11
    d.save_as(tmp_path/"b.dcm")
    assert "BitsStored 12, HighBit 11" in refusal(tmp_path/"b.dcm")


def gdcm_copy(path, out, syntax):
    "A file compressed by gdcm."
    gdcm = pytest.importorskip("gdcm")
    reader, change, writer = (
        gdcm.ImageReader(),
        gdcm.ImageChangeTransferSyntax(),
        gdcm.ImageWriter(),
    )
    reader.SetFileName(str(path))
    assert reader.Read()
    change.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, syntax)))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    writer.SetFileName(str(out))
    assert writer.Write()
    return out


def test_padding_beyond_the_stored_bits_is_padding(tmp_path):
    a = bscans(high=4000)
    padded = a.copy()
    padded[:, :5] = 0xffff
    got = pictures(write(tmp_path/"a.dcm", padded, 16, 12, PixelPaddingValue=0xffff))
    assert not got[:, :5].any() and np.array_equal(
        got[:, 5:], spread(a, *(f(a[:, 5:]) for f in (np.min, np.max)))[:, 5:]
    )


def test_an_impossible_high_bit_is_noted(tmp_path):
    a = bscans(high=4095)
    path = write(tmp_path/"a.dcm", a, 16, 12, HighBit=7)
    assert np.array_equal(
        pictures(path), spread(a)
    ) and "HighBit is 7, which cannot be: 11 is taken" in notes(path)


def test_a_representation_that_does_not_exist_is_refused(tmp_path):
    assert "PixelRepresentation is 2" in refusal(
        write(tmp_path / "a.dcm", bscans(), 8, PixelRepresentation=2)
    )


def test_signed_values_of_fewer_bits_than_a_pixel_has_are_read(tmp_path):
    a = bscans(low=-700, high=300)
    assert np.array_equal(pictures(write(tmp_path/"a.dcm", a, 16, 12)), spread(a))


@pytest.mark.parametrize("bits,stored,high", [(8, 8, 255), (16, 16, 65535), (16, 12, 4095)])
def test_unsigned_values_that_the_header_calls_signed_are_refused(tmp_path, bits, stored, high):
    assert "PixelRepresentation" in refusal(
        write(tmp_path / "a.dcm", bscans(high=high), bits, stored, PixelRepresentation=1)
    )


@pytest.mark.parametrize("low,high", [(-128, 127), (-100, 0), (-30, 90)])
def test_signed_values_of_the_whole_range_are_read(tmp_path, low, high):
    a = bscans(low=low, high=high)
    assert np.array_equal(pictures(write(tmp_path/"a.dcm", a, 8)), spread(a))


def test_pixels_in_the_upper_bits_are_read(tmp_path):
    a = bscans(high=4095)
    assert np.array_equal(pictures(write(tmp_path/"a.dcm", a << 4, 16, 12, HighBit=15)), spread(a))


def test_big_endian_and_rle_are_read_alike(tmp_path):
    a = bscans(high=900)
    d = pydicom.dcmread(write(tmp_path/"a.dcm", a))
    d.compress(uid.RLELossless)
    d.save_as(tmp_path/"rle.dcm")
    for path in (write(tmp_path/"big.dcm", a, syntax=BIG), tmp_path/"rle.dcm"):
        assert np.array_equal(pictures(path), spread(a))


def test_a_palette_becomes_its_colours(tmp_path):
    g = bscans()
    tables = dict(Red=np.arange(256), Green=255 - np.arange(256), Blue=np.zeros(256))
    elements = dict(PhotometricInterpretation="PALETTE COLOR")
    for k, t in tables.items():
        elements |= {
            f"{k}PaletteColorLookupTableDescriptor": [256, 0, 16],
            f"{k}PaletteColorLookupTableData": (t.astype("<u2") << 8).tobytes(),
        }
    path = write(tmp_path/"a.dcm", g, 8, **elements)
    assert np.array_equal(
        pictures(path), np.stack([g, 255 - g, 0 * g], -1)
    ) and "palette colour: converted" in notes(path)


def test_ybr_becomes_rgb(tmp_path):
    rgb = np.stack([bscans(1), 255 - bscans(1), bscans(1)//2], -1)
    ybr = np.stack([np.asarray(Image.fromarray(x.astype(np.uint8)).convert("YCbCr")) for x in rgb])
    got = pictures(write(tmp_path/"a.dcm", ybr, 8, PhotometricInterpretation="YBR_FULL"))
    assert np.abs(got.astype(int) - rgb).max() <= 3


def test_a_file_without_preamble_is_read_with_a_note(tmp_path):
    a = bscans()
    raw = write(tmp_path/"a.dcm", a, 8).read_bytes()
    for name in ("b.dcm", "b"):
        (tmp_path/name).write_bytes(raw[132:])
        assert np.array_equal(pictures(tmp_path / name), a) and "without preamble" in notes(
            tmp_path / name
        )


def test_a_file_without_meta_information_is_read_as_its_elements_are(tmp_path):
    a = bscans(high=900)
    raw = write(tmp_path/"a.dcm", a).read_bytes()
    (tmp_path/"b").write_bytes(raw[raw.index(b"\x08\0\x16\0UI"):])
    assert np.array_equal(pictures(tmp_path/"b"), spread(a))


@pytest.mark.parametrize(
    "name",
    [
        "SC_rgb_jpeg_gdcm.dcm",
        "MR_small_jpeg_ls_lossless.dcm",
        "MR_small_jp2klossless.dcm",
        "J2K_pixelrep_mismatch.dcm",
    ],
)
def test_jpeg_lossless_jpeg_ls_and_jpeg_2000_are_read_with_the_extra(name):
    pytest.importorskip("gdcm")
    pytest.importorskip("openjpeg")
    # CT and MR among them
    assert np.ptp(pictures(Path(pydicom.__file__).parent/"data"/"test_files"/name, "other")) > 100


@pytest.mark.parametrize("name", ["JPGExtended.dcm", "JPEG-lossy.dcm"])
def test_jpeg_of_12_bits_is_read_with_the_extra(name):
    pytest.importorskip("gdcm")
    values = next(
        dicom_pixels._dicom_frames(
            path := Path(pydicom.__file__).parent / "data" / "test_files" / name,
            dicom._dicom_head(path)[0],
            1,
        )
    )
    # what libjpeg reads, as pydicom's own tests have it
    assert (values[420, 140], values[230, 120], values.max()) == (244, 95, 264)


@pytest.mark.parametrize("photometric", ["MONOCHROME2", "MONOCHROME1"])
def test_a_volume_of_jpeg_of_12_bits_is_read_and_without_gdcm_names_the_extra(
    tmp_path, monkeypatch, photometric
):
    a = bscans(high=4095)
    path = gdcm_copy(
        write(tmp_path / "a.dcm", a, 16, 12, PhotometricInterpretation=photometric),
        tmp_path / "b.dcm",
        "JPEGExtendedProcess2_4",
    )
    want = spread(a) if photometric == "MONOCHROME2" else 255 - spread(a)
    assert np.abs(pictures(path).astype(int) - want).max() <= 1
    monkeypatch.setattr(dicom, "find_spec", lambda name: None)
    assert "JPEG Extended" in refusal(path) and "kdoct[volumes]" in refusal(path)


@pytest.mark.parametrize(
    "syntax",
    [
        "1.2.840.10008.1.2.4.100",
        "1.2.840.10008.1.2.4.102",
        "1.2.840.10008.1.2.4.103.1",
        "1.2.840.10008.1.2.4.107",
    ],
)
def test_a_video_is_named_with_a_remedy_that_helps(tmp_path, syntax):
    heard = refusal(encapsulated(tmp_path/"a.dcm", syntax))
    assert "a video" in heard and "uncompressed" in heard and "pip install" not in heard


@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2.4.110", "1.2.840.10008.1.2.4.55", "1.2.3.4"])
def test_a_way_of_storing_pixels_that_nothing_decodes_names_no_extra(tmp_path, syntax):
    heard = refusal(encapsulated(tmp_path/"a.dcm", syntax))
    assert "uncompressed" in heard and "pip install" not in heard


def jpeg(a):
    "A picture as JPEG."
    f = io.BytesIO()
    Image.fromarray(a.astype(np.uint8)).save(f, "JPEG", quality=95)
    return f.getvalue()


def write_jpegs(path, frames, **elements):
    "A file whose frames are JPEGs, as they are given."
    d = pydicom.dcmread(write(path, bscans(len(frames)), 8, **elements))
    d.PixelData = pydicom.encaps.encapsulate(frames)
    d["PixelData"].is_undefined_length = True
    d.file_meta.TransferSyntaxUID = uid.JPEGBaseline8Bit
    d.save_as(path)
    return path


def test_jpegs_are_read(tmp_path):
    got = pictures(write_jpegs(tmp_path/"a.dcm", [jpeg(a) for a in bscans()]))
    assert np.abs(got.astype(int) - bscans()).max() < 9 and notes(tmp_path/"a.dcm") == ""


@pytest.mark.parametrize("share", [.4, .8])
def test_a_jpeg_in_dicom_that_is_cut_or_zeroed_is_refused(tmp_path, share):
    frames = [jpeg(a) for a in bscans()]
    at = len(frames[1]) - int((1 - share)*(len(frames[1]) - frames[1].index(b"\xff\xda")))
    for name, lost in (("cut.dcm", b""), ("zero.dcm", bytes(len(frames[1]) - 2 - at))):
        damaged = [frames[0], frames[1][:at] + lost + b"\xff\xd9", frames[2]]
        heard = refusal(write_jpegs(tmp_path/name, damaged))
        assert heard.startswith(f"corrupt: {name}: frame 2: ") and "damaged or lost" in heard


@pytest.mark.parametrize(
    "frame,detail",
    [
        (np.stack([bscans(1)[0]] * 3, -1), "48 x 40 pixels, 3 samples"),
        (bscans(1, h=44)[0], "48 x 44 pixels, 1 sample "),
    ],
)
def test_a_jpeg_of_other_size_or_channels_than_the_header_says_is_refused(tmp_path, frame, detail):
    heard = refusal(write_jpegs(tmp_path/"a.dcm", [jpeg(frame)]))
    assert (
        heard.startswith("corrupt")
        and "the header says 48 x 40 pixels, 1 sample a pixel" in heard
        and f"the JPEG in it has {detail}" in heard
    )


def write_jpegs_2000(path, frames):
    "A file of JPEG 2000 frames that are written as they are."
    write(path, bscans(len(frames)), 8)
    d = pydicom.dcmread(path)
    d.PixelData = pydicom.encaps.encapsulate(frames)
    d["PixelData"].VR, d.file_meta.TransferSyntaxUID = "OB", uid.JPEG2000Lossless
    d.save_as(path)
    return path


def jpeg_2000(a):
    f = io.BytesIO()
    Image.fromarray(a).save(f, "JPEG2000", no_jp2=True)
    return f.getvalue()


def test_jpegs_2000_are_read(tmp_path):
    a = np.random.default_rng(0).integers(0, 256, (3, 40, 48), np.uint8)
    frames = [jpeg_2000(x) for x in a]
    assert np.array_equal(pictures(write_jpegs_2000(tmp_path/"a.dcm", frames)), a)


def test_a_jpeg_2000_in_dicom_that_is_zeroed_is_refused(tmp_path):
    a = np.random.default_rng(0).integers(0, 256, (3, 40, 48), np.uint8)
    frames = [jpeg_2000(x) for x in a]
    middle = len(frames[1])//2
    frames[1] = frames[1][:middle] + bytes(300) + frames[1][middle + 300:]
    heard = refusal(write_jpegs_2000(tmp_path/"a.dcm", frames))
    assert heard.startswith("corrupt: a.dcm: frame 2: a part of the JPEG 2000 data is zeroed")


def encapsulated(path, syntax):
    "A file whose pixels are said to be compressed in some way."
    d = pydicom.dcmread(write(path, bscans(), 8))
    d.PixelData = pydicom.encaps.encapsulate([b"frame!"]*3)
    d["PixelData"].is_undefined_length = True
    d.file_meta.TransferSyntaxUID = uid.UID(syntax)
    d.save_as(path, implicit_vr=False, little_endian=True, force_encoding=True)
    return path


def test_a_compression_that_nothing_decodes_names_the_extra(tmp_path, monkeypatch):
    d = pydicom.dcmread(write(tmp_path/"a.dcm", bscans(), 8))
    d.PixelData = pydicom.encaps.encapsulate([b"frame!"]*3)
    d["PixelData"].is_undefined_length = True
    d.file_meta.TransferSyntaxUID = uid.JPEGLSLossless
    d.save_as(tmp_path/"a.dcm")
    for plugin in list(pydicom.pixels.get_decoder(uid.JPEGLSLossless).available_plugins):
        monkeypatch.delitem(pydicom.pixels.get_decoder(uid.JPEGLSLossless)._available, plugin)
    assert "JPEG-LS" in refusal(tmp_path/"a.dcm") and "kdoct[volumes]" in refusal(tmp_path/"a.dcm")


@pytest.mark.parametrize(
    "maker,detail", [("Carl Zeiss Meditec", "another decoder will not help"), ("Nobody", "damaged")]
)
def test_pixels_that_no_decoder_takes_are_those_of_a_scrambled_zeiss_file_or_damaged(
    tmp_path, maker, detail
):
    d = pydicom.dcmread(write(tmp_path/"a.dcm", bscans(), 8, Manufacturer=maker))
    d.PixelData = pydicom.encaps.encapsulate([bytes(range(200))]*3)
    d["PixelData"].is_undefined_length = True
    d.file_meta.TransferSyntaxUID = uid.JPEG2000Lossless
    d.save_as(tmp_path/"a.dcm")
    assert detail in refusal(tmp_path/"a.dcm")


# --- what is no volume of B-scans

def of_stacks(path, *stacks):
    "A file whose frames are each of a stack."
    frames = [data_set(FrameContentSequence=[data_set(StackID=stack)]) for stack in stacks]
    return write(path, bscans(len(stacks)), 8, PerFrameFunctionalGroupsSequence=frames)


def test_two_volumes_in_one_file_are_refused(tmp_path):
    heard = refusal(of_stacks(tmp_path/"a.dcm", "1", "1", "1", "2", "2"))
    assert heard.startswith("mixed-pages") and "3 of StackID 1, 2 of StackID 2" in heard


@pytest.mark.parametrize("stacks", [("1", "1", "1"), ("1", "2", "3"), (None, "1", "1")])
def test_frames_of_one_stack_or_of_a_stack_each_are_one_volume(tmp_path, stacks):
    scans = read(of_stacks(tmp_path/"a.dcm", *stacks))
    assert [(s.slice, s.n_slices, s.volume) for s in scans] == [(i, 3, "a") for i in range(3)]


def test_float_pixels_are_named(tmp_path):
    d = pydicom.dcmread(write(tmp_path/"a.dcm", bscans(1)))
    del d.PixelData, d.BitsStored, d.HighBit, d.PixelRepresentation
    d.BitsAllocated, d.FloatPixelData = 32, (bscans(1)/255).astype("<f4").tobytes()
    d.save_as(tmp_path/"a.dcm")
    assert "float pixels" in refusal(tmp_path/"a.dcm")


@pytest.mark.parametrize(
    "elements,detail",
    [
        (dict(Modality="OP"), "a photograph by its Modality"),
        (dict(ImageType=["DERIVED", "SECONDARY", "RED"]), "a photograph by its ImageType, RED"),
        (dict(ImageType=["ORIGINAL", "PRIMARY", "ANGIO"]), "OCT angiography"),
        (dict(sop=PHOTOGRAPH, Modality="OP"), "a photograph"),
        (dict(sop=uid.OphthalmicPhotography16BitImageStorage, Modality=None), "a photograph"),
        (
            dict(sop=uid.OphthalmicOpticalCoherenceTomographyEnFaceImageStorage, Modality="OPTENF"),
            "en face",
        ),
        (
            dict(
                sop=uid.OphthalmicOpticalCoherenceTomographyBscanVolumeAnalysisStorage,
                Modality="OPTBSV",
            ),
            "angiography",
        ),
        (dict(sop=uid.SegmentationStorage, Modality="SEG"), "a segmentation"),
        (dict(sop=uid.OphthalmicThicknessMapStorage, Modality="OPM"), "a thickness map"),
    ],
)
def test_a_picture_of_another_kind_is_named_whichever_element_says_so(tmp_path, elements, detail):
    assert (heard := refusal(write(tmp_path / "a.dcm", bscans(1), 8, **elements))).startswith(
        "not-a-bscan"
    ) and detail in heard


@pytest.mark.parametrize("modality", ["OPT", "OT", None])
@pytest.mark.parametrize(
    "sop",
    [
        uid.OphthalmicPhotography8BitImageStorage,
        uid.OphthalmicOpticalCoherenceTomographyEnFaceImageStorage,
        uid.OphthalmicOpticalCoherenceTomographyBscanVolumeAnalysisStorage,
        uid.OphthalmicThicknessMapStorage,
        uid.SegmentationStorage,
        uid.CTImageStorage,
        uid.ComputedRadiographyImageStorage,
        uid.DigitalXRayImageStorageForPresentation,
        uid.UltrasoundImageStorage,
        uid.UltrasoundMultiFrameImageStorage,
        uid.MRImageStorage,
        uid.VLPhotographicImageStorage,
        uid.IntravascularOpticalCoherenceTomographyImageStorageForPresentation,
    ],
)
def test_another_class_is_refused_whatever_the_modality(tmp_path, sop, modality):
    heard = refusal(write(tmp_path/"a.dcm", bscans(1), 8, sop=sop, Modality=modality))
    assert (
        heard.startswith("not-a-bscan")
        and f"SOP class, {sop.name}" in heard
        and "leave it out" in heard
    )


def test_another_class_in_the_meta_information_is_refused(tmp_path):
    d = pydicom.dcmread(write(tmp_path/"a.dcm", bscans(1), 8))
    d.file_meta.MediaStorageSOPClassUID = PHOTOGRAPH
    d.save_as(tmp_path/"a.dcm")
    assert "a photograph by its MediaStorageSOPClassUID" in refusal(tmp_path/"a.dcm")


@pytest.mark.parametrize(
    "modality",
    ["OP", "OPTENF", "OPTBSV", "OPM", "SEG", "CT", "CR", "DX", "US", "MR", "MG", "ES", "IVOCT"],
)
@pytest.mark.parametrize("sop", [OCT, uid.SecondaryCaptureImageStorage])
def test_another_modality_is_refused_whatever_the_class(tmp_path, modality, sop):
    assert f"by its Modality, {modality}, where an OCT is expected" in refusal(
        write(tmp_path / "a.dcm", bscans(1), 8, sop=sop, Modality=modality)
    )


@pytest.mark.parametrize("sop", [OCT, uid.SecondaryCaptureImageStorage])
@pytest.mark.parametrize(
    "value",
    [
        "SLO",
        "CSLO",
        "FUNDUS",
        "FUNDUS PHOTO",
        "LOCALIZER",
        "THICKNESS",
        "THICKNESS MAP",
        "THICKNESS_MAP",
        "PROJECTION",
        "EN FACE",
        "ENFACE",
        "REPORT",
        "SCREEN SAVE",
        "SCREENSHOT",
        "PREVIEW",
        "THUMBNAIL",
        "REFERENCE IMAGE",
        "IR",
        "FA",
        "ICGA",
        "FAF",
        "SEGMENTATION",
        "OCTA",
    ],
)
def test_an_image_type_of_another_kind_is_refused(tmp_path, value, sop):
    heard = refusal(
        write(tmp_path / "a.dcm", bscans(1), 8, sop=sop, ImageType=["DERIVED", "SECONDARY", value])
    )
    assert (
        heard.startswith("not-a-bscan")
        and f"by its ImageType, {value}, where an OCT is expected" in heard
    )


@pytest.mark.parametrize("element", ["SeriesDescription", "ProtocolName"])
@pytest.mark.parametrize(
    "text",
    [
        "Fundus photograph",
        "Colour fundus",
        "Thickness map",
        "RNFL Thickness Map",
        "En face",
        "en-face slab",
        "Report",
        "Screenshot",
    ],
)
def test_a_text_that_names_another_kind_is_refused(tmp_path, element, text):
    heard = refusal(write(tmp_path/"a.dcm", bscans(1), 8, **{element: text}))
    assert f"by its {element}, which says '" in heard and "leave it out" in heard


@pytest.mark.parametrize("element", ["SeriesDescription", "ProtocolName"])
@pytest.mark.parametrize("text", ["IR", "IR reflectance", "SLO", "FA", "ICGA", "FAF"])
def test_the_mode_of_the_camera_is_noted_in_an_oct_and_refused_elsewhere(tmp_path, element, text):
    # OCT-Converter writes it as ProtocolName of the volume
    path = write(tmp_path/"a.dcm", bscans(), 8, **{element: text})
    assert np.array_equal(pictures(path), bscans()) and f"its {element} names " in notes(path)
    path = write(
        tmp_path / "b.dcm",
        bscans(1),
        8,
        sop=uid.SecondaryCaptureImageStorage,
        Modality="OT",
        **{element: text},
    )
    assert f"by its {element}" in refusal(path)


@pytest.mark.parametrize(
    "text",
    [
        "IR + OCT volume",
        "OCT with fundus photograph",
        "Volume IR",
        "Macular Cube 512x128, en face",
        "3D OCT, thickness map",
    ],
)
def test_a_text_that_names_bscans_too_is_noted(tmp_path, text):
    path = write(tmp_path/"a.dcm", bscans(), 8, SeriesDescription=text)
    assert np.array_equal(pictures(path), bscans()) and "its SeriesDescription names " in notes(
        path
    )


@pytest.mark.parametrize(
    "elements",
    [
        dict(ImageType=["ORIGINAL", "PRIMARY"]),
        dict(ImageType=["ORIGINAL", "PRIMARY", "VOLUME"]),
        dict(ImageType=["DERIVED", "SECONDARY"]),
        dict(ImageType=["ORIGINAL", "PRIMARY", "ANGIO", "STRUCTURE"]),
        dict(SeriesDescription="Macular Cube 512x128"),
        dict(SeriesDescription="HD 5 Line Raster"),
        dict(SeriesDescription="Volume", ProtocolName="OCT ART"),
        dict(SeriesDescription="RNFL circle"),
        dict(Modality=None),
        dict(Modality="OCT"),
        dict(Modality="OT"),
    ],
)
def test_a_sound_oct_is_read_without_a_note(tmp_path, elements):
    path = write(tmp_path/"a.dcm", bscans(), 8, **elements)
    assert np.array_equal(pictures(path), bscans()) and notes(path) == ""


def test_the_volume_and_the_picture_that_oct_converter_writes_are_told_apart(tmp_path):
    converter = pytest.importorskip("oct_converter.dicom.dicom")
    from oct_converter.dicom import metadata as m
    series = m.SeriesMeta(
        laterality="R",
        series_id="1",
        protocol="ICGA",
        description="Volume",
        opt_anatomy=m.OPTAnatomyStructure.Retina,
    )
    patient, maker = (
        m.PatientMeta(patient_id="Study-07"),
        m.ManufacturerMeta(manufacturer="Heidelberg"),
    )
    about = m.DicomMetadata(
        patient, series, maker, m.ImageGeometry(pixel_spacing=[0.01, 0.01]), m.OCTImageParams()
    )
    converter.write_opt_dicom(about, list(bscans().astype(float)), tmp_path/"volume.dcm")
    assert np.abs(
        pictures(tmp_path / "volume.dcm").astype(int) - bscans()
    ).max() <= 3 and "names angiography with a dye too" in notes(tmp_path / "volume.dcm")
    converter.write_fundus_dicom(about, bscans(1)[0], tmp_path/"fundus.dcm")
    assert "a photograph by its Modality" in refusal(tmp_path/"fundus.dcm")


RADIOGRAPHS = [
    uid.ComputedRadiographyImageStorage,
    uid.DigitalXRayImageStorageForPresentation,
    uid.DigitalXRayImageStorageForProcessing,
]


@pytest.mark.parametrize("sop,modality", list(zip(RADIOGRAPHS, ("CR", "DX", "DX"), strict=True)))
def test_a_network_of_radiographs_reads_them_and_no_oct(tmp_path, sop, modality):
    path = write(
        tmp_path / "a.dcm",
        bscans(1, high=4000),
        16,
        12,
        sop=sop,
        Modality=modality,
        ImageType=["ORIGINAL", "PRIMARY"],
        SeriesDescription="Chest PA",
    )
    assert np.array_equal(
        pictures(path, "radiograph"), spread(bscans(1, high=4000))
    ) and "radiograph" not in notes(path, "radiograph")
    assert "a radiograph by its SOP class" in refusal(
        path
    ) and "a radiograph by its SOP class" in refusal(path, "histology")
    oct_ = write(tmp_path/"b.dcm", bscans(), 8)
    assert "an OCT by its SOP class" in refusal(oct_, "radiograph") and "as PNG" in refusal(
        oct_, "radiograph"
    )
    assert (
        np.array_equal(pictures(oct_, "other"), bscans()) and np.ptp(pictures(path, "other")) > 200
    )


def test_a_network_of_radiographs_refuses_reports_and_other_modalities_and_notes_captures(tmp_path):
    radiograph = dict(sop=RADIOGRAPHS[0], Modality="CR")
    for elements in (
        dict(ImageType=["DERIVED", "SECONDARY", "SCREEN SAVE"]),
        dict(Modality="CT"),
        dict(sop=uid.CTImageStorage, Modality="CT"),
    ):
        path = write(tmp_path/"a.dcm", bscans(1), 8, **radiograph | elements)
        assert "where a radiograph is expected" in refusal(path, "radiograph")
    path = write(
        tmp_path / "b.dcm", bscans(1), 8, sop=uid.SecondaryCaptureImageStorage, Modality="OT"
    )
    assert notes(path, "radiograph") == "may be no radiograph: Secondary Capture Image Storage"


@pytest.mark.parametrize(
    "modality,error", [("radiograph", ""), ("oct", "not-a-bscan"), ("", "not-a-bscan")]
)
def test_predict_refuses_what_its_network_was_not_trained_on(tmp_path, modality, error):
    from kdoct.deploy.engines import Engine  # here: they import torch
    from kdoct.deploy.predict import Predictor
    def engine(name="", threads=0):
        return Engine("straw", lambda x: (np.tile([1., 0], (len(x), 1)), np.zeros(len(x))), 1)
    about = dict(modality=modality) if modality else {}
    network = SimpleNamespace(
        decision=None, classes=["a", "b"], framing={}, about=about, engine=engine
    )
    path = write(tmp_path/"a.dcm", bscans(1), 8, sop=RADIOGRAPHS[1], Modality="DX")
    with Predictor(network) as p: (row,) = p.predict(path)
    assert row["error"] == error and bool(row["predicted"]) == (not error)
    if error: assert f"not-a-bscan: {row['detail']}" in refusal(path)


@pytest.mark.parametrize(
    "name,begin", [("a.vol", b"HSF-OCT-103"), ("a.e2e", b"CMDb"), ("a.fda", b"FOCT")]
)
def test_a_network_of_radiographs_refuses_volumes_of_oct_devices(tmp_path, name, begin):
    (tmp_path/name).write_bytes(begin + bytes(5000))
    assert "a file of an OCT device, where a radiograph is expected" in refusal(
        tmp_path / name, "radiograph"
    )


# --- which eye

@pytest.mark.parametrize(
    "frame,image,series,eye,detail",
    [
        ("L", "R", None, "OS", "FrameLaterality says OS, ImageLaterality says OD"),
        (None, "L", "R", "OS", "ImageLaterality says OS, Laterality says OD"),
        ("R", "R", "L", "OD", "Laterality says OS; OD is taken"),
        ("R", "R", "R", "OD", ""),
        ("U", "B", "L", "OS", ""),
        (None, None, "R", "OD", ""),
    ],
)
def test_elements_that_name_both_eyes_are_noted(tmp_path, frame, image, series, eye, detail):
    elements = dict(ImageLaterality=image, Laterality=series)
    if frame:
        elements["SharedFunctionalGroupsSequence"] = [
            data_set(FrameAnatomySequence=[data_set(FrameLaterality=frame)])
        ]
    path = write(tmp_path/"a.dcm", bscans(), 8, **{k: v for k, v in elements.items() if v})
    assert (
        read(path)[0].eye == eye
        and detail in notes(path)
        and bool(detail) == ("which eye" in notes(path))
    )


def test_bscans_of_both_eyes_in_a_volume_are_noted(tmp_path):
    groups = [data_set(FrameAnatomySequence=[data_set(FrameLaterality=side)]) for side in "LRR"]
    path = write(tmp_path/"a.dcm", bscans(), 8, PerFrameFunctionalGroupsSequence=groups)
    assert [s.eye for s in read(path)] == [
        "OS",
        "OD",
        "OD",
    ] and "its B-scans are of both eyes" in notes(path)


def test_a_look_up_table_without_an_item_is_none(tmp_path):
    plain, path = (
        write(tmp_path/name, bscans(1), 8, **elements)
        for name, elements in (("a.dcm", {}), ("b.dcm", {"VOILUTSequence": []}))
    )
    assert notes(path) == notes(plain) and np.array_equal(pictures(path), pictures(plain))


@pytest.mark.parametrize("sop", [uid.SecondaryCaptureImageStorage, None])
def test_a_picture_of_no_ophthalmic_class_has_a_note(tmp_path, sop):
    path = write(tmp_path/"a.dcm", bscans(1), 8, sop=sop or OCT)
    if sop is None:
        d = pydicom.dcmread(path)
        del d.SOPClassUID
        d.save_as(path)
    assert notes(path).startswith("may be no OCT: ") and read(path)[0].slice is None


@pytest.mark.parametrize("sop", [uid.EncapsulatedPDFStorage, uid.BasicTextSRStorage])
def test_a_document_is_named(tmp_path, sop):
    d = pydicom.dcmread(write(tmp_path/"a.dcm", bscans(1), 8, sop=sop))
    del d.PixelData, d.Rows, d.Columns
    d.save_as(tmp_path/"a.dcm")
    assert f"without a picture: {sop.name}" in refusal(tmp_path/"a.dcm")


def test_a_dicomdir_says_to_give_the_folder():
    assert "give the folder" in refusal(
        Path(pydicom.__file__).parent / "data" / "test_files" / "dicomdirtests" / "DICOMDIR"
    )


def test_pixels_of_fewer_and_of_more_frames_than_the_header_says_are_refused(tmp_path):
    assert "4 frames need" in refusal(write(tmp_path/"a.dcm", bscans(3), 8, NumberOfFrames=4))
    assert "NumberOfFrames is 2, and there are pixels for 3" in refusal(
        write(tmp_path / "b.dcm", bscans(3), 8, NumberOfFrames=2)
    )
    d = pydicom.dcmread(write(tmp_path/"c.dcm", bscans(3), 8))
    d.compress(uid.RLELossless)
    for n, detail in (
        (2, "NumberOfFrames is 2, and there are more"),
        (4, "3 of 4 frames are there"),
    ):
        d.NumberOfFrames = n
        d.save_as(tmp_path/"c.dcm")
        assert detail in refusal(tmp_path/"c.dcm")


@pytest.mark.parametrize(
    "element", ["PhotometricInterpretation", "BitsStored", "PixelRepresentation"]
)
def test_what_the_header_lacks_is_named(tmp_path, element):
    assert f"lacks {element}" in refusal(write(tmp_path/"a.dcm", bscans(), 8, **{element: None}))


def test_one_bit_and_32_bits_a_pixel_are_refused_in_words(tmp_path):
    assert "32 of 32 bits" in refusal(write(tmp_path/"a.dcm", bscans(), 32))
    assert "a mask" in refusal(write(tmp_path/"b.dcm", bscans(high=1), 8, 1))


# --- one B-scan a file

def places(folder): return {p.name: read(p)[0].slice for p in folder.iterdir()}


def test_slices_without_number_are_in_the_order_of_their_positions(tmp_path):
    for name, z in (("a.dcm", 3), ("b.dcm", -1), ("c.dcm", 2)):
        write(tmp_path/name, bscans(1), 8, ImagePositionPatient=[0, 0, z])
    assert places(tmp_path) == {
        "a.dcm": 2,
        "b.dcm": 0,
        "c.dcm": 1,
    } and "ImagePositionPatient" in notes(tmp_path / "a.dcm")


@pytest.mark.parametrize("number,why", [(None, "no InstanceNumber"), (1, "equal InstanceNumbers")])
def test_slices_that_only_their_names_tell_apart_are_in_the_order_of_the_names(
    tmp_path, number, why
):
    for k in (1, 2, 10):
        write(
            tmp_path / f"s{k}.dcm",
            bscans(1),
            8,
            **({} if number is None else dict(InstanceNumber=number)),
        )
    assert places(tmp_path) == {"s1.dcm": 0, "s2.dcm": 1, "s10.dcm": 2}
    assert notes(tmp_path/"s1.dcm") == f"{why} in its series: slices are in the order of file name"


def test_numbers_of_another_patient_in_the_same_series_are_no_matter(tmp_path):
    for p in "AB":
        for k in (1, 2): write(tmp_path/f"{p}{k}.dcm", bscans(1), 8, PatientID=p, InstanceNumber=k)
    assert (
        places(tmp_path) == {"A1.dcm": 0, "A2.dcm": 1, "B1.dcm": 0, "B2.dcm": 1}
        and notes(tmp_path / "A1.dcm") == ""
    )


def test_two_patients_whose_ids_are_withheld_are_not_one_volume(tmp_path):
    for p in "AB":
        (tmp_path/p).mkdir()
        write(tmp_path/p/"1.dcm", bscans(1), 8, PatientID=f"Roe^{p}", InstanceNumber=1)
    assert {read(tmp_path/p/"1.dcm")[0].volume for p in "AB"} == {"1.2.3 in A", "1.2.3 in B"}
