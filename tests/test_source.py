"""Who a study is of survives into every object, in any character set; broken things are repaired or go."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import dcmread
from pydicom.charset import python_encoding
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.tag import Tag

from tests.needs import needs_dcmtk, needs_dicom3tools
from tests.results import INFO, NOW, SEVERE, blob, errors, positive, small_study
from triage.dicom import key_slices, pictures, seg, sr, view3d
from triage.dicom.header import find_instances
from triage.domain import ResultObject, Series

NAMES = {
    "ISO_IR 100": ("Müller^Jürgen", "Röntgen der Lunge"),
    "ISO_IR 101": ("Wałęsa^Świętosława", "Płuca bez kontrastu, główne"),
    "ISO_IR 109": ("Ġorġ^Ħamrun", "Toraċi"),
    "ISO_IR 110": ("Bērziņš^Jānis", "Krūšu kurvis"),
    "ISO_IR 126": ("Διονυσιος^Ελένη", "Θώρακας"),
    "ISO_IR 127": ("قباني^لنزار", "صدر"),
    "ISO_IR 138": ("שרון^דבורה", "חזה"),
    "ISO_IR 144": ("Люкceмбypг^Пётр", "Грудная клетка"),
    "ISO_IR 148": ("Çavuşoğlu^Işık", "Göğüs"),
    "ISO_IR 166": ("นามสกุล^ชื่อ", "ทรวงอก"),
    "ISO_IR 192": ("Wang^XiaoDong=王^小东", "胸部 CT, Brust, грудь"),
    "GB18030": ("Wang^XiaoDong=王^小东", "胸部䶮"),
    "\\ISO 2022 IR 87": ("Yamada^Tarou=山田^太郎=やまだ^たろう", "胸部"),
    "ISO_IR 13\\ISO 2022 IR 87": ("ﾔﾏﾀﾞ^ﾀﾛｳ=山田^太郎=やまだ^たろう", "胸部"),
    "\\ISO 2022 IR 149": ("Hong^Gildong=洪^吉洞=홍^길동", "흉부"),
    "\\ISO 2022 IR 58": ("Zhang^XiaoDong=张^小东", "胸部"),
    "ISO 2022 IR 100\\ISO 2022 IR 144": ("Müller^Пётр", "Lunge лёгкие"),
    "ISO 2022 IR 6\\ISO 2022 IR 101\\ISO 2022 IR 126": ("Wałęsa^Ελένη", "Płuca"),
}
"""Specific Character Set, with its values: a name and a study's description in it."""
BYTES = {
    "张^小东": b"\x1b$)A\xd5\xc5^\x1b$)A\xd0\xa1\xb6\xab",
    "胸部": b"\x1b$)A\xd0\xd8\xb2\xbf",
}
"""Of ISO 2022 IR 58, as PS3.5 section K.2 writes it; pydicom leaves the escape sequences out."""


def in_bytes(text: str, character_set: str) -> str | bytes:
    if not character_set.endswith("58"):
        return text
    return b"=".join(BYTES.get(part) or part.encode() for part in text.split("="))


def in_letters(text: object) -> str:
    """What pydicom reads, without the escape sequences that it leaves in."""
    return str(text).replace("\x1b$)A", "")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Series:
    return small_study(tmp_path_factory.mktemp("study"))


def with_header(study: Series, folder: Path, change: Callable[[Dataset], None]) -> Series:
    """The series with another first image, which alone says whose it is."""
    first = study.instances[0]
    dataset = dcmread(first.path)
    change(dataset)
    folder.mkdir(exist_ok=True)
    dataset.set_original_encoding(False, True, dataset._character_set)  # bytes are saved as they are
    dataset.save_as(folder / first.path.name)
    found, _ = find_instances([folder / first.path.name])
    return Series((*found, *study.instances[1:]), study.spacing, study.orientation)


