"""The one series of a study that is judged: the rules, in the order in which they are asked.

1. Images that can never be part of an axial CT series are set aside (``NEVER``).
2. What is left of a series is parted into stacks of one size, orientation and kernel.
3. Stacks are ranked (``PREFERENCES``); of those as surely of the chest as the best one, the first that is
   sound (``MUST``) is chosen: an abdomen never stands in for a chest that cannot be judged.

A study without such a stack is Rejected: the reason is the best stack's, or says what there was instead.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from triage.config import Assemble
from triage.domain import Instance, Series
from triage.errors import Rejected

CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2"
MULTI_FRAME_CT = ("1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.2.2")
"""Enhanced CT and Legacy Converted Enhanced CT: received and kept, but not judged."""
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"

REFORMATS = ("REFORMATTED", "MPR", "MIP", "MINIP", "PROJECTION", "RENDERED", "VRT", "SSD", "3D", "CPR")
"""Words of ImageType that name a picture computed from slices; DERIVED alone does not."""
PICTURES = ("SCREEN", "SAVE", "SURVIEW", "DOSE", "INFO", "RESULTS", "PERFUSION")
"""Words of ImageType that name pictures which are no slices at all."""

MOST_OBLIQUE_DEGREES = 30.0
"""No gantry tilts further; beyond it the slices are a reformat."""
STEP_TOLERANCE = 0.1
"""Steps within 10 % of their median are even: positions are written with two decimals, tables jitter."""
GAP = 1.5
"""A step of this many median steps is a hole: one missing slice doubles a step."""
IN_PLANE_TOLERANCE_MM = 1.0
"""Origins further off the straight line from first to last slice are another field of view."""
LUNG_LENGTH_MM = 250.0
"""Coverage beyond an adult's lungs does not make a series better."""
FULL_FIELD_MM = 250.0
"""A smaller field of view is a zoom on one lung or on the spine."""
THIN_MM = 3.0

CHEST = re.compile(
    r"CHEST|THORA[XC]|T[OÓ]RA[XC]"
    r"|(?<![A-Z])(LUNG|PULM|POUMON|HRCT|CTPA|MEDIAST|WHOLE ?BODY|(?:TAP|CAP|NCAP)(?![A-Z]))"
)
ELSEWHERE = re.compile(
    r"(?<![A-Z])(HEAD(?![- ]?FIRST)|BRAIN|SKULL|CEREBR|CRAN|NECK|CERVIC|ORBIT|SINUS|FACE|FACIAL|DENTAL"
    r"|ABD|PELV|LIVER|KIDNEY|COLON|UROGR|SPINE|CSPINE|LSPINE|LUMBAR|KNEE|SHOULDER|ELBOW|WRIST|ANKLE|FEMUR|EXTREMIT"
    r"|(?:HIP|LEG|FOOT|HAND|ARM|EAR|JAW)(?![A-Z]))[A-Z]*"
)
SEVERAL = re.compile(r"(?<![A-Z])(WHOLE ?BODY|(?:TAP|CAP|NCAP)(?![A-Z]))")
"""Words of CHEST that name other regions as well: thorax, abdomen and pelvis."""
SOFT = re.compile(
    r"^(B[1-4]\d[A-Z]?|[BQ][RFV][1-4]\d.*|I[1-4]\d.*|STANDARD|STND|SOFT.*|STD.*|[ABC]|FC0\d|FC1\d|MEDIAST.*)$"
)
SHARP = re.compile(
    r"^(B[5-9]\d[A-Z]?|B[LRFV][5-9]\d.*|I[5-9]\d.*|LUNG.*|BONE.*|EDGE.*|[LDE]|Y[A-D]|FC[358]\d|SHARP.*)$"
)
"""Kernels as Siemens, GE, Philips and Canon write them."""


@dataclass(frozen=True)
class Stack:
    """Slices of one series that share size, orientation and kernel, ascending along their normal."""

    instances: tuple[Instance, ...]

    @cached_property
    def normal(self) -> NDArray[np.float64]:
        return _normal(self.instances[0])

    @cached_property
    def origins(self) -> NDArray[np.float64]:
        """ImagePositionPatient of every slice, (n, 3) in mm."""
        return np.array([i.image_position_patient for i in self.instances], float)

    @cached_property
    def steps(self) -> NDArray[np.float64]:
        """Distances between neighbours along the normal, in mm."""
        return np.diff(self.origins @ self.normal)

    @cached_property
    def nominal(self) -> float:
        """The usual distance of two neighbours, in mm; 0 where there is none."""
        moving = self.steps[self.steps > 0.05]
        return float(np.median(moving)) if moving.size else 0.0

    @property
    def coverage(self) -> float:
        return float(self.steps.sum()) + self.nominal

    @property
    def field_of_view(self) -> float:
        first = self.instances[0]
        y, x = first.pixel_spacing or (0.0, 0.0)
        return min(first.rows * y, first.columns * x)


