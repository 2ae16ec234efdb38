"Tables as spreadsheets and typists leave them: read, or refused with the line and what helps."
import gzip
import io
import zipfile

import numpy as np
import pytest
from conftest import lay_out, problems, table_recipe

from kdoct.core.files import KdoctError
from kdoct.data.patient_names import eye_name
from kdoct.data.sources import load_table
from kdoct.data.spreadsheet import read_table

GOOD = "path,label,patient\na.png,CNV,0012\nb.png,NORMAL,7\n"


def reads(tmp_path, text, encoding="utf-8", name="table.csv"):
    lay_out(tmp_path, "a.png", "b.png")
    t = load_table(table_recipe(tmp_path, text, encoding, name)).table
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
    "sep=;\r\n" + GOOD.replace(",", ";"),
    GOOD.replace("path,label,patient", " Path " ",LABEL,Patient"),
    "\n\n" + GOOD.replace("\n", "\n,,\n"),
    GOOD.replace(",label", ",\"label\"").replace("CNV", "\" CNV \""),
    ",path,label,patient\n0,a.png,CNV,0012\n1,b.png,NORMAL,7\n",
    GOOD.replace("\n", ",\n").replace("patient,", "patient"),
    "path,note,label,patient\na.png,\"two\nlines, \"\"quoted\"\"\",CNV,0012\nb.png,,NORMAL,7\n",
    "path,label,label,patient\na.png,CNV,CNV,0012\nb.png,NORMAL,NORMAL,7\n",
    "path,label,label.1,patient\na.png,CNV,CNV,0012\nb.png,NORMAL,NORMAL,7\n",
    "path;size;label;patient\na.png;1,5;CNV;0012\nb.png;2,5;NORMAL;7\n",
])
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
    (
        "path,label,patient\n1,a.png,CNV,0012\n2,b.png,NORMAL,7\n",
        "line 2 has 4 cells, the header 3", "name in the header",
    ),
    ("path,label,patient\n\"a\nb.png\",CNV,1\nc.png,CNV\n", "line 4 has 2 cells", "quotes"),
    (GOOD.replace("CNV", "\"CNV"), "line 2", "CSV UTF-8"),
    (
        GOOD.replace("NORMAL", "\xd6dem").encode("cp1252"),
        r"line 3 is not UTF-8 (b.png,\xd6dem,7), and its encoding cannot be known", "CSV UTF-8",
    ),
    (GOOD.encode("utf-16-le"), "UTF-16 without its mark", "CSV UTF-8"),
    (
        "path,label,label,patient\na.png,CNV,DME,1\n",
        "two columns named 'label', the 2. and the 3.", "Rename",
    ),
    (
        "path,label,label.1,patient\na.png,CNV,DME,1\n", "'label' and 'label.1'",
        "--set data.columns.label=label",
    ),
    (
        "path,label,Label,patient\na.png,CNV,DME,1\n", "'label' and 'Label'",
        "--set data.columns.label=label",
    ),
    ("path,label,patient\n", "a header and no row", "one row an image"),
    ("", "it is empty", "header"), (b"\x00\x01\x02" * 9, "zero bytes", "CSV UTF-8"),
    (a_zip("xl/workbook.xml"), "an Excel workbook", "CSV UTF-8"),
    (b"\xd0\xcf\x11\xe0", "an old Excel workbook", "CSV UTF-8"),
    (arrays(), "NumPy arrays (train_images.npy)", "PNG files"),
    (a_zip("a.csv", "b.csv"), "an archive of 2 files", "Unpack"),
    ("path;label,patient\na;b,c\n", "semicolon", "comma-separated"),
    (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer", "CSV"),
])
def test_a_malformed_table_is_refused_with_the_line_and_what_helps(text, says, helps, tmp_path):
    with pytest.raises(KdoctError) as e: load_table(table_recipe(tmp_path, text))
    assert says in e.value.problem and helps in e.value.fix


HEAD = "path,label,patient\n"


