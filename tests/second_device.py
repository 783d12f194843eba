"""Judging on a device that is not the processor, where there is none: a second device made of the first.

    python -m tests.second_device

Its tensors say that they are elsewhere, and whatever mixes them with others fails, as it does on a GPU.
torch's way to write a device in Python is an experiment, and stays for the life of a process: this is one.
"""

from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch.utils import _pytree as trees
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

from tests.test_models import phantom
from triage.config import Analysis
from triage.domain import ModelInfo
from triage.models import cascade, compute
from triage.models.engine import Replayed
from triage.models.pipeline import Pipeline, from_fraction, in_each_slice, plausible_lungs, slice_by_slice
from triage.models.preprocessing import CANONICAL

VIEWS = ("alias", "slice.Tensor", "select.int", "permute", "expand", "unsqueeze", "split.Tensor")
WHOLE = ("abs", "constant_pad_nd", "arange", "arange.start", "arange.start_step")
"""What torch would make of smaller steps, which only know of tensors that own their memory."""
ELSEWHERE = torch.device("privateuseone", 0)


class Device(_DummyBackendModule):
    def get_amp_supported_dtype(self):
        return [torch.bfloat16]


class There(torch.Tensor):
    @classmethod
    def of(cls, here):
        with torch.inference_mode(False):
            there = torch._C._acc.create_empty_tensor(here.shape, here.dtype)
        there.__class__, there.here = cls, here
        return there


def here(one):
    if isinstance(one, There):
        return one.here
    return torch.device("cpu") if one == ELSEWHERE else one


def run(operation, *args, **options):
    """On the processor, what it shall do there. Raises RuntimeError where tensors of both are mixed."""
    name = operation.name()
    given = [one for one in trees.tree_leaves((args, options)) if isinstance(one, torch.Tensor)]
    if name == "aten::_copy_from":
        here(args[1]).copy_(here(args[0]))
        return args[1]
    there = {id(one.here): one for one in given if isinstance(one, There)}
    if there and any(one.dim() and not isinstance(one, There) for one in given):
        raise RuntimeError(f"{name}: some tensors are on the device, some are not")
    args, options = trees.tree_map(here, (args, options))
    if name == "aten::_local_scalar_dense":
        return args[0].item()

    def back(one):
        if id(one) in there or not isinstance(one, torch.Tensor):
            return there.get(id(one), one)
        return There.of(one)

    return trees.tree_map(back, operation(*args, **options))


def install():
    _setup_privateuseone_for_python_backend(ELSEWHERE.type, Device())
    every, some = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    every.fallback(run, "PrivateUse1")
    for name in VIEWS + WHOLE:
        packet, _, overload = name.partition(".")
        operation = getattr(getattr(torch.ops.aten, packet), overload or "default")
        some.impl(name, partial(run, operation), "PrivateUse1")
    return every, some


def pipeline(running, grid, conclude):
    """Air is lung, and what is between air and tissue is lesion: networks without weights."""
    lungs = slice_by_slice(lambda slices: 30 * (0.3 - slices[:, 1:2]), 16, running, inputs=3)
    replayed = Replayed(lambda slices: 30 * (0.1 - (slices - 0.4).abs()), lambda network, _: network)
    lesions = in_each_slice(slice_by_slice(replayed, 16, running))
    info = ModelInfo(name="plain", version="1", summary="", calibrated=False, card="")
    return Pipeline(info, running, plausible_lungs(lungs), lesions, 0.5, grid, conclude=conclude)


def main():
    kept = install()
    near = compute.choose(Analysis(device="cpu", engine="torch", precision="float32"))
    volume = phantom((40, 120, 140), (2.0, 2.6, 2.6))
    for grid, conclude in (
        (CANONICAL, from_fraction),
        (cascade.GRID, partial(cascade.conclude, minimum_area=3)),
    ):
        models = [pipeline(replace(near, device=one), grid, conclude) for one in (near.device, ELSEWHERE)]
        ours, theirs = (model.predict(volume) for model in models)
        assert ours.lesion_mask.any()
        assert np.array_equal(ours.lung_mask, theirs.lung_mask)
        assert np.array_equal(ours.lesion_mask, theirs.lesion_mask)
        assert ours.probability == theirs.probability
        maps = [model.lesion_map(volume, None) for model in models]
        assert np.array_equal(*maps)
    del kept
    print("the same on both")


if __name__ == "__main__":
    main()