def every_object(series: Series, folder: Path) -> list[ResultObject]:
    """One of each kind that is ever sent."""
    result = positive(series)
    lung = np.zeros((len(series.instances), 64, 64), bool)
    lung[4:20, 10:50, 5:28] = True
    picture = np.zeros((8, 8, 3), np.uint8)
    drawn = [
        pictures.write_secondary_capture(picture, series, result, INFO, folder, now=NOW),
        key_slices.write(picture, series, [3, 9], result, INFO, folder, now=NOW),
        view3d.write(np.zeros((2, 8, 8, 3), np.uint8), series, result, INFO, folder, now=NOW),
    ]
    masks = [
        seg.write_lesions(series, blob(series), result, INFO, folder, now=NOW),
        seg.write_lungs(series, lung, lung[..., ::-1], result, INFO, folder, now=NOW),
    ]
    report = sr.write(series, result, SEVERE, INFO, {}, folder, now=NOW, segmentations=masks, pictures=drawn)
    return [*masks, *drawn, report]


def raw(path: Path, keyword: str) -> bytes:
    """The bytes of a value as they lie in the file, without padding."""
    element = dcmread(path, specific_tags=[keyword]).get_item(keyword)
    return bytes(element.value).rstrip(b" \0")  # type: ignore[union-attr]


@needs_dicom3tools
@needs_dcmtk
@pytest.mark.parametrize("character_set", NAMES)
def test_names_survive_into_every_object(study: Series, character_set: str, tmp_path: Path) -> None:
    name, description = NAMES[character_set]

    def put(dataset: Dataset) -> None:
        dataset.SpecificCharacterSet = character_set.split("\\")
        for keyword, text in (
            ("PatientName", name),
            ("ReferringPhysicianName", name),
            ("StudyDescription", description),
        ):
            put_unchecked(dataset, keyword, in_bytes(text, character_set))

    named = with_header(study, tmp_path / "named", put)
    sent = named.instances[0].path
    assert named.instances[0].patient_name == name
    for written in every_object(named, tmp_path):
        dataset = dcmread(written.path)
        assert in_letters(dataset.PatientName) == name, written.kind
        assert in_letters(dataset.StudyDescription) == description, written.kind
        for keyword in ("PatientName", "ReferringPhysicianName", "StudyDescription"):
            assert raw(written.path, keyword) == raw(sent, keyword), written.kind
        assert errors(written.path) == [], written.kind
    dumped = subprocess.run(["dsrdump", "+Pl", tmp_path / "sr.dcm"], capture_output=True, check=True)
    assert b"E:" not in dumped.stderr
    assert raw(sent, "PatientName") in dumped.stdout


def characters(character_set: str) -> st.SearchStrategy[str]:
    """Text of letters that this set can write; no separators of names or values."""
    encoding = python_encoding[character_set]

    def can(text: str) -> bool:
        try:
            return text.encode(encoding).decode(encoding) == text
        except UnicodeError:
            return False

    letters = st.characters(codec="utf-8", categories=["L", "N"], exclude_characters="\\^=")
    return st.text(letters.filter(can), min_size=1, max_size=20)


@settings(max_examples=30)
@given(data=st.data(), character_set=st.sampled_from(["ISO_IR 192", "GB18030", "ISO_IR 100", "ISO_IR 144"]))
def test_any_name_survives_byte_for_byte(
    study: Series, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, character_set: str
) -> None:
    """GB18030 has letters whose second byte is a backslash or a caret."""
    family, given_name = data.draw(characters(character_set)), data.draw(characters(character_set))
    encoded = f"{family}^{given_name}".encode(python_encoding[character_set])
    folder = tmp_path_factory.mktemp("any")

    def put(dataset: Dataset) -> None:
        dataset.SpecificCharacterSet = character_set
        put_unchecked(dataset, "PatientName", encoded)

    named = with_header(study, folder / "named", put)
    picture = pictures.write_secondary_capture(
        np.zeros((8, 8, 3), np.uint8), named, positive(named), INFO, folder, now=NOW
    )
    assert raw(picture.path, "PatientName") == encoded
    assert dcmread(picture.path).SpecificCharacterSet == character_set