def is_ct_image(instance: Instance) -> bool:
    """True for what can bring new content to a study: images, not reports, pictures or our own results."""
    return instance.sop_class_uid in (CT_IMAGE, *MULTI_FRAME_CT)


def choose(instances: Sequence[Instance], rules: Assemble) -> Series:
    """The axial lung series of one study's instances, in whatever order they came.

    Raises Rejected with the reason for the reader.
    """
    _refuse_children(instances, rules)
    unique = {i.sop_instance_uid: i for i in sorted(instances, key=lambda i: (i.digest, str(i.path)))}
    kinds = {uid: _never(instance) for uid, instance in unique.items()}
    stacks = sorted(_stacks(i for uid, i in unique.items() if not kinds[uid]), key=_rank)
    if not stacks:
        raise Rejected(_nothing_axial(list(unique.values()), [kind for kind in kinds.values() if kind]))
    return _first_sound(stacks, rules)


def _first_sound(stacks: Sequence[Stack], rules: Assemble) -> Series:
    """The first sound one of the stacks that are as surely of the chest as the best."""
    reasons: list[str] = []
    for stack in (stack for stack in stacks if _region(stack) == _region(stacks[0])):
        reason = next((reason for must in MUST if (reason := must(stack, rules))), "")
        if not reason:
            notes = [f"a preferred series was not used: {reason}" for reason in reasons]
            return _series(stack, notes + _left_out(stack, stacks))
        reasons.append(reason)
    raise Rejected(reasons[0])


def _left_out(chosen: Stack, stacks: Sequence[Stack]) -> list[str]:
    """A series in two parts may show half of a lung in each: the reader must know."""
    series_uid = chosen.instances[0].series_instance_uid
    count = sum(len(s.instances) for s in stacks if s.instances[0].series_instance_uid == series_uid)
    rest = count - len(chosen.instances)
    return [f"axial images of the same series left out for size, direction or kernel: {rest}"] if rest else []


def _series(stack: Stack, notes: Sequence[str]) -> Series:
    first = stack.instances[0]
    y, x = first.pixel_spacing or (0.0, 0.0)
    spacing = float(stack.steps.mean())
    return Series(stack.instances, (spacing, y, x), first.image_orientation_patient or (), tuple(notes))


def _refuse_children(instances: Sequence[Instance], rules: Assemble) -> None:
    ages = [i.patient_age_years for i in instances if i.patient_age_years is not None]
    if ages and min(ages) < rules.minimum_age_years:
        raise Rejected(f"patient is under {rules.minimum_age_years:g} years")


# 1. Images that are never part of an axial CT series: each rule answers with the kind of image, or "".


def _not_ct(instance: Instance) -> str:
    if instance.sop_class_uid.startswith(SECONDARY_CAPTURE):
        return "secondary capture"
    ct = instance.sop_class_uid in (CT_IMAGE, *MULTI_FRAME_CT) and instance.modality in ("CT", "")
    return "" if ct else f"{instance.modality or 'unknown'} object"


def _localizer(instance: Instance) -> str:
    return "localizer" if {"LOCALIZER", "SCOUT", "TOPOGRAM"} & set(instance.image_type) else ""


def _picture(instance: Instance) -> str:
    return "screen save" if _image_type_words(instance) & set(PICTURES) else ""


def _multi_frame(instance: Instance) -> str:
    multi = instance.sop_class_uid in MULTI_FRAME_CT or instance.number_of_frames > 1
    return "multi-frame CT image (not supported)" if multi else ""


def _unplaced(instance: Instance) -> str:
    position, orientation = instance.image_position_patient, instance.image_orientation_patient
    if position is None or orientation is None or abs(np.linalg.norm(_normal(instance)) - 1) > 0.01:
        return "image without a position in the patient"
    return ""


def _not_axial(instance: Instance) -> str:
    normal = np.abs(_normal(instance))
    if np.degrees(np.arccos(min(normal[2], 1.0))) <= MOST_OBLIQUE_DEGREES:
        return "axial reformat" if _image_type_words(instance) & set(REFORMATS) else ""
    names = ("sagittal reformat", "coronal reformat", "oblique reformat")
    return names[int(normal.argmax())] if normal.max() > 0.9 else names[2]


NEVER: tuple[Callable[[Instance], str], ...] = (
    _not_ct, _localizer, _multi_frame, _picture, _unplaced, _not_axial,
)  # fmt: skip


