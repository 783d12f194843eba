"""The page of one study and what its viewer asks for: the very values, the very masks, and no other file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
import trimesh
from hypothesis import given
from hypothesis import strategies as st

from tests.results import NOW, SOURCES, blob, changed, parted, positive, small_study, source_series
from tests.study_page import INFO, Judged, judged_phantom
from tests.test_web import Reader, browse, text
from tests.web_studies import CT, Ward, configured
from triage import config as settings
from triage.config import Config
from triage.dicom import masks, seg, volume
from triage.domain import DeliveryState, Grade, Instance, Permission, ResultKind, Status, Study, StudyState
from triage.errors import ConfigError, Rejected
from triage.passwords import token_hash
from triage.web import words
from triage.web.studies import viewer_address
from triage.web.viewer import KEPT, edges, numbers

SMALL = {"slices": 20, "rows": 64, "slice_spacing": 8.0}
OWN_WORDS = "Licensed for clinical use at St. Elsewhere."


@pytest.fixture
def ward(tmp_path: Path) -> Iterator[Ward]:
    ward = Ward(configured(tmp_path))
    yield ward
    ward.database.close()


def told(reader: Reader, uid: str) -> dict[str, Any]:
    answer = reader.get(f"/studies/{uid}/viewer.json")
    assert answer.status_code == 200, answer.text
    marks = reader.get(f"{answer.json()['address']}/marks.json")
    assert marks.status_code == 200, marks.text
    return {**answer.json(), **marks.json()}


# --- images and masks ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Ward, Judged]]:
    ward = Ward(configured(tmp_path_factory.mktemp("seen")))
    yield ward, judged_phantom(ward, seed=5, classes=True, boxes=True, **SMALL)
    ward.database.close()


def test_every_image_has_the_values_that_were_judged(seen: tuple[Ward, Judged]) -> None:
    ward, study = seen
    reader = browse(ward)
    scan = told(reader, study.uid)
    assert (scan["rows"], scan["columns"]) == study.volume.array.shape[1:]
    assert scan["spacing"] == pytest.approx(study.volume.spacing[1:])
    for place, k in enumerate(study.in_viewer_order):
        assert scan["numbers"][place] == study.series.instances[k].instance_number
        answer = reader.get(f"{scan['address']}/images/{place}")
        shown = np.frombuffer(answer.content, "<i2").reshape(study.volume.array.shape[1:])
        assert np.array_equal(shown, study.volume.array[k])
        assert answer.headers["cache-control"] == "private, max-age=3600, immutable"
        assert answer.headers["content-encoding"] == "gzip"
        assert "default-src 'none'" in answer.headers["content-security-policy"]
    plain = reader.get(f"{scan['address']}/images/0", headers={"accept-encoding": "identity"})
    assert "content-encoding" not in plain.headers
    assert len(plain.content) == 2 * scan["rows"] * scan["columns"]


def test_every_mask_is_the_one_that_was_written(seen: tuple[Ward, Judged]) -> None:
    ward, study = seen
    reader = browse(ward)
    scan = told(reader, study.uid)
    half = study.lesions.shape[2] // 2
    assert [one["label"] for one in scan["segments"]] == [
        "Ground glass",
        "Consolidation",
        "Right lung",
        "Left lung",
    ]
    values = [one["value"] for one in scan["segments"]]
    pixel = study.volume.spacing[1] * study.volume.spacing[2]
    for place, k in enumerate(study.in_viewer_order):
        labels = np.frombuffer(reader.get(f"{scan['address']}/labels/{place}").content, np.uint8)
        labels = labels.reshape(study.lesions.shape[1:])
        wanted = study.lesions[k] + study.lesions[k] * 1 * (np.arange(labels.shape[1]) >= half)
        assert np.array_equal(labels & 15, wanted)
        assert np.array_equal(labels >> 4 > 0, study.lungs[k])
        assert np.array_equal(labels >> 4 == 1, study.lungs[k] & (np.arange(labels.shape[1]) < half))
        counted = [np.count_nonzero((labels & (15 if value < 16 else 240)) == value) for value in values]
        assert scan["areas"][place] == pytest.approx([pixel * count for count in counted], abs=0.051)
    most = int(np.argmax([study.lesions[k].sum() for k in study.in_viewer_order]))
    assert scan["start"] == most
    box = study.answer.boxes[0]
    assert scan["boxes"] == [[most, *box.box, box.score]]


def test_surfaces_are_made_of_the_masks(seen: tuple[Ward, Judged]) -> None:
    ward, study = seen
    reader = browse(ward)
    scan = told(reader, study.uid)
    assert scan["surfaces"] is True
    answer = reader.get(f"{scan['address']}/surfaces.glb")
    assert answer.headers["content-type"] == "model/gltf-binary"
    scene = trimesh.load(BytesIO(answer.content), file_type="glb")
    assert set(scene.geometry) == {"infection", "lungs"}
    assert reader.get(f"{scan['address']}/surfaces.glb").content == answer.content


def test_surfaces_that_were_written_are_sent_as_they_are(ward: Ward) -> None:
    study = judged_phantom(ward, seed=6, **SMALL)
    mesh = ward.config.storage.spool / "mesh.glb"
    mesh.write_bytes(b"glTF as written")
    rejudge(ward, study, files={**study.answer.files, ResultKind.MESH: mesh})
    reader = browse(ward)
    assert reader.get(f"{told(reader, study.uid)['address']}/surfaces.glb").content == b"glTF as written"


def test_an_answer_without_masks_has_images_and_nothing_to_draw(ward: Ward) -> None:
    study = judged_phantom(ward, seed=6, **SMALL)
    rejudge(ward, study, files={})
    reader = browse(ward)
    scan = told(reader, study.uid)
    assert scan["segments"] == scan["boxes"] == []
    assert scan["surfaces"] is False
    assert scan["start"] == SMALL["slices"] // 2
    assert reader.get(f"{scan['address']}/images/0").status_code == 200
    assert not np.frombuffer(reader.get(f"{scan['address']}/labels/0").content, np.uint8).any()
    assert reader.get(f"{scan['address']}/surfaces.glb").status_code == 404


def rejudge(ward: Ward, study: Judged, **changes: Any) -> None:
    """A newer answer for the same study."""
    ward.database.requeue(study.uid, ward.now, ward.waiting)
    claimed = ward.claim(study.uid)
    answer = replace(study.answer, content_key=f"{study.answer.content_key}-anew", **changes)
    place = ward.waiting(claimed.arrived_at, False)
    assert ward.database.finish(claimed, answer, [], place, ward.now)


def test_new_masks_have_a_new_address(ward: Ward) -> None:
    study = judged_phantom(ward, seed=6, **SMALL)
    reader = browse(ward)
    before = told(reader, study.uid)["address"]
    rejudge(ward, study)
    assert reader.get(f"{before}/labels/0").status_code == 200, "a page that shows it may go on"
    after = told(reader, study.uid)["address"]
    assert after != before
    later = browse(ward)
    assert later.get(f"{before}/labels/0").status_code == 200, "nor does it end with what is kept in memory"
    for address in (f"{after}/images/20", f"{after}/images/-1", f"{after}x/images/0"):
        assert later.get(address).status_code == 404, address


def test_each_revision_can_be_looked_at(ward: Ward) -> None:
    study = judged_phantom(ward, seed=6, **SMALL)
    rejudge(ward, study, status=Status.NEGATIVE, files={}, reason="nothing found")
    reader, page = browse(ward), f"/studies/{study.uid}"
    newest, first = reader.get(page).text, reader.get(f"{page}?revision=1").text
    assert "superseded" not in newest
    assert f'href="{page}?revision=1"' in newest
    assert "Revision 1 of 2, superseded." in first
    assert "<b>Positive</b>" in first
    assert f'<a href="{page}">2, newest</a>' in first
    source = first.partition('<ct-viewer src="')[2].partition('"')[0].replace("&amp;", "&")
    before = reader.get(source).json()["address"]
    assert len(reader.get(f"{before}/marks.json").json()["segments"]) == 3
    assert told(reader, study.uid)["segments"] == []
    wanted = study.lesions[study.in_viewer_order[10]]
    for one in (reader, browse(ward)):  # also where nothing of it is in memory any more
        labels = np.frombuffer(one.get(f"{before}/labels/10").content, np.uint8).reshape(wanted.shape)
        assert np.array_equal(labels & 15, wanted)
    for wrong in ("3", "-1", "one", ""):
        assert reader.get(f"{page}?revision={wrong}").status_code == 404
        assert reader.get(f"{page}/viewer.json?revision={wrong}").status_code == 404


def test_pictures_are_of_the_revision_that_is_shown(ward: Ward) -> None:
    ward.arrive("1.1")
    ward.judge("1.1", picture=ward.png("first.png", (200, 0, 0)))
    ward.database.requeue("1.1", ward.now, ward.waiting)
    ward.judge("1.1", picture=ward.png("second.png", (0, 0, 200)))
    reader, folder = browse(ward), ward.config.storage.spool
    for revision, name in (("?revision=1", "first.png"), ("?revision=2", "second.png"), ("", "second.png")):
        assert reader.get(f"/pictures/1.1.png{revision}").content == (folder / name).read_bytes()
    assert 'src="/pictures/1.1/large.png?revision=1"' in reader.get("/studies/1.1?revision=1").text


def test_masks_that_were_deleted_are_told(ward: Ward) -> None:
    study = judged_phantom(ward, seed=6, **SMALL)
    study.answer.files[ResultKind.LUNG_SEG].unlink()
    scan = told(browse(ward), study.uid)
    assert scan["notes"] == ["Segmentation of the lungs: not here any more."]
    assert {one["kind"] for one in scan["segments"]} == {"lesion"}


def test_images_are_shown_before_a_study_is_judged_and_when_it_cannot_be(ward: Ward) -> None:
    study = judged_phantom(ward, seed=6, **SMALL)
    gone = study.series.instances[3]
    ward.database.requeue(study.uid, ward.now, ward.waiting)
    ward.refuse(study.uid, "missing slices")
    reader = browse(ward)
    scan = told(reader, study.uid)
    assert len(scan["numbers"]) == SMALL["slices"]
    gone.path.unlink()
    place = study.in_viewer_order.index(3)
    assert reader.get(f"{scan['address']}/images/{place}").status_code == 404
    assert reader.get(f"{scan['address']}/images/{place - 1}").status_code == 200


def test_a_mask_that_cannot_be_read_is_told(ward: Ward) -> None:
    study = judged_phantom(ward, seed=6, **SMALL)
    path = study.answer.files[ResultKind.LESION_SEG]
    path.write_bytes(path.read_bytes()[:2000])
    scan = told(browse(ward), study.uid)
    assert scan["notes"] == [f"Without an overlay: {path.name} holds no masks that can be read."]
    assert {one["kind"] for one in scan["segments"]} == {"lung"}


def test_no_other_file_than_the_spool_s_is_read(ward: Ward, tmp_path: Path) -> None:
    study = judged_phantom(ward, seed=6, **SMALL)
    outside = tmp_path / "outside.dcm"
    outside.write_bytes(study.answer.files[ResultKind.LESION_SEG].read_bytes())
    within = ward.config.storage.spool / "link.dcm"
    within.symlink_to(outside)
    for path in (outside, within, ward.config.storage.spool / ".." / "outside.dcm"):
        rejudge(ward, study, files={ResultKind.LESION_SEG: path, ResultKind.MESH: path})
        assert told(browse(ward), study.uid)["segments"] == []
    stranger = study.series.instances[0].path.rename(tmp_path / "image.dcm")
    received = Instance(
        study_instance_uid="1.9", series_instance_uid="1.9.1", sop_instance_uid="1.9.1.1", sop_class_uid=CT,
        transfer_syntax_uid="1.2.840.10008.1.2.1", path=stranger, digest="1", rows=64, columns=64,
    )  # fmt: skip
    ward.database.register(received, ward.now, judgeable=True, stat=False, pending=ward.waiting)
    assert browse(ward).get("/studies/1.9/viewer.json").status_code == 404
    assert browse(ward).get("/studies/1.8/viewer.json").status_code == 404


def test_masks_of_few_studies_stay_in_memory(ward: Ward) -> None:
    studies = [
        judged_phantom(ward, seed=seed, slices=20, rows=32, slice_spacing=8.0) for seed in range(KEPT + 2)
    ]
    reader = browse(ward)
    addresses = [told(reader, study.uid)["address"] for study in studies]
    for address in (*addresses, addresses[0]):  # those that were let go are read again
        assert reader.get(f"{address}/labels/10").status_code == 200


@pytest.mark.parametrize("name", SOURCES)
def test_one_image_is_read_as_the_whole_series_is(name: str, tmp_path: Path) -> None:
    series = source_series(name, tmp_path)
    some = series.instances[:: len(series.instances) // 3]
    for image, slice_ in zip(some, volume.read(replace(series, instances=some), 1).array, strict=True):
        assert np.array_equal(volume.read_image(image), slice_)


def test_images_are_counted_where_their_numbers_tell_nothing(seen: tuple[Ward, Judged]) -> None:
    images = seen[1].series.instances[:4]
    assert numbers(images) == [one.instance_number for one in images]
    for known in ([7, 7, 8, 9], [None, 1, 2, 3]):
        told = [replace(one, instance_number=n) for one, n in zip(images, known, strict=True)]
        assert numbers(told) == [1, 2, 3, 4]


@pytest.mark.parametrize("form", ["binary", "labelmap_rle", "labelmap_jpeg_ls"])
@pytest.mark.parametrize("classes", [False, True])
def test_masks_read_back_as_written(tmp_path: Path, form: seg.Form, classes: bool) -> None:
    series = small_study(tmp_path / "source")
    mask = blob(series)
    parts = parted(mask) if classes else {}
    written = seg.write_lesions(
        series, mask, positive(series), INFO, tmp_path, now=NOW, classes=parts, form=form
    )
    found = masks.read(written.path)
    labels = ["Ground glass", "Consolidation"] if classes else ["Lesions"]
    assert [one.label for one in found.segments.values()] == labels
    for number, part in enumerate(parts.values() if classes else [mask], 1):
        back = np.stack([found.labels(one.sop_instance_uid) == number for one in series.instances])
        assert np.array_equal(back, part)
        for k, one in enumerate(series.instances):
            assert found.areas.get(one.sop_instance_uid, {}).get(number, 0) == part[k].sum()
    kind = seg.LESIONS if not classes else seg.CLASSES["ground_glass"]
    assert np.allclose(found.segments[1].colour, kind.colour, atol=2)


def test_frames_need_not_end_with_a_byte(tmp_path: Path) -> None:
    """63 × 63 bits a frame: each begins somewhere in a byte (PS3.5 section 8.1.1)."""
    rng = np.random.default_rng(1)
    small = small_study(tmp_path / "source")
    cut = changed(small, tmp_path / "cut", Rows=63, Columns=63, PixelData=bytes(2 * 63 * 63))
    mask = rng.random((len(cut.instances), 63, 63)) > 0.7
    written = seg.write_lesions(cut, mask, positive(cut), INFO, tmp_path, now=NOW)
    found = masks.read(written.path)
    assert np.array_equal(np.stack([found.marked(one.sop_instance_uid) for one in cut.instances]), mask)


def test_what_is_no_segmentation_is_refused(tmp_path: Path) -> None:
    series = small_study(tmp_path / "source")
    with pytest.raises(Rejected, match="holds no masks"):
        masks.read(series.instances[0].path)


@pytest.mark.parametrize(
    ("orientation", "letters"),
    [
        ((1, 0, 0, 0, 1, 0), "R L A P"),
        ((-1, 0, 0, 0, -1, 0), "L R P A"),
        ((0, 1, 0, 0, 0, -1), "A P H F"),
        ((0.8, 0.6, 0, -0.6, 0.8, 0), "RA LP AL PR"),
        ((0.99, 0.1, 0, -0.1, 0.99, 0), "R L A P"),
    ],
)
def test_letters_name_the_edges(orientation: tuple[float, ...], letters: str) -> None:
    assert " ".join(edges(orientation).values()) == letters
    assert set(edges(None).values()) == {""}


# --- the page --------------------------------------------------------------------------------


def test_earlier_studies_of_the_patient_and_what_changed(ward: Ward) -> None:
    same = {"patient_id": "P1"}
    ward.arrive("1.1", study_date="20200301", **same)
    ward.judge("1.1", affected_fraction=0.2)
    ward.arrive("1.2", study_date="20200310", **same)
    ward.judge("1.2", affected_fraction=0.32)
    ward.arrive("1.3", study_date="20200320", **same)
    ward.arrive("1.4", study_date="", **same)
    ward.arrive("1.5", study_date="20200302", patient_id="P2")
    ward.arrive("1.6", study_date="20200303", patient_id="")
    page = browse(ward).get("/studies/1.2")
    priors = page.text.partition('id="priors"')[2].partition("</section>")[0]
    assert "/studies/1.1" in priors
    assert "▲ 12 points more affected" in priors
    assert not any(f"/studies/1.{n}" in priors for n in (2, 3, 4, 5, 6))
    assert [prior.study.study_instance_uid for prior in ward.database.priors(ward.study("1.3"), 9)] == [
        "1.2",
        "1.1",
    ]
    assert [prior.study.study_instance_uid for prior in ward.database.priors(ward.study("1.3"), 1)] == ["1.2"]
    for uid, reason in (("1.4", "the study has no date"), ("1.6", "the study has no patient ID")):
        assert reason in text(browse(ward).get(f"/studies/{uid}"))
    assert "None has come here" in text(browse(ward).get("/studies/1.1"))


def test_an_earlier_study_under_another_name_is_told_and_not_compared(ward: Ward) -> None:
    for uid, name in (("1.1", "ROE^RICHARD"), ("1.2", "Doe^Jane^^Dr"), ("1.3", "DOE^JANE=ドウ")):
        ward.arrive(uid, patient_id="P1", patient_name=name, study_date=f"2020030{uid[2:]}")
        ward.judge(uid, affected_fraction=0.2)
    priors = browse(ward).get("/studies/1.3").text.partition('id="priors"')[2].partition("</section>")[0]
    assert priors.count("⚠ other name") == 1
    assert priors.count("as much affected") == 1
    told = browse(ward).get("/api/v1/studies/1.3/priors").json()
    assert {one["study_instance_uid"]: (one["other_name"], one["change"]) for one in told} == {
        "1.1": (True, None),
        "1.2": (False, 0.0),
    }


def test_images_of_another_patient_are_left_out(ward: Ward) -> None:
    study = judged_phantom(ward, seed=6, **SMALL)
    before = told(browse(ward), study.uid)
    stray = replace(study.series.instances[0], sop_instance_uid="9.9", digest="x", patient_id="SOMEBODY ELSE")
    ward.database.register(stray, ward.now, judgeable=True, stat=False, pending=ward.waiting)
    after = told(browse(ward), study.uid)
    assert after["numbers"] == before["numbers"]
    assert after["notes"] == ["Images of another patient ID came with this study's UID: they are left out."]
    assert before["notes"] == []


@pytest.mark.parametrize(
    ("now", "before", "said"),
    [
        (0.32, 0.2, "▲ 12 points more affected"),
        (0.2, 0.215, "▼ 1.5 points less affected"),
        (0.2, 0.2, "as much affected"),
        (None, 0.2, ""),
    ],
)
def test_changes_in_words(ward: Ward, now: float | None, before: float, said: str) -> None:
    answers = [
        replace(ward.answer("1.1", Status.POSITIVE), affected_fraction=part, grade=Grade.CT1)
        for part in (now, before)
    ]
    assert words.change(*answers) == said
    if said:
        assert words.change(answers[0], replace(answers[1], model="ssm")) == f"{said}, by another network"
    assert words.change(answers[0], None) == ""


def test_the_banner_is_on_every_page_and_in_the_site_s_own_words(ward: Ward) -> None:
    ward.arrive("1.1")
    addresses = ("/", "/studies/1.1", "/search?q=DOE", "/studies/1.2", "/login")
    usual = "Research use, not a medical device. Read every study whatever this list says. Nothing here is"
    for address in addresses:
        assert usual in text(browse(ward).get(address)), address
    web = ward.config.web.model_copy(update={"notice": OWN_WORDS})
    ward.config = ward.config.model_copy(update={"web": web})
    for address in addresses:
        page = text(browse(ward).get(address))
        assert OWN_WORDS in page, address
        assert "Research use" not in page, address
    with pytest.raises(ConfigError, match=r"web\.notice"):
        settings.parse({"web": {"notice": ""}})


# --- the site's own viewer -------------------------------------------------------------------

STUDY = Study(
    study_instance_uid="1.2.3", state=StudyState.READY, arrived_at=datetime(2026, 3, 2, tzinfo=UTC),
    last_received_at=datetime(2026, 3, 2, tzinfo=UTC), accession_number="A/1 &x=2", patient_id="P#é",
)  # fmt: skip


def web(**values: Any) -> Config:
    return settings.parse({"web": values})


def test_a_link_opens_the_study_in_the_site_s_viewer(ward: Ward) -> None:
    ward.arrive("1.1", accession_number='A/1"&x=<2>')
    template = "https://pacs.example/open?study={study_instance_uid}&acc={accession_number}"
    ward.config = ward.config.model_copy(update={"web": web(viewer_url=template).web})
    page = browse(ward).get("/studies/1.1").text
    wanted = "https://pacs.example/open?study=1.1&amp;acc=A%2F1%22%26x%3D%3C2%3E"
    assert f'href="{wanted}" target="_blank" rel="noopener noreferrer"' in page
    ward.config = ward.config.model_copy(update={"web": web().web})
    assert "Open in the PACS viewer" not in browse(ward).get("/studies/1.1").text


@given(st.text(max_size=20), st.text(max_size=20))
def test_whatever_a_study_is_called_it_stays_in_its_place(accession_number: str, patient_id: str) -> None:
    try:
        (accession_number + patient_id).encode()
    except UnicodeEncodeError:
        return
    study = replace(STUDY, accession_number=accession_number, patient_id=patient_id)
    address = viewer_address("https://v.example/{patient_id}/{accession_number}/end", study)
    if not (accession_number or patient_id):
        assert address is None
        return
    assert address is not None
    host, *parts = address.removeprefix("https://").split("/")
    assert (host, parts[-1]) == ("v.example", "end")
    assert [unquote(part) for part in parts[:-1]] == [patient_id, accession_number]


@pytest.mark.parametrize(
    "values",
    [
        {"viewer_url": "http://pacs/?s={study_instance_uid}"},
        {"viewer_url": "https://pacs:8443/{patient_id}/{accession_number}#{study_instance_uid}"},
        {"viewer_url": "weasis://?%24dicom%3Aget={study_instance_uid}", "viewer_scheme": "weasis"},
    ],
)
def test_good_templates_of_links(values: dict[str, str]) -> None:
    assert viewer_address(web(**values).web.viewer_url, STUDY)


@pytest.mark.parametrize(
    ("values", "wrong"),
    [
        ({"viewer_url": "https://pacs/"}, "names no study"),
        ({"viewer_url": "https://pacs/{patient_name}"}, "may name"),
        ({"viewer_url": "https://pacs/{}"}, "may name"),
        ({"viewer_url": "https://pacs/{patient_id!r}"}, "may name"),
        ({"viewer_url": "https://pacs/{patient_id.x}"}, "may name"),
        ({"viewer_url": "https://pacs/{patient_id"}, "viewer_url"),
        ({"viewer_url": "https://{patient_id}/"}, "must begin"),
        ({"viewer_url": "https://pacs{patient_id}/"}, "must begin"),
        ({"viewer_url": "{patient_id}://pacs/"}, "must begin"),
        ({"viewer_url": "javascript:alert('{patient_id}')"}, "must begin"),
        ({"viewer_url": "/local/{patient_id}"}, "must begin"),
        ({"viewer_url": "weasis://{patient_id}"}, "must begin"),
        ({"viewer_url": "javascript:'{patient_id}'", "viewer_scheme": "javascript"}, "opens no viewer"),
        ({"viewer_scheme": "We asis"}, "viewer_scheme"),
    ],
)
def test_a_wrong_template_stops_the_start(values: dict[str, str], wrong: str) -> None:
    with pytest.raises(ConfigError, match=wrong):
        web(**values)


# --- sending again ---------------------------------------------------------------------------


def owing(tmp_path: Path) -> Ward:
    """A ward whose PACS and archive are owed the results of study 1.1, the archive's given up."""
    config = settings.parse(
        {
            **json.loads(configured(tmp_path).model_dump_json(include={"storage", "database"})),
            "delivery": {
                "destinations": [
                    {"name": name, "ae_title": "PACS", "host": "127.0.0.1", "port": 104}
                    for name in ("PACS", "the archive/2")
                ]
            },
        }
    )
    ward = Ward(config)
    ward.arrive("1.1")
    ward.judge("1.1", to=("PACS", "the archive/2"))
    for delivery in ward.database.deliveries("1.1"):
        if delivery.destination == "PACS":
            ward.database.mark_sent(delivery.delivery_id, ward.now)
        else:
            ward.database.give_up(delivery.delivery_id, "refused")
    return ward


