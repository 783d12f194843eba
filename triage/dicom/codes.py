"""Every coded concept that our objects use, in one place (DICOM PS3.16; SNOMED CT; RadLex; UCUM)."""

from __future__ import annotations

from collections.abc import Mapping

from highdicom.coding_schemes import CodingSchemeIdentificationItem
from pydicom.sr.coding import Code

from triage.domain import LUNG_REGIONS, Grade, GradeBasis, Status

PRIVATE = "99TRIAGE"
"""deploy/objects.md says of each of its codes what it means. None exceeds 16 characters: many readers know no
LongCodeValue."""


def private_scheme() -> CodingSchemeIdentificationItem:
    """Says whose scheme 99TRIAGE is (PS3.3 C.12.1.1.2): no standard code exists for what it names."""
    return CodingSchemeIdentificationItem(
        designator=PRIVATE,
        name="triage: answers, affected lung fraction, CT grades and scores; see deploy/objects.md",
        responsible_organization="triage",
    )


# What made the objects, and of what.
ARTIFICIAL_INTELLIGENCE = Code("123110", "DCM", "Artificial Intelligence")
IMAGE_LIBRARY = Code("111028", "DCM", "Image Library")
IMAGE_LIBRARY_GROUP = Code("126200", "DCM", "Image Library Group")
IMAGING_MEASUREMENTS = Code("126010", "DCM", "Imaging Measurements")
SOURCE = Code("260753009", "SCT", "Source")
ILLUSTRATION = Code("121080", "DCM", "Best illustration of finding")
SOURCE_IMAGE = Code("121322", "DCM", "Source image for image processing operation")
CT_CHEST = Code("169069000", "SCT", "CT of chest")
LUNG = Code("39607008", "SCT", "Lung")
LEFT = Code("7771000", "SCT", "Left")
RIGHT = Code("24028007", "SCT", "Right")

# Segments.
ABNORMAL_STRUCTURE = Code("49755003", "SCT", "Morphologically Abnormal Structure")
ANATOMICAL_STRUCTURE = Code("91723000", "SCT", "Anatomical Structure")
LESION = Code("52988006", "SCT", "Lesion")
GROUND_GLASS = Code("112120", "DCM", "Ground glass opacity")
CONSOLIDATION = Code("95436008", "SCT", "Lung consolidation")

# The answer. A disease is named as a finding only by a positive report.
PNEUMONIA = Code("233604007", "SCT", "Pneumonia")
ANSWER = Code("answer", PRIVATE, "Triage result")
ANSWERS = {
    Status.POSITIVE: Code("10828004", "SCT", "Positive"),
    Status.NEGATIVE: Code("260385009", "SCT", "Negative"),
    Status.NOT_ANALYSABLE: Code("not-analysable", PRIVATE, "Not analysable"),
    Status.FAILED: Code("failed", PRIVATE, "Failed, given up"),
}
CAD_SUMMARY = Code("111017", "DCM", "CAD Processing and Findings Summary")
CAD_SUMMARIES = {
    Status.POSITIVE: Code("111242", "DCM", "All algorithms succeeded; with findings"),
    Status.NEGATIVE: Code("111241", "DCM", "All algorithms succeeded; without findings"),
    Status.NOT_ANALYSABLE: Code("111245", "DCM", "No algorithms succeeded; without findings"),
    Status.FAILED: Code("111245", "DCM", "No algorithms succeeded; without findings"),
}

