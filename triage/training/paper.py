"""Published figures that ours are printed beside."""

from __future__ import annotations

from dataclasses import dataclass

from triage.training.cases import Diagnosis


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

ENCODERS = {
    "unet": "",
    "resnet18": "ResNet18",
    "resnet50": "ResNet50",
    "resnet152": "ResNet152",
    "densenet121": "DenseNet121",
    "densenet161": "DenseNet161",
    "densenet201": "DenseNet201",
}
DECODERS = {"unet": "UNet", "fpn": "FPN"}
"""Of a recipe's network → Qiblawey et al.'s names; the plain U-Net has no name for its encoder."""

Cells = tuple[str, ...]
"""A row as printed, in percent with the paper's ±, unless said otherwise."""

CASCADE_LUNGS: dict[tuple[str, str], Cells] = {
    ("unet", "unet"): ("99.70 ± 0.16", "95.04 ± 0.63", "96.61 ± 0.52"),
    ("resnet18", "unet"): ("99.70 ± 0.16", "95.01 ± 0.63", "96.84 ± 0.50"),
    ("resnet50", "unet"): ("99.70 ± 0.16", "95.03 ± 0.63", "96.80 ± 0.51"),
    ("resnet152", "unet"): ("99.70 ± 0.16", "94.95 ± 0.63", "96.69 ± 0.52"),
    ("densenet121", "unet"): ("99.70 ± 0.16", "95.35 ± 0.61", "97.11 ± 0.48"),
    ("densenet161", "unet"): ("99.69 ± 0.16", "95.10 ± 0.62", "97.19 ± 0.48"),
    ("densenet201", "unet"): ("94.88 ± 0.64", "94.88 ± 0.64", "97.00 ± 0.49"),
    ("resnet18", "fpn"): ("99.65 ± 0.17", "93.60 ± 0.71", "95.76 ± 0.58"),
    ("resnet50", "fpn"): ("99.65 ± 0.17", "93.39 ± 0.72", "95.52 ± 0.60"),
    ("resnet152", "fpn"): ("99.66 ± 0.17", "93.92 ± 0.69", "96.00 ± 0.57"),
    ("densenet121", "fpn"): ("99.67 ± 0.16", "94.53 ± 0.66", "96.55 ± 0.53"),
    ("densenet161", "fpn"): ("99.66 ± 0.17", "94.05 ± 0.68", "96.11 ± 0.56"),
    ("densenet201", "fpn"): ("99.67 ± 0.17", "94.35 ± 0.67", "96.39 ± 0.54"),
}
"""(encoder, decoder) → accuracy, IoU, DSC of lungs (Qiblawey et al., table 5, 5-fold cross-validation)."""

CASCADE_LESIONS: dict[tuple[str, str], Cells] = {
    ("unet", "unet"): ("99.82 ± 0.18", "90.20 ± 0.72", "92.52 ± 0.60"),
    ("resnet18", "unet"): ("99.82 ± 0.18", "90.69 ± 0.72", "92.97 ± 0.58"),
    ("resnet50", "unet"): ("98.56 ± 0.18", "89.09 ± 0.72", "91.44 ± 0.58"),
    ("resnet152", "unet"): ("99.80 ± 0.18", "88.41 ± 0.72", "90.80 ± 0.59"),
    ("densenet121", "unet"): ("99.81 ± 0.18", "90.58 ± 0.70", "92.88 ± 0.55"),
    ("densenet161", "unet"): ("99.82 ± 0.18", "90.86 ± 0.71", "93.07 ± 0.55"),
    ("densenet201", "unet"): ("99.82 ± 0.73", "91.13 ± 0.73", "93.36 ± 0.56"),
    ("resnet18", "fpn"): ("99.81 ± 0.20", "91.45 ± 0.81", "93.80 ± 0.67"),
    ("resnet50", "fpn"): ("99.81 ± 0.20", "91.46 ± 0.82", "93.82 ± 0.68"),
    ("resnet152", "fpn"): ("99.80 ± 0.19", "90.66 ± 0.79", "93.05 ± 0.65"),
    ("densenet121", "fpn"): ("99.68 ± 0.19", "89.09 ± 0.75", "91.02 ± 0.60"),
    ("densenet161", "fpn"): ("99.81 ± 0.19", "91.11 ± 0.78", "93.45 ± 0.64"),
    ("densenet201", "fpn"): ("99.81 ± 0.19", "91.85 ± 0.76", "94.13 ± 0.62"),
}
"""(encoder, decoder) → accuracy, IoU, DSC of lesions (Qiblawey et al., table 6, 10-fold cross-validation)."""

