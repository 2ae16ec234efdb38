"Names and tables as spreadsheets and typists leave them: found, merged with a note, or refused with what helps."
import gzip
import io
import zipfile

import numpy as np
import pytest
from conftest import lay_out, problems
from hypothesis import given
from hypothesis import strategies as st

from kdoct.core.files import KdoctError
from kdoct.core.overrides import parse_overrides
from kdoct.core.presets import preset
from kdoct.core.sections import DataRecipe
from kdoct.data.listing import classes_option, part_name
from kdoct.data.sources import load_table
from kdoct.data.spreadsheet import (
    doubtful_spellings,
    is_empty_cell,
    read_table,
    same_name_key,
    same_patient_key,
)
from kdoct.data.table_sources import eye_name


def table_of(tmp_path, text, encoding="utf-8", name="table.csv"):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode(encoding))
    return DataRecipe(source="csv", root=str(tmp_path / name))


def of_patients(tmp_path, *patients, labels=("A",), column="patient"):
    rows = [f'{i}.png,{labels[i % len(labels)]},"{p}"' for i, p in enumerate(patients)]
    lay_out(tmp_path, *(f"{i}.png" for i in range(len(rows))))
    return load_table(table_of(tmp_path, f"path,label,{column}\n" + "\n".join(rows) + "\n"))


# --- patients

SEVEN = [
    "7",
    "7.0",
    "07",
    "007",
    " 7",
    "7\u00a0",
    "\uff17",
    "7,0",
    "7.",
    "'7",
    "\u0667",
    "7e0",
    "Patient 7 ",
    "patient 7",
    "PATIENT-7",
    "P7",
    "P-7",
    "p007",
    "P_7",
    "Pat. 7",
    "sub-07",
    "7\u200b",
    "\ufeff7",
    "7,00 \u20ac",
    "\u20ac7.00",
    "$ 7",
    "#7",
    "# 07",
    "Patient ID 7",
    "Patient No. 7",
    "Subject ID: 7",
    "Pat-ID 7",
    "Pat.Nr. 7",
    "patient_id_7",
    "ID: 7",
    "MRN7",
    "MRN: 007",
    "case 7",
    "7-OD",
]


@pytest.mark.parametrize("spelling", SEVEN)
def test_a_patient_in_another_spelling_is_the_same_group(spelling, tmp_path):
    listing = of_patients(tmp_path, "7", spelling, "8")
    assert listing.table.group.nunique() == 2 and listing.table.group[0] == listing.table.group[1]
    if spelling.strip() != "7":
        assert (
            problems(listing)[f"{0 if min('7', spelling.strip()) != '7' else 1}.png"]
            == "patient-spelling"
        )


@pytest.mark.parametrize(("one", "other"), [("7", "70"), ("1-2", "12"), ("1.5", "15"), ("A1", "B1"), ("7a", "7b"), ("CNV/7", "DRUSEN/7"), ("10", "1"),
                                            ("2020-01-03", "2020-01-30"), ("x1_11", "x11_1"), ("12345678901234567890", "12345678901234567891"),
                                            ("0,123", "123"), ("1-234", "1234"), ("3/4/2021", "4/3/2021"),
                                            ("1234567890123457", "1234567890123456"), ("2021-3-4", "44260"),
                                            ("5e123456", "5e123457"), ("1-2", "1-Mar"), ("7.1", "7.2")])
def test_different_patients_stay_apart(one, other, tmp_path):
    listing = of_patients(tmp_path, one, other)
    assert listing.table.group.nunique() == 2 and not len(listing.findings)


@pytest.mark.parametrize(("one", "other"), [("1e5", "100000"), ("1E+05", "100000.0"), ("1,23E+05", "123000"), ("1,5", "1.5"),
                                            ("100,000", "100000"), ("M\u00fcller", "Mu\u0308ller"),
                                            ("CNV/7", "cnv/07"), ("0", "0.0"), ("0998A", "998a"), ("Schmidt  Anna", "schmidt anna"),
                                            ("1 234", "1234"), ("1\u00a0234", "1234"), ("1\u2009234", "1234"), ("1\u202f234,5", "1234.5"), ("1'234", "1234"),
                                            ("1\u2019234", "1234"), ("1,234", "1234"), ("1.234,00 \u20ac", "1234"), ("12.345.678", "12345678"),
                                            ("2021-03-04", "04.03.2021"), ("2021-03-04", "4.3.2021"),
                                            ("2021-03-04 00:00:00", "2021/3/4"), ("25/12/2020", "12/25/2020"),
                                            ("4 Mar 2021", "2021-03-04"), ("20210304.0", "04-Mar-2021"), ("CNV/13/4/2021", "cnv/2021-04-13")])
def test_numbers_and_words_have_one_key_in_all_their_spellings(one, other):
    assert same_patient_key(one) == same_patient_key(other)


@pytest.mark.parametrize(("one", "other"), [("1-OD", "1-OS"), ("P1_OD", "P1_OS"), ("12 R", "12 L"), ("12L", "12R"), ("7 right", "7 left eye"), ("OD_7", "OS_7"),
                                            ("001-OD-1", "001-OS-1"), ("7 (OD)", "7"),
                                            ("CNV/7/OD", "CNV/7/OS"), ("OD/7", "OS/7"), ("Smith right", "Smith left")])
def test_two_eyes_of_a_patient_are_one_group_with_a_note(one, other, tmp_path):
    listing = of_patients(tmp_path, one, other, "8")
    assert listing.table.group.nunique() == 2 and listing.table.group[0] == listing.table.group[1]
    assert list(listing.findings.problem) == ["patient-spelling"]


@pytest.mark.parametrize(("one", "other"), [("Doe R", "Doe L"), ("Rod 7", "7"), ("Leonard5", "5"), ("7a", "7b"), ("control 7", "7"), ("OD1", "OD2")])
def test_letters_that_are_no_eye_keep_patients_apart(one, other, tmp_path):
    listing = of_patients(tmp_path, one, other)
    assert listing.table.group.nunique() == 2 and not len(listing.findings)


@pytest.mark.parametrize(("one", "other"), [("P7", "\u04207"), ("A1", "\u03911"), ("KOT3", "\u041a\u041e\u04223")])
def test_a_patient_with_letters_that_only_look_latin_is_the_same_group_and_the_note_names_the_letter(
    one, other, tmp_path
):
    listing = of_patients(tmp_path, one, other, "8")
    assert (
        listing.table.group.nunique() == 2 and f"whose {other[0]} (" in listing.findings.detail[0]
    )