@pytest.mark.parametrize("second", [b"\\", b"^", b"|", b"~"])
def test_letters_that_hold_a_separator_survive(study: Series, second: bytes, tmp_path: Path) -> None:
    letter = b"\x81" + second
    assert len(letter.decode("gb18030")) == 1

    def put(dataset: Dataset) -> None:
        dataset.SpecificCharacterSet = "GB18030"
        for keyword in ("PatientName", "StudyDescription"):
            put_unchecked(dataset, keyword, letter)

    named = with_header(study, tmp_path / "named", put)
    seg.write_lesions(named, blob(named), positive(named), INFO, tmp_path, now=NOW)
    for keyword in ("PatientName", "StudyDescription"):
        assert raw(tmp_path / "lesion_seg.dcm", keyword) == letter


def code(value: str, **changes: str) -> Dataset:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, "99SITE", "CT of chest"
    for keyword, changed in changes.items():
        setattr(item, keyword, changed)
    return item


def reference(**attributes: str) -> Dataset:
    item = Dataset()
    for keyword, value in attributes.items():
        setattr(item, keyword, value)
    return item


STUDY_CLASS = "1.2.840.10008.3.1.2.3.1"
BROKEN: dict[str, tuple[dict[str, object], dict[str, object]]] = {
    "sex": ({"PatientSex": "Y"}, {"PatientSex": ""}),
    "birth date": ({"PatientBirthDate": "19509999"}, {"PatientBirthDate": ""}),
    "birth date of old": ({"PatientBirthDate": "1950.12.31"}, {"PatientBirthDate": "19501231"}),
    "study time": ({"StudyTime": "9999"}, {"StudyTime": ""}),
    "study time with colons": ({"StudyTime": "10:20:30"}, {"StudyTime": ""}),
    "age": ({"PatientAge": "60"}, {"PatientAge": None}),
    "weight with comma": ({"PatientWeight": b"75,5"}, {"PatientWeight": None}),
    "no weight": ({"PatientWeight": "0"}, {"PatientWeight": None}),
    "size too long": ({"PatientSize": b"1.750000000000000001"}, {"PatientSize": None}),
    "laterality": ({"Laterality": "B"}, {"Laterality": None}),
    "removed": ({"PatientIdentityRemoved": "TRUE"}, {"PatientIdentityRemoved": None}),
    "removed, nobody knows how": (
        {
            "PatientIdentityRemoved": "YES",
            "DeidentificationMethod": None,
            "DeidentificationMethodCodeSequence": None,
        },
        {"PatientIdentityRemoved": "YES", "DeidentificationMethod": "not told by the source"},
    ),
    "trial without subject": (
        {
            "ClinicalTrialSponsorName": "sponsor",
            "ClinicalTrialProtocolID": "protocol",
            "ClinicalTrialSubjectID": "",
        },
        {
            "ClinicalTrialSponsorName": None,
            "ClinicalTrialProtocolID": None,
            "ClinicalTrialSubjectID": None,
        },
    ),
    "study reference without class": (
        {"ReferencedStudySequence": [reference(ReferencedSOPInstanceUID="1.2.3")]},
        {"ReferencedStudySequence": None},
    ),
    "one of two study references": (
        {
            "ReferencedStudySequence": [
                reference(ReferencedSOPInstanceUID="1.2.3"),
                reference(ReferencedSOPClassUID=STUDY_CLASS, ReferencedSOPInstanceUID="1.2.4"),
            ]
        },
        {
            "ReferencedStudySequence": [
                reference(ReferencedSOPClassUID=STUDY_CLASS, ReferencedSOPInstanceUID="1.2.4")
            ]
        },
    ),
    "long code": (
        {"ProcedureCodeSequence": [code("CT-THORAX-WITHOUT-CONTRAST")]},
        {
            "ProcedureCodeSequence": [
                reference(
                    CodeMeaning="CT of chest",
                    CodingSchemeDesignator="99SITE",
                    LongCodeValue="CT-THORAX-WITHOUT-CONTRAST",
                )
            ]
        },
    ),
    "code without meaning": (
        {"ProcedureCodeSequence": [code("CT", CodeMeaning="")]},
        {"ProcedureCodeSequence": None},
    ),
    "code of a scheme that is none": (
        {"ProcedureCodeSequence": [code("CT", CodingSchemeDesignator="A SCHEME OF OUR OWN")]},
        {"ProcedureCodeSequence": None},
    ),
    "long description": ({"StudyDescription": "x" * 70}, {"StudyDescription": "x" * 64}),
    "description of two lines": ({"StudyDescription": "CT\r\nchest"}, {"StudyDescription": "CT chest"}),
    "description in another set": (
        {"SpecificCharacterSet": "ISO_IR 192", "StudyDescription": b"Br\xfcste"},
        {"StudyDescription": None},
    ),
    "set misspelt": (
        {"SpecificCharacterSet": "ISO-IR 192", "PatientName": "Müller^Ö".encode()},
        {"SpecificCharacterSet": "ISO_IR 192", "PatientName": "Müller^Ö"},
    ),
    "set that nobody knows": (
        {"SpecificCharacterSet": "LATIN", "PatientName": b"M\xfcller"},
        {"SpecificCharacterSet": "ISO_IR 100", "PatientName": "Müller"},
    ),
    "no set": (
        {"SpecificCharacterSet": None, "PatientName": b"M\xfcller"},
        {"SpecificCharacterSet": "ISO_IR 100", "PatientName": "Müller"},
    ),
    "no set and none needed": (
        {"SpecificCharacterSet": None, "PatientName": "DOE^JANE", "PatientComments": b"M\xfcller"},
        {"SpecificCharacterSet": None, "PatientName": "DOE^JANE"},
    ),
    "sets that do not go together": (
        {"SpecificCharacterSet": ["ISO_IR 192", "ISO 2022 IR 87"], "PatientName": "Müller".encode()},
        {"SpecificCharacterSet": "ISO_IR 192", "PatientName": "Müller"},
    ),
}
"""What a source may have, and what our objects have of it; None is an attribute that is not there."""


