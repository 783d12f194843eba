"""The contract that every network of the registry keeps, and the pieces they are made of."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from functools import cache, partial
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from triage import models
from triage.config import Analysis
from triage.domain import Volume
from triage.errors import ConfigError, DeviceLost, Rejected, Retryable
from triage.models import compute, engine, lungs, packages, preprocessing, weights
from triage.models.networks import PAPER_WIDTHS, PYRAMID, LungsNet, MultitaskNet, pyramid
from triage.models.pipeline import BATCH, score, slice_by_slice
from triage.models.preprocessing import Layout, bounding_box, pad, prepare, restore

AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


def phantom(shape=(10, 220, 260), spacing=(8.0, 1.4, 1.4), lesion=True, lung=True) -> Volume:
    """A chest of ellipses in HU: body 40, lungs -850 with vessels, a hazy patch of -500 at the left back."""
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    rng = np.random.default_rng(7)
    array = np.full(shape, -1000.0)
    array[(x / 0.9) ** 2 + (y / 0.75) ** 2 < 1] = 40
    for side in (-1, 1):
        inside = ((x - 0.42 * side) / 0.33) ** 2 + (y / 0.55) ** 2 + (z / 1.3) ** 2 < 1
        if lung:
            array[inside] = -850
            array[inside & (rng.random(shape) < 0.01)] = 0
        if lung and lesion and side == 1:
            array[inside & (y > 0.1)] = -450
    array += rng.normal(0, 15, shape)
    return Volume(array.astype(np.int16), spacing)


@cache
def loaded(name, **changes):
    return models.load(Analysis(model=name, threads=1, **changes))


@pytest.fixture(params=models.MODELS)
def place(request):
    """What ``analysis.model`` says."""
    return request.param


@pytest.fixture
def model(place):
    return loaded(place)


def kept(mask, spacing_mm=5.0):
    return (lungs.plausible(torch.from_numpy(mask).float(), spacing_mm) > 0.5).numpy()


def equal(a, b):
    return (
        a.probability == b.probability
        and np.array_equal(a.lung_mask, b.lung_mask)
        and (np.array_equal(a.lesion_mask, b.lesion_mask))
    )


class TestContract:
    """What every network keeps, whatever its weights: every entry of MODELS; other files bring theirs."""

    @pytest.mark.parametrize(
        ("shape", "spacing"),
        [
            ((10, 220, 260), (8.0, 1.4, 1.4)),
            ((3, 300, 400), (10.0, 1.0, 0.8)),
            ((7, 201, 333), (5.0, 1.37, 1.03)),
            ((2, 512, 512), (10.0, 0.7, 0.7)),
            ((4, 90, 110), (10.0, 3.3, 3.3)),
        ],
    )
    def test_masks_are_on_the_volumes_own_grid(self, model, shape, spacing):
        volume = phantom(shape, spacing)
        before = volume.array.copy()
        findings = model.predict(volume)
        assert findings.lung_mask.shape == shape
        assert findings.lung_mask.dtype == bool
        assert findings.lung_mask.any()
        assert 0 <= findings.probability <= 1
        assert findings.probability_kind in ("classifier", "score")
        assert findings.calibrated == model.info.calibrated
        if findings.lesion_mask is not None:
            assert findings.lesion_mask.shape == shape
            assert findings.lesion_mask.dtype == bool
            assert not (findings.lesion_mask & ~findings.lung_mask).any()
        assert np.array_equal(volume.array, before)

    @pytest.mark.parametrize(("across", "back", "swapped"), list(product((1, -1), (1, -1), (False, True))))
    def test_the_answer_does_not_depend_on_how_the_slices_are_stored(self, model, across, back, swapped):
        upright = phantom()
        findings = model.predict(upright)
        row, column = (across, 0.0, 0.0), (0.0, back, 0.0)
        head = across * back
        stored = upright.array[::head, ::back, ::across]
        if swapped:
            row, column = column, row
            stored = stored[::-1].swapaxes(1, 2)
        turned = Volume(np.ascontiguousarray(stored), upright.spacing, (*row, *column))
        answer = model.predict(turned)
        assert answer.probability == findings.probability
        assert (answer.lesion_mask is None) == (findings.lesion_mask is None)
        for mask, expected in (
            (answer.lung_mask, findings.lung_mask),
            (answer.lesion_mask, findings.lesion_mask),
        ):
            if expected is None:
                continue
            upright_mask = mask.swapaxes(1, 2)[::-1] if swapped else mask
            assert np.array_equal(upright_mask[::head, ::back, ::across], expected)

    def test_judging_twice_gives_the_same(self, model):
        assert equal(model.predict(phantom()), model.predict(phantom()))

    def test_the_number_of_threads_does_not_change_the_answer(self, place, model):
        volume = phantom((40, 120, 140), (5.0, 2.6, 2.6))
        many = models.load(Analysis(model=place, threads=3))
        assert equal(model.predict(volume), many.predict(volume))

    @pytest.mark.parametrize("slices", [1, 10])
    def test_the_lesion_map_is_on_the_volumes_own_grid_also_of_a_picture(self, model, slices):
        volume = phantom((10, 220, 260))
        picture = Volume(volume.array[:slices], volume.spacing)
        found = model.lesion_map(picture, None)
        assert (found is None) == (model.predict(volume).lesion_mask is None)
        if found is not None:
            assert found.shape == picture.array.shape
            assert found.dtype == np.float32
            assert found.min() >= 0
            assert found.max() <= 1

    def test_no_lungs_is_not_analysable(self, model):
        with pytest.raises(Rejected, match="no lungs found"):
            model.predict(phantom(lung=False))
        with pytest.raises(Rejected, match="no lungs found"):
            model.predict(Volume(np.full((4, 64, 64), -1000, np.int16), (5.0, 1.0, 1.0)))

    def test_what_changes_the_answer_is_told(self, place, model):
        other = loaded(place, lesion_threshold=0.9, precision="bfloat16")
        assert other.settings["precision"] == "bfloat16"
        assert all(isinstance(value, str | float) for value in other.settings.values())
        finds_lesions = model.predict(phantom()).lesion_mask is not None
        assert other.settings.get("lesion_threshold") == (0.9 if finds_lesions else None)

    def test_a_higher_threshold_never_finds_more(self, place):
        masks = [loaded(place, lesion_threshold=t).predict(phantom()).lesion_mask for t in (0.1, 0.5, 0.9)]
        for more, less in pairwise(masks):
            assert (more is None) == (less is None)
            assert more is None or not (less & ~more).any()


class TestShipped:
    """Every entry of MODELS, with the weights that ship."""

    def test_lungs_lie_where_the_chest_has_them(self, model):
        volume = phantom(lesion=False)
        truth = volume.array < -700
        truth[:, :, :20] = truth[:, :, -20:] = False
        truth &= np.abs(np.linspace(-1, 1, truth.shape[1]))[None, :, None] < 0.56
        found = model.predict(volume).lung_mask
        assert 2 * (found & truth).sum() / (found.sum() + truth.sum()) > 0.85

    def test_a_hazy_lung_is_more_affected_than_a_clear_one(self, model):
        hazy, clear = model.predict(phantom()), model.predict(phantom(lesion=False))
        assert hazy.lesion_mask.sum() > 5 * clear.lesion_mask.sum()
        assert hazy.probability > clear.probability
        assert hazy.lung_mask[phantom().array > -600].any(), "an affected lung is still lung"

    def test_ships_with_small_weights_and_an_honest_card(self, model):
        package = packages.read(models.MODELS[model.info.name])
        assert model.info == package.info
        assert package.card.name == model.info.name
        assert all(path.stat().st_size <= 15e6 for path in package.files.values())
        assert package.card.training_data
        assert package.card.limits
        assert "esearch use" in package.card.licence
        for words in ("esearch use", "not a medical device", "calibrated: false"):
            assert words in model.info.card


class TestRegistry:
    def test_an_unknown_name_is_told_with_the_valid_ones(self):
        with pytest.raises(ConfigError, match=r"'resnet9000'.*multitask"):
            models.load(Analysis(model="resnet9000"))

    def test_weights_of_another_network_are_refused(self, tmp_path):
        path = tmp_path / "w.safetensors"
        weights.save(LungsNet((4, 8)), {"network": "lungs", "widths": "4,8"}, path)
        assert weights.read(path, LungsNet)[0].stride == 2
        with pytest.raises(ConfigError, match="not MultitaskNet"):
            weights.read(path, MultitaskNet)
        weights.save(LungsNet((4, 8)), {"network": "lungs", "widths": "4,16"}, path)
        with pytest.raises(ConfigError, match="cannot be used"):
            weights.read(path, LungsNet)

    def test_large_variances_survive_the_file(self, tmp_path):
        network, path = LungsNet((4, 8)), tmp_path / "w.safetensors"
        network.backbone.down[0].norm1.running_var.fill_(1e6)  # fp16 ends at 65504
        weights.save(network, {"network": "lungs", "widths": "4,8"}, path)
        slices = torch.rand(1, 1, 8, 8)
        same = weights.read(path, LungsNet)[0](slices)
        assert torch.allclose(same, network.eval()(slices), atol=1e-2)

    def test_a_network_that_came_to_grief_is_not_saved(self, tmp_path):
        network = LungsNet((4, 8))
        network.head[2].bias.data.fill_(float("nan"))
        with pytest.raises(ConfigError, match=r"head\.2\.bias is no number: train with a lower"):
            weights.save(network, {"network": "lungs", "widths": "4,8"}, tmp_path / "w.safetensors")
        assert not list(tmp_path.iterdir())

    def test_describing_the_networks_does_not_load_torch(self):
        code = (
            "import sys; from triage.models import describe; print([p.card.name for p in describe()]);"
            "sys.exit('torch' in sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "multitask" in done.stdout


class TestCompute:
    def test_memory_that_runs_out_can_be_tried_again(self):
        running = compute.choose(Analysis(device="cpu"))
        with pytest.raises(Retryable, match="memory"), running.running():
            torch.empty(1 << 50)

    def test_a_lost_gpu_asks_for_a_new_process(self):
        running = compute.choose(Analysis(device="cpu"))
        with pytest.raises(DeviceLost), running.running():
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_what_is_no_number_is_never_an_answer(self, value):
        chosen = compute.choose(Analysis(device="cpu"))
        with pytest.raises(Retryable, match="no numbers"):
            chosen.map(lambda batch: batch * value, [torch.ones(1, 1, 4, 4)], torch.nan_to_num)

    def test_few_batches_are_made_ahead_of_the_network(self):
        """A long volume's batches never lie in memory all at once."""
        threads, made, answered, ahead = 2, 0, [], []

        def batches():
            nonlocal made
            for _ in range(60):
                ahead.append(made - len(answered))
                made += 1
                yield torch.full((300, 300), float(made))

        def network(batch):
            product = batch @ batch
            answered.append(1)
            return product[:1, 0] / product[0, 0] * batch[0, 0]

        running = compute.choose(Analysis(device="cpu", precision="float32", threads=threads))
        answers = running.map(network, batches())
        assert torch.cat(answers).tolist() == list(range(1, 61))
        assert max(ahead) <= 2 * threads

    def test_the_activation_sees_a_batch_of_slices_at_a_time(self):
        """With several channels the values of a long volume would be several times its size."""
        seen = []

        def second(values):
            seen.append(len(values))
            return values.softmax(1)[:, 1:2]

        running = compute.choose(Analysis(device="cpu", precision="float32", threads=2))
        slices = torch.rand(3 * BATCH + 5, 30, 41)
        judge = slice_by_slice(lambda x: torch.cat([x, 1 - x, x * x], 1), 16, running, second)
        expected = torch.stack([slices, 1 - slices, slices**2], 1).softmax(1)[:, 1]
        assert torch.allclose(judge(slices, 5.0), expected)
        assert sorted(seen) == [5, BATCH, BATCH, BATCH]

    def test_a_mistake_of_ours_is_not_called_transient(self):
        running = compute.choose(Analysis(device="cpu"))
        with pytest.raises(RuntimeError, match="size"), running.running():
            torch.ones(2) + torch.ones(3)

    def test_precision_is_what_the_settings_say(self):
        assert compute.choose(Analysis(device="cpu", precision="float32")).precision == "float32"
        assert compute.choose(Analysis(device="cpu", precision="bfloat16")).precision == "bfloat16"

    @pytest.mark.parametrize("name", engine.ENGINES)
    def test_every_engine_gives_what_torch_gives_for_any_size_from_any_thread(self, name):
        pytest.importorskip(name)
        network = LungsNet((4, 8), inputs=3).requires_grad_(False).eval()
        run = engine.run_by(name, network, 3, torch.float32, 2)
        batches = [
            torch.rand(n, 3, 2 * h, 2 * w) for n, h, w in ((1, 8, 9), (16, 20, 16), (5, 8, 9), (3, 7, 2))
        ]
        with ThreadPoolExecutor(2) as pool:
            for batch, found in zip(batches, pool.map(run, batches), strict=True):
                assert torch.allclose(found, network(batch), atol=1e-4)

    def test_torch_takes_over_from_an_engine_that_fails(self, monkeypatch, caplog):
        def cannot(*_):
            raise RuntimeError("no such instruction\nmore")

        network = LungsNet((4, 8)).requires_grad_(False).eval()
        slices = torch.rand(2, 1, 8, 8)
        for made in (cannot, lambda *_: cannot):  # when it is loaded, and later
            monkeypatch.setitem(engine.ENGINES, "openvino", made)
            run = engine.run_by("openvino", network, 1, torch.float32, 1)
            assert torch.equal(run(slices), network(slices))
            assert torch.equal(run(slices), network(slices))
        said = "openvino cannot run this network, torch does: no such instruction"
        assert [record.getMessage() for record in caplog.records] == [said, said]

    @pytest.mark.parametrize("device", ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
    def test_recordings_are_of_whole_batches_and_few(self, device):
        seen = []

        def on_cpu(network, slices):
            return lambda again: network(again) if again.shape == slices.shape else again[:0]

        on_gpu = partial(engine.cuda_graph, None)

        def record(network, slices):
            seen.append(tuple(slices.shape))
            return (on_cpu if device == "cpu" else on_gpu)(network, slices)

        network = LungsNet((4, 8)).requires_grad_(False).eval()
        run = engine.Replayed(deepcopy(network).to(device), record)
        sides = [*range(2, 2 * engine.SHAPES + 4, 2), 4, 2]
        for side in sides:
            slices = torch.rand(engine.RECORDED + 3, 1, side, 6)
            assert torch.allclose(run(slices.to(device)).cpu(), network(slices), atol=1e-2)
        assert seen == [(engine.RECORDED, 1, side, 6) for side in (*sides[:-2], 2)], "the first was let go"
        assert len(run.recordings) == engine.SHAPES

    def test_the_way_on_another_device_gives_the_same(self):
        done = subprocess.run(
            [sys.executable, "-m", "tests.second_device"], capture_output=True, text=True, check=False
        )
        assert done.stdout == "the same on both\n", done.stderr

    def test_an_engine_that_is_not_installed_is_told_at_start(self, monkeypatch):
        monkeypatch.setattr(engine, "find_spec", lambda name: None)
        with pytest.raises(ConfigError, match="engine = 'openvino' is not installed"):
            compute.choose(Analysis(device="cpu", engine="openvino"))

    def test_an_engine_that_has_one_precision_says_which(self, monkeypatch):
        monkeypatch.setattr(compute, "fast_bfloat16", lambda on_gpu: True)
        names = [name for name in ("torch", *engine.ENGINES) if engine.installed(name)]
        precise = {name: compute.choose(Analysis(device="cpu", engine=name)).precision for name in names}
        assert precise == {n: "float32" if n == "onnxruntime" else "bfloat16" for n in names}

    def test_another_engine_must_be_clearly_faster(self, monkeypatch):
        for torchs, chosen in ((2.0, "openvino"), (1.7, "openvino"), (1.5, "torch")):
            monkeypatch.setattr(engine, "trial", lambda *_, t=torchs: {"openvino": 2.0, "torch": t})
            assert engine.choose(torch.bfloat16, 1) == chosen

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_a_missing_gpu_is_told_at_start(self):
        with pytest.raises(ConfigError, match="cuda"):
            compute.choose(Analysis(device="cuda"))

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_a_gpu_that_is_gone_is_replaced_by_the_cpu_only_where_that_is_allowed(self, monkeypatch, caplog):
        """It is still counted, as one that fell off the bus, and does nothing."""
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        assert compute.choose(Analysis(device="auto")).device.type == "cpu"
        assert "the GPU does not work" in caplog.text
        assert "judged on the CPU" in caplog.text
        with pytest.raises(ConfigError, match="no GPU can be used here"):
            compute.choose(Analysis(device="cuda"))


orientations = st.permutations([0, 1]).flatmap(
    lambda axes: st.tuples(*(st.sampled_from([-1.0, 1.0]) for _ in axes)).map(
        lambda signs: tuple(
            np.ravel([np.eye(3)[axis] * sign for axis, sign in zip(axes, signs, strict=True)])
        )
    )
)


class TestPreprocessing:
    @given(orientations)
    def test_canonical_and_stored_are_inverse(self, orientation):
        array = np.arange(24).reshape(2, 3, 4)
        layout = Layout.of(orientation)
        assert np.array_equal(layout.stored(layout.canonical(array)), array)

    @given(orientations)
    def test_canonical_axes_run_to_the_head_the_back_and_the_left(self, orientation):
        row, column = np.array(orientation[:3]), np.array(orientation[3:])
        normal = np.cross(row, column)
        k, j, i = np.indices((4, 5, 6))
        position = k[..., None] * normal + j[..., None] * column + i[..., None] * row
        left, back, head = (Layout.of(orientation).canonical(position[..., axis]) for axis in range(3))
        assert (np.diff(head, axis=0) > 0).all()
        assert (np.diff(back, axis=1) > 0).all()
        assert (np.diff(left, axis=2) > 0).all()

    @settings(max_examples=40)
    @given(
        shape=st.tuples(st.integers(1, 40), st.integers(30, 200), st.integers(30, 200)),
        pixel=st.tuples(st.floats(0.5, 2.5), st.floats(0.5, 2.5)),
        orientation=orientations,
        data=st.data(),
    )
    def test_a_mask_survives_the_way_there_and_back(self, shape, pixel, orientation, data):
        z, y, x = shape
        top = data.draw(st.integers(0, y // 2))
        left = data.draw(st.integers(0, x // 2))
        mask = np.zeros(shape, bool)
        mask[: max(1, z // 2), top : top + y // 2, left : left + x // 2] = True
        volume = Volume(np.where(mask, 300, -1000).astype(np.int16), (5.0, *pixel), orientation)
        back = restore(prepare(volume), 0.5, volume)
        assert back.shape == mask.shape
        assert 2 * (back & mask).sum() / (back.sum() + mask.sum()) > 0.8
        if min(y * pixel[0], x * pixel[1]) > 100:
            assert 2 * (back & mask).sum() / (back.sum() + mask.sum()) > 0.93

    def test_values_are_clipped_to_the_window_and_scaled(self):
        array = np.array([-3024, -1000, -350, 300, 3071], np.int16)[:, None, None] * np.ones(
            (1, 8, 8), np.int16
        )
        slices = prepare(Volume(array, (5.0, 2.0, 2.0)))
        assert torch.allclose(slices[:, 4, 4], torch.tensor([0, 0, 0.5, 1, 1]), atol=1e-5)

    @given(st.integers(1, 70), st.integers(1, 70), st.sampled_from([1, 2, 16, 64]))
    def test_padding_is_air_below_and_to_the_right(self, h, w, stride):
        padded = pad(torch.ones(1, h, w), stride)
        assert padded.shape[1] % stride == padded.shape[2] % stride == 0
        assert padded.shape[1] - h < stride
        assert padded.sum() == padded[:, :h, :w].sum() == h * w

    def test_the_box_is_tight_and_stays_inside(self):
        mask = np.zeros((5, 20, 30), bool)
        mask[1:3, 4:9, 25:29] = True
        assert bounding_box(mask) == (slice(1, 3), slice(4, 9), slice(25, 29))
        assert bounding_box(mask, preprocessing.MARGIN) == (slice(1, 3), slice(0, 17), slice(17, 30))


class TestThickness:
    @pytest.mark.parametrize("spacing", [1.0, 1.25, 2.0, 2.5, 3.0])
    def test_thin_slices_look_like_thick_ones(self, spacing):
        rng = np.random.default_rng(3)
        thin = Volume(rng.normal(-500, 90, (40, 20, 20)).astype(np.int16), (spacing, 2.0, 2.0))
        count = round(5 / spacing)
        whole = len(thin.array) // count * count
        means = thin.array[:whole].reshape(-1, count, 20, 20).mean(axis=1)
        thick = prepare(Volume(np.rint(means).astype(np.int16), (count * spacing, 2.0, 2.0)))
        slices = prepare(thin)
        assert slices.shape[0] == 40
        middle = torch.arange(len(thick)) * count + count // 2
        if count % 2:  # then the slab around a slice is exactly a thick slice
            assert torch.allclose(slices[middle], thick, atol=1e-3)
        assert slices.std() == pytest.approx(float(thick.std()), rel=0.2)

    def test_thick_slices_stay_as_they_are(self):
        volume = Volume(np.random.default_rng(3).integers(-1000, 300, (9, 20, 20), np.int16), (5.0, 2.0, 2.0))
        assert torch.allclose(prepare(volume), torch.from_numpy((volume.array + 1000) / 1300).float())

    @given(st.floats(0.3, 4.9), st.integers(1, 30))
    @settings(max_examples=50)
    def test_what_does_not_change_along_the_patient_stays(self, spacing, count):
        slices = torch.rand(1, 4, 4).expand(count, 4, 4)
        assert torch.allclose(preprocessing.thicken(slices, spacing, 5.0), slices, atol=1e-5)


class TestLungs:
    def test_dense_tissue_inside_a_lung_is_lung(self):
        mask = np.zeros((6, 40, 40), bool)
        mask[:, 5:30, 5:30] = True
        whole = mask.copy()
        mask[2:4, 12:18, 12:18] = False
        assert np.array_equal(kept(mask), whole)

    def test_the_dome_of_the_diaphragm_is_not_lung(self):
        mask = np.zeros((6, 40, 40), bool)
        mask[:, 5:30, 5:30] = True
        mask[:3, 12:18, 12:18] = False
        assert np.array_equal(kept(mask), mask)

    def test_bowel_gas_is_not_lung(self):
        mask = np.zeros((6, 40, 40), bool)
        mask[:, 2:20, 2:12] = mask[:, 2:20, 20:30] = True
        both = mask.copy()
        mask[0, 35:38, 35:38] = True
        assert np.array_equal(kept(mask), both)

    def test_what_lies_above_the_chest_is_not_lung(self):
        mask = np.zeros((20, 40, 40), bool)
        mask[:10, 2:20, 2:12] = mask[:12, 2:20, 20:30] = True
        both = mask.copy()
        mask[13:, 10:20, 10:30] = True
        assert np.array_equal(kept(mask), both)

    @pytest.mark.parametrize("spacing_mm", [1.5, 5.0])
    def test_a_stomach_in_one_slice_is_not_lung(self, spacing_mm):
        """It touches the lung; what goes on over 12 mm, and thin rims in one slice, stay."""
        thick = round(6 / spacing_mm)  # slices that a thick one would show
        mask = np.zeros((8 * thick, 40, 50), bool)
        mask[:, 2:30, 2:20] = True
        mask[4 * thick : 6 * thick, 10:30, 20:32] = True
        mask[3 * thick, 2:10, 20:23] = True
        lungs_only = mask.copy()
        mask[thick : 2 * thick, 5:25, 20:40] = True
        assert np.array_equal(kept(mask, spacing_mm), lungs_only)

    def test_nothing_stays_nothing(self):
        assert not kept(np.zeros((2, 5, 5), bool)).any()


class TestNetworks:
    def test_papers_lungs_network(self):
        network = LungsNet()
        assert len(network.backbone.down) == len(PAPER_WIDTHS) == 7
        assert [block.conv2.out_channels for block in network.backbone.down] == [8, 16, 32, 64, 128, 256, 512]
        assert sum(p.numel() for p in network.parameters()) == 6_646_193
        assert network(torch.rand(2, 1, 64, 128)).shape == (2, 1, 64, 128)

    def test_papers_multitask_network(self):
        network = MultitaskNet().eval()
        assert (network.classifier[1].in_features, network.classifier[1].out_features) == (4680, 1024)
        lesions, pooled = network(torch.rand(3, 1, 64, 64))
        assert lesions.shape == (3, 1, 64, 64)
        assert pooled.shape == (3, 8, 8, 8)
        assert network.classify(pooled).shape == ()

    @settings(max_examples=25)
    @given(st.integers(1, 40), st.integers(8, 50), st.integers(8, 50))
    def test_the_pyramid_of_pooled_slices_is_that_of_the_whole_volume(self, z, h, w):
        features = torch.rand(z, 3, h, w)
        levels = [F.adaptive_max_pool3d(features.movedim(0, 1), (n, n, n)).flatten() for n in (8, 4, 2, 1)]
        assert torch.equal(pyramid(F.adaptive_max_pool2d(features, 8)), torch.cat(levels))
        assert sum(map(len, levels)) == PYRAMID * 3


class TestScore:
    @given(st.floats(0, 1), st.floats(0, 1))
    def test_more_affected_never_scores_less(self, a, b):
        low, high = sorted((a, b))
        assert 0 <= score(low) <= score(high) <= 1

    def test_much_disease_is_positive_and_none_is_not(self):
        assert score(0.15) > 0.8
        assert score(0.03) == 0.5
        assert score(0.0) == 0