@pytest.mark.parametrize(("text", "says", "helps"), [
    (
        "path,label,patient,eye\na.png,CNV,P1,OD\nb.png,CNV,OD,P2\n",
        "line 3: the patient 'OD' is the word for an eye, and the eye is 'P2'", "cell by cell",
    ),
    (
        "path,label,patient,eye\na.png,CNV,L,7\nb.png,CNV,8,R\n",
        "line 2: the patient 'L' is the word for an eye, and the eye is '7'", "cell by cell",
    ),
    (
        "path,label,patient,eye\na.png,CNV,P1,OD\nb.png,CNV,,P1\n",
        "line 3: the eye 'P1' is a patient", "cell by cell",
    ),
    (
        HEAD + "a.png,CNV,OD\nb.png,CNV,OS\n",
        "line 2 and 1 other: the patient 'OD' is the word for an eye", "cell by cell",
    ),
    (
        "path,label,group\na.png,CNV,left\nb.png,CNV,g2\n",
        "line 2: the group 'left' is the word for an eye", "cell by cell",
    ),
    (
        HEAD + "a.png,CNV,1\nb.png,c.png,CNV\n", "line 3: the label 'c.png' is the name of a file",
        "cell by cell",
    ),
    (
        HEAD + "a.png,CNV,1\n,b.png,CNV\n", "line 3: the label 'b.png' is the name of a file",
        "empty one",
    ),
    (HEAD + "a.png,CNV,1\nb.png,IMG\\Z.TIFF,1\n", "line 3: the label", "cell by cell"),
    (
        HEAD + "img/scan_a,CNV,1\nb.png,scan_a,2\n",
        "line 3: the label 'scan_a' is the path in line 2", "cell by cell",
    ),
    (
        "path,label,patient,eye\na.png,CNV,1,OD\nCNV,2,OS,\n",
        "line 2: the label 'CNV' is the path in line 3", "cell by cell",
    ),
    (
        HEAD + "a.png,CNV,1\nb.png,vol/3.dcm,1\n",
        "line 3: the label 'vol/3.dcm' is the name of a file", "cell by cell",
    ),
    (
        "path,label,group\na.png,CNV,g1\nb.png,g2,CNV\n",
        "line 3: the group 'CNV' is the name of another class", "cell by cell",
    ),
    (
        "Study A;Clinic B\n" + HEAD + "a.png,CNV,1\n", "line 2 has 1 cell, the header 2",
        "comment or a title",
    ),
    (
        HEAD + "a.png,CNV,P1\nb.png,P2,CNV\n", "line 3: the patient 'CNV' is the name of a class",
        "cell by cell",
    ),
    (
        "a.png,CNV,1\nb.png,CNV,2\n", "has no header: its first line is data, 'a.png,CNV,1'",
        "no row is lost: path,NAME2,NAME3",
    ),
    ("1,1,a.png\n2,2,b.png\n", "has no header", "NAME1,NAME2,path"),
    ("1,1\n2,3\n", "has no header", "NAME1,NAME2"),
    ("scan_a,CNV,1\nscan_b,CNV,2\n", "has no header", "no row is lost"),
    ("sub/x,CNV,1\nsub/y,DME,2\n", "has no header", "no row is lost"),
    (
        HEAD + "a.png,CNV,1\n" + HEAD + "b.png,CNV,2\n", "line 3, is the header once more",
        "Delete line 3",
    ),
    ("# exported\n" + HEAD + "a.png,CNV,1\n", "line 1 is no header: '# exported'", "Delete"),
    (
        "# exported, by me\n" + HEAD + "a.png,CNV,1\n", "line 2 has 3 cells, the header 2",
        "comment or a title",
    ),
    (
        "My nice study\n\n" + HEAD + "a.png,CNV,1\n", "line 1 is no header",
        "may be 'path,label,patient'",
    ),
    (
        "My study,,\n" + HEAD + "a.png,CNV,1\n", "line 2, seems to be the header",
        "Delete what stands above",
    ),
    (
        "path label patient\na.png CNV 1\nb 2.png CNV 2\n", "line 3 has 4 and the header 3",
        "comma-separated",
    ),
    (
        HEAD + 'a.png,"CNV,1\nb.png,CNV",2\n',
        "line 2: label 'CNV,1\\nb.png,CNV' goes over several lines", "quote",
    ),
    (HEAD + 'a.png,"CNV,1\nb.png,CNV,2\n', "line 2: unexpected end", "Close the quote"),
    (HEAD + "a.png,CNV,1\nTotal,24,\n", "line 3, 'Total', seems to be a sum", "Delete line 3"),
    (HEAD + "a.png,CNV,1\nSumme:,1,1\n", "seems to be a sum", "Delete line 3"),
    (HEAD + "file:///img/a.png,CNV,1\n", "line 2: the path 'file:///img/a.png' is an", "/data/"),
    (HEAD + "https://x.org/a.png,CNV,1\n", "is an address", "download"),
    (HEAD + "scan%5Fb.png,CNV,1\n", "as in an address, for 'scan_b.png'", "without %"),
    (HEAD + "a.png,CNV, wet,1\n", "line 2 has 4 cells", "quotes"),
    (HEAD + "a.png,\ufffddem,1\n", "line 2 has \ufffd", "original"),
    ((HEAD + "a.png,\xd6dem,1\n").encode("utf-16-le"), "zero bytes", "CSV UTF-8"),
    ((HEAD + "a.png,\xd6dem,1\n").encode("utf-16")[:-1], "UTF-16 is damaged", "again"),
    (a_zip("mimetype", "content.xml"), "a LibreOffice workbook", "CSV UTF-8"),
    (b'<?xml version="1.0"?><Workbook/>', "it is XML", "CSV UTF-8"),
    (arrays()[:200], "damaged", "download it again"),
    (b"\x07\x01\x02" * 9, "binary data", "CSV UTF-8"),
])
def test_a_table_that_looks_right_and_is_not_is_refused_with_the_line_and_what_helps(
    text, says, helps, tmp_path
):
    lay_out(tmp_path, "a.png", "b.png", "c.png", "img/scan_a.png", "scan_b.png", "sub/x")
    with pytest.raises(KdoctError) as e: load_table(table_recipe(tmp_path, text))
    assert says in e.value.problem and helps in e.value.fix