CASCADE_DETECTION: dict[tuple[str, str], Cells] = {
    ("unet", "unet"): ("95.23 ± 0.70", "84.92 ± 1.18", "99.35 ± 0.27", "91.57 ± 0.92", "93.77 ± 0.80"),
    ("resnet18", "unet"): ("94.60 ± 0.75", "84.03 ± 1.21", "99.78 ± 0.15", "91.32 ± 0.93", "92.46 ± 0.87"),
    ("resnet50", "unet"): ("95.66 ± 0.67", "85.91 ± 1.15", "99.69 ± 0.18", "92.29 ± 0.88", "94.24 ± 0.77"),
    ("resnet152", "unet"): ("95.68 ± 0.67", "86.06 ± 1.14", "99.56 ± 0.22", "92.32 ± 0.88", "94.31 ± 0.77"),
    ("densenet121", "unet"): ("95.86 ± 0.66", "86.59 ± 1.13", "99.53 ± 0.23", "92.61 ± 0.86", "94.57 ± 0.75"),
    ("densenet161", "unet"): ("95.61 ± 0.68", "85.90 ± 1.15", "99.26 ± 0.28", "92.10 ± 0.89", "94.35 ± 0.76"),
    ("densenet201", "unet"): ("95.93 ± 0.65", "86.67 ± 1.12", "99.64 ± 0.20", "92.70 ± 0.86", "94.63 ± 0.74"),
    ("resnet18", "fpn"): ("95.74 ± 0.67", "86.25 ± 1.14", "99.40 ± 0.26", "92.36 ± 0.88", "94.46 ± 0.76"),
    ("resnet50", "fpn"): ("95.77 ± 0.66", "86.29 ± 1.14", "99.45 ± 0.24", "92.40 ± 0.88", "94.49 ± 0.75"),
    ("resnet152", "fpn"): ("98.44 ± 0.41", "95.07 ± 0.72", "99.48 ± 0.24", "97.23 ± 0.54", "98.04 ± 0.46"),
    ("densenet121", "fpn"): ("97.16 ± 0.55", "91.67 ± 0.91", "99.00 ± 0.33", "95.19 ± 0.71", "96.43 ± 0.61"),
    ("densenet161", "fpn"): ("97.05 ± 0.56", "90.62 ± 0.96", "98.91 ± 0.34", "94.58 ± 0.75", "96.39 ± 0.62"),
    ("densenet201", "fpn"): ("98.96 ± 0.34", "96.47 ± 0.61", "99.64 ± 0.20", "98.03 ± 0.46", "98.72 ± 0.37"),
}
"""(encoder, decoder) of the lesions' network → accuracy, precision, sensitivity, F1, specificity of slices
(Qiblawey et al., table 7)."""

CASCADE_SEVERITY: dict[str, Cells] = {
    "CT-0": ("98.92 ± 1.27", "100 ± 0", "95.28 ± 2.61", "97.58 ± 1.89", "100 ± 0"),
    "CT-1": ("96.67 ± 1.35", "95.89 ± 1.49", "98.83 ± 0.81", "97.34 ± 1.21", "93.19 ± 1.89"),
    "CT-2": ("95.23 ± 3.74", "83.96 ± 6.43", "71.20 ± 7.94", "77.06 ± 7.37", "98.27 ± 2.28"),
    "CT-3": ("97.30 ± 4.74", "63.64 ± 14.06", "77.78 ± 12.15", "70.00 ± 13.39", "98.12 ± 3.97"),
    "CT-4": ("100 ± 0", "100 ± 0", "100 ± 0", "100 ± 0", "100 ± 0"),
}
"""Grade → accuracy, precision, sensitivity, F1, specificity over the 1,110 patients of MosMedData (Qiblawey
et al., table 8)."""

