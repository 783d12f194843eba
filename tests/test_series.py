"""The series that is judged, or the reason why none can be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from math import cos, sin
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.needs import DATA, needs_data
from triage.config import Assemble
from triage.dicom.header import find_instances
from triage.dicom.phantom import write_study
from triage.dicom.series import choose
from triage.domain import Instance
from triage.errors import Rejected

RULES = Assemble()
AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
CT, ENHANCED_CT, SC, SR = (
    f"1.2.840.10008.5.1.4.1.1.{x}" for x in ("2", "2.1", "7", "88.33")
)  # fmt: skip


def stack(count: int = 60, spacing: float = 5.0, series: str = "1.2.3", **facts: Any) -> list[Instance]:
    """A series of a sound chest CT, lowest slice first, as its headers tell."""
    return [
        Instance(
            **{
                "study_instance_uid": "1.2",
                "series_instance_uid": series,
                "sop_instance_uid": f"{series}.{k + 1}",
                "sop_class_uid": CT,
                "transfer_syntax_uid": "1.2.840.10008.1.2.1",
                "path": Path(f"{series}.{k}.dcm"),
                "digest": f"{series}.{k}",
                "modality": "CT",
                "image_type": ("ORIGINAL", "PRIMARY", "AXIAL"),
                "rows": 512,
                "columns": 512,
                "instance_number": count - k,
                "image_position_patient": (-170.0, -170.0, -300 + k * spacing),
                "image_orientation_patient": AXIAL,
                "pixel_spacing": (0.7, 0.7),
                "slice_thickness": spacing,
                "rescale_slope": 1.0,
                "rescale_intercept": -1024.0,
                "convolution_kernel": "STANDARD",
                "body_part_examined": "CHEST",
            }
            | facts
        )
        for k in range(count)
    ]


def moved(instance: Instance, dx: float = 0.0, dy: float = 0.0, dz: float = 0.0) -> Instance:
    x, y, z = instance.image_position_patient or (0, 0, 0)
    return replace(instance, image_position_patient=(x + dx, y + dy, z + dz))


def reason(instances: Sequence[Instance], rules: Assemble = RULES) -> str:
    with pytest.raises(Rejected) as refusal:
        choose(instances, rules)
    return str(refusal.value)


def test_a_sound_series_is_chosen_and_ordered_along_its_normal() -> None:
    series = choose(stack()[::-1], RULES)
    assert series.instances == tuple(stack())
    assert series.spacing == (5.0, 0.7, 0.7)
    assert series.orientation == AXIAL
    assert series.notes == ()


@pytest.mark.parametrize(
    ("orientation", "up"),
    [
        (AXIAL, 1),  # on the back
        ((-1.0, 0.0, 0.0, 0.0, -1.0, 0.0), 1),  # prone
        ((0.0, 1.0, 0.0, -1.0, 0.0, 0.0), 1),  # on one side
        ((1.0, 0.0, 0.0, 0.0, -1.0, 0.0), -1),  # mirrored columns: the normal points to the feet
    ],
)
def test_every_axial_orientation_is_ordered_along_its_own_normal(orientation: Any, up: int) -> None:
    series = choose(stack(image_orientation_patient=orientation), RULES)
    assert [i.sop_instance_uid for i in series.instances] == [i.sop_instance_uid for i in stack()][::up]
    assert series.spacing[0] == pytest.approx(5.0)


def test_the_same_object_twice_counts_once() -> None:
    again = [replace(i, path=Path("copy")) for i in stack()]
    assert len(choose(stack() + again, RULES).instances) == 60


# What is never judged.


@pytest.mark.parametrize(
    ("instances", "expected"),
    [
        ([], "no images"),
        (stack(1, image_type=("ORIGINAL", "PRIMARY", "LOCALIZER")), "no axial CT series: only 1 localizer"),
        (
            stack(20, image_orientation_patient=(0.0, 1.0, 0.0, 0.0, 0.0, -1.0)),
            "no axial CT series: only 20 sagittal reformats",
        ),
        (
            stack(20, image_orientation_patient=(1.0, 0.0, 0.0, 0.0, 0.0, -1.0)),
            "no axial CT series: only 20 coronal reformats",
        ),
        (
            stack(30, image_orientation_patient=(1.0, 0.0, 0.0, 0.0, cos(0.8), sin(0.8))),
            "no axial CT series: only 30 oblique reformats",
        ),
        (
            stack(60, image_type=("DERIVED", "SECONDARY", "REFORMATTED", "AVERAGE")),
            "no axial CT series: only 60 axial reformats",
        ),
        (
            stack(60, image_type=("DERIVED", "SECONDARY", "PROJECTION IMAGE")),
            "no axial CT series: only 60 axial reformats",
        ),
        (
            stack(1, sop_class_uid=ENHANCED_CT, number_of_frames=300),
            "no axial CT series: only 1 multi-frame CT image (not supported)",
        ),
        (
            stack(3, image_position_patient=None),
            "no axial CT series: only 3 images without a position in the patient",
        ),
        (
            stack(3, image_orientation_patient=(0.0,) * 6),
            "no axial CT series: only 3 images without a position in the patient",
        ),
        (stack(2, sop_class_uid=SC), "no CT images: only 2 secondary captures"),
        (
            stack(1, sop_class_uid=SR, modality="SR", series="1.2.4") + stack(2, sop_class_uid=SC),
            "no CT images: only 2 secondary captures and 1 SR object",
        ),
    ],
)
def test_what_there_was_instead_is_said(instances: list[Instance], expected: str) -> None:
    assert reason(instances) == expected


def test_derived_alone_is_no_reason() -> None:
    assert choose(stack(image_type=("DERIVED", "PRIMARY", "AXIAL", "CT_SOM5 SPI")), RULES)
    assert choose(stack(image_type=("ORIGINAL", "SECONDARY", "AXIAL")), RULES)


def test_a_localizer_within_the_series_is_left_out() -> None:
    scout = stack(1, series="1.2.3.9", image_type=("ORIGINAL", "PRIMARY", "LOCALIZER"))
    inside = [replace(i, series_instance_uid="1.2.3") for i in scout]
    assert choose(stack() + inside, RULES).instances == tuple(stack())


# Whom and what it shows.


def test_children_are_not_judged() -> None:
    assert reason(stack(patient_age_years=17.9)) == "patient is under 18 years"
    assert reason(stack(patient_age_years=0.0)) == "patient is under 18 years"
    assert choose(stack(patient_age_years=18.0), RULES)
    assert choose(stack(patient_age_years=None), RULES)
    assert choose(stack(patient_age_years=15.0), Assemble(minimum_age_years=14))


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({"body_part_examined": "HEAD"}, "not a chest: HEAD"),
        ({"body_part_examined": "", "series_description": "Brain 5mm"}, "not a chest: BRAIN"),
        ({"body_part_examined": "", "study_description": "CT ABDOMEN W CONTRAST"}, "not a chest: ABDOMEN"),
        ({"body_part_examined": "PELVIS", "study_description": "CT HIP LEFT"}, "not a chest: PELVIS"),
        ({"body_part_examined": "HIP"}, "not a chest: HIP"),
        (
            {"body_part_examined": "ABDOMEN", "study_description": "CT CHEST ABDOMEN PELVIS"},
            "not a chest: ABDOMEN",
        ),
        (
            {"body_part_examined": "", "series_description": "Pelvis 5.0", "study_description": "CT TAP"},
            "not a chest: PELVIS",
        ),
    ],
)
def test_another_region_is_named(facts: dict[str, str], expected: str) -> None:
    assert reason(stack(**facts)) == expected


@pytest.mark.parametrize(
    "facts",
    [
        {"body_part_examined": ""},
        {"body_part_examined": "CHEST"},
        {"body_part_examined": "CHESTABDPELVIS"},
        {"body_part_examined": "THORAX"},
        {"body_part_examined": "HEAD", "series_description": "Lung 1.25"},
        {"body_part_examined": "ABDOMEN", "series_description": "CHEST/LUNG"},
        {"body_part_examined": "", "study_description": "CT CHEST ABDOMEN PELVIS"},
        {"body_part_examined": "CHEST", "series_description": "ABD 5.0"},
        {"body_part_examined": "", "study_description": "TDM THORACO-ABDOMINO-PELVIENNE"},
        {"body_part_examined": "", "series_description": "HEAD FIRST 5.0"},
        {"body_part_examined": "", "series_description": "SHIPPED COPY"},
    ],
)
def test_hints_are_only_hints(facts: dict[str, str]) -> None:
    assert choose(stack(**facts), RULES)


# Geometry.


@pytest.mark.parametrize(
    ("instances", "expected"),
    [
        (stack(19, 10), "too few slices (19)"),
        (stack(1), "too few slices (1)"),
        (stack(20), "coverage 100 mm is too short for a chest"),
        (stack(25, 12), "slice spacing 12 mm is too wide"),
        (stack(pixel_spacing=None), "missing PixelSpacing"),
        (stack(rescale_slope=None), "missing RescaleSlope"),
        (stack(rescale_slope=0.0), "missing RescaleSlope"),
        (stack(rescale_intercept=None), "missing RescaleIntercept"),
        (stack(gantry_detector_tilt=-18.5), "gantry tilt 18°"),
        ([moved(i, dy=k * 1.8) for k, i in enumerate(stack())], "gantry tilt 20°"),
        (
            stack(image_orientation_patient=(1.0, 0.0, 0.0, 0.0, cos(0.3), sin(0.3))),
            "gantry tilt 17°",
        ),
        (
            stack()[:20] + stack()[40:],
            "missing slices: 105 mm hole between slices 20 and 41",
        ),
        (
            stack()[:20] + stack()[22:30] + stack()[32:],
            "missing slices: 2 holes, 15 mm hole between slices 38 and 41",
        ),
        (
            [moved(i, dz=2.0) if k % 2 else i for k, i in enumerate(stack())],
            "uneven slice spacing (3 mm to 7 mm)",
        ),
        (
            [moved(i, dz=max(k - 30, 0) * 2) for k, i in enumerate(stack())],
            "uneven slice spacing (5 mm to 7 mm)",
        ),
        (
            stack() + [replace(i, sop_instance_uid=i.sop_instance_uid + ".9") for i in stack()],
            "duplicate slice positions: two series in one",
        ),
        (
            [*stack(), replace(stack()[30], sop_instance_uid="1.9")],
            "duplicate slice positions (1)",
        ),
        (
            [moved(i, dx=20.0) if k > 40 else i for k, i in enumerate(stack())],
            "slices are shifted sideways by 14 mm",
        ),
    ],
)  # fmt: skip
def test_unsound_geometry_is_named(instances: list[Instance], expected: str) -> None:
    assert reason(instances) == expected


def test_limits_are_settings() -> None:
    assert choose(stack(15, 5), Assemble(minimum_slices=15, minimum_coverage_mm=70))
    assert choose(stack(25, 12), Assemble(maximum_spacing_mm=12))
    assert choose(stack(gantry_detector_tilt=18.5), Assemble(maximum_tilt_degrees=20))


def test_a_hole_without_instance_numbers_is_counted_from_below() -> None:
    found = stack(instance_number=None)
    assert reason(found[:20] + found[22:]) == "missing slices: 15 mm hole between slices 20 and 21"


@given(
    count=st.integers(40, 200),
    spacing=st.floats(0.75, 5.0),
    where=st.floats(0.0, 1.0),
    jitter=st.integers(0, 2**32),
)
def test_removing_an_inner_slice_is_always_missing_slices(
    count: int, spacing: float, where: float, jitter: int
) -> None:
    shaken = Random(jitter)
    whole = [moved(i, dz=shaken.uniform(-0.01, 0.01)) for i in stack(count, spacing)]
    inner = 1 + int(where * (count - 3))
    assert reason(whole[:inner] + whole[inner + 1 :]).startswith("missing slices: ")


@given(spacing=st.floats(0.5, 10.0), thickness=st.floats(0.5, 10.0), jitter=st.integers(0, 2**32))
def test_even_spacing_is_accepted_whatever_the_thickness(
    spacing: float, thickness: float, jitter: int
) -> None:
    """Also with positions rounded to a hundredth of a millimetre, or every second slice sent."""
    shaken = Random(jitter)
    count = max(20, int(300 / spacing))
    found = [
        moved(i, dz=shaken.uniform(-0.01, 0.01)) for i in stack(count, spacing, slice_thickness=thickness)
    ]
    series = choose(found, Assemble(maximum_spacing_mm=10.1))
    assert series.spacing[0] == pytest.approx(spacing, abs=0.01)


CHANGES: dict[str, Any] = {
    "nothing": lambda s: s,
    "hole": lambda s: s[:20] + s[25:],
    "doubled": lambda s: s + [replace(i, sop_instance_uid=i.sop_instance_uid + ".9") for i in s],
    "sharp": lambda s: [replace(i, convolution_kernel="LUNG") for i in s],
    "two kernels": lambda s: [
        replace(i, convolution_kernel="BONE" if k % 2 else "SOFT") for k, i in enumerate(s)
    ],
    "head": lambda s: [replace(i, body_part_examined="HEAD") for i in s],
    "few": lambda s: s[:10],
    "no slope": lambda s: [replace(i, rescale_slope=None) for i in s],
    "sagittal": lambda s: [replace(i, image_orientation_patient=(0, 1, 0, 0, 0, -1)) for i in s],
    "mixed sizes": lambda s: [replace(i, rows=256) if k < 8 else i for k, i in enumerate(s)],
}


@settings(max_examples=60)
@given(
    changes=st.lists(st.sampled_from(sorted(CHANGES)), min_size=1, max_size=3),
    order=st.randoms(use_true_random=False),
)
def test_the_order_of_arrival_never_matters(changes: list[str], order: Random) -> None:
    study = [
        i
        for number, change in enumerate(changes)
        for i in CHANGES[change](stack(40, 5 - number, series=f"1.2.{number}"))
    ]
    shuffled = order.sample(study, len(study))

    def answer(instances: Sequence[Instance]) -> object:
        try:
            return choose(instances, RULES)
        except Rejected as refusal:
            return str(refusal)

    assert answer(shuffled) == answer(study)


# Which of several.


def chosen(*candidates: list[Instance]) -> str:
    return choose([i for candidate in candidates for i in candidate], RULES).series_instance_uid


def test_thin_slices_are_preferred_to_thick_ones() -> None:
    assert chosen(stack(series="1.1"), stack(240, 1.25, series="1.9")) == "1.9"
    assert chosen(stack(series="1.1"), stack(240, 1.25, series="1.9", convolution_kernel="LUNG")) == "1.9"


@pytest.mark.parametrize(
    ("soft", "sharp"),
    [
        ("B30f", "B70f"),
        ("STANDARD", "LUNG"),
        ("B", "L"),
        ("Br40d\\3", "Bl57d\\3"),
        ("FC08", "FC52"),
        ("SOFT", "BONE"),
    ],
)
def test_soft_kernels_are_preferred_to_sharp_ones(soft: str, sharp: str) -> None:
    soft_series, sharp_series = (
        stack(series="1.9", convolution_kernel=soft),
        stack(series="1.1", convolution_kernel=sharp),
    )
    unknown = stack(series="1.5", convolution_kernel="Q9000")
    assert chosen(soft_series, sharp_series, unknown) == "1.9"
    assert chosen(sharp_series, unknown) == "1.5"


def test_a_whole_chest_is_preferred_to_a_thin_part_of_it() -> None:
    assert chosen(stack(series="1.9"), stack(160, 1, series="1.1")) == "1.9"


def test_a_chest_scan_is_preferred_to_a_longer_thicker_body_scan() -> None:
    assert chosen(stack(200, 5, series="1.1"), stack(250, 1.25, series="1.9")) == "1.9"


def test_a_full_field_of_view_is_preferred_to_a_zoom() -> None:
    zoom = stack(240, 1.25, series="1.1", pixel_spacing=(0.35, 0.35))
    assert chosen(stack(series="1.9"), zoom) == "1.9"


def test_a_series_of_another_region_loses() -> None:
    facts = {"study_description": "CT CHEST AND ABDOMEN"}
    abdomen = stack(240, 1.25, series="1.1", body_part_examined="ABDOMEN", **facts)
    assert chosen(abdomen, stack(series="1.9", **facts)) == "1.9"


def test_more_coverage_then_more_slices_then_the_uid_decide() -> None:
    assert chosen(stack(60, series="1.1"), stack(70, series="1.9")) == "1.9"
    assert chosen(stack(60, 5, series="1.1"), stack(75, 4, series="1.9")) == "1.9"
    assert chosen(stack(series="1.9"), stack(series="1.1")) == "1.1"


def test_two_reconstructions_in_one_series_are_told_apart_by_kernel() -> None:
    sharp = [replace(i, sop_instance_uid=f"9.{k}", convolution_kernel="LUNG") for k, i in enumerate(stack())]
    assert choose(stack() + sharp, RULES).instances == tuple(stack())


def test_a_stray_slice_of_another_size_is_left_out() -> None:
    stray = [replace(stack()[0], sop_instance_uid="9.1", rows=256, columns=256)]
    series = choose(stack() + stray, RULES)
    assert series.instances == tuple(stack())
    assert series.notes == ("axial images of the same series left out for size, direction or kernel: 1",)


def test_the_next_best_series_is_used_and_that_is_noted() -> None:
    thin = stack(240, 1.25, series="1.1")
    series = choose(stack(series="1.9") + thin[:100] + thin[101:], RULES)
    assert series.series_instance_uid == "1.9"
    assert series.notes == (
        "a preferred series was not used: missing slices: 2.5 mm hole between slices 139 and 141",
    )


def test_the_reason_is_that_of_the_best_series() -> None:
    thin = stack(240, 1.25, series="1.1")
    assert reason(stack(5, series="1.9") + thin[:100] + thin[101:]).startswith("missing slices")


THREE_REGIONS = {"study_description": "CT CHEST ABDOMEN PELVIS"}
NOT_SURELY_THE_CHEST: list[dict[str, str]] = [
    {"body_part_examined": "ABDOMEN"},
    {"body_part_examined": "", "series_description": "ABDOMEN/PELVIS 5.0"},
    {"body_part_examined": "CHEST", "series_description": "ABDOMEN/PELVIS 5.0"},
    {"body_part_examined": "", "series_description": "5.0 STND"},
    {"body_part_examined": "", "study_description": "CT TAP"},
]


@pytest.mark.parametrize("other", NOT_SURELY_THE_CHEST)
def test_no_other_region_stands_in_for_a_chest_that_cannot_be_judged(other: dict[str, str]) -> None:
    chest = stack(60, series="1.1", **THREE_REGIONS)
    abdomen = stack(240, 1.25, series="1.9", **THREE_REGIONS | other)
    assert chosen(chest, abdomen) == "1.1"
    expected = "missing slices: 10 mm hole between slices 29 and 31"
    assert reason(chest[:30] + chest[31:] + abdomen) == expected


def test_an_abdomen_is_not_judged_while_the_chest_is_still_missing() -> None:
    abdomen = stack(80, body_part_examined="ABDOMEN", **THREE_REGIONS)
    pelvis = stack(60, series="1.2.4", body_part_examined="", series_description="PELVIS", **THREE_REGIONS)
    assert reason(abdomen + pelvis) == "not a chest: ABDOMEN"


def test_another_kernel_of_the_chest_stands_in_for_one_that_cannot_be_judged() -> None:
    soft = stack(series="1.1", **THREE_REGIONS)
    lung = stack(series="1.5", convolution_kernel="LUNG", **THREE_REGIONS)
    abdomen = stack(80, series="1.9", **THREE_REGIONS | {"body_part_examined": "ABDOMEN"})
    series = choose(soft[:30] + soft[31:] + lung + abdomen, RULES)
    assert series.series_instance_uid == "1.5"
    assert series.notes == (
        "a preferred series was not used: missing slices: 10 mm hole between slices 29 and 31",
    )


# Files and real scanners.


def test_phantom_files_are_chosen(tmp_path: Path) -> None:
    write_study(tmp_path, seed=3, rows=64, localizer=True)
    series = choose(find_instances([tmp_path])[0], RULES)
    assert len(series.instances) == 60
    assert series.spacing == (5.0, 5.625, 5.625)


def test_a_phantom_with_missing_slices_is_named(tmp_path: Path) -> None:
    write_study(tmp_path, seed=3, rows=64, missing=(20, 21, 22))
    assert reason(find_instances([tmp_path])[0]) == "missing slices: 20 mm hole between slices 37 and 41"


def real(folder: str) -> list[list[Instance]]:
    """The studies of one folder of real files."""
    found, _ = find_instances([DATA / "dicom" / folder])
    found.sort(key=lambda i: i.study_instance_uid)
    return [list(study) for _uid, study in groupby(found, key=lambda i: i.study_instance_uid)]


@needs_data
@pytest.mark.parametrize(
    ("folder", "slices", "spacing", "kernel"),
    [
        ("covid_ricord_1012", 248, 1.25, "STANDARD"),
        ("lidc_0001", 67, 5.0, "STANDARD"),
        ("lungdx_a0001_two_kernels", 64, 5.0, "B"),
    ],
)
def test_real_chests_are_chosen(folder: str, slices: int, spacing: float, kernel: str) -> None:
    (study,) = real(folder)
    series = choose(study, RULES)
    heights = np.array([i.image_position_patient for i in series.instances])[:, 2]
    assert len(series.instances) == slices
    assert series.spacing[0] == pytest.approx(spacing)
    assert {i.convolution_kernel for i in series.instances} == {kernel}
    assert (np.diff(heights) > 0).all()
    assert series.notes == ()


@needs_data
@pytest.mark.parametrize(
    ("folder", "expected"),
    [
        ("acrin_013_gap", {"missing slices: 216 mm hole between slices 8 and 62"}),
        (
            "odd/sagittal_ricord_0906",
            {"no axial CT series: only 19 sagittal reformats and 1 coronal reformat"},
        ),
        ("odd/head_tilt_ge", {"not a chest: HEAD"}),
        ("odd/uneven_increment_ge", {"patient is under 18 years", "too few slices (4)"}),
        ("odd/localizer_philips", {"no axial CT series: only 1 localizer"}),
        ("odd/exam_summary_philips", {"no CT images: only 6 secondary captures"}),
        (
            "odd/screen_save_and_enhanced",
            {
                "no CT images: only 1 secondary capture",
                "no axial CT series: only 1 multi-frame CT image (not supported)",
            },
        ),
        ("odd/codecs_chest_ge", {"too few slices (19)", "no CT images: only 1 US object"}),
    ],
)
def test_real_odd_studies_get_their_reason(folder: str, expected: set[str]) -> None:
    assert {reason(study) for study in real(folder)} == expected


@needs_data
def test_the_tilt_and_the_uneven_steps_of_real_heads_are_seen() -> None:
    anything = Assemble(minimum_slices=4, minimum_coverage_mm=3, minimum_age_years=0)
    (head,) = real("odd/head_tilt_ge")
    assert reason([replace(i, body_part_examined="", study_description="") for i in head], anything) == (
        "gantry tilt 18°"
    )
    tilted, uneven = sorted(real("odd/uneven_increment_ge"), key=len)
    assert reason(tilted, anything) == "gantry tilt 16°"
    assert reason(uneven, anything) == "uneven slice spacing (5 mm to 10 mm)"