@pytest.mark.parametrize("at", [60, 150, 400])
def test_a_damaged_archive_is_named_as_such(at, tmp_path):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("t.csv", HEAD + "".join(f"{i}.png,CNV,{i}\n" for i in range(99)))
    data = bytearray(out.getvalue())
    data[at:at + 40] = b"\xaa" * 40
    with pytest.raises(KdoctError, match="damaged"):
        load_table(table_recipe(tmp_path, bytes(data), name="t.zip"))


def test_files_named_like_a_sum_or_with_a_percent_sign_are_read(tmp_path):
    lay_out(tmp_path, "Total", "50%25.png", "50%.png")
    text = HEAD + "50%25.png,CNV,1\n50%.png,DME,2\nTotal,CNV,3\n"
    t = load_table(table_recipe(tmp_path, text)).table
    assert sorted(t.path) == ["50%.png", "50%25.png", "Total"]


def test_an_empty_path_is_named_with_its_line(tmp_path):
    listing = load_table(table_recipe(tmp_path, HEAD + "a.png,CNV,1\n\n,CNV,2\n"))
    assert list(listing.findings.problem) == ["unparsable-name"] and listing.findings.detail[
        0
    ].startswith("line 4: ")


def test_labels_that_are_numbers_may_be_names_of_files_and_patients(tmp_path):
    lay_out(tmp_path, "0.png", "1.png")
    listing = load_table(table_recipe(tmp_path, HEAD + "0,1,1\n1,0,0\n"))
    assert list(listing.table.label) == ["1", "0"] and list(listing.table.patient) == ["1", "0"]


@pytest.mark.parametrize(("written", "eye"), [
    ("OD", "OD"), ("os", "OS"), ("Right", "OD"), ("R", "OD"), (" left", "OS"), ("O.S.", "OS"),
    ("left eye", "OS"), ("rechts", "OD"),
])
def test_the_eye_of_a_table_is_od_or_os(written, eye, tmp_path):
    lay_out(tmp_path, "a.png")
    listing = load_table(table_recipe(tmp_path, f"path,label,patient,eye\na.png,CNV,1,{written}\n"))
    assert list(listing.table.eye) == [eye] and not len(listing.findings)


@pytest.mark.parametrize("written", ["1", "2", "OU", "both", "?"])
def test_an_eye_that_is_neither_right_nor_left_is_kept_and_noted(written, tmp_path):
    lay_out(tmp_path, "a.png")
    listing = load_table(table_recipe(tmp_path, f"path,label,patient,eye\na.png,CNV,1,{written}\n"))
    assert (
        list(listing.table.eye) == [written]
        and problems(listing) == {"a.png": "eye-unclear"}
        and eye_name(written) == ""
    )


