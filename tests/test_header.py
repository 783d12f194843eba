"""Header facts come out of whatever scanners, archives and broken disks leave in a file."""

from __future__ import annotations

import hashlib
from io import BytesIO
from pathlib import Path

import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from tests.needs import DATA, needs_data
from triage.dicom import header
from triage.dicom.header import find_instances, instance_of, parse, read_instance, split
from triage.dicom.phantom import write_study
from triage.errors import Rejected, Retryable

ODD_CHARACTERS = pytest.mark.filterwarnings("ignore::UserWarning")
"""pydicom warns of character sets that it does not know, without quoting the patient."""


@pytest.fixture(scope="module")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One small slice as a file."""
    return write_study(tmp_path_factory.mktemp("phantom"), seed=7, slices=2, rows=64)[0]


def edited(phantom: Path, folder: Path, **changes: object) -> Path:
    """The phantom with other values; None removes an attribute."""
    dataset = pydicom.dcmread(phantom)
    for keyword, value in changes.items():
        if value is None:
            del dataset[keyword]
        else:
            setattr(dataset, keyword, value)
    path = folder / "edited.dcm"
    dataset.save_as(path, enforce_file_format=False)
    return path


def patched(phantom: Path, folder: Path, keyword: str, raw: bytes) -> Path:
    """The phantom with the bytes of one value overwritten, so that even invalid ones can be written."""
    element = pydicom.dcmread(phantom).get_item(keyword)
    data = bytearray(phantom.read_bytes())
    assert element.value_tell is not None
    data[element.value_tell : element.value_tell + element.length] = raw[: element.length].ljust(
        element.length
    )
    path = folder / "patched.dcm"
    path.write_bytes(data)
    return path


def test_facts_are_those_of_an_independent_reader(phantom: Path) -> None:
    found, reference = read_instance(phantom), pydicom.dcmread(phantom)
    assert found.sop_instance_uid == reference.SOPInstanceUID
    assert found.series_instance_uid == reference.SeriesInstanceUID
    assert found.study_instance_uid == reference.StudyInstanceUID
    assert found.sop_class_uid == reference.SOPClassUID
    assert found.transfer_syntax_uid == ExplicitVRLittleEndian
    assert found.image_position_patient == tuple(reference.ImagePositionPatient)
    assert found.image_orientation_patient == tuple(reference.ImageOrientationPatient)
    assert found.pixel_spacing == tuple(reference.PixelSpacing)
    assert (found.rows, found.columns) == (64, 64)
    assert (found.rescale_slope, found.rescale_intercept) == (1.0, 0.0)
    assert found.image_type == ("ORIGINAL", "PRIMARY", "AXIAL")
    assert found.patient_age_years == 60
    assert found.patient_name == "PHANTOM^MADE UP"
    assert found.number_of_frames == 1
    assert found.convolution_kernel == "STANDARD"


def test_the_digest_is_of_the_data_set_alone(phantom: Path, tmp_path: Path) -> None:
    dataset = pydicom.dcmread(phantom)
    dataset.file_meta.SourceApplicationEntityTitle = "ANOTHER SENDER"
    other_meta, other_data = tmp_path / "meta.dcm", tmp_path / "data.dcm"
    dataset.save_as(other_meta)
    dataset.PatientID = "ANOTHER"
    dataset.save_as(other_data)
    assert read_instance(other_meta).digest == read_instance(phantom).digest
    assert read_instance(other_data).digest != read_instance(phantom).digest

    bare = BytesIO()
    pydicom.dcmwrite(bare, _without_meta(phantom), implicit_vr=False, little_endian=True)
    assert read_instance(phantom).digest == hashlib.sha256(bare.getvalue()).hexdigest()
    assert read_instance(phantom, "known").digest == "known"


def _without_meta(path: Path) -> Dataset:
    dataset = Dataset()
    dataset.update(pydicom.dcmread(path))
    return dataset


def test_received_bytes_need_no_pixel_data(phantom: Path) -> None:
    transfer_syntax_uid, body = split(phantom.read_bytes())
    cut = bytes(body[: len(body) - 64 * 64 * 2])
    found = instance_of(parse(cut, transfer_syntax_uid), transfer_syntax_uid, phantom, "digest")
    assert found.sop_instance_uid == read_instance(phantom).sop_instance_uid


@pytest.mark.parametrize(
    ("keyword", "raw", "field", "value"),
    [
        ("SliceThickness", b"junk", "slice_thickness", None),
        ("SliceThickness", b"", "slice_thickness", None),
        ("SliceThickness", b"1\\2", "slice_thickness", None),
        ("SliceThickness", b"1e400", "slice_thickness", None),
        ("SliceThickness", b"nan", "slice_thickness", None),
        ("ImagePositionPatient", b"1\\2", "image_position_patient", None),
        ("ImagePositionPatient", b"1\\2\\x", "image_position_patient", None),
        ("PixelSpacing", b"0\\0", "pixel_spacing", None),
        ("RescaleSlope", b"?", "rescale_slope", None),
        ("InstanceNumber", b"?", "instance_number", None),
        ("PatientAge", b"old", "patient_age_years", None),
        ("ImageType", b"ORIGINAL", "image_type", ("ORIGINAL",)),
        ("StudyDate", b"yesterda", "study_date", "yesterda"),
    ],
)
def test_a_broken_optional_attribute_is_unknown(
    phantom: Path, tmp_path: Path, keyword: str, raw: bytes, field: str, value: object
) -> None:
    assert getattr(read_instance(patched(phantom, tmp_path, keyword, raw)), field) == value


@pytest.mark.parametrize(
    "keyword", ["StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID"]
)
def test_a_missing_uid_is_named(phantom: Path, tmp_path: Path, keyword: str) -> None:
    with pytest.raises(Rejected, match=f"^missing {keyword}$"):
        read_instance(edited(phantom, tmp_path, **{keyword: None}))
    with pytest.raises(Rejected, match=f"^{keyword} is not a UID$"):
        read_instance(patched(phantom, tmp_path, keyword, b"../../etc/passwd"))


@pytest.mark.parametrize(
    "keyword", ["StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID"]
)
@pytest.mark.parametrize("uid", [b"..", b".", b".1.2", b"1.2/3", b"1.2a", "١.٢".encode()])
def test_a_uid_is_never_a_path(phantom: Path, tmp_path: Path, keyword: str, uid: bytes) -> None:
    """UIDs name folders, also of what never came through the listener."""
    with pytest.raises(Rejected, match=f"^{keyword} is not a UID$"):
        read_instance(patched(phantom, tmp_path, keyword, uid))


@pytest.mark.parametrize(
    "content", [b"", b"hello", bytes(1000), b"\x89PNG\r\n\x1a\n" + bytes(500), b"%PDF-1.7" * 60, b"DICM" * 99]
)
def test_other_files_are_not_dicom(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(Rejected, match=r"^(not a (readable )?DICOM|missing )"):
        read_instance(path)


def test_a_file_that_cannot_be_read_may_be_tried_again(tmp_path: Path) -> None:
    with pytest.raises(Retryable, match="No such file"):
        read_instance(tmp_path / "gone.dcm")


@pytest.mark.parametrize("implicit", [True, False])
def test_files_without_preamble_and_meta_are_read(phantom: Path, tmp_path: Path, implicit: bool) -> None:
    path = tmp_path / "bare"
    pydicom.dcmwrite(path, _without_meta(phantom), implicit_vr=implicit, little_endian=True)
    found = read_instance(path)
    assert found.sop_instance_uid == read_instance(phantom).sop_instance_uid
    assert found.transfer_syntax_uid == (ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian)


@pytest.mark.parametrize(
    "transfer_syntax_uid",
    [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian],
)
def test_every_encoding_of_a_data_set(tmp_path: Path, transfer_syntax_uid: str) -> None:
    path = write_study(tmp_path, seed=7, slices=2, rows=64, transfer_syntax_uid=transfer_syntax_uid)[0]
    found = read_instance(path)
    assert found.transfer_syntax_uid == transfer_syntax_uid
    assert found.image_orientation_patient == (1, 0, 0, 0, 1, 0)
    assert found.rows == 64


def test_a_deflated_data_set_does_not_blow_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    syntax = DeflatedExplicitVRLittleEndian
    path = write_study(tmp_path, seed=7, slices=2, rows=64, transfer_syntax_uid=syntax)[0]
    _, body = split(path.read_bytes())
    monkeypatch.setattr(header, "LARGEST_INFLATED", 64 * 64 * 2)
    with pytest.raises(Rejected, match="unpacks to more than any image has"):
        parse(body, syntax)


def test_a_wrong_transfer_syntax_in_the_file_meta_is_seen_through(phantom: Path, tmp_path: Path) -> None:
    raw = phantom.read_bytes().replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2\0\0\0", 1)
    (tmp_path / "mislabelled.dcm").write_bytes(raw)
    assert read_instance(tmp_path / "mislabelled.dcm").rows == 64


@pytest.mark.parametrize(
    ("age", "born", "studied", "years"),
    [
        ("042Y", "", "20200401", 42),
        ("018M", "", "20200401", 1.5),
        ("026W", "", "20200401", 0.5),
        ("010D", "", "20200401", 10 / 365.25),
        ("", "19800401", "20200401", 40),
        ("", "20100401", "20200401", 10),
        ("", "20200402", "20200401", None),
        ("", "", "20200401", None),
        ("", "19800401", "", None),
    ],
)
def test_age(phantom: Path, tmp_path: Path, age: str, born: str, studied: str, years: float | None) -> None:
    path = edited(phantom, tmp_path, PatientAge=age, PatientBirthDate=born, StudyDate=studied)
    assert read_instance(path).patient_age_years == (
        years if years is None else pytest.approx(years, abs=0.01)
    )


@pytest.mark.parametrize(
    ("terms", "name"),
    [
        ("ISO_IR 100", "Müller^Jörg"),
        ("ISO_IR 192", "王^小东"),
        ("GB18030", "王^小东"),
        (["", "ISO 2022 IR 87"], "Yamada^Tarou=山田^太郎"),
        ("ISO_IR 144", "Люксембург"),
    ],
)
def test_names_in_their_own_characters(phantom: Path, tmp_path: Path, terms: object, name: str) -> None:
    path = edited(phantom, tmp_path, SpecificCharacterSet=terms, PatientName=name)
    assert read_instance(path).patient_name == name


def test_a_sequence_in_place_of_a_text_is_none(phantom: Path, tmp_path: Path) -> None:
    """Nor what is in it: whose name that may be, nobody asked."""
    within = Dataset()
    within.PatientName = "DOE^JANE"
    path = edited(phantom, tmp_path)
    dataset = pydicom.dcmread(path)
    dataset.add(pydicom.DataElement("Modality", "SQ", [within]))
    dataset.save_as(path)
    assert read_instance(path).modality == ""


@ODD_CHARACTERS
def test_an_unknown_character_set_loses_nothing_but_the_accents(phantom: Path, tmp_path: Path) -> None:
    path = tmp_path / "klingon.dcm"
    path.write_bytes(phantom.read_bytes().replace(b"ISO_IR 192", b"KLINGON   ", 1))
    assert read_instance(path).patient_name == "PHANTOM^MADE UP"


def test_priority_of_the_request(phantom: Path, tmp_path: Path) -> None:
    assert read_instance(phantom).requested_procedure_priority == ""
    stat = edited(phantom, tmp_path, RequestedProcedurePriority="STAT")
    assert read_instance(stat).requested_procedure_priority == "STAT"
    request = Dataset()
    request.RequestedProcedurePriority = "high"
    nested = edited(phantom, tmp_path, RequestAttributesSequence=Sequence([Dataset(), request]))
    assert read_instance(nested).requested_procedure_priority == "HIGH"


def _instance_or_named_error(raw: bytes, path: Path) -> None:
    path.write_bytes(raw)
    found, refused = find_instances([path])
    assert len(found) + len(refused) == 1
    assert all(reason for _path, reason in refused)


@ODD_CHARACTERS
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(length=st.integers(0, 1900))
def test_a_file_cut_anywhere_gives_an_instance_or_a_reason(
    phantom: Path, tmp_path: Path, length: int
) -> None:
    _instance_or_named_error(phantom.read_bytes()[:length], tmp_path / "cut")


@pytest.fixture(scope="module")
def nested(phantom: Path) -> bytes:
    """A slice with sequences of both kinds before its pixel data: they tear in more ways than values."""
    dataset = pydicom.dcmread(phantom)
    for keyword in ("ReferencedImageSequence", "RequestAttributesSequence"):
        item = Dataset()
        item.ReferencedSOPInstanceUID, item.RequestedProcedurePriority = "1.2.3", "STAT"
        setattr(dataset, keyword, Sequence([item, item]))
    dataset["RequestAttributesSequence"].is_undefined_length = True
    buffer = BytesIO()
    dataset.save_as(buffer)
    return buffer.getvalue()


@ODD_CHARACTERS
@settings(max_examples=500, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    noise=st.lists(st.tuples(st.integers(132, 2200), st.integers(0, 255)), min_size=1, max_size=10),
    length=st.none() | st.integers(132, 2200),
)
def test_a_file_with_wrong_bytes_gives_an_instance_or_a_reason(
    nested: bytes, tmp_path: Path, noise: list[tuple[int, int]], length: int | None
) -> None:
    raw = bytearray(nested)
    for at, byte in noise:
        raw[at] = byte
    _instance_or_named_error(bytes(raw[:length]), tmp_path / "noisy")


def test_folders_are_walked_and_other_files_come_with_a_reason(tmp_path: Path) -> None:
    files = write_study(tmp_path / "a" / "b", seed=7, slices=3, rows=64)
    (tmp_path / "a" / "notes.txt").write_text("not an image")
    found, refused = find_instances([tmp_path, files[0], tmp_path / "gone"])
    assert {instance.path for instance in found} == set(files)
    assert len(found) == len(files)
    assert dict(refused)[tmp_path / "a" / "notes.txt"] == "not a DICOM file"
    assert "No such file" in dict(refused)[tmp_path / "gone"]


@needs_data
def test_every_real_file_is_read() -> None:
    found, refused = find_instances([DATA / "dicom"])
    assert not refused
    assert len(found) == 596
    assert {i.modality for i in found} == {"CT", "US"}
    ricord = [i for i in found if "ricord_1012" in str(i.path)]
    assert {i.patient_age_years for i in ricord} == {80}
    assert len({i.digest for i in ricord}) == len(ricord) == 248