DCN_MASKS = {"lungs": "99.11", "lesions": "83.51"}
"""DSC (Gao et al., table 2, five-fold cross-validation)."""

DCN_ATTENTION = {"attention 1": "0.28", "attention 2": "0.56", "attention 3": "0.46", "attention 4": "0.17"}
"""Map → DSC with the lesions (Gao et al., section 3.4.5)."""

DCN_SLICES: dict[str, Cells] = {
    "VGG16": ("92.68", "86.46", "74.89", "98.02", "0.9392"),
    "ResNet-34": ("92.25", "85.37", "72.57", "98.17", "0.9328"),
    "ResNet-50": ("93.96", "89.15", "80.20", "98.09", "0.9510"),
    "ResNet-101": ("93.05", "86.57", "74.51", "98.62", "0.9499"),
    "DenseNet-121": ("93.50", "88.51", "79.20", "97.81", "0.9472"),
    "DCN": ("95.99", "93.59", "89.14", "98.04", "0.9755"),
}
"""Accuracy, AA, sensitivity, specificity and AUC of slices (Gao et al., table 3)."""

DCN_STUDIES: dict[tuple[str, str], Cells] = {
    ("VGG16", "internal"): ("93.49", "93.54", "93.75", "93.33", "0.9422"),
    ("ResNet-34", "internal"): ("91.87", "92.13", "89.58", "94.67", "0.9114"),
    ("ResNet-50", "internal"): ("94.31", "94.58", "95.83", "93.33", "0.9506"),
    ("ResNet-101", "internal"): ("94.31", "94.58", "95.83", "93.33", "0.9294"),
    ("DenseNet-121", "internal"): ("93.49", "93.54", "93.75", "93.33", "0.9467"),
    ("DCN", "internal"): ("96.74", "96.95", "97.91", "96.00", "0.9864"),
    ("VGG16", "external"): ("87.58", "87.87", "87.32", "88.42", "0.9264"),
    ("ResNet-34", "external"): ("90.03", "89.47", "90.52", "88.42", "0.9383"),
    ("ResNet-50", "external"): ("90.92", "90.14", "91.62", "88.65", "0.9512"),
    ("ResNet-101", "external"): ("90.58", "90.74", "90.45", "91.02", "0.9493"),
    ("DenseNet-121", "external"): ("86.41", "85.09", "87.68", "82.51", "0.9128"),
    ("DCN", "external"): ("92.87", "92.89", "92.86", "92.91", "0.9771"),
}
"""(method, patients) → accuracy, AA, sensitivity, specificity and AUC of studies (Gao et al., table 3):
five-fold cross-validation of 123 patients of one hospital, and 1,079 of nine others."""

DCN_ABLATION: dict[tuple[bool, bool], tuple[Cells, Cells, Cells]] = {
    (False, False): (
        ("94.40", "92.93", "90.19", "95.67"),
        ("91.87", "91.50", "89.58", "93.33"),
        ("77.64", "84.85", "71.67", "98.02"),
    ),
    (False, True): (
        ("94.40", "92.93", "90.19", "95.67"),
        ("94.31", "94.58", "95.83", "93.33"),
        ("89.44", "90.81", "88.29", "93.33"),
    ),
    (True, False): (
        ("95.99", "93.59", "89.14", "98.04"),
        ("94.31", "94.21", "93.75*", "94.67*"),
        ("87.48", "89.90", "85.47", "94.32"),
    ),
    (True, True): (
        ("95.99", "93.59*", "89.14", "98.04"),
        ("96.74", "96.95", "97.91", "96.00"),
        ("92.87", "92.89", "92.86", "92.91"),
    ),
}
"""(attention, mapping) → accuracy, AA, sensitivity, specificity of slices, of studies, and of studies from
other hospitals (Gao et al., table 4). *: corrected, see ``DCN_CORRECTED``."""
DCN_CORRECTED = (
    "* corrected: the paper prints an AA of 95.59 for slices with both modules, but (89.14 + 98.04) / 2 is "
    "93.59, as in its table 3; and for studies with attention only a sensitivity of 94.67 and a specificity "
    "of 93.75, which are 71 of its 75 controls and 45 of its 48 patients: exchanged."
)