def test_patients_keep_their_names_and_the_note_says_who_was_merged(tmp_path):
    listing = of_patients(tmp_path, "0001", "1", "2")
    assert list(listing.table.patient) == ["0001", "1", "2"] and list(listing.table.group) == [
        "0001",
        "0001",
        "2",
    ]
    (note,) = listing.findings.to_dict("records")
    assert (
        note["severity"] == "note"
        and note["action"] == "groups 0001 and 1 merged"
        and "'1' (1 image) and '0001' (1 image)" in note["detail"]
    )


def test_groups_that_part_a_patient_are_merged_and_a_note_says_so(tmp_path):
    lay_out(tmp_path, *(f"{c}.png" for c in "abcd"))
    listing = load_table(
        table_of(
            tmp_path,
            "path,label,patient,group\na.png,CNV,7,g1\nb.png,CNV,7.0,g2\nc.png,CNV,8,g2\nd.png,CNV,,g3\n",
        )
    )
    assert list(listing.table.group) == ["g1", "g1", "g1", "g3"] and problems(listing) == {
        "a.png": "patient-in-two-groups"
    }
    assert (
        listing.findings.detail[0] == "patient 7 / 7.0: groups g1, g2"
        and listing.findings.action[0] == "groups g1, g2 merged"
    )


@given(st.lists(st.tuples(st.sampled_from(["7", "7.0", "P8", "008", "9", ""]), st.sampled_from(["a", "b", "c", "A "])), min_size=1, max_size=8))
def test_no_patient_is_in_two_groups_whatever_the_table(rows):
    from kdoct.data.listing import join_spellings, make_listing
    listing = make_listing(
        ".",
        [dict(path=f"{i}.png", label="CNV", patient=p, group=g) for i, (p, g) in enumerate(rows)],
        [],
        "test",
    )
    t = join_spellings(listing).table
    assert (t[t.patient != ""].groupby(t.patient.map(same_patient_key)).group.nunique() <= 1).all()
    assert (t.groupby(listing.table.group.map(same_patient_key)).group.nunique() == 1).all()


@pytest.mark.parametrize(("one", "other", "helps"), [
    ("7.1", "7.10", "as text"), ("007.1", "7.100", "as text"), ("CNV/7.1", "CNV/7.10", "as text"),
    ("1.234", "1234", "without it"), ("1,234", "1.234", "without it"),
    ("2021-03-04", "3/4/2021", "2021-03-04"), ("04.03.2021", "3-4-2021", "2021-03-04"), ("3/4/2021", "3-4-2021", "2021-03-04"),
    ("2021-03-04", "04-Mar-21", "2021-03-04"), ("2021-03-04", "44259", "2021-03-04"), ("3/4/2021",
    "44259", "2021-03-04"), ("2021-03-04", "42797", "2021-03-04"),
    ("2-1", "2-Jan", "as text"), ("2021-03", "Mar-21", "as text"), ("1-2", "02. Jan", "as text"), ("1.23E+05", "123456", "as text"),
    ("1.23457E+14", "123456789012345", "as text"), ("1234567890123450", "1234567890123456", "as text")])
def test_patients_who_may_be_one_are_refused_where_it_cannot_be_known(one, other, helps, tmp_path):
    with pytest.raises(
        KdoctError, match="line 2 and 1 other|line 3: patient .1.23457E|cannot be known"
    ) as e:
        of_patients(tmp_path, one, other, "8")
    assert helps in e.value.fix and repr(one) in e.value.problem


def test_a_rounded_number_is_refused_alone_for_it_may_be_several_patients(tmp_path):
    with pytest.raises(KdoctError, match="line 3 and 1 other: patient '1.23457E\\+14'"):
        of_patients(tmp_path, "7", "1.23457E+14", "1.23457E+14")