def _never(instance: Instance) -> str:
    return next((kind for rule in NEVER if (kind := rule(instance))), "")


def _nothing_axial(instances: Sequence[Instance], kinds: Sequence[str]) -> str:
    if not instances:
        return "no images"
    counted = [
        f"{count} {kind}" if count == 1 else f"{count} {_plural(kind)}"
        for kind, count in sorted(Counter(kinds).items(), key=lambda item: (-item[1], item[0]))
    ]
    what = "no axial CT series" if any(not _not_ct(i) for i in instances) else "no CT images"
    return f"{what}: only {' and '.join(counted)}"


def _plural(kind: str) -> str:
    noun = re.compile(r"(object|capture|localizer|save|image|reformat)(?=$| )")
    return noun.sub(r"\1s", kind, count=1)


# 2. Stacks.


def _stacks(instances: Iterable[Instance]) -> list[Stack]:
    groups: list[list[Instance]] = []
    for instance in sorted(instances, key=lambda i: i.sop_instance_uid):
        group = next((group for group in groups if _alike(group[0], instance)), None)
        if group is None:
            groups.append([instance])
        else:
            group.append(instance)
    return [Stack(_ordered(group)) for group in groups]


def _alike(a: Instance, b: Instance) -> bool:
    """Same series, size and kernel; directions and pixel spacing equal but for rounding."""
    same = (a.series_instance_uid, a.rows, a.columns, a.convolution_kernel) == (
        b.series_instance_uid, b.rows, b.columns, b.convolution_kernel,
    )  # fmt: skip
    return (
        same
        and _close(a.image_orientation_patient, b.image_orientation_patient, 0.01)
        and _close(a.pixel_spacing, b.pixel_spacing, 0.001)
    )


def _close(a: tuple[float, ...] | None, b: tuple[float, ...] | None, tolerance: float) -> bool:
    if a is None or b is None:
        return a is b
    return all(abs(x - y) <= tolerance for x, y in zip(a, b, strict=True))


def _ordered(group: Sequence[Instance]) -> tuple[Instance, ...]:
    normal = _normal(group[0])
    along = {i.sop_instance_uid: float(normal @ np.array(i.image_position_patient)) for i in group}
    return tuple(sorted(group, key=lambda i: (along[i.sop_instance_uid], i.sop_instance_uid)))


# 3a. Preferences: smaller is better, earlier counts more.


def _region(stack: Stack) -> int:
    """0 where nothing speaks against a chest, 1 where it may be another region, 2 where it names another.

    It may be another in a study of several regions when the series itself is silent, and where only the body
    part says chest: scanners write that of the first series into all.
    """
    if _elsewhere(stack):
        return 2
    first = stack.instances[0]
    description = first.series_description.upper()
    if CHEST.search(description):
        return 0
    if CHEST.search(first.body_part_examined.upper()):
        return int(bool(ELSEWHERE.search(description)))
    study = first.study_description.upper()
    return int(bool(ELSEWHERE.search(study) or SEVERAL.search(study)))


def _narrow(stack: Stack) -> bool:
    return stack.field_of_view < FULL_FIELD_MM


def _uncovered(stack: Stack) -> float:
    return -round(min(stack.coverage, LUNG_LENGTH_MM) / 25)


def _thick(stack: Stack) -> bool:
    return max(stack.instances[0].slice_thickness or 0.0, stack.nominal) > THIN_MM


def _kernel(stack: Stack) -> int:
    """0 soft or standard, 1 unknown, 2 sharp: the networks learned from soft and standard kernels."""
    name = stack.instances[0].convolution_kernel.split("\\")[0].strip().upper()
    return 0 if SOFT.match(name) else 2 if SHARP.match(name) else 1


def _shortness(stack: Stack) -> float:
    return -round(stack.coverage)


def _fewness(stack: Stack) -> float:
    return -len(stack.instances)


PREFERENCES: tuple[Callable[[Stack], float], ...] = (
    _region, _narrow, _uncovered, _thick, _kernel, _shortness, _fewness,
)  # fmt: skip


def _rank(stack: Stack) -> tuple[object, ...]:
    first = stack.instances[0]
    return (*(rule(stack) for rule in PREFERENCES), first.series_instance_uid, first.sop_instance_uid)


# 3b. What a stack must be: each rule answers with the reason why it is not, or "".


def _another_region(stack: Stack, _rules: Assemble) -> str:
    region = _elsewhere(stack)
    return f"not a chest: {region}" if region else ""


def _values_missing(stack: Stack, _rules: Assemble) -> str:
    for i in stack.instances:
        if i.pixel_spacing is None:
            return "missing PixelSpacing"
        if not i.rescale_slope:
            return "missing RescaleSlope"
        if i.rescale_intercept is None:
            return "missing RescaleIntercept"
    return ""