INFNET: dict[tuple[bool, float], Cells] = {
    (False, 0.0): ("7.95", "1.17"),
    (False, 0.2): ("3.87", "0.78"),
    (False, 0.4): ("5.09", "0.71"),
    (False, 0.5): ("5.09", "0.66"),
    (True, 0.0): ("–", "–"),
    (True, 0.5): ("–", "–"),
}
"""(self-supervised, share that is cut out) → test loss of Single and Multi Inf-Net (Fung et al., table I).

The last two rows are empty in the paper, which does not give the share of the last."""

SSM_WAYS = {"single": "SSM", "parallel": "SSM²", "scratch": "SSM^S"}
"""How it was trained → the paper's name."""

Ssm = tuple[str, str, int]
"""Way of training, encoder, and how many of its blocks."""

SSM_LESIONS: dict[Ssm, Cells] = {
    ("single", "resnet18", 2): ("0.4585", "0.3175", "0.3516"),
    ("single", "resnet18", 3): ("0.4253", "0.3222", "0.3415"),
    ("single", "resnet34", 2): ("0.5635", "0.3942", "0.3993"),
    ("single", "resnet34", 3): ("0.5243", "0.2984", "0.3565"),
    ("parallel", "resnet18", 2): ("0.4741", "0.3910", "0.3856"),
    ("parallel", "resnet18", 3): ("0.4835", "0.3851", "0.3870"),
    ("parallel", "resnet34", 2): ("0.5607", "0.3978", "0.4021"),
    ("parallel", "resnet34", 3): ("0.5952", "0.4164", "0.4381"),
    ("scratch", "resnet18", 2): ("0.5095", "0.3927", "0.3923"),
    ("scratch", "resnet18", 3): ("0.5799", "0.3828", "0.4245"),
    ("scratch", "resnet34", 2): ("0.6291", "0.4648", "0.4535"),
    ("scratch", "resnet34", 3): ("0.5152", "0.3381", "0.3579"),
}
"""AP at IoU 0.5, at 0.75, and from 0.5 to 0.95, by the authors' rule (Ter-Sarkisov, table 2): 100 slices."""

SSM_CLASSES: dict[Ssm, Cells] = {
    ("single", "resnet18", 2): ("90.20", "89.52", "89.34", "89.58", "0.8969"),
    ("single", "resnet18", 3): ("83.00", "89.55", "98.62", "92.25", "0.9220"),
    ("single", "resnet34", 2): ("88.70", "83.35", "94.54", "89.43", "0.8941"),
    ("single", "resnet34", 3): ("87.13", "96.75", "88.04", "91.23", "0.9138"),
    ("parallel", "resnet18", 2): ("83.76", "78.65", "87.58", "83.67", "0.8370"),
    ("parallel", "resnet18", 3): ("84.38", "78.22", "88.76", "84.18", "0.8417"),
    ("parallel", "resnet34", 2): ("85.48", "81.80", "79.39", "81.47", "0.8166"),
    ("parallel", "resnet34", 3): ("85.07", "78.07", "91.04", "85.28", "0.8528"),
    ("scratch", "resnet18", 2): ("93.16", "95.68", "96.18", "95.38", "0.9542"),
    ("scratch", "resnet18", 3): ("93.00", "96.53", "98.64", "96.75", "0.9676"),
    ("scratch", "resnet34", 2): ("89.62", "89.99", "96.76", "92.93", "0.9293"),
    ("scratch", "resnet34", 3): ("91.44", "95.33", "92.48", "93.26", "0.9333"),
}
"""Sensitivity to COVID-19, common pneumonia and normal slices, accuracy, F1 (Ter-Sarkisov, table 3): 21,192
slices."""

SSM_ORDER = {Diagnosis.HEALTHY: 0, Diagnosis.OTHER: 1, Diagnosis.COVID: 2}
"""Normal, common pneumonia and COVID-19, as module S numbers them."""
SSM_WEIGHTS = {0: 0.45, 1: 0.35, 2: 0.2}
"""Of normal, common pneumonia and COVID-19 in the F1: their shares of those slices."""