def test_a_shifted_row_does_not_train_on_masks(tmp_path):
    lay_out(tmp_path, "img/0.png", "img/1.png", "mask/0.png", "mask/1.png")
    text = (
        "path,mask,label,grade,patient\n"
        "img/0.png,mask/0.png,CNV,C0,P000,\nimg/1.png,mask/1.png,NORMAL,N1,P001,\n"
    )
    t = load_table(table_recipe(tmp_path, text)).table
    assert (
        list(t.path) == ["img/0.png", "img/1.png"]
        and list(t.label) == ["CNV", "NORMAL"]
        and list(t.patient) == ["P000", "P001"]
    )


def test_columns_are_found_by_another_spelling_and_missing_ones_are_proposed(tmp_path):
    lay_out(tmp_path, "a.png")
    data = table_recipe(tmp_path, "File_Name,Disease,Patient ID\na.png,CNV,1\n")
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
    table_recipe(tmp_path, "a,b\n 007 ,NA\n")
    assert read_table(tmp_path / "table.csv").to_dict("list") == dict(a=[" 007 "], b=["NA"])


@pytest.mark.parametrize(("written", "real", "problem"), [
    ("img/a.PNG", "img/a.png", "path-by-case"), (r"IMG\a.png", "img/a.png", "path-by-case"),
    ("img/a", "img/a.png", "path-by-ending"), ("img/a.jpeg", "img/a.JPG", "path-by-ending"),
    ("a", "deep/er/a.jpg", "path-by-name"), ("A.PNG", "img/a.png", "path-by-name"),
    ("img/M\u00fcller.png", "img/Mu\u0308ller.png", "path-by-case"),
    ("/img/a.png", "img/a.png", ""), ("./img/a.png", "img/a.png", ""),
    (r"img\a.png", "img/a.png", ""),
])
def test_a_path_of_a_table_is_found_among_the_files(written, real, problem, tmp_path):
    lay_out(tmp_path, real)
    listing = load_table(table_recipe(tmp_path, f"path,label,patient\n{written},CNV,1\n"))
    assert list(listing.table.path) == [real] and list(listing.findings.problem) == [
        problem
    ] * bool(problem)


def test_a_path_that_could_be_two_files_is_not_guessed_and_one_that_is_nowhere_stays(tmp_path):
    lay_out(tmp_path, "x/a.png", "y/a.png", "b.tif", "b.jpg", "z/c.png")
    listing = load_table(
        table_recipe(
            tmp_path, "path,label,patient\na.png,CNV,1\nb.png,CNV,1\nC:\\data\\q.png,CNV,1\n"
        )
    )
    assert (
        list(listing.table.path) == ["C:/data/q.png"]
        and set(listing.findings.problem) == {"ambiguous-path"}
        and len(listing.findings) == 2
    )


def test_two_rows_that_lead_to_one_file_are_one_image_or_a_contradiction(tmp_path):
    lay_out(tmp_path, "a.png", "b.png")
    listing = load_table(
        table_recipe(
            tmp_path, "path,label,patient\na.png,CNV,1\nA.PNG,CNV,1\nb.png,CNV,1\nb,DME,1\n"
        )
    )
    assert list(listing.table.path) == ["a.png"] and {"repeated-row", "contradictory-rows"} <= set(
        listing.findings.problem
    )


# --- columns

def rows_of(*columns, n=12):
    "A table's text of n lines; a column is a name and a function of the line."
    lines = [",".join(str(f(i)) for _, f in columns) for i in range(n)]
    return "\n".join([",".join(name for name, _ in columns), *lines]) + "\n"


PATH = ("path", lambda i: f"{i}.png")
LABEL = ("label", lambda i: ("CNV", "NORMAL")[i % 2])


@pytest.mark.parametrize("patient", [
    lambda i: i, lambda i: f"{i}.png", lambda i: f"img/{i:03}.png", lambda i: f"1.2.840.{i}",
    lambda i: "",
])
def test_a_table_that_names_another_patient_for_each_image_is_warned_of(patient, tmp_path, capsys):
    lay_out(tmp_path, *(f"{i}.png" for i in range(12)))
    load_table(table_recipe(tmp_path, rows_of(PATH, LABEL, ("patient", patient))))
    printed = capsys.readouterr().out
    assert "WARNING: every image counts as a patient of its own" in printed
    assert "--set data.columns.patient=..." in printed


