"Names as spreadsheets and typists leave them: found, merged with a note, or refused with what helps."
import pytest
from conftest import lay_out, problems, table_recipe
from hypothesis import given
from hypothesis import strategies as st

from kdoct.core.files import KdoctError
from kdoct.core.overrides import parse_overrides
from kdoct.core.presets import preset
from kdoct.core.sections import DataRecipe
from kdoct.data.listing import classes_option
from kdoct.data.patient_names import doubtful_spellings, same_patient_key
from kdoct.data.sources import load_table
from kdoct.data.spellings import is_empty_cell, same_name_key


def of_patients(tmp_path, *patients, labels=("A",), column="patient"):
    rows = [f'{i}.png,{labels[i % len(labels)]},"{p}"' for i, p in enumerate(patients)]
    lay_out(tmp_path, *(f"{i}.png" for i in range(len(rows))))
    return load_table(table_recipe(tmp_path, f"path,label,{column}\n" + "\n".join(rows) + "\n"))


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


@pytest.mark.parametrize(("one", "other"), [
    ("7", "70"), ("1-2", "12"), ("1.5", "15"), ("A1", "B1"), ("7a", "7b"), ("CNV/7", "DRUSEN/7"),
    ("10", "1"), ("2020-01-03", "2020-01-30"), ("x1_11", "x11_1"),
    ("12345678901234567890", "12345678901234567891"), ("0,123", "123"), ("1-234", "1234"),
    ("3/4/2021", "4/3/2021"), ("1234567890123457", "1234567890123456"), ("2021-3-4", "44260"),
    ("5e123456", "5e123457"), ("1-2", "1-Mar"), ("7.1", "7.2"),
])
def test_different_patients_stay_apart(one, other, tmp_path):
    listing = of_patients(tmp_path, one, other)
    assert listing.table.group.nunique() == 2 and not len(listing.findings)


@pytest.mark.parametrize(("one", "other"), [
    ("1e5", "100000"), ("1E+05", "100000.0"), ("1,23E+05", "123000"), ("1,5", "1.5"),
    ("100,000", "100000"), ("M\u00fcller", "Mu\u0308ller"), ("CNV/7", "cnv/07"), ("0", "0.0"),
    ("0998A", "998a"), ("Schmidt  Anna", "schmidt anna"), ("1 234", "1234"), ("1\u00a0234", "1234"),
    ("1\u2009234", "1234"), ("1\u202f234,5", "1234.5"), ("1'234", "1234"), ("1\u2019234", "1234"),
    ("1,234", "1234"), ("1.234,00 \u20ac", "1234"), ("12.345.678", "12345678"),
    ("2021-03-04", "04.03.2021"), ("2021-03-04", "4.3.2021"), ("2021-03-04 00:00:00", "2021/3/4"),
    ("25/12/2020", "12/25/2020"), ("4 Mar 2021", "2021-03-04"), ("20210304.0", "04-Mar-2021"),
    ("CNV/13/4/2021", "cnv/2021-04-13"),
])
def test_numbers_and_words_have_one_key_in_all_their_spellings(one, other):
    assert same_patient_key(one) == same_patient_key(other)


@pytest.mark.parametrize(("one", "other"), [
    ("1-OD", "1-OS"), ("P1_OD", "P1_OS"), ("12 R", "12 L"), ("12L", "12R"),
    ("7 right", "7 left eye"), ("OD_7", "OS_7"), ("001-OD-1", "001-OS-1"), ("7 (OD)", "7"),
    ("CNV/7/OD", "CNV/7/OS"), ("OD/7", "OS/7"), ("Smith right", "Smith left"),
])
def test_two_eyes_of_a_patient_are_one_group_with_a_note(one, other, tmp_path):
    listing = of_patients(tmp_path, one, other, "8")
    assert listing.table.group.nunique() == 2 and listing.table.group[0] == listing.table.group[1]
    assert list(listing.findings.problem) == ["patient-spelling"]


