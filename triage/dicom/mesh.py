"""The surfaces of lungs and infection as one glTF-binary file, for a page or a program that turns them.

glTF (Khronos, ISO/IEC 12113) because one file holds both surfaces, each with its name, colour and
transparency, and browsers' libraries (vtk.js, three.js), Slicer, Blender and trimesh read it; STL has no
colours and PLY one surface a file. Vertices are patient coordinates: LPS in mm, as ImagePositionPatient.
Each node's matrix brings them to glTF's own convention, metres with the head up, facing the viewer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from triage.dicom.cells import Cells, box, shares
from triage.dicom.files import write_durably
from triage.domain import Findings, Mask, ResultKind, Series

LUNGS, INFECTION = "lungs", "infection"
COLOURS: Mapping[str, tuple[int, int, int, int]] = {
    INFECTION: (226, 44, 44, 255),
    LUNGS: (168, 206, 236, 64),
}
"""By name of the surface: red, green, blue and opacity, 0 to 255."""
CELL_SIZES_MM = (3.0, 4.0, 5.0, 6.0, 8.0, 12.0)
MOST_TRIANGLES = 36_000
"""Of one surface: the file of both stays below 2 MB. Where there are more, cells are taken larger."""
SMOOTHING_MM = 2.0
TO_GLTF = np.array([[0.001, 0, 0, 0], [0, 0, 0.001, 0], [0, -0.001, 0, 0], [0, 0, 0, 1]])
"""LPS in mm → metres, x to the patient's left, y to the head, z to the front (glTF 2.0, section 3.4)."""


@dataclass(frozen=True, slots=True)
class Surface:
    """Closed, and seen from outside counter-clockwise: points (n, 3) in LPS mm, triangles (m, 3)."""

    points: NDArray[np.float32]
    triangles: NDArray[np.int32]


def surfaces(series: Series, findings: Findings) -> dict[str, Surface]:
    """The lungs, and the infection where there is one. Raises ValueError without a lung mask."""
    return {**surfaces_of(series, None, findings.lesion_mask), LUNGS: _surface(findings.lung_mask, series)}


def surfaces_of(series: Series, lungs: Mask | None, lesions: Mask | None) -> dict[str, Surface]:
    """What there is of the two masks, each on the series' grid."""
    masks = {INFECTION: lesions, LUNGS: lungs}
    return {name: _surface(mask, series) for name, mask in masks.items() if mask is not None and mask.any()}


def write(series: Series, findings: Findings, folder: Path) -> Path:
    """Write ``surfaces`` as mesh.glb below 2 MB; it holds no patient data but the shapes.

    Raises ValueError without a lung mask, Retryable when the disk refuses.
    """
    path = folder / f"{ResultKind.MESH.value}.glb"
    write_durably(path, glb(surfaces(series, findings)))
    return path


def glb(found: Mapping[str, Surface]) -> bytes:
    """The surfaces as one glTF-binary file."""
    import trimesh  # a second to load, for those who want a mesh

    scene = trimesh.Scene()
    for name, surface in found.items():
        material = trimesh.visual.material.PBRMaterial(
            name=name,
            baseColorFactor=COLOURS[name],
            alphaMode="OPAQUE" if COLOURS[name][3] == 255 else "BLEND",
            metallicFactor=0.0,
            roughnessFactor=0.6,
            doubleSided=True,
        )
        body = trimesh.Trimesh(
            surface.points,
            surface.triangles,
            visual=trimesh.visual.TextureVisuals(material=material),
            process=False,
        )
        scene.add_geometry(body, node_name=name, geom_name=name, transform=TO_GLTF)
    binary: bytes = trimesh.exchange.gltf.export_glb(scene, include_normals=True)
    return binary


def _surface(mask: Mask, series: Series) -> Surface:
    """The border that holds as much as the mask does, as fine as ``MOST_TRIANGLES`` allows."""
    here = box(mask)
    for cell_mm in CELL_SIZES_MM:
        points, triangles = _border(mask[here], series.spacing, cell_mm)
        if len(triangles) <= MOST_TRIANGLES:
            break
    middle = [(span.start + span.stop - 1) / 2 for span in here]
    origin, steps = _grid(series)
    indices = points / np.array(series.spacing) + middle
    return Surface((origin + indices @ steps).astype(np.float32), triangles)


def _border(mask: Mask, spacing: tuple[float, ...], cell_mm: float) -> tuple[Cells, NDArray[np.int32]]:
    """Points in mm from the middle of the mask along its axes, and triangles (marching cubes)."""
    from skimage.measure import marching_cubes

    share = shares(mask, spacing, cell_mm)
    smooth = gaussian_filter(share, SMOOTHING_MM / cell_mm)
    filled = max(1, round(float(share.sum())))
    level = min(np.partition(smooth, -filled, axis=None)[-filled], 0.75 * smooth.max())
    points, triangles, _, _ = marching_cubes(smooth, level)
    return (points - (np.array(share.shape) - 1) / 2) * cell_mm, triangles


def _grid(series: Series) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Patient coordinates of the first voxel, and the steps (3, 3) to the next slice, row and column."""
    first, last = (np.array(series.instances[k].image_position_patient) for k in (0, -1))
    row, column = np.array(series.orientation[:3]), np.array(series.orientation[3:])
    to_next_slice = (last - first) / (len(series.instances) - 1)  # a tilted gantry's slices lie askew
    return first, np.stack([to_next_slice, series.spacing[1] * column, series.spacing[2] * row])