def _too_few(stack: Stack, rules: Assemble) -> str:
    count = len(stack.instances)
    return f"too few slices ({count})" if count < rules.minimum_slices else ""


def _duplicates(stack: Stack, _rules: Assemble) -> str:
    twice = int((stack.steps < max(0.01, stack.nominal * STEP_TOLERANCE)).sum())
    if not twice:
        return ""
    if twice >= len(stack.instances) // 2:
        return "duplicate slice positions: two series in one"
    return f"duplicate slice positions ({twice})"


def _tilted(stack: Stack, rules: Assemble) -> str:
    """By shear (slices not above one another), by orientation, or by the scanner's word."""
    path = stack.origins[-1] - stack.origins[0]
    shear = _angle(path, stack.normal)
    leaning = min(_angle(stack.normal, np.array([0, 0, 1.0])), _angle(-stack.normal, np.array([0, 0, 1.0])))
    told = max(abs(i.gantry_detector_tilt or 0.0) for i in stack.instances)
    tilt = max(shear, leaning, told)
    return f"gantry tilt {tilt:.0f}°" if tilt > rules.maximum_tilt_degrees else ""


def _holes(stack: Stack, _rules: Assemble) -> str:
    """Uniform spacing above the slice thickness is no hole; a step that towers above the others is."""
    holes = stack.steps > GAP * stack.nominal
    even = np.abs(stack.steps[~holes] - stack.nominal) <= STEP_TOLERANCE * stack.nominal
    if not holes.any() or not even.all():
        return ""
    at = int(stack.steps.argmax())
    between = " and ".join(sorted((_slice_name(stack, k) for k in (at, at + 1)), key=int))
    where = f"{_mm(stack.steps[at])} hole between slices {between}"
    return f"missing slices: {where}" if holes.sum() == 1 else f"missing slices: {holes.sum()} holes, {where}"


def _slice_name(stack: Stack, k: int) -> str:
    """The number that the reader sees in a viewer, else the place counted from the first slice."""
    number = stack.instances[k].instance_number
    return str(k + 1 if number is None else number)


def _uneven(stack: Stack, _rules: Assemble) -> str:
    off = np.abs(stack.steps - stack.nominal) > max(STEP_TOLERANCE * stack.nominal, 0.05)
    return f"uneven slice spacing ({_mm(stack.steps.min())} to {_mm(stack.steps.max())})" if off.any() else ""


def _too_wide(stack: Stack, rules: Assemble) -> str:
    wide = stack.nominal > rules.maximum_spacing_mm
    return f"slice spacing {_mm(stack.nominal)} is too wide" if wide else ""


def _shifted(stack: Stack, _rules: Assemble) -> str:
    along = stack.origins @ stack.normal
    share = ((along - along[0]) / (along[-1] - along[0]))[:, None]
    line = stack.origins[0] + share * (stack.origins[-1] - stack.origins[0])
    off = np.linalg.norm(stack.origins - line, axis=1).max()
    return f"slices are shifted sideways by {off:.0f} mm" if off > IN_PLANE_TOLERANCE_MM else ""


def _too_short(stack: Stack, rules: Assemble) -> str:
    short = stack.coverage < rules.minimum_coverage_mm
    return f"coverage {stack.coverage:.0f} mm is too short for a chest" if short else ""


MUST: tuple[Callable[[Stack, Assemble], str], ...] = (
    _another_region, _values_missing, _too_few, _duplicates, _tilted, _holes, _uneven, _too_wide, _shifted,
    _too_short,
)  # fmt: skip


# Small tools.


def _mm(length: float) -> str:
    return f"{round(float(length), 1):g} mm"


def _normal(instance: Instance) -> NDArray[np.float64]:
    orientation = np.array(instance.image_orientation_patient, float)
    return np.cross(orientation[:3], orientation[3:])


def _angle(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Degrees between two directions; 0 where one has no length."""
    lengths = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(np.degrees(np.arccos(np.clip(a @ b / lengths, -1, 1)))) if lengths else 0.0


def _image_type_words(instance: Instance) -> set[str]:
    return {word for value in instance.image_type for word in re.split(r"[ _]", value)}


def _elsewhere(stack: Stack) -> str:
    """The other region that the series names; only where it names none, and no chest, that of the study."""
    first = stack.instances[0]
    series = f"{first.body_part_examined} {first.series_description}".upper()
    for text in (series, first.study_description.upper()):
        if CHEST.search(text):
            return ""
        if match := ELSEWHERE.search(text):
            return match[0]
    return ""