def as_who(ward: Ward, *scopes: Permission) -> dict[str, str]:
    secret = "-".join(scopes)
    ward.database.people.add_token(secret, token_hash(secret), frozenset(scopes), "tests", ward.now, None, [])
    return {"Authorization": f"Bearer {secret}"}


def test_an_admin_sends_again_what_was_not_taken(tmp_path: Path) -> None:
    ward = owing(tmp_path)
    admin = as_who(ward, Permission.READ, Permission.ADMIN)
    reader = browse(ward)
    page = reader.get("/studies/1.1", headers=admin).text
    assert page.count('class="resend"') == 1
    assert 'action="/studies/1.1/resend/the%20archive/2"' in page
    ward.now += timedelta(hours=1)
    answer = reader.post("/studies/1.1/resend/the%20archive/2", headers=admin)
    assert (answer.status_code, answer.headers["location"]) == (303, "/studies/1.1#delivery")
    states = {(d.destination, d.state) for d in ward.database.deliveries("1.1")}
    assert states == {("PACS", DeliveryState.SENT), ("the archive/2", DeliveryState.PENDING)}
    assert len(ward.database.due_deliveries("the archive/2", ward.now)) == 2
    for address in ("/studies/1.1/resend/elsewhere", "/studies/1.7/resend/PACS"):
        assert reader.post(address, headers=admin).status_code == 404
    ward.database.close()


