"""Published figures that ours are printed beside."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Published:
    """One method of Goncharov et al., table 2; None is what the paper does not give."""

    name: str
    auc_healthy: float
    auc_others: float
    spearman: float
    lesions_dice: float | None


TABLE = {
    "threshold": Published("Thresholding", 0.649, 0.567, 0.87, 0.45),
    "unet3d": Published("3D U-Net", 0.865, 0.772, 0.94, 0.49),
    "unet2d": Published("2D U-Net", 0.890, 0.830, 0.98, 0.50),
    "unet2d_plus": Published("2D U-Net+", 0.996, 0.957, 0.76, 0.33),
    "resnet50": Published("ResNet50", 0.966, 0.934, 0.45, None),
    "multitask": Published("Proposed (multitask)", 0.978, 0.951, 0.98, 0.48),
}
"""The card's ``system`` → its row. Measured by the authors on Mosmed-20 and part of
Mosmed-Lung-Cancer-500 (Goncharov et al., section 3.5), which are other patients than ours."""

COLUMNS = {
    "auc_healthy": "AUC vs healthy",
    "auc_others": "AUC vs all others",
    "spearman": "Spearman's ρ",
    "lesions_dice": "Dice",
}
"""Figure of ``evaluation.FIGURES`` → heading; the fields of ``Published``."""

PICTURES = {"U-Net": 0.439, "U-Net++": 0.581, "Inf-Net": 0.682, "Semi-Inf-Net": 0.739}
"""Threshold-averaged Dice on the 48 test slices of COVID-SemiSeg (Fan et al. 2020, table II)."""