def test_a_table_of_patients_with_several_images_is_not_warned_of(tmp_path, capsys):
    lay_out(tmp_path, *(f"{i}.png" for i in range(12)))
    load_table(table_recipe(tmp_path, rows_of(PATH, LABEL, ("patient", lambda i: i // 2))))
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
    data = table_recipe(tmp_path, text)
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
    assert len(load_table(table_recipe(tmp_path, text)).table) == 12


def test_columns_that_could_be_the_patient_are_named_with_the_option(tmp_path):
    visits = ("visit code", lambda i: f"V{i // 2}")
    text = rows_of(PATH, LABEL, ("eye", lambda i: "OD"), visits, ("age", lambda i: 50 + i))
    with pytest.raises(KdoctError, match="patient") as e: load_table(table_recipe(tmp_path, text))
    assert "The patient may be in visit code." in e.value.fix
    assert "--set data.columns.patient=..." in e.value.fix
    text = rows_of(PATH, LABEL, ("MRN", lambda i: i))
    with pytest.raises(KdoctError) as e: load_table(table_recipe(tmp_path, text))
    assert "--set data.columns.patient=MRN" in e.value.fix


@pytest.mark.parametrize("name", ["set", "Set", "subset", "Partition", "data_split"])
def test_a_column_of_parts_is_the_split_under_its_usual_names(name, tmp_path):
    lay_out(tmp_path, *(f"{i}.png" for i in range(12)))
    parts = (name, lambda i: ("Train", "test")[i % 2])
    text = rows_of(PATH, LABEL, ("patient", lambda i: i // 2), parts)
    assert set(load_table(table_recipe(tmp_path, text)).table.split) == {"train", "test"}


def test_a_column_called_set_that_holds_something_else_is_no_split(tmp_path):
    lay_out(tmp_path, *(f"{i}.png" for i in range(12)))
    text = rows_of(PATH, LABEL, ("patient", lambda i: i // 2), ("set", lambda i: "AB"[i % 2]))
    assert set(load_table(table_recipe(tmp_path, text)).table.split) == {""}


def test_words_that_are_no_part_of_a_split_are_findings_with_the_word(tmp_path):
    lay_out(tmp_path, "a.png", "b.png")
    text = "path,label,patient,split\na.png,CNV,1,train\nb.png,CNV,2,external\n"
    listing = load_table(table_recipe(tmp_path, text))
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
    with pytest.raises(KdoctError) as e: load_table(table_recipe(tmp_path, text))
    assert says in e.value.problem and "CSV UTF-8" in e.value.fix


# --- letters, names and paths of a table that lead astray

@pytest.mark.parametrize("cell", [
    "\u00c3\u2013dem", "\u00d0\u00bd\u00d0\u00be\u00d1\u20ac", "\u00c3\x96dem", "\u251c\u00fbdem",
    "%C3%96dem", "#U00d6dem", "&Ouml;dem",
])
def test_letters_that_were_read_in_another_encoding_are_refused(cell, tmp_path):
    with pytest.raises(KdoctError, match="with garbled letters") as e:
        load_table(table_recipe(tmp_path, GOOD.replace("CNV", cell)))
    assert "line 2" in e.value.problem and "original" in e.value.fix


@pytest.mark.parametrize("labels", [
    ["CNV", "CNV?"], ["CNV", "DME", "CNV;DME"], ["CNV", "CNV | DME"], ["True", "False", "1", "0"],
])
def test_a_label_that_is_no_class_of_its_own_is_refused_unless_all_are_named(labels, tmp_path):
    rows = "".join(f"{i}.png,{label},P{i}\n" for i, label in enumerate(labels*2))
    lay_out(tmp_path, *(f"{i}.png" for i in range(2*len(labels))))
    with pytest.raises(KdoctError, match="no class of its own") as e:
        load_table(table_recipe(tmp_path, HEAD + rows))
    assert "--classes" in e.value.fix or "data.classes" in e.value.fix
    named = table_recipe(tmp_path, HEAD + rows).model_copy(update=dict(classes=tuple(labels)))
    assert set(load_table(named).table.label) == set(labels)


def test_a_label_that_has_lost_a_letter_is_refused_and_a_doubt_is_none(tmp_path):
    with pytest.raises(KdoctError, match="label 'Dr.sen' has lost letters"):
        load_table(table_recipe(tmp_path, GOOD.replace("CNV", "Dr?sen")))
    lay_out(tmp_path, "a.png", "b.png")
    table = load_table(table_recipe(tmp_path, GOOD.replace("CNV", "CNV?"))).table
    assert set(table.label) == {"CNV?", "NORMAL"}


@pytest.mark.parametrize("label", [
    "\u00d6dem", "caf\u00c9\u2013bar", "\u043d\u043e\u0440\u043c\u0430", "\u6d6e\u816b", "S\u00c3O"
])
def test_letters_of_all_languages_are_labels(label, tmp_path):
    lay_out(tmp_path, "a.png", "b.png")
    t = load_table(table_recipe(tmp_path, GOOD.replace("CNV", label))).table
    assert label in set(t.label)


@pytest.mark.parametrize(("label", "encoding"), [
    ("\u043d\u043e\u0440\u043c\u0430", "cp1251"), ("\u6b63\u5e38", "shift_jis"),
    ("\u6c34\u80bf", "gbk"), ("\u00d6dem", "mac_roman"),
    ("Dvo\u0159\u00e1k", "cp1250"), ("\u015eahin", "cp1254"), ("\u00d6dem", "cp1252"),
])
def test_no_encoding_is_guessed_of_a_table_that_is_not_utf_8(label, encoding, tmp_path):
    text = GOOD.replace("NORMAL", label).encode(encoding)
    with pytest.raises(KdoctError, match="line 3 is not UTF-8") as e:
        load_table(table_recipe(tmp_path, text))
    assert "encoding cannot be known" in e.value.problem and "CSV UTF-8" in e.value.fix
    assert "125" not in str(e.value) and "iconv" not in e.value.fix


@pytest.mark.parametrize("written", ["../img/000", "../IMG/000.png", "../img/000.PNG"])
def test_a_path_out_of_the_tables_folder_is_found_as_one_below_it(written, tmp_path):
    lay_out(tmp_path, "img/000.png")
    (tmp_path / "tables").mkdir()
    data = table_recipe(tmp_path / "tables", f"path,label,patient\n{written},CNV,1\n")
    assert list(load_table(data).table.path) == ["../img/000.png"]


def test_a_path_out_of_the_tables_folder_that_could_be_two_is_not_guessed(tmp_path):
    lay_out(tmp_path, "img/000.png", "img/000.bmp", "img/1.png")
    (tmp_path / "tables").mkdir()
    rows = "path,label,patient\n../img/000,CNV,1\n../img/1,DME,2\n../img/2.png,DME,3\n"
    listing = load_table(table_recipe(tmp_path / "tables", rows))
    assert list(listing.table.path) == ["../img/1.png", "../img/2.png"]
    assert sorted(listing.findings.problem) == ["ambiguous-path", "path-by-ending"]


@pytest.mark.parametrize("theirs", ["subject", ""])
def test_a_chosen_column_that_is_not_there_is_named_once(theirs, tmp_path):
    data = table_recipe(tmp_path, "path,label,who\na.png,CNV,1\nb.png,CNV,1\nc.png,CNV,2\n")
    with pytest.raises(KdoctError) as e:
        load_table(data.model_copy(update=dict(columns=dict(patient=theirs))))
    assert f"has no column {theirs!r} (data.columns.patient)." in e.value.problem
    assert e.value.fix.count("data.columns.patient") == 1 and "may be in who" in e.value.fix


@pytest.mark.parametrize(("rows", "says", "helps"), [
    ("i/0,CNV,1\n", "i/0.bmp or i/0.png", "its ending"),
    ("0.png,CNV,1\n", "i/0.png or k/0.png", "its folder"),
    ("k/0.png,CNV,1\nk/0.png,DME,1\n", "label: CNV / DME", "one row"),
])
def test_a_table_of_which_no_row_can_be_used_says_why_and_what_helps(rows, says, helps, tmp_path):
    lay_out(tmp_path, "i/0.png", "i/0.bmp", "k/0.png")
    with pytest.raises(KdoctError, match="no usable image") as e:
        load_table(table_recipe(tmp_path, "path,label,patient\n" + rows))
    assert says in e.value.problem and helps in e.value.fix


@pytest.mark.parametrize(("volume", "n"), [("V{}", 2), ("{}", 0)])
def test_a_volume_of_two_patients_is_noted(volume, n, tmp_path):
    lay_out(tmp_path, *(f"{i}.png" for i in range(8)))
    rows = [f"{i}.png,CNV,P{i // 2},{volume.format(i // 4)}\n" for i in range(8)]
    text = "path,label,patient,volume\n" + "".join(rows)
    found = load_table(table_recipe(tmp_path, text)).findings
    assert list(found.problem) == ["volume-of-several-patients"]*n
    if n: assert found.detail.iloc[0] == "volume V0: patients P0, P1"