def test_long_numbers_in_a_row_are_no_rounded_ones():
    assert doubtful_spellings([str(1234567890123440 + i) for i in range(40)]) == []
    assert doubtful_spellings(
        [str(1234567890123440 + i // 2 * 10 * (i % 2) + i) for i in range(6)]
        + ["1234567890123450", "1234567890123460"]
    )


@given(st.lists(st.integers(1, 99_999).map(str) | st.dates().map(str) | st.from_regex(r"[A-Z]{1,2}[0-9]{1,4}", fullmatch=True), max_size=12, unique=True))
def test_a_table_in_one_form_is_never_doubtful(names):
    dates = [n for n in names if n.count("-") == 2]
    for kind in (dates, [n for n in names if n not in dates]): assert doubtful_spellings(kind) == []


@pytest.mark.parametrize("nobody", ["-", "?", "..", "\u2014", "unknown", "Unknown ", "none", "None",
    "n.a.", "anonymous", "-1", "-99", "0", "000", "NA", "CNV/-"])
def test_a_word_for_nobody_is_no_patient_that_many_share(nobody, tmp_path):
    with pytest.raises(KdoctError, match="line 3 and 1 other: patient .* not known") as e:
        of_patients(tmp_path, "7", nobody, nobody, "12")
    assert "leave the cell empty" in e.value.fix
    with pytest.raises(KdoctError, match="group .* not known"):
        of_patients(tmp_path, "7", nobody, nobody, column="group")


def test_a_hospital_that_is_not_known_does_not_make_its_patients_nobody(tmp_path):
    assert list(of_patients(tmp_path, "unknown/7", "-/8").table.patient) == ["unknown/7", "-/8"]


@pytest.mark.parametrize("names", [("0", "1", "2"), ("0", "0", "1", "1", "2"), ("NA", "7"), ("P0", "P0", "7"), ("X1", "X2")])
def test_names_that_look_like_nobody_are_patients_where_others_are_like_them(names, tmp_path):
    assert list(of_patients(tmp_path, *names).table.patient) == list(names)


def test_images_that_are_groups_of_their_own_are_not_merged_by_their_names(tmp_path):
    data = DataRecipe(
        source="folder", root=lay_out(tmp_path, "CNV/1.png", "CNV/01.png", "NORMAL/P1.png")
    )
    assert load_table(data).table.group.nunique() == 3


def test_spellings_are_found_in_names_of_files_and_in_tables_of_groups(tmp_path):
    root = lay_out(tmp_path, "CNV/P7_1.png", "CNV/p07_2.png", "DME/P8_1.png")
    assert (
        load_table(
            DataRecipe(source="folder", root=root, group_pattern=r"/([^_]+)_")
        ).table.group.nunique()
        == 2
    )
    (tmp_path / "groups.csv").write_text(
        "Path;Group \ncnv/P7_1.png;tile 1\nCNV\\p07_2.png;Tile 01\nDME/P8_1.png;tile 2\n"
    )
    t = load_table(
        DataRecipe(source="folder", root=root, groups=str(tmp_path / "groups.csv"))
    ).table
    assert t.group.nunique() == 2 and t.group[0] == t.group[1]


@pytest.mark.parametrize("blank", ["", " ", "nan", "NaN", "#N/A", "NULL", "<NA>"])
def test_a_patient_that_is_a_word_for_an_empty_cell_is_nobody(blank, tmp_path):
    listing = of_patients(tmp_path, "7", blank, blank)
    assert problems(listing) == {"1.png": "no-patient", "2.png": "no-patient"}


# --- labels

@pytest.mark.parametrize("labels", [("NORMAL", "Normal"), ("CNV", "cnv\u00a0"), ("COVID-19", "COVID19"), ("lung_n", "Lung N"), ("1", "1.0"),
                                    ("D\u00e9pots", "De\u0301pots")])
def test_a_class_in_two_spellings_is_refused_unless_both_are_named(labels, tmp_path):
    with pytest.raises(KdoctError, match="in several spellings.*first 0.png.*\n.*--classes") as e:
        of_patients(tmp_path, *"1234", labels=labels)
    assert labels[0] in str(e.value)
    listing = load_table(
        table_of(tmp_path, (tmp_path / "table.csv").read_text()).model_copy(
            update=dict(classes=tuple(s.strip() for s in labels))
        )
    )
    assert listing.table.label.nunique() == 2


def test_class_folders_that_differ_only_by_case_are_refused(tmp_path):
    with pytest.raises(KdoctError, match="'CNV' .*'Cnv'"):
        load_table(DataRecipe(source="folder", root=lay_out(tmp_path, "CNV/1.png", "Cnv/2.png")))


@pytest.mark.parametrize("empty", ["nan", "NaN", "", "#N/A", "null", "N/A"])
def test_a_word_for_an_empty_cell_is_no_class(empty, tmp_path):
    assert problems(of_patients(tmp_path, "1", "2", labels=("CNV", empty))) == {"1.png": "no-label"}


@pytest.mark.parametrize("sign", ["-", "?", "..", "\u2014", "--"])
def test_a_sign_is_no_class(sign, tmp_path):
    listing = of_patients(tmp_path, "1", "2", "3", labels=("CNV", sign))
    assert problems(listing) == {"1.png": "no-label"} and "line 3" in listing.findings.detail[0]


def test_plus_and_minus_are_classes(tmp_path):
    assert set(of_patients(tmp_path, "1", "2", labels=("+", "-")).table.label) == {"+", "-"}


def test_a_class_with_a_comma_can_be_named_as_the_message_says(tmp_path):
    import shlex
    with pytest.raises(KdoctError) as e:
        of_patients(tmp_path, "1", "2", labels=('"CNV, wet"', '"cnv, wet"'))
    typed = shlex.split(e.value.fix.split("name all of them: ")[1])
    assert typed[0] == "--set" and parse_overrides(typed[1]) == {
        "data.classes": ["CNV, wet", "cnv, wet"]
    }
    assert classes_option(["b", "a"]) == "--classes b,a"   # the order is that of the logits


@pytest.mark.parametrize("names", [("NORMAL", "wet AMD"), ("a'b", "$HOME", "c;d"), ("CNV, wet", "dry"),
                                   ("'q'", "b"), (" lead", "b"), ("[x", "y]"), ("-1", "1")])
def test_the_option_that_names_classes_parses_back(names):
    import shlex
    option, text = shlex.split(classes_option(names))
    given = parse_overrides(text) if option == "--set" else {"data.classes": text}
    assert preset("demo", **given).data.classes == names


def test_a_class_without_an_image_is_answered_with_a_quoted_option(tmp_path):
    from kdoct.data.plan import class_names
    with pytest.raises(KdoctError, match="--classes 'NORMAL,wet AMD'"):
        class_names(
            of_patients(tmp_path, "1", "2", labels=("wet AMD", "NORMAL")).table, ("DRUSEN",)
        )


def test_classes_in_several_spellings_with_blanks_are_answered_with_a_quoted_option(tmp_path):
    with pytest.raises(KdoctError, match="--classes 'wet AMD,wet amd'"):
        of_patients(tmp_path, "1", "2", labels=("wet AMD", "wet amd"))


@pytest.mark.parametrize("word", ["None", "unknown", "TBD", "not available", "NA", "-1", "ungradable", "x", "-"])
def test_a_word_for_no_label_is_a_class_only_where_it_is_named(word, tmp_path):
    listing = of_patients(tmp_path, "1", "2", labels=("CNV", word))
    assert (
        problems(listing) == {"1.png": "no-label"}
        and "line 3" in listing.findings.detail[0]
        and "--classes" in listing.findings.detail[0]
    )
    data = table_of(tmp_path, (tmp_path / "table.csv").read_text()).model_copy(
        update=dict(classes=("CNV", word))
    )
    assert set(load_table(data).table.label) == {"CNV", word} and not is_empty_cell("0")


@pytest.mark.parametrize("labels", [("0", "1"), ("-1", "1"), ("normal", "no finding"), ("N", "S")])
def test_short_and_numbered_labels_are_classes(labels, tmp_path):
    assert set(of_patients(tmp_path, "1", "2", labels=labels).table.label) == set(labels)


@pytest.mark.parametrize("labels", [("train", "test"), ("CNV", "Validation"), ("OD", "OS")])
def test_parts_of_a_split_and_eyes_are_classes_only_where_they_are_named(labels, tmp_path):
    with pytest.raises(KdoctError, match="named like (parts of a split|eyes)") as e:
        of_patients(tmp_path, "1", "2", labels=labels)
    part = "eye" if labels[0] == "OD" else "split"
    assert (
        f"--set data.columns.{part}=label" in e.value.fix
        and "line 2" in e.value.problem
        or "line 3" in e.value.problem
    )
    data = table_of(tmp_path, (tmp_path / "table.csv").read_text()).model_copy(
        update=dict(classes=labels)
    )
    assert set(load_table(data).table.label) == set(labels)


def test_a_class_with_another_alphabets_letter_is_refused_and_the_letter_is_named(tmp_path):
    with pytest.raises(KdoctError, match=r"'CNV' .*'\u0421NV', whose \u0421 \(Cyrillic"):
        of_patients(tmp_path, "1", "2", labels=("CNV", "\u0421NV"))
    assert same_name_key("\u041d\u043e\u0440\u043c\u0430") != same_name_key("Hop\u043ca")


# --- tables

GOOD = "path,label,patient\na.png,CNV,0012\nb.png,NORMAL,7\n"


def reads(tmp_path, text, encoding="utf-8", name="table.csv"):
    lay_out(tmp_path, "a.png", "b.png")
    t = load_table(table_of(tmp_path, text, encoding, name)).table
    return (
        list(t.path) == ["a.png", "b.png"]
        and list(t.label) == ["CNV", "NORMAL"]
        and list(t.patient) == ["0012", "7"]
    )


@pytest.mark.parametrize("separator", [",", ";", "\t", "|", " ", "   ", ":"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_separators_encodings_and_line_ends_are_found(separator, encoding, end, tmp_path):
    assert reads(tmp_path, GOOD.replace(",", separator).replace("\n", end), encoding)


@pytest.mark.parametrize("text", [
    "sep=;\r\n" + GOOD.replace(",", ";"), GOOD.replace("path,label,patient", " Path "
                                                                             ",LABEL,Patient"), "\n\n" + GOOD.replace("\n", "\n,,\n"),
    GOOD.replace(",label", ",\"label\"").replace("CNV", "\" CNV \""), ",path,label,patient\n0,a.png,CNV,0012\n1,b.png,NORMAL,7\n",
    GOOD.replace("\n", ",\n").replace("patient,", "patient"), "path,note,label,patient\na.png,\"two\nlines, \"\"quoted\"\"\",CNV,0012\nb.png,,NORMAL,7\n",
    "path,label,label,patient\na.png,CNV,CNV,0012\nb.png,NORMAL,NORMAL,7\n", "path,label,label.1,patient\na.png,CNV,CNV,0012\nb.png,NORMAL,NORMAL,7\n",
    "path;size;label;patient\na.png;1,5;CNV;0012\nb.png;2,5;NORMAL;7\n"])
def test_tables_that_can_be_read_in_one_way_are_read(text, tmp_path):
    assert reads(tmp_path, text)


def test_a_packed_table_is_read(tmp_path):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as z: z.writestr("listing.csv", GOOD)
    assert reads(tmp_path, gzip.compress(GOOD.encode()), name="t.csv.gz") and reads(
        tmp_path, packed.getvalue(), name="t.zip"
    )


def a_zip(*names):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as z:
        for n in names: z.writestr(n, "x")
    return out.getvalue()


def arrays():
    out = io.BytesIO()
    np.savez(out, train_images=np.zeros(3))
    return out.getvalue()


@pytest.mark.parametrize(("text", "says", "helps"), [
    (GOOD.replace("7\n", "7,checked, twice\n"), "line 3 has 5 cells, the header 3", "quotes"),
    (GOOD.replace("CNV,0012", "CNV"), "line 2 has 2 cells", "empty one"),
    (GOOD.replace("b.png,NORMAL,7\n", "b.png,NORMAL,7,\n"), "line 3 has 4 cells", "quotes"),
    ("path,label,patient\n1,a.png,CNV,0012\n2,b.png,NORMAL,7\n", "line 2 has 4 cells, "
                                                                 "the header 3", "name "
                                                                                 "in the header"),
    ("path,label,patient\n\"a\nb.png\",CNV,1\nc.png,CNV\n", "line 4 has 2 cells", "quotes"),
    (GOOD.replace("CNV", "\"CNV"), "line 2", "CSV UTF-8"),
    (GOOD.replace("NORMAL", "\xd6dem").encode("cp1252"), "line 3 is not UTF-8; it may be "
                                                         "Windows-1252 ('b.png,\xd6dem", "iconv"),
    (GOOD.encode("utf-16-le"), "UTF-16 without its mark", "CSV UTF-8"),
    ("path,label,label,patient\na.png,CNV,DME,1\n", "two columns named 'label', the "
                                                    "2. and the 3.", "Rename"),
    ("path,label,label.1,patient\na.png,CNV,DME,1\n", "'label' "
                                                      "and 'label.1'", "--set "
                                                                       "data.columns.label=label"),
    ("path,label,Label,patient\na.png,CNV,DME,1\n", "'label' "
                                                    "and 'Label'", "--set "
                                                                   "data.columns.label=label"),
    ("path,label,patient\n", "a "
                             "header and no row", "one "
                                                  "row an image"), ("", "it is empty", "header"), (b"\x00\x01\x02" * 9, "zero bytes", "CSV UTF-8"),
    (a_zip("xl/workbook.xml"), "an "
                               "Excel workbook", "CSV UTF-8"), (b"\xd0\xcf\x11\xe0", "an old "
                                                                                     "Excel workbook", "CSV UTF-8"),
    (arrays(), "NumPy arrays "
               "(train_images.npy)", "PNG files"), (a_zip("a.csv", "b.csv"), "an "
                                                                             "archive of 2 files", "Unpack"),
    ("path;label,patient\na;b,c\n", "semicolon", "comma-separated"), (b"version "
                                                                      b"https://git-lfs.github.com/spec/v1\n", "Git LFS pointer", "CSV")])
def test_a_malformed_table_is_refused_with_the_line_and_what_helps(text, says, helps, tmp_path):
    with pytest.raises(KdoctError) as e: load_table(table_of(tmp_path, text))
    assert says in e.value.problem and helps in e.value.fix


HEAD = "path,label,patient\n"


@pytest.mark.parametrize(("text", "says", "helps"), [
    ("path,label,patient,eye\na.png,CNV,P1,OD\nb.png,CNV,OD,P2\n", "line 3: the patient 'OD' is "
                                                                   "the word for an eye, and the "
                                                                   "eye is 'P2'", "cell by cell"),
    ("path,label,patient,eye\na.png,CNV,L,7\nb.png,CNV,8,R\n", "line 2: the patient 'L' is the "
                                                               "word for an eye, and "
                                                               "the eye is '7'", "cell by cell"),
    ("path,label,patient,eye\na.png,CNV,P1,OD\nb.png,CNV,,P1\n", "line 3: the eye 'P1' "
                                                                 "is a patient", "cell by cell"),
    (HEAD + "a.png,CNV,OD\nb.png,CNV,OS\n", "line 2 and 1 other: the patient 'OD' is the "
                                            "word for an eye", "cell by cell"),
    ("path,label,group\na.png,CNV,left\nb.png,CNV,g2\n", "line 2: the group 'left' is the "
                                                         "word for an eye", "cell by cell"),
    (HEAD + "a.png,CNV,1\nb.png,c.png,CNV\n", "line 3: the label 'c.png' is the "
                                              "name of a file", "cell by cell"),
    (HEAD + "a.png,CNV,1\n,b.png,CNV\n", "line 3: the label 'b.png' is the "
                                         "name of a file", "empty one"),
    (HEAD + "a.png,CNV,1\nb.png,IMG\\Z.TIFF,1\n", "line 3: the label", "cell by cell"),
    (HEAD + "img/scan_a,CNV,1\nb.png,scan_a,2\n", "line 3: the label 'scan_a' is the "
                                                  "path in line 2", "cell by cell"),
    ("path,label,patient,eye\na.png,CNV,1,OD\nCNV,2,OS,\n", "line 2: the label 'CNV' is the "
                                                            "path in line 3", "cell by cell"),
    (HEAD + "a.png,CNV,1\nb.png,vol/3.dcm,1\n", "line 3: the label 'vol/3.dcm' is the "
                                                "name of a file", "cell by cell"),
    ("path,label,group\na.png,CNV,g1\nb.png,g2,CNV\n", "line 3: the group 'CNV' is the name of "
                                                       "another class", "cell by cell"),
    ("Study "
     "A;Clinic B\n" + HEAD + "a.png,CNV,1\n", "line 2 has 1 cell, "
                                              "the header 2", "comment or a title"),
    (HEAD + "a.png,CNV,P1\nb.png,P2,CNV\n", "line 3: the patient 'CNV' is the "
                                            "name of a class", "cell by cell"),
    ("a.png,CNV,1\nb.png,CNV,2\n", "has no header: its first line is data, "
                                   "'a.png,CNV,1'", "no row is lost: path,NAME2,NAME3"),
    ("1,1,a.png\n2,2,b.png\n", "has no header", "NAME1,NAME2,path"), ("1,1\n2,3\n", "has no header", "NAME1,NAME2"),
    ("scan_a,CNV,1\nscan_b,CNV,2\n", "has no header", "no "
                                                      "row is lost"), ("sub/x,CNV,1\nsub/y,DME,2\n", "has no header", "no row is lost"),
    (HEAD + "a.png,CNV,1\n" + HEAD + "b.png,CNV,2\n", "line 3, is the "
                                                      "header once more", "Delete line 3"),
    ("# exported\n" + HEAD + "a.png,CNV,1\n", "line 1 is no header: '# exported'", "Delete"),
    ("# "
     "exported, by me\n" + HEAD + "a.png,CNV,1\n", "line 2 has 3 cells, "
                                                   "the header 2", "comment or a title"),
    ("My "
     "nice study\n\n" + HEAD + "a.png,CNV,1\n", "line 1 "
                                                "is no header", "may be 'path,label,patient'"),
    ("My study,,\n" + HEAD + "a.png,CNV,1\n", "line 2, seems to "
                                              "be the header", "Delete what stands above"),
    ("path label patient\na.png CNV 1\nb "
     "2.png CNV 2\n", "line 3 has 4 and the header 3", "comma-separated"),
    (HEAD + 'a.png,"CNV,1\nb.png,CNV",2\n', "line 2: label 'CNV,1\\nb.png,CNV' goes over "
                                            "several lines", "quote"),
    (HEAD + 'a.png,"CNV,1\nb.png,CNV,2\n', "line 2: unexpected end", "Close the quote"),
    (HEAD + "a.png,CNV, wet,1\n", "line 2 has 4 cells", "quotes"),
    (HEAD + "a.png,\ufffddem,1\n", "line 2 has \ufffd", "original"),
    ((HEAD + "a.png,\xd6dem,1\n").encode("utf-16-le"), "zero bytes", "CSV UTF-8"),
    ((HEAD + "a.png,\xd6dem,1\n").encode("utf-16")[:-1], "UTF-16 is damaged", "again"),
    (a_zip("mimetype", "content.xml"), "a "
                                       "LibreOffice workbook", "CSV UTF-8"), (b'<?xml '
                                                                              b'version="1.0"?><Workbook/>', "it is XML", "CSV UTF-8"),
    (arrays()[:200], "damaged", "download it again"), (b"\x07\x01\x02" * 9, "binary data", "CSV UTF-8")])
def test_a_table_that_looks_right_and_is_not_is_refused_with_the_line_and_what_helps(
    text, says, helps, tmp_path
):
    lay_out(tmp_path, "a.png", "b.png", "c.png", "img/scan_a.png", "scan_b.png", "sub/x")
    with pytest.raises(KdoctError) as e: load_table(table_of(tmp_path, text))
    assert says in e.value.problem and helps in e.value.fix


@pytest.mark.parametrize("at", [60, 150, 400])
def test_a_damaged_archive_is_named_as_such(at, tmp_path):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("t.csv", HEAD + "".join(f"{i}.png,CNV,{i}\n" for i in range(99)))
    data = bytearray(out.getvalue())
    data[at:at + 40] = b"\xaa" * 40
    with pytest.raises(KdoctError, match="damaged"):
        load_table(table_of(tmp_path, bytes(data), name="t.zip"))


def test_an_empty_path_is_named_with_its_line(tmp_path):
    listing = load_table(table_of(tmp_path, HEAD + "a.png,CNV,1\n\n,CNV,2\n"))
    assert list(listing.findings.problem) == ["unparsable-name"] and listing.findings.detail[
        0
    ].startswith("line 4: ")


def test_letters_may_be_patients(tmp_path):
    assert (
        of_patients(tmp_path, "A", "B", "L", "R", "OD", labels=("CNV",)).table.group.nunique() == 5
    )


def test_labels_that_are_numbers_may_be_names_of_files_and_patients(tmp_path):
    lay_out(tmp_path, "0.png", "1.png")
    listing = load_table(table_of(tmp_path, HEAD + "0,1,1\n1,0,0\n"))
    assert list(listing.table.label) == ["1", "0"] and list(listing.table.patient) == ["1", "0"]


@pytest.mark.parametrize(("written", "eye"), [("OD", "OD"), ("os", "OS"), ("Right", "OD"), ("R", "OD"),
    (" left", "OS"), ("O.S.", "OS"), ("left eye", "OS"), ("rechts", "OD")])
def test_the_eye_of_a_table_is_od_or_os(written, eye, tmp_path):
    lay_out(tmp_path, "a.png")
    listing = load_table(table_of(tmp_path, f"path,label,patient,eye\na.png,CNV,1,{written}\n"))
    assert list(listing.table.eye) == [eye] and not len(listing.findings)


@pytest.mark.parametrize("written", ["1", "2", "OU", "both", "?"])
def test_an_eye_that_is_neither_right_nor_left_is_kept_and_noted(written, tmp_path):
    lay_out(tmp_path, "a.png")
    listing = load_table(table_of(tmp_path, f"path,label,patient,eye\na.png,CNV,1,{written}\n"))
    assert (
        list(listing.table.eye) == [written]
        and problems(listing) == {"a.png": "eye-unclear"}
        and eye_name(written) == ""
    )


def test_a_shifted_row_does_not_train_on_masks(tmp_path):
    lay_out(tmp_path, "img/0.png", "img/1.png", "mask/0.png", "mask/1.png")
    text = "path,mask,label,grade,patient\nimg/0.png,mask/0.png,CNV,C0,P000,\nimg/1.png,mask/1.png,NORMAL,N1,P001,\n"
    t = load_table(table_of(tmp_path, text)).table
    assert (
        list(t.path) == ["img/0.png", "img/1.png"]
        and list(t.label) == ["CNV", "NORMAL"]
        and list(t.patient) == ["P000", "P001"]
    )


def test_columns_are_found_by_another_spelling_and_missing_ones_are_proposed(tmp_path):
    lay_out(tmp_path, "a.png")
    data = table_of(tmp_path, "File_Name,Disease,Patient ID\na.png,CNV,1\n")
    with pytest.raises(KdoctError) as e: load_table(data)
    assert (
        "--set data.columns.path=File_Name --set data.columns.label=Disease --set "
        "data.columns.patient='Patient ID'"
        in e.value.fix
    )
    t = load_table(
        data.model_copy(
            update=dict(columns=dict(path="file name", label="disease ", patient="patient_id"))
        )
    ).table
    assert list(t.path) == ["a.png"] and list(t.label) == ["CNV"] and list(t.patient) == ["1"]


def test_cells_stay_as_they_are(tmp_path):
    table_of(tmp_path, "a,b\n 007 ,NA\n")
    assert read_table(tmp_path / "table.csv").to_dict("list") == dict(a=[" 007 "], b=["NA"])


@pytest.mark.parametrize(("written", "real", "problem"), [
    ("img/a.PNG", "img/a.png", "path-by-case"), (r"IMG\a.png", "img/a.png", "path-by-case"), ("img/a", "img/a.png", "path-by-ending"),
    ("img/a.jpeg", "img/a.JPG", "path-by-ending"), ("a", "deep/er/a.jpg", "path-by-name"), ("A.PNG", "img/a.png", "path-by-name"),
    ("img/M\u00fcller.png", "img/Mu\u0308ller.png", "path-by-case"),
    ("/img/a.png", "img/a.png", ""), ("./img/a.png", "img/a.png", ""), (r"img\a.png", "img/a.png", "")])
def test_a_path_of_a_table_is_found_among_the_files(written, real, problem, tmp_path):
    lay_out(tmp_path, real)
    listing = load_table(table_of(tmp_path, f"path,label,patient\n{written},CNV,1\n"))
    assert list(listing.table.path) == [real] and list(listing.findings.problem) == [
        problem
    ] * bool(problem)


def test_a_path_that_could_be_two_files_is_not_guessed_and_one_that_is_nowhere_stays(tmp_path):
    lay_out(tmp_path, "x/a.png", "y/a.png", "b.tif", "b.jpg", "z/c.png")
    listing = load_table(
        table_of(tmp_path, "path,label,patient\na.png,CNV,1\nb.png,CNV,1\nC:\\data\\q.png,CNV,1\n")
    )
    assert (
        list(listing.table.path) == ["C:/data/q.png"]
        and set(listing.findings.problem) == {"ambiguous-path"}
        and len(listing.findings) == 2
    )


def test_two_rows_that_lead_to_one_file_are_one_image_or_a_contradiction(tmp_path):
    lay_out(tmp_path, "a.png", "b.png")
    listing = load_table(
        table_of(tmp_path, "path,label,patient\na.png,CNV,1\nA.PNG,CNV,1\nb.png,CNV,1\nb,DME,1\n")
    )
    assert list(listing.table.path) == ["a.png"] and {"repeated-row", "contradictory-rows"} <= set(
        listing.findings.problem
    )


# --- folders

@pytest.mark.parametrize("names", [("train", "val", "test"), ("Train", "Valid", "Test"), ("training", "validation", "Testing"),
                                   ("train_set", "dev", "test set")])
def test_folders_of_parts_are_the_split_and_not_the_classes(names, tmp_path):
    root = lay_out(
        tmp_path,
        *(
            f"{part}/{c}/{c}_{part}{i}_1.png"
            for part in names
            for c in ("AMD", "NORMAL")
            for i in range(2)
        ),
    )
    t = load_table(DataRecipe(source="folder", root=root, group_pattern=r"_([^_]+)_")).table
    assert set(t.label) == {"AMD", "NORMAL"} and dict(t.split.value_counts()) == dict(
        train=4, val=4, test=4
    )


def test_parts_within_classes_and_patients_within_parts(tmp_path):
    inner = lay_out(tmp_path / "a", "CNV/train/1.png", "CNV/test/2.png", "DME/train/3.png")
    assert list(load_table(DataRecipe(source="folder", root=inner)).table.split) == [
        "test",
        "train",
        "train",
    ]
    deep = lay_out(tmp_path / "b", "train/CNV/p1/OD/1.png", "train/DME/p2/1.png")
    t = load_table(DataRecipe(source="folder", root=deep, group_pattern=r"/(p\d+)/")).table
    assert (
        list(t.label) == ["CNV", "DME"]
        and list(t.patient) == ["p1", "p2"]
        and set(t.split) == {"train"}
    )


@pytest.mark.parametrize(("names", "says"), [
    (("train/CNV/1.png", "DME/2.png"), "parts (train) beside other "
                                       "folders (DME)"), (("images/1.png", "masks/1.png"), "folders of images and of masks"),
    (("OCTDL/AMD/1.png", "OCTDL/NO/2.png"), "one class folder, OCTDL, with folders AMD, NO in it")])
def test_folders_that_cannot_be_classes_are_refused(names, says, tmp_path):
    with pytest.raises(KdoctError, match="->") as e:
        load_table(DataRecipe(source="folder", root=lay_out(tmp_path, *names)))
    assert says in e.value.problem and "--data-root" in e.value.fix or "--classes" in e.value.fix


def test_a_class_may_be_called_test_where_it_is_named(tmp_path):
    data = DataRecipe(
        source="folder",
        root=lay_out(tmp_path, "test/1.png", "control/2.png"),
        classes=("control", "test"),
    )
    assert list(load_table(data).table.label) == ["control", "test"] and part_name("contest") == ""


def test_masks_below_a_class_are_no_images_of_it(tmp_path):
    listing = load_table(
        DataRecipe(
            source="folder",
            root=lay_out(tmp_path, "CNV/1.png", "CNV/masks/1.png", "DME/images/2.png"),
        )
    )
    assert problems(listing) == {"CNV/masks/1.png": "mask-folder"} and len(listing.table) == 2


def test_a_class_folder_without_an_image_stops_the_run_and_says_why(tmp_path):
    root = lay_out(tmp_path, "CNV/1.png", "DME/1.ppm", "DME/2.ppm")
    for folder, target in dict(DRUSEN="not mounted", loop="loop").items():
        (tmp_path / folder).symlink_to(tmp_path / target)
    (tmp_path / "NORMAL").mkdir()
    (tmp_path / "again").symlink_to(tmp_path / "CNV")
    listing = load_table(DataRecipe(source="folder", root=root))
    f = listing.findings[listing.findings.problem == "empty-class"].set_index("path").detail
    assert set(f.index) == {"DME", "DRUSEN", "NORMAL", "again", "loop"}
    assert (
        "2 .ppm" in f.DME
        and "leads nowhere" in f.DRUSEN
        and f.NORMAL == "no file in it"
        and "read already" in f.again
    )
    named = load_table(DataRecipe(source="folder", root=root, classes=("CNV", "DME")))
    # what is no class may be empty
    assert list(named.findings.path[named.findings.problem == "empty-class"]) == ["DME"]


def test_a_class_on_another_disk_is_followed_and_circles_are_not(tmp_path):
    lay_out(tmp_path, "data/CNV/CNV-1-1.jpeg", "disk/NORMAL/NORMAL-2-1.jpeg")
    (tmp_path / "data/NORMAL").symlink_to(tmp_path / "disk/NORMAL")
    (tmp_path / "disk/NORMAL/up").symlink_to(tmp_path / "disk")
    (tmp_path / "disk/NORMAL/home").symlink_to(tmp_path / "data")
    listing = load_table(DataRecipe(source="ucsd", root=str(tmp_path / "data")))
    assert (
        list(listing.table.label) == ["CNV", "NORMAL"]
        and (listing.root / listing.table.path[1]).is_file()
    )
    assert list(listing.findings.action) == ["followed", "not used", "not used"]


def test_our_own_outputs_in_the_folder_of_the_images_are_no_class(tmp_path, outputs):
    root = lay_out(tmp_path, "CNV/1.png", "DME/1.png", "outputs/edge/fold_0/figures/curves.png")
    assert outputs == tmp_path / "outputs"
    listing = load_table(DataRecipe(source="folder", root=root))
    assert set(listing.table.label) == {"CNV", "DME"} and problems(listing) == {"outputs": "hidden"}


def test_a_picture_under_a_name_of_no_picture_is_not_passed_over(tmp_path):
    root = lay_out(tmp_path, "CNV/1.png", "NORMAL/1.png", "NORMAL/3.txt")
    (tmp_path / "NORMAL/2.jpg_large").write_bytes(b"\xff\xd8\xff\xe0" + bytes(200))
    (tmp_path / "NORMAL/4").write_bytes(bytes(128) + b"DICM")
    assert problems(load_table(DataRecipe(source="folder", root=root))) == {
        "NORMAL/2.jpg_large": "picture-by-content",
        "NORMAL/4": "picture-by-content",
        "NORMAL/3.txt": "other-file",
    }


def test_the_folder_that_is_meant_is_named(tmp_path):
    lay_out(
        tmp_path, "OCT2017 /train/CNV/CNV-1-1.jpeg", "__MACOSX/OCT2017 /train/CNV/._CNV-1-1.jpeg"
    )
    with pytest.raises(KdoctError) as e: load_table(DataRecipe(source="ucsd", root=str(tmp_path)))
    assert f"Did you mean --data-root '{tmp_path}/OCT2017 '" in e.value.fix


def test_a_pattern_that_matches_nothing_is_shown_with_three_names(tmp_path):
    root = lay_out(tmp_path, *(f"CNV/{i}.png" for i in range(5)))
    with pytest.raises(KdoctError) as e:
        load_table(DataRecipe(source="folder", root=root, group_pattern=r"(P\d+)_"))
    assert (
        r"(P\d+)_" in e.value.problem
        and "none of 5 paths, such as CNV/0.png, CNV/1.png, CNV/2.png" in e.value.problem
    )


# --- what is typed

@pytest.mark.parametrize(("typed", "field", "value"), [
    (r"data.group_pattern=(P\d+)_", "group_pattern", r"(P\d+)_"), (r"data.group_pattern=^[A-Z]{2}-(\d+)\b", "group_pattern", r"^[A-Z]{2}-(\d+)\b"),
    (r'data.group_pattern="(P\\d+)_"', "group_pattern", r"(P\d+)_"), (r"data.group_pattern='(P\d+) x=\w'", "group_pattern", r"(P\d+) x=\w"),
    (r"data.group_pattern=[0-9]+_(\d+)", "group_pattern", r"[0-9]+_(\d+)"), (r"data.group_pattern=(\d)", "group_pattern", r"(\d)"),
    (r"data.root=C:\new\table.csv", "root", r"C:\new\table.csv"), ("data.root=my "
                                                                   "data/2026 03", "root", "my "
                                                                                           "data/2026 03"), ("data.root=2026", "root", "2026"),
    ("data.root=O'Brien's", "root", "O'Brien's"), ("data.root=null", "root", None), ("data.classes=NORMAL,CNV", "classes", ("NORMAL", "CNV")),
    ('data.classes=["NORMAL", "CNV"]', "classes", ("NORMAL", "CNV")), ("data.classes=[NORMAL,CNV]", "classes", ("NORMAL", "CNV")),
    ("data.classes=0,1,007", "classes", ("0", "1", "007")), ("data.leave_out=empty", "leave_out", ("empty",)),
    ("data.columns.label=disease", "columns", {"label": "disease"}), ('data.columns={"label": "a b=c"}', "columns", {"label": "a b=c"})])
@pytest.mark.parametrize("more", ["", " seed=7 student.epochs=2"])
def test_what_is_typed_arrives(typed, field, value, more):
    from kdoct.core.overrides import parse_overrides
    recipe = preset("demo", **parse_overrides(typed + more))
    assert getattr(recipe.data, field) == value
    if more: assert recipe.seed == 7 and recipe.student.epochs == 2


def test_every_spelling_of_a_name_has_the_key_of_its_key():
    for name in [*SEVEN, "CNV/7", "1e5", "COVID-19", "Pat. 70"]:
        assert same_name_key(same_name_key(name)) == same_name_key(name), name


# --- names that show only beside others what they are

@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("M\u00fcller", "Mueller"),
        ("M\u00fcller", "Muller"),
        ("Garc\u00eda", "Garcia"),
        ("S\u00f8rensen", "Sorensen"),
        ("S1", "Subject 1"),
        ("s01", "Sub-1"),
        ("C7", "Case 7"),
        ("1", "1 (2)"),
        ("Doe", "Doe - Copy"),
        ("P7", "7 (1)"),
    ],
)
def test_names_that_are_one_beside_each_other_are_one_group_with_a_note(one, other, tmp_path):
    listing = of_patients(tmp_path, one, other, "Nobody else")
    assert listing.table.group.nunique() == 2 and listing.table.group[0] == listing.table.group[1]
    assert list(listing.findings.problem) == ["patient-spelling"]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("S1", "P1"),
        ("S1", "1"),
        ("Muller", "Mueller"),
        ("benign (1)", "benign (2)"),
        ("\u0439", "\u0438"),
        ("Bauer", "Baur"),
        ("AE12", "A12"),
        ("S1", "Site 1"),
    ],
)
def test_names_that_no_other_shows_to_be_one_stay_apart(one, other, tmp_path):
    listing = of_patients(tmp_path, one, other)
    assert listing.table.group.nunique() == 2 and not len(listing.findings)