@pytest.mark.parametrize(("one", "other"), [
    ("P0_V1", "P0_V2"), ("P0_20200101", "P0_20210101"), ("P0", "P0-visit 2"), ("7_T1", "7_T2"),
    ("P0_OD_V1", "P0_V2_OS"), ("Doe_baseline", "Doe_follow-up"), ("P0/visit1", "P0/visit2"),
    ("0012 (V1)", "0012_01.02.2020"), ("P0_V1_2020-01-01", "P0_V2_2021-01-01"),
    ("P1", "P1 II"), ("P1_I", "P1_II"), ("P1 ii", "p1-III"), ("1016042 (II)", "1016042"),
    ("CNV/P1 II", "CNV/P1"), ("P1_II_OD", "P1"),
    ("1:30", "01:30:00"), ("1", "(1)"), ("Doe, J1", "J1 Doe"),
])
def test_visits_and_other_forms_of_a_patient_are_one_group_with_a_note(one, other, tmp_path):
    listing = of_patients(tmp_path, one, other, "8")
    assert listing.table.group.nunique() == 2 and listing.table.group[0] == listing.table.group[1]
    assert list(listing.findings.problem) == ["patient-spelling"]


@pytest.mark.parametrize(("one", "other"), [
    ("Smith_V1", "Smith_V2"), ("V1", "V2"), ("site1_20200101", "site1_20200102"),
    ("1_20200101", "1_20200102"), ("CNV-1016042-1", "CNV-1016042-2"), ("Li Fu", "Li"),
    ("P0_20201301", "P0_20201302"), ("P0V1", "P0V2"), ("P0_1", "P0_2"),
    ("Smith II", "Smith"), ("7 II", "8 II"), ("Group 1 II", "Group 1"), ("P1 IIII", "P1"),
    ("P1 A", "P1 B"),
])
def test_what_may_be_no_visit_keeps_patients_apart(one, other, tmp_path):
    listing = of_patients(tmp_path, one, other)
    assert listing.table.group.nunique() == 2 and not len(listing.findings)


@pytest.mark.parametrize(("one", "other"), [
    ("Doe R", "Doe L"), ("Rod 7", "7"), ("Leonard5", "5"), ("7a", "7b"), ("control 7", "7"),
    ("OD1", "OD2"),
])
def test_letters_that_are_no_eye_keep_patients_apart(one, other, tmp_path):
    listing = of_patients(tmp_path, one, other)
    assert listing.table.group.nunique() == 2 and not len(listing.findings)


@pytest.mark.parametrize(
    ("one", "other"), [("P7", "\u04207"), ("A1", "\u03911"), ("KOT3", "\u041a\u041e\u04223")]
)
def test_a_patient_with_letters_that_look_latin_is_the_same_group_and_they_are_named(
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
        table_recipe(
            tmp_path,
            "path,label,patient,group\n"
            "a.png,CNV,7,g1\nb.png,CNV,7.0,g2\nc.png,CNV,8,g2\nd.png,CNV,,g3\n",
        )
    )
    assert list(listing.table.group) == ["g1", "g1", "g1", "g3"] and problems(listing) == {
        "a.png": "patient-in-two-groups"
    }
    assert (
        listing.findings.detail[0] == "patient 7 / 7.0: groups g1, g2"
        and listing.findings.action[0] == "groups g1, g2 merged"
    )


NAMES = st.sampled_from(["7", "7.0", "P8", "008", "9", ""])
GROUPS = st.sampled_from(["a", "b", "c", "A "])


@pytest.mark.slow
@given(st.lists(st.tuples(NAMES, GROUPS), min_size=1, max_size=8))
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
    ("2021-03-04", "3/4/2021", "2021-03-04"), ("04.03.2021", "3-4-2021", "2021-03-04"),
    ("3/4/2021", "3-4-2021", "2021-03-04"), ("2021-03-04", "04-Mar-21", "2021-03-04"),
    ("2021-03-04", "44259", "2021-03-04"), ("3/4/2021", "44259", "2021-03-04"),
    ("2021-03-04", "42797", "2021-03-04"), ("2-1", "2-Jan", "as text"),
    ("2021-03", "Mar-21", "as text"), ("1-2", "02. Jan", "as text"),
    ("1.23E+05", "123456", "as text"), ("1.23457E+14", "123456789012345", "as text"),
    ("1234567890123450", "1234567890123456", "as text"),
    ("3-1", "2024-03-01", "as text"), ("3-1", "3/1/2024", "as text"), ("1-3", "01.03.", "as text"),
    ("MAR1", "1-Mar", "as text"), ("1", "100%", "as text"), ("CNV/3-1", "CNV/2024-03-01", "as text"),
])
def test_patients_who_may_be_one_are_refused_where_it_cannot_be_known(one, other, helps, tmp_path):
    with pytest.raises(
        KdoctError, match="line 2 and 1 other|line 3: patient .1.23457E|cannot be known"
    ) as e:
        of_patients(tmp_path, one, other, "8")
    assert helps in e.value.fix and repr(one) in e.value.problem


