"""The multitask system (Goncharov et al., figure 3): lungs network, crop, two-headed network.

The answer is a score from the affected fraction. The classification head is trained with the rest,
as in the paper, but not asked: without healthy patients to learn from it calls clear lungs of an
unknown scanner positive (the card has the figures).
"""

from __future__ import annotations

from torch import nn

from triage.config import Analysis
from triage.models import compute, weights
from triage.models.networks import MultitaskNet
from triage.models.packages import Package
from triage.models.pipeline import Pipeline, assemble, in_each_slice, slice_by_slice


def load(package: Package, analysis: Analysis) -> Pipeline:
    """From the files ``lungs`` and ``multitask`` of a package. Raises ConfigError."""
    running = compute.choose(analysis)
    network, _ = weights.read(package.file("multitask"), MultitaskNet)
    ready = running.ready(nn.Sequential(network.backbone, network.lesions), network.inputs)
    lesions = slice_by_slice(ready, network.stride, running, inputs=network.inputs)
    return assemble(package, analysis, running, in_each_slice(lesions))
