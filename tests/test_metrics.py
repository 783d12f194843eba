"""Every measure agrees with MONAI, scikit-learn and SciPy, or with its definition written out."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from monai.metrics import compute_dice, compute_hausdorff_distance, compute_iou
from scipy import stats
from scipy.spatial.distance import cdist
from sklearn import metrics as theirs
from sklearn.calibration import calibration_curve

from triage.domain import Grade
from triage.training import metrics
from triage.training.metrics import Figure

SEEDS = range(5)
SHAPE = (4, 9, 11)


def masks(seed: int, shape=SHAPE) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.random(shape) < rng.uniform(0.1, 0.6), rng.random(shape) < rng.uniform(0.1, 0.6)


def one_hot(mask: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(mask.astype(np.float32))[None, None]


@pytest.mark.parametrize("seed", SEEDS)
class TestOverlap:
    def test_dice(self, seed):
        answer, truth = masks(seed)
        expected = theirs.f1_score(truth.ravel(), answer.ravel())
        assert metrics.dice(answer, truth) == pytest.approx(expected)
        assert metrics.dice(answer, truth) == pytest.approx(
            float(compute_dice(one_hot(answer), one_hot(truth)))
        )

    def test_iou(self, seed):
        answer, truth = masks(seed)
        assert metrics.iou(answer, truth) == pytest.approx(
            theirs.jaccard_score(truth.ravel(), answer.ravel())
        )
        assert metrics.iou(answer, truth) == pytest.approx(
            float(compute_iou(one_hot(answer), one_hot(truth)))
        )

    def test_hd95(self, seed):
        answer, truth = masks(seed)
        spacing = (5.0, 0.7, 0.9)
        found = metrics.hd95(answer, truth, spacing)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it uses an argument of its own that it deprecates
            expected = compute_hausdorff_distance(
                one_hot(answer), one_hot(truth), include_background=True, percentile=95, spacing=list(spacing)
            )
        assert found == pytest.approx(float(expected))

    def test_hd95_by_all_distances_of_two_boxes(self, seed):
        rng = np.random.default_rng(seed)
        boxes = np.zeros((2, 12, 14, 16), dtype=bool)
        for box in boxes:
            z, y, x = rng.integers(1, 6, 3)
            box[z : z + 5, y : y + 6, x : x + 7] = True
        spacing = np.array([3.0, 1.0, 0.8])
        shells = []
        for box in boxes:
            inner = np.zeros_like(box)
            z, y, x = (np.flatnonzero(box.any(axis=axes)) for axes in ((1, 2), (0, 2), (0, 1)))
            inner[z[1] : z[-1], y[1] : y[-1], x[1] : x[-1]] = True
            shells.append(np.argwhere(box & ~inner) * spacing)
        distances = cdist(*shells)
        expected = max(np.percentile(distances.min(axis=axis), 95) for axis in (0, 1))
        assert metrics.hd95(boxes[0], boxes[1], tuple(spacing)) == pytest.approx(expected, rel=1e-5)


class TestOverlapAtTheEdges:
    nothing, something = np.zeros(SHAPE, dtype=bool), np.ones(SHAPE, dtype=bool)

    def test_two_empty_masks_agree(self):
        assert metrics.dice(self.nothing, self.nothing) == 1
        assert metrics.iou(self.nothing, self.nothing) == 1

    def test_one_empty_mask_does_not(self):
        assert metrics.dice(self.nothing, self.something) == 0
        assert metrics.iou(self.something, self.nothing) == 0

    @pytest.mark.parametrize(("a", "b"), [(nothing, nothing), (nothing, something), (something, nothing)])
    def test_no_surface_no_distance(self, a, b):
        assert metrics.hd95(a, b, (1.0, 1.0, 1.0)) is None

    def test_a_slice_is_measured_in_its_plane(self):
        answer, truth = np.zeros((2, 1, 20, 20), dtype=bool)
        answer[0, 5:10, 5:10] = truth[0, 5:10, 8:13] = True
        assert metrics.hd95(answer, truth, (99.0, 1.0, 2.0)) == pytest.approx(6.0)

    def test_volume_error_has_a_sign(self):
        answer, truth = np.zeros((2, *SHAPE), dtype=bool)
        answer[0], truth[0, :2] = True, True
        assert metrics.volume_error(answer, truth, 0.5) == pytest.approx((9 - 2) * 11 * 0.5)
        assert metrics.volume_error(truth, answer, 0.5) < 0


class TestIntervals:
    @given(n=st.integers(1, 500), share=st.floats(0, 1))
    def test_wilson(self, n, share):
        successes = round(n * share)
        expected = stats.binomtest(successes, n).proportion_ci(method="wilson")
        assert metrics.wilson(successes, n) == pytest.approx((expected.low, expected.high), abs=1e-9)

    def test_nothing_tried_says_nothing(self):
        assert metrics.wilson(0, 0) == (0, 1)

    def test_bootstrap_of_single_cases(self):
        values = np.random.default_rng(3).normal(5, 2, 40)
        figure = metrics.bootstrap(values, [str(k) for k in range(40)], np.mean)
        level = 1 - 2 * metrics.expanded_level(40)
        expected = stats.bootstrap(
            (values,), np.mean, method="percentile", confidence_level=level, rng=np.random.default_rng(4)
        )
        assert figure.value == pytest.approx(values.mean())
        assert figure.low == pytest.approx(expected.confidence_interval.low, abs=0.1)
        assert figure.high == pytest.approx(expected.confidence_interval.high, abs=0.1)

    def test_few_patients_have_an_interval_as_wide_as_students(self):
        """Plain percentiles of seven would be a third too narrow."""
        widths = []
        for seed in range(20):
            values = np.random.default_rng(seed).normal(5, 2, 7)
            figure = metrics.bootstrap(values, list("abcdefg"), np.mean)
            student = 2 * stats.t.ppf(0.975, 6) * values.std(ddof=1) / np.sqrt(7)
            widths.append((figure.high - figure.low) / student)
        assert np.mean(widths) == pytest.approx(1, abs=0.07)

    def test_one_ill_patient_gives_no_interval_of_an_auc(self):
        figure = metrics.roc_auc([0.9, *np.linspace(0, 1, 10)], [True] + [False] * 10, list("abcdefghijk"))
        assert figure.value == pytest.approx(0.9)
        assert figure.low is None
        assert "in a group" in figure.reason

    def test_volumes_of_one_patient_are_no_more_witnesses(self):
        values = np.random.default_rng(3).normal(5, 2, 6)
        once = metrics.bootstrap(values, list("abcdef"), np.mean)
        tenfold = metrics.bootstrap(np.repeat(values, 10), [p for p in "abcdef" for _ in range(10)], np.mean)
        assert (tenfold.low, tenfold.high) == pytest.approx((once.low, once.high))
        assert (tenfold.n, tenfold.patients) == (60, 6)

    def test_too_few_patients_have_no_interval(self):
        figure = metrics.bootstrap(np.array([0.2, 0.4, 0.9]), ["a", "a", "b"], np.mean)
        assert figure.value == pytest.approx(0.5)
        assert figure.low is figure.high is None
        assert "fewer than 3 patients" in figure.reason

    def test_no_spread_is_no_certainty(self):
        figure = metrics.bootstrap(np.ones(5), list("abcde"), np.mean)
        assert (figure.value, figure.low) == (1, None)
        assert figure.reason

    def test_the_same_seed_gives_the_same_interval(self):
        values = np.random.default_rng(3).random(9)
        first, second, other = (
            metrics.bootstrap(values, list("abcdefghi"), np.mean, seed) for seed in (1, 1, 2)
        )
        assert first == second != other

    def test_every_patient_counts_once_in_a_mean(self):
        figure = metrics.mean([1.0, 1.0, 1.0, 0.0, 0.2], ["a", "a", "a", "b", "c"])
        assert figure.value == pytest.approx(0.4)
        assert (figure.n, figure.patients) == (5, 3)

    def test_shares_are_of_patients(self):
        figure = metrics.share([True, False, True, True], ["a", "a", "b", "c"])
        assert figure.value == pytest.approx(2.5 / 3)
        assert (figure.low, figure.high) == metrics.wilson(2.5, 3)


class TestRanks:
    @pytest.mark.parametrize("seed", SEEDS)
    def test_auc(self, seed):
        rng = np.random.default_rng(seed)
        scores = rng.integers(0, 8, 60) / 8  # with ties
        positive = rng.random(60) < 0.4
        figure = metrics.roc_auc(scores.tolist(), positive.tolist(), [str(k) for k in range(60)])
        assert figure.value == pytest.approx(theirs.roc_auc_score(positive, scores))
        assert figure.low < figure.value < figure.high
        curve = metrics.roc_curve(scores.tolist(), positive.tolist(), [str(k) for k in range(60)])
        for rate, sensitivity in zip(curve.false_positive_rate, curve.sensitivity, strict=True):
            reachable = [
                (scores[positive] >= t).mean()
                for t in [*np.unique(scores), 2]
                if (scores[~positive] >= t).mean() <= rate
            ]
            assert sensitivity == pytest.approx(max(reachable))
        assert (curve.low <= curve.sensitivity).all()
        assert (curve.sensitivity <= curve.high).all()

    @pytest.mark.parametrize(
        ("scores", "patients"),
        [([0.2, 0.3, 0.4, 0.1], list("aabb")), ([0.9, 0.1, 0.8, 0.2], list("abcd"))],
        ids=["two patients", "always the same"],
    )
    def test_a_curve_has_a_band_only_where_the_auc_has_an_interval(self, scores, patients):
        positive = [True, False, True, False]
        curve = metrics.roc_curve(scores, positive, patients)
        assert metrics.roc_auc(scores, positive, patients).low is None
        assert curve.low is curve.high is None
        assert len(curve.sensitivity) == len(curve.false_positive_rate)

    def test_one_group_has_no_auc(self):
        figure = metrics.roc_auc([0.2, 0.3, 0.4], [True] * 3, list("abc"))
        assert figure == Figure(value=None, n=3, patients=3, reason=figure.reason)
        assert figure.reason

    @pytest.mark.parametrize("seed", SEEDS)
    def test_spearman(self, seed):
        rng = np.random.default_rng(seed)
        drawn, found = rng.integers(0, 9, (2, 30)) / 9
        figure = metrics.spearman(drawn.tolist(), found.tolist(), [str(k) for k in range(30)])
        assert figure.value == pytest.approx(stats.spearmanr(drawn, found).statistic)
        assert figure.low < figure.value < figure.high

    def test_constant_fractions_have_no_rank(self):
        assert metrics.spearman([0.1, 0.2, 0.3], [0.5] * 3, list("abc")).value is None

    @pytest.mark.parametrize("seed", SEEDS)
    def test_grade_confusion(self, seed):
        drawn, found = np.random.default_rng(seed).choice(list(Grade), (2, 40))
        table = metrics.grade_confusion([Grade(g) for g in drawn], [Grade(g) for g in found])
        assert (table == theirs.confusion_matrix(drawn, found, labels=[g.value for g in Grade])).all()


def lesion_map(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    truth, lungs = masks(seed)
    noise = rng.random(SHAPE) ** 2
    return (0.3 * truth + 0.7 * noise).astype(np.float32), truth, lungs


@pytest.mark.parametrize("seed", SEEDS)
class TestHistogram:
    def test_volumes_at_any_threshold_are_those_of_the_mask(self, seed):
        probability, truth, lungs = lesion_map(seed)
        histogram = metrics.histogram(probability, truth, lungs)
        for threshold in (0.05, 0.2, 0.29, 0.5, 0.95):
            mask = (probability > threshold) & lungs
            assert histogram.fraction(threshold) == pytest.approx(mask.sum() / lungs.sum())
            tp, fp, fn = histogram.counts(threshold)
            assert (tp, fp, fn) == ((mask & truth).sum(), (mask & ~truth).sum(), (truth & ~mask).sum())

    def test_calibration(self, seed):
        probability, truth, lungs = lesion_map(seed)
        bins = metrics.reliability(metrics.histogram(probability, truth, lungs).table())
        inside, drawn = probability[lungs].astype(np.float64), truth[lungs]
        observed, predicted = calibration_curve(drawn, inside, n_bins=10)
        assert bins.observed == pytest.approx(observed)
        assert bins.predicted == pytest.approx(predicted)
        place = np.minimum((inside * 10).astype(int), 9)
        gaps = [abs(inside[place == k].sum() - drawn[place == k].sum()) for k in range(10)]
        assert bins.ece == pytest.approx(sum(gaps) / len(inside))

    def test_threshold_averaged_dice_is_the_mean_over_256_cuts(self, seed):
        probability, truth, _ = lesion_map(seed)
        stretched = (probability - probability.min()) / np.ptp(probability)
        cuts = [theirs.f1_score(truth.ravel(), (stretched >= k / 255).ravel()) for k in range(256)]
        assert metrics.threshold_averaged_dice(probability, truth) == pytest.approx(np.mean(cuts))
        fainter = 0.1 + 0.3 * probability
        assert metrics.threshold_averaged_dice(fainter, truth) == pytest.approx(np.mean(cuts), abs=2e-3)


class TestThresholdAveragedDice:
    def test_an_empty_drawing_scores_nothing(self):
        probability, truth, _ = lesion_map(1)
        assert metrics.threshold_averaged_dice(probability, np.zeros_like(truth)) == 0

    def test_a_constant_map_is_not_stretched(self):
        truth = np.zeros((1, 4, 4), dtype=bool)
        truth[0, :2] = True
        half = np.full(truth.shape, 0.5, dtype=np.float32)
        assert metrics.threshold_averaged_dice(half, truth) == pytest.approx(128 / 256 * 2 / 3)

    def test_a_perfect_mask_loses_the_lowest_cut_only(self):
        truth = np.zeros((1, 4, 4), dtype=bool)
        truth[0, :2] = True
        value = metrics.threshold_averaged_dice(truth.astype(np.float32), truth)
        assert value == pytest.approx((255 + 2 / 3) / 256)


def test_ece_of_several_cases_pools_their_voxels():
    tables = np.stack([metrics.histogram(*lesion_map(seed)).table() for seed in SEEDS])
    figure = metrics.ece(tables, [str(seed) for seed in SEEDS])
    assert figure.value == pytest.approx(metrics.reliability(tables.sum(axis=0)).ece)
    assert figure.low < figure.high


def test_nothing_counted_has_no_calibration():
    assert math.isnan(metrics.reliability(np.zeros((3, metrics.BINS))).ece)