def test_a_rounded_number_is_refused_alone_for_it_may_be_several_patients(tmp_path):
    with pytest.raises(KdoctError, match="line 3 and 1 other: patient '1.23457E\\+14'"):
        of_patients(tmp_path, "7", "1.23457E+14", "1.23457E+14")


def test_the_number_of_a_day_is_a_date_only_where_most_other_names_are_like_3_1():
    assert doubtful_spellings(["3-1", "3-2", "3-3", "45352"])[0][0] == ["3-1", "45352"]
    assert doubtful_spellings(["3-1", "7", "8", "45352"]) == []


def test_one_rounded_number_beside_many_that_share_its_first_digits_is_doubtful():
    many = [str(12345678901234567 + i) for i in range(12)]
    assert doubtful_spellings([*many, "12345678901234500"])
    assert doubtful_spellings([str(12345678901234500 + i) for i in range(12)]) == []
    shorter = [str(1234567890123456 + i) for i in range(12)]
    assert doubtful_spellings([*shorter, "1234567890123450"]) and doubtful_spellings(shorter) == []
    assert doubtful_spellings([*shorter, "9234567890123450"]) == []


def test_long_numbers_in_a_row_are_no_rounded_ones():
    assert doubtful_spellings([str(1234567890123440 + i) for i in range(40)]) == []
    assert doubtful_spellings(
        [str(1234567890123440 + i // 2 * 10 * (i % 2) + i) for i in range(6)]
        + ["1234567890123450", "1234567890123460"]
    )


NUMBERS = st.integers(1, 99_999).map(str)
DATES = st.dates().map(str)
CODES = st.from_regex(r"[A-Z]{1,2}[0-9]{1,4}", fullmatch=True)


@pytest.mark.slow
@given(st.lists(NUMBERS | DATES | CODES, max_size=12, unique=True))
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


@pytest.mark.parametrize(
    "names",
    [("0", "1", "2"), ("0", "0", "1", "1", "2"), ("NA", "7"), ("P0", "P0", "7"), ("X1", "X2")],
)
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
    data = table_recipe(tmp_path, "path,label,patient\n0.png,CNV,1\n1.png,CNV (1),2\n")
    with pytest.raises(KdoctError, match=r"'CNV' .*'CNV \(1\)'"): load_table(data)
    both = data.model_copy(update=dict(classes=("CNV", "CNV (1)")))
    assert len(load_table(both).table) == 2


def test_letters_may_be_patients(tmp_path):
    assert (
        of_patients(tmp_path, "A", "B", "L", "R", "OD", labels=("CNV",)).table.group.nunique() == 5
    )


# --- labels

@pytest.mark.parametrize("labels", [
    ("NORMAL", "Normal"), ("CNV", "cnv\u00a0"), ("COVID-19", "COVID19"), ("lung_n", "Lung N"),
    ("1", "1.0"), ("D\u00e9pots", "De\u0301pots"),
])
def test_a_class_in_two_spellings_is_refused_unless_both_are_named(labels, tmp_path):
    with pytest.raises(KdoctError, match="in several spellings.*first 0.png.*\n.*--classes") as e:
        of_patients(tmp_path, *"1234", labels=labels)
    assert labels[0] in str(e.value)
    listing = load_table(
        table_recipe(tmp_path, (tmp_path / "table.csv").read_text()).model_copy(
            update=dict(classes=tuple(s.strip() for s in labels))
        )
    )
    assert listing.table.label.nunique() == 2


def test_classes_whose_letters_look_the_same_are_told_apart_in_the_message(tmp_path):
    "On a screen the two forms of an accent are one word twice."
    lay_out(tmp_path, "Dru\u0308sen/1.png", "Dr\u00fcsen/2.png", "CNV/3.png")
    with pytest.raises(KdoctError, match="signs of their own .Unicode NFD."):
        load_table(DataRecipe(source="folder", root=str(tmp_path)))


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


@pytest.mark.parametrize("names", [
    ("NORMAL", "wet AMD"), ("a'b", "$HOME", "c;d"), ("CNV, wet", "dry"), ("'q'", "b"),
    (" lead", "b"), ("[x", "y]"), ("-1", "1"),
])
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


@pytest.mark.parametrize(
    "word", ["None", "unknown", "TBD", "not available", "NA", "-1", "ungradable", "x", "-"]
)
def test_a_word_for_no_label_is_a_class_only_where_it_is_named(word, tmp_path):
    listing = of_patients(tmp_path, "1", "2", labels=("CNV", word))
    assert (
        problems(listing) == {"1.png": "no-label"}
        and "line 3" in listing.findings.detail[0]
        and "--classes" in listing.findings.detail[0]
    )
    data = table_recipe(tmp_path, (tmp_path / "table.csv").read_text()).model_copy(
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
    data = table_recipe(tmp_path, (tmp_path / "table.csv").read_text()).model_copy(
        update=dict(classes=labels)
    )
    assert set(load_table(data).table.label) == set(labels)


def test_a_class_with_another_alphabets_letter_is_refused_and_the_letter_is_named(tmp_path):
    with pytest.raises(KdoctError, match=r"'CNV' .*'\u0421NV', whose \u0421 \(Cyrillic"):
        of_patients(tmp_path, "1", "2", labels=("CNV", "\u0421NV"))
    assert same_name_key("\u041d\u043e\u0440\u043c\u0430") != same_name_key("Hop\u043ca")


# --- what is typed

@pytest.mark.parametrize(("typed", "field", "value"), [
    (r"data.group_pattern=(P\d+)_", "group_pattern", r"(P\d+)_"),
    (r"data.group_pattern=^[A-Z]{2}-(\d+)\b", "group_pattern", r"^[A-Z]{2}-(\d+)\b"),
    (r'data.group_pattern="(P\\d+)_"', "group_pattern", r"(P\d+)_"),
    (r"data.group_pattern='(P\d+) x=\w'", "group_pattern", r"(P\d+) x=\w"),
    (r"data.group_pattern=[0-9]+_(\d+)", "group_pattern", r"[0-9]+_(\d+)"),
    (r"data.group_pattern=(\d)", "group_pattern", r"(\d)"),
    (r"data.root=C:\new\table.csv", "root", r"C:\new\table.csv"),
    ("data.root=my data/2026 03", "root", "my data/2026 03"), ("data.root=2026", "root", "2026"),
    ("data.root=O'Brien's", "root", "O'Brien's"), ("data.root=null", "root", None),
    ("data.classes=NORMAL,CNV", "classes", ("NORMAL", "CNV")),
    ('data.classes=["NORMAL", "CNV"]', "classes", ("NORMAL", "CNV")),
    ("data.classes=[NORMAL,CNV]", "classes", ("NORMAL", "CNV")),
    ("data.classes=0,1,007", "classes", ("0", "1", "007")),
    ("data.leave_out=empty", "leave_out", ("empty",)),
    ("data.columns.label=disease", "columns", {"label": "disease"}),
    ('data.columns={"label": "a b=c"}', "columns", {"label": "a b=c"}),
])
@pytest.mark.parametrize("more", ["", " seed=7 student.epochs=2"])
def test_what_is_typed_arrives(typed, field, value, more):
    from kdoct.core.overrides import parse_overrides
    recipe = preset("demo", **parse_overrides(typed + more))
    assert getattr(recipe.data, field) == value
    if more: assert recipe.seed == 7 and recipe.student.epochs == 2


def test_every_spelling_of_a_name_has_the_key_of_its_key():
    for name in [*SEVEN, "CNV/7", "1e5", "COVID-19", "Pat. 70"]:
        assert same_name_key(same_name_key(name)) == same_name_key(name), name