def test_a_class_beside_a_copy_of_itself_is_refused_unless_both_are_named(tmp_path):
    lay_out(tmp_path, "0.png", "1.png")
    data = table_of(tmp_path, "path,label,patient\n0.png,CNV,1\n1.png,CNV (1),2\n")
    with pytest.raises(KdoctError, match=r"'CNV' .*'CNV \(1\)'"): load_table(data)
    both = data.model_copy(update=dict(classes=("CNV", "CNV (1)")))
    assert len(load_table(both).table) == 2


# --- columns

def rows_of(*columns, n=12):
    "A table's text of n lines; a column is a name and a function of the line."
    lines = [",".join(str(f(i)) for _, f in columns) for i in range(n)]
    return "\n".join([",".join(name for name, _ in columns), *lines]) + "\n"


PATH = ("path", lambda i: f"{i}.png")
LABEL = ("label", lambda i: ("CNV", "NORMAL")[i % 2])


@pytest.mark.parametrize(
    "patient",
    [lambda i: i, lambda i: f"{i}.png", lambda i: f"img/{i:03}.png", lambda i: f"1.2.840.{i}", lambda i: ""],
)
def test_a_table_that_names_another_patient_for_each_image_is_warned_of(patient, tmp_path, capsys):
    lay_out(tmp_path, *(f"{i}.png" for i in range(12)))
    load_table(table_of(tmp_path, rows_of(PATH, LABEL, ("patient", patient))))
    said = capsys.readouterr().out
    assert "WARNING: every image counts as a patient of its own" in said
    assert "--set data.columns.patient=..." in said