# Figures.
PROBABILITY = Code("122157", "DCM", "Probability")
SCORE = Code("score", PRIVATE, "Score, not a probability")
PROBABILITY_KINDS = {
    ("classifier", True): Code("calibrated", PRIVATE, "Network output, calibrated"),
    ("classifier", False): Code("not-calibrated", PRIVATE, "Network output, not calibrated"),
    ("score", True): Code("rule-calibrated", PRIVATE, "Documented monotone rule, calibrated"),
    ("score", False): Code("rule-not-calib", PRIVATE, "Documented monotone rule, not calibrated"),
}
AFFECTED = Code("affected", PRIVATE, "Affected lung percentage")
BY_VOLUME = Code("by-volume", PRIVATE, "Lesion volume over lung volume")
BY_AREA = Code("by-area", PRIVATE, "Lesion area over lung area, slice by slice")
BY_VOXELS = Code("126030", "DCM", "Sum of segmented voxel method for volume")
MAXIMUM = Code("56851009", "SCT", "Maximum")
MEAN = Code("373098007", "SCT", "Mean")
TOTAL = Code("255619001", "SCT", "Total")
SLICE_MEAN = Code("slice-mean", PRIVATE, "Percentage of infection, mean over slices")
CT_SEVERITY_SCORE = Code("ct-score", PRIVATE, "CT severity score of 20 regions, 0 to 40")
REGION_SCORE = Code("ct-region-score", PRIVATE, "CT severity score of one region, 0 to 2")
REGIONS = tuple(
    Code(f"region-{number}", PRIVATE, name.capitalize()) for number, name in enumerate(LUNG_REGIONS, 1)
)
"""Parts of either lung, which no standard code names: they are cut by its shape, not by its segments."""
BY_SHAPE = Code("by-shape", PRIVATE, "Regions cut by the shape of each lung")
LESION_VOLUME = Code("lesion-volume", PRIVATE, "Volume of all lesions")
VOLUME = Code("118565006", "SCT", "Volume")
PERCENT = Code("%", "UCUM", "percent")
MILLILITRE = Code("ml", "UCUM", "ml")
NO_UNITS = Code("1", "UCUM", "no units")

# Grade, severity, urgency of the finding (never of the place on a worklist).
CT_GRADE: Mapping[GradeBasis, Code] = {
    "affected_fraction": Code("ct-grade", PRIVATE, "CT grade by affected lung fraction"),
    "percent_infection": Code("ct-grade-slices", PRIVATE, "CT grade by percentage of infection"),
}
CT_GRADES = {
    Grade.CT0: Code("CT-0", PRIVATE, "CT-0: none or hardly any affected"),
    Grade.CT1: Code("CT-1", PRIVATE, "CT-1: up to 25 % affected"),
    Grade.CT2: Code("CT-2", PRIVATE, "CT-2: 25 to 50 % affected"),
    Grade.CT3: Code("CT-3", PRIVATE, "CT-3: 50 to 75 % affected"),
    Grade.CT4: Code("CT-4", PRIVATE, "CT-4: 75 % or more affected"),
}
SEVERITY = Code("246112005", "SCT", "Severity")
_SEVERE = Code("24484000", "SCT", "Severe")
SEVERITIES = {
    Grade.CT1: Code("255604002", "SCT", "Mild"),
    Grade.CT2: Code("6736007", "SCT", "Moderate"),
    Grade.CT3: _SEVERE,
    Grade.CT4: _SEVERE,
}
ACTIONABILITY = Code("actionability", PRIVATE, "Actionable finding classification")
_WITHIN_MINUTES = Code("RID49480", "RADLEX", "ACR Category 1 Actionable Finding")
_WITHIN_HOURS = Code("RID49481", "RADLEX", "ACR Category 2 Actionable Finding")
_WITHIN_DAYS = Code("RID49482", "RADLEX", "ACR Category 3 Actionable Finding")
ACTIONABILITIES = {
    Grade.CT0: _WITHIN_DAYS,
    Grade.CT1: _WITHIN_HOURS,
    Grade.CT2: _WITHIN_HOURS,
    Grade.CT3: _WITHIN_MINUTES,
    Grade.CT4: _WITHIN_MINUTES,
    None: _WITHIN_HOURS,
}
"""CID 7035 for a positive study, by its grade; None is an unknown affected fraction."""

COMMENT = Code("121106", "DCM", "Comment")