def test_nobody_else_sends_anything(tmp_path: Path) -> None:
    ward = owing(tmp_path)
    reader = browse(ward)
    for who in (as_who(ward, Permission.READ, Permission.WORKLIST), as_who(ward, Permission.READ)):
        assert 'class="resend"' not in reader.get("/studies/1.1", headers=who).text
        assert reader.post("/studies/1.1/resend/the%20archive/2", headers=who).status_code == 403
        assert reader.get("/studies/1.1/resend/the%20archive/2", headers=who).status_code in (403, 405)
    assert {d.state for d in ward.database.deliveries("1.1")} == {DeliveryState.SENT, DeliveryState.GIVEN_UP}
    ward.database.close()


# --- the same for programs -------------------------------------------------------------------


def test_programs_get_what_the_page_shows(tmp_path: Path) -> None:
    ward = owing(tmp_path)
    for uid, date, fraction in (("1.2", "20200301", 0.2), ("1.3", "20200310", 0.32)):
        ward.arrive(uid, study_date=date, patient_id="P1")
        ward.judge(uid, affected_fraction=fraction)
    reader, viewer = browse(ward), as_who(ward, Permission.READ)
    (prior,) = reader.get("/api/v1/studies/1.3/priors", headers=viewer).json()
    assert (prior["study_instance_uid"], prior["study_date"], prior["status"]) == (
        "1.2",
        "20200301",
        "positive",
    )
    assert prior["change"] == pytest.approx(0.12)
    (revision,) = reader.get("/api/v1/studies/1.3/revisions", headers=viewer).json()
    assert (revision["revision"], revision["affected_fraction"], revision["grade"]) == (1, 0.32, "CT-2")
    deliveries = reader.get("/api/v1/studies/1.1/deliveries", headers=viewer).json()
    assert {(one["destination"], one["state"]) for one in deliveries} == {
        ("PACS", "sent"),
        ("the archive/2", "given_up"),
    }
    assert {one["what"] for one in deliveries} == {
        words.object_name(one) for one in ward.database.deliveries("1.1")
    }
    again = "/api/v1/studies/1.1/resend/the%20archive/2"
    assert reader.post(again, headers=viewer).status_code == 403
    assert reader.post(again, headers=as_who(ward, Permission.ADMIN)).status_code == 204
    assert len(ward.database.due_deliveries("the archive/2", ward.now)) == 2
    for what in ("priors", "revisions", "deliveries"):
        assert reader.get(f"/api/v1/studies/9.9/{what}", headers=viewer).status_code == 404
    ward.database.close()


def test_leaving_takes_the_images_out_of_the_browser(ward: Ward) -> None:
    assert browse(ward).post("/logout").headers["clear-site-data"] == '"cache"'