def test_a_table_of_patients_with_several_images_is_not_warned_of(tmp_path, capsys):
    lay_out(tmp_path, *(f"{i}.png" for i in range(12)))
    load_table(table_of(tmp_path, rows_of(PATH, LABEL, ("patient", lambda i: i // 2))))
    assert "WARNING" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("label", "patient", "says"),
    [
        (lambda i: i // 2, lambda i: i // 2, "the same in every line"),
        (lambda i: f"P{i // 2}", LABEL[1], "changed places"),
        (lambda i: 100 + i // 2, lambda i: "AB"[i // 6], "changed places"),
        (lambda i: 100 + i // 4, lambda i: ("normal", "wet AMD")[i // 8], "changed places"),
    ],
)
def test_labels_and_patients_in_each_others_columns_are_refused(label, patient, says, tmp_path):
    lay_out(tmp_path, *(f"{i}.png" for i in range(12)))
    if says == "changed places" and patient is LABEL[1]:
        def patient(i): return ("CNV", "NORMAL")[i // 6]
    text = rows_of(PATH, ("label", label), ("patient", patient))
    data = table_of(tmp_path, text)
    with pytest.raises(KdoctError, match=says) as e: load_table(data)
    assert "--set data.columns.label=" in e.value.fix and "--classes" in e.value.fix
    classes = tuple(sorted({str(label(i)) for i in range(12)}))
    named = data.model_copy(update=dict(classes=classes))
    assert set(load_table(named).table.label) == set(classes)


@pytest.mark.parametrize(
    ("label", "patient"),
    [
        (LABEL[1], lambda i: i // 2),
        (lambda i: "ABCD"[i // 3], lambda i: i // 6),
        (lambda i: i % 3, lambda i: i // 4),
        (lambda i: i // 6, lambda i: i // 3),
    ],
)
def test_sound_labels_and_patients_have_not_changed_places(label, patient, tmp_path):
    lay_out(tmp_path, *(f"{i}.png" for i in range(12)))
    text = rows_of(PATH, ("label", label), ("patient", patient))
    assert len(load_table(table_of(tmp_path, text)).table) == 12


def test_columns_that_could_be_the_patient_are_named_with_the_option(tmp_path):
    visits = ("visit code", lambda i: f"V{i // 2}")
    text = rows_of(PATH, LABEL, ("eye", lambda i: "OD"), visits, ("age", lambda i: 50 + i))
    with pytest.raises(KdoctError, match="patient") as e: load_table(table_of(tmp_path, text))
    assert "The patient may be in visit code." in e.value.fix
    assert "--set data.columns.patient=..." in e.value.fix
    text = rows_of(PATH, LABEL, ("MRN", lambda i: i))
    with pytest.raises(KdoctError) as e: load_table(table_of(tmp_path, text))
    assert "--set data.columns.patient=MRN" in e.value.fix


@pytest.mark.parametrize("name", ["set", "Set", "subset", "Partition", "data_split"])
def test_a_column_of_parts_is_the_split_under_its_usual_names(name, tmp_path):
    lay_out(tmp_path, *(f"{i}.png" for i in range(12)))
    parts = (name, lambda i: ("Train", "test")[i % 2])
    text = rows_of(PATH, LABEL, ("patient", lambda i: i // 2), parts)
    assert set(load_table(table_of(tmp_path, text)).table.split) == {"train", "test"}


def test_a_column_called_set_that_holds_something_else_is_no_split(tmp_path):
    lay_out(tmp_path, *(f"{i}.png" for i in range(12)))
    text = rows_of(PATH, LABEL, ("patient", lambda i: i // 2), ("set", lambda i: "AB"[i % 2]))
    assert set(load_table(table_of(tmp_path, text)).table.split) == {""}


def test_words_that_are_no_part_of_a_split_are_findings_with_the_word(tmp_path):
    lay_out(tmp_path, "a.png", "b.png")
    text = "path,label,patient,split\na.png,CNV,1,train\nb.png,CNV,2,external\n"
    listing = load_table(table_of(tmp_path, text))
    assert problems(listing) == {"b.png": "split-unclear"}
    assert listing.findings.detail[0] == "the table says external"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("| path | label | patient |\n|---|:-:|---|\n| a.png | CNV | 1 |\n", "Markdown"),
        ("path | label | patient\n--- | --- | ---\na.png | CNV | 1\n", "Markdown"),
        ("+---+---+\n| path | label |\n+---+---+\n| a.png | CNV |\n", "Markdown"),
        ("path^label^patient\na.png^CNV^1\nb.png^CNV, wet^2\n", "'^'"),
        ("path~label~patient\na.png~CNV~1\n", "'~'"),
        ("path\u00a6label\u00a6patient\na.png\u00a6CNV\u00a61\n", "'\u00a6'"),
        ("path/label/patient\na.png/CNV/1\n", "'/'"),
    ],
)
def test_tables_with_other_separators_are_refused_with_the_sign(text, says, tmp_path):
    with pytest.raises(KdoctError) as e: load_table(table_of(tmp_path, text))
    assert says in e.value.problem and "CSV UTF-8" in e.value.fix