@needs_dicom3tools
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", BROKEN)
def test_broken_attributes_are_repaired_or_left_out(study: Series, name: str, tmp_path: Path) -> None:
    received, expected = BROKEN[name]

    def put(dataset: Dataset) -> None:
        for keyword, value in received.items():
            if value is None:
                dataset.pop(keyword, None)
            else:
                put_unchecked(dataset, keyword, value)

    broken = with_header(study, tmp_path / "broken", put)
    for written in every_object(broken, tmp_path):
        dataset = dcmread(written.path)
        for keyword, value in expected.items():
            assert dataset.get(keyword) == value, (written.kind, keyword)
        assert errors(written.path) == [], written.kind


def put_unchecked(dataset: Dataset, keyword: str, value: object) -> None:
    """As ``setattr``, but bytes as they are."""
    if isinstance(value, bytes):
        padded = value + b" " * (len(value) % 2)
        tag, vr = Tag(keyword), dictionary_VR(keyword)
        dataset[tag] = RawDataElement(tag, vr, len(padded), padded, 0, False, True)
    else:
        setattr(dataset, keyword, value)


def test_identity_is_handed_on_however_odd(study: Series, tmp_path: Path) -> None:
    """A PACS finds the study by it: no length and no sign is mended."""
    odd = {"PatientID": b"x" * 80, "AccessionNumber": b"2021/0000/1234567890-A", "PatientName": b"Bono"}

    def put(dataset: Dataset) -> None:
        for keyword, value in odd.items():
            put_unchecked(dataset, keyword, value)

    named = with_header(study, tmp_path / "odd", put)
    for written in every_object(named, tmp_path):
        assert {keyword: raw(written.path, keyword) for keyword in odd} == odd, written.kind
