"""Boxes against brute force, and average precision against cases worked by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.test_evaluation import case, judged
from tests.test_paper_tables import Judges, cells, of
from triage.domain import DetectedLesion, Findings, Volume
from triage.models import boxes as box
from triage.training import instances, metrics, paper, published, tables
from triage.training import recipe as recipes
from triage.training.cases import Case, Diagnosis
from triage.training.scores import SliceLesions, from_json, to_json
from triage.training.summary import summarise

corners = st.tuples(*[st.integers(0, 18)] * 2, *[st.integers(1, 12)] * 2).map(
    lambda c: (c[0], c[1], c[0] + c[2], c[1] + c[3])
)
some_boxes = st.lists(corners, min_size=1, max_size=12)


def tensor(rows):
    return torch.tensor(rows, dtype=torch.float32).reshape(-1, 4)


def drawn(corner, size=(30, 30)):
    mask = np.zeros(size, bool)
    mask[corner[0] : corner[2], corner[1] : corner[3]] = True
    return mask


class TestBoxes:
    @given(some_boxes, some_boxes)
    @settings(max_examples=30)
    def test_iou_is_that_of_pixels(self, a, b):
        expected = [[metrics.iou(drawn(x), drawn(y)) for y in b] for x in a]
        assert np.allclose(box.iou(tensor(a), tensor(b)), expected, atol=1e-6)

    @given(some_boxes, st.integers(0, 2**32 - 1), st.sampled_from([0.2, 0.5, 0.75]))
    @settings(max_examples=50)
    def test_nms_keeps_what_no_better_one_overlaps(self, rows, seed, threshold):
        boxes = tensor(rows)
        scores = torch.from_numpy(np.random.default_rng(seed).integers(0, 5, len(rows)) / 4)
        left, kept = sorted(range(len(rows)), key=lambda k: (-scores[k], k)), []
        while left:
            best = left.pop(0)
            kept.append(best)
            left = [k for k in left if metrics.iou(drawn(rows[best]), drawn(rows[k])) <= threshold]
        assert box.nms(boxes, scores, threshold).tolist() == kept

    @given(some_boxes, st.integers(0, 2**32 - 1))
    @settings(max_examples=30)
    def test_decoding_inverts_encoding(self, rows, seed):
        rng = np.random.default_rng(seed)
        first = rng.uniform(0, 20, (len(rows), 2))
        anchors = tensor(np.concatenate([first, first + rng.uniform(1, 30, first.shape)], axis=1).tolist())
        for weights in ((1.0, 1.0), (10.0, 5.0)):
            codes = box.encode(tensor(rows), anchors, weights)
            assert torch.allclose(box.decode(codes, anchors, weights), tensor(rows), atol=1e-3)

    def test_a_code_by_hand(self):
        """The centre moves by half a height and a quarter of a width; half as high, twice as wide."""
        anchor, moved = tensor([(0, 0, 4, 8)]), tensor([(3, -4, 5, 12)])
        code = [10 * 0.5, 0.0, 5 * math.log(0.5), 5 * math.log(2)]
        assert box.encode(moved, anchor, (10.0, 5.0))[0].tolist() == pytest.approx(code)
        far = box.decode(torch.tensor([[0, 0, 99.0, 0]]), anchor, (1.0, 1.0))
        assert far[0, 2] - far[0, 0] == pytest.approx(4 * 1000 / 16)

    def test_a_box_cut_to_the_picture_is_never_empty(self):
        cut = box.cut(tensor([(-5, 2, 4, 90), (70, 70, 90, 90), (-9, -9, -3, -3)]), (20, 30))
        assert cut.tolist() == [[0, 2, 4, 30], [19, 29, 20, 30], [0, 0, 1, 1]]

    def test_anchors_lie_around_their_cells(self):
        anchors = box.anchors((2, 3), 8, (2, 16), (0.25, 1.0))
        assert anchors.shape == (2 * 3 * 4, 4)
        wide, square = anchors[20], anchors[23]  # of the last cell
        assert wide.tolist() == pytest.approx([8.5 - 0.5, 16.5 - 2, 8.5 + 0.5, 16.5 + 2])
        assert square.tolist() == pytest.approx([0.5, 8.5, 16.5, 24.5])
        assert box.in_cells(anchors, 8)[20].tolist() == pytest.approx([1.4375, 2.25, 1.5625, 2.75])

    @given(st.integers(0, 2**32 - 1))
    @settings(max_examples=15)
    def test_roi_align_is_the_mean_of_bilinear_points(self, seed):
        rng = np.random.default_rng(seed)
        features = rng.random((2, 6, 9)).astype(np.float32)
        first = rng.uniform(-2, 6, (3, 2))
        boxes = np.concatenate([first, first + rng.uniform(0.3, 9, (3, 2))], axis=1)

        def bilinear(y, x):
            y, x = (min(max(v - 0.5, 0), n - 1) for v, n in ((y, 6), (x, 9)))
            j, i = min(int(y), 4), min(int(x), 7)
            rows = (1 - (y - j)) * features[:, j] + (y - j) * features[:, j + 1]
            return (1 - (x - i)) * rows[:, i] + (x - i) * rows[:, i + 1]

        found = box.roi_align(torch.from_numpy(features), tensor(boxes.tolist()), 3)
        for n, (top, left, bottom, right) in enumerate(boxes):
            for j in range(3):
                for i in range(3):
                    shares = [(k + (s + 0.5) / 2) / 3 for k in (j, i) for s in (0, 1)]
                    points = [
                        bilinear(top + a * (bottom - top), left + b * (right - left))
                        for a in shares[:2]
                        for b in shares[2:]
                    ]
                    assert found[n, :, j, i].tolist() == pytest.approx(np.mean(points, axis=0), abs=1e-4)

    def test_what_was_aligned_is_pasted_back(self):
        y, x = torch.meshgrid(torch.arange(40.0), torch.arange(50.0), indexing="ij")
        picture = ((y - 20) ** 2 / 100 + (x - 22) ** 2 / 60 < 1).float()
        corner = (6.3, 9.7, 33.1, 36.4)
        seen = box.roi_align(picture[None], tensor([corner]), 28)[0, 0]
        (rows, columns), values = box.paste(seen, corner, (40, 50))
        assert (rows, columns) == (slice(6, 34), slice(9, 37))
        assert ((values > 0.5) != (picture[rows, columns] > 0.5)).float().mean() < 0.03
        rest = picture.clone()
        rest[rows, columns] = 0
        assert not rest.any()

    def test_of_a_box_beyond_the_picture_nothing_is_pasted(self):
        ones = torch.ones(28, 28)
        assert box.paste(ones, (3, 60, 9, 70), (40, 50))[1].numel() == 0
        (rows, columns), values = box.paste(ones, (-5, 40, 5, 60), (40, 50))
        assert (rows, columns) == (slice(0, 5), slice(40, 50))
        assert values[0, 5] == 1


A = SliceLesions(2, (0.9, 0.6), ((0.8, 0.0), (0.6, 0.0)))
B = SliceLesions(1, (0.7,), ((0.55,),))


class TestAveragePrecision:
    def test_coco_by_hand(self):
        """Three drawn; at 0.5 the best two found are right, the third hits what was hit; at 0.75 the best."""
        assert instances.coco([A, B], ["a", "b"], (0.5,)).value == pytest.approx(67 / 101)
        assert instances.coco([A, B], ["a", "b"], (0.75,)).value == pytest.approx(34 / 101)
        every = [67 / 101] * 2 + [34 / 101] * 5 + [0] * 3  # 0.5 and 0.55, up to 0.8, beyond
        assert instances.coco([A, B], ["a", "b"]).value == pytest.approx(np.mean(every))

    def test_precision_is_that_of_any_higher_recall(self):
        """Wrong, right, right of two: 1/2 and 2/3 become 2/3 at every recall."""
        one = SliceLesions(2, (0.9, 0.8, 0.7), ((0.0, 0.1), (0.9, 0.2), (0.1, 0.9)))
        assert instances.coco([one], ["a"], (0.5,)).value == pytest.approx(2 / 3)

    def test_the_best_score_chooses_first_the_lesion_it_overlaps_most(self):
        one = SliceLesions(2, (0.9, 0.8), ((0.6, 0.7), (0.1, 0.8)))
        assert instances.hits(one, 0.5) == [True, False]  # the second one's lesion is taken
        assert instances.hits(SliceLesions(0, (0.4,), ((),)), 0.5) == [False]

    def test_the_authors_rule_by_hand(self):
        """One of two, one of one; nothing drawn and nothing found, nothing drawn and something found."""
        slices = [A, B, SliceLesions(0), SliceLesions(0, (0.8,), ((),))]
        figure = instances.of_slices(slices, list("abcd"), (0.5,))
        assert figure.value == pytest.approx((0.5 + 1 + 1 + 0) / 4)
        assert (figure.n, figure.patients) == (4, 4)

    def test_intervals_are_of_patients(self):
        slices, patients = [A, B, A, B, SliceLesions(1)] * 2, list("abcdefghij")
        figure = instances.coco(slices, patients, (0.5,))
        assert figure.low < figure.value < figure.high
        # A patient drawn twice is counted twice: as two patients who are alike.
        weights = instances.average_precision(np.array([True, False]), np.array([2, 1]), 4.0)
        assert weights == instances.average_precision(np.array([True, True, False]), np.ones(3, int), 4.0)
        assert instances.coco([SliceLesions(0)], ["a"]).value is None

    def test_only_parts_that_are_large_enough_are_lesions(self):
        mask = np.zeros((20, 20), bool)
        mask[0:2, 0:5] = mask[10:13, 3:6] = mask[13, 13] = True
        assert [int(part.sum()) for part in instances.parts(mask, 9.5)] == [10]
        assert len(instances.parts(mask, 9)) == 2
        assert 49 < instances.LEAST_MM2 < 50

    def test_slices_with_lung_are_compared_mask_by_mask(self):
        """Slice 0 has two lesions, of which half of one is found; slice 2 shows no lung and no lesion."""
        lesion, lung = np.zeros((3, 40, 40), bool), np.zeros((3, 40, 40), bool)
        lung[:2] = True
        lesion[0, 5:15, 5:15] = lesion[0, 25:35, 5:15] = True
        volume = Volume(np.zeros((3, 40, 40), np.int16), (5.0, 1.0, 1.0))
        one = Case(name="a", patient="a", volume=volume, lung=lung, lesions=(lesion,))
        half = DetectedLesion(0, (5, 5, 10, 20), 0.7, np.arange(15)[None].repeat(5, 0) < 10)
        found = instances.by_slice(one, Findings(0.5, "score", False, lung, lesion, detected=(half,)))
        assert [s.drawn for s in found] == [2, 0]
        assert found[0].ious == ((0.5, 0.0),)


class Detects(Judges):
    """Finds each slice's haze as one lesion, in so many slices."""

    def __init__(self, most=99):
        self.most = most

    def predict(self, volume):
        findings = super().predict(volume)
        every = (0, 0, *volume.array.shape[1:])
        found = [DetectedLesion(z, every, 0.9, m) for z, m in enumerate(findings.lesion_mask) if m.any()]
        return replace(findings, detected=tuple(found[: self.most]))


SSM = {"ssm": {"encoder": "resnet18", "blocks": "2", "branches": "2", "recipe": '{"options": {}}'}}


class TestFigures:
    def test_are_there_for_networks_that_find_lesions_one_by_one(self):
        cases = [case(f"p{k}", rows=10, drawn=12) for k in range(3)]
        detects, judges = (judged(*cases, model=model) for model in (Detects(), Judges()))
        figures = summarise(detects).figures
        assert figures["detected_ap_50"].value == pytest.approx(1.0)
        assert figures["detected_ap"].value == pytest.approx(0.7)  # an IoU of 10 / 12 reaches 0.8
        assert figures["detected_slices_ap"].value == pytest.approx(0.7)
        assert figures["detected_slices_ap"].n == 12
        assert from_json(to_json(detects)) == detects
        missed = summarise(judged(*cases, model=Detects(most=0))).figures
        assert missed["detected_ap"].value == 0, "who looks and finds none is not one who does not look"
        reason = "finds no lesions one by one"
        assert reason in summarise(judges).figures["detected_ap"].reason
        shown = [name for name, *_ in tables.figure_rows(of("ssm", SSM, *cases))]
        assert not [name for name in shown if "one by one" in name]

    def test_f1_is_weighted_as_the_papers_classes(self):
        """COVID-19: 2 of 3 found, one wrongly; normal: 4 of 5."""
        truth, found = [2, 2, 2, 0, 0, 0, 0, 0], [2, 2, 0, 2, 0, 0, 0, 0]
        figure = metrics.weighted_f1(found, truth, list("abcdefgh"), paper.SSM_WEIGHTS)
        assert figure.value == pytest.approx((0.45 * 4 / 5 + 0.2 * 2 / 3) / 0.65)
        assert sum(paper.SSM_WEIGHTS.values()) == pytest.approx(1)

    def test_ours_stand_beside_the_same_network(self):
        cases = [case(f"p{k}", rows=10, drawn=12) for k in range(3)]
        lesions, classes = published.tables([of("ssm", SSM, *cases, model=Detects())])
        row = cells(lesions)["SSM^S (ResNet18+FPN), 2 blocks, ours: ours 0123"]
        assert row["AP@0.5:0.95"] == ("0.3923", "0.700")
        assert row["AP@0.5, COCO"] == ("–", "1.000")
        row = cells(classes)["SSM^S (ResNet18+FPN), 2 blocks, ours: ours 0123"]
        assert row["COVID-19, %"] == ("93.16", "100.0")
        assert row["common pneumonia, %"] == ("95.68", "not measurable here")
        assert row["F1"] == ("0.9542", "1.000")
        pretrained = {"ssm": {**SSM["ssm"], "recipe": '{"options": {"pretrain": 9}}'}}
        lesions, _ = published.tables([of("ssm", pretrained, *cases)])
        assert "SSM² (ResNet18+FPN), 2 blocks, ours: ours 0123" in cells(lesions)

    @pytest.mark.parametrize(
        ("classes", "pneumonia", "normal"), [("3", "50.0", "100.0"), ("2", "not measurable here", "66.7")]
    )
    def test_of_labelled_pictures_each_is_given_a_class(self, classes, pneumonia, normal):
        """Rightly but for one of pneumonia, which is called COVID-19; whose they are is unknown."""
        told = {"a": ("covid", 2), "b": ("other", 1), "c": ("other", 2), "d": ("healthy", 0)}
        network = {"ssm": {**SSM["ssm"], "classes": classes}}
        evaluation = of("ssm", network, *(case(name) for name in told))
        scores = []
        for score in evaluation.scores:
            diagnosis, found = told[score.name]
            found = found if classes == "3" else 2 * (found == 2)
            own = {"class": float(found)}
            scores.append(replace(score, picture=True, diagnosis=Diagnosis(diagnosis), slices=(), own=own))
        _, table = published.tables([replace(evaluation, scores=tuple(scores))])
        row = cells(table)["SSM^S (ResNet18+FPN), 2 blocks, ours: ours 0123"]
        ours = {column: mine for column, (_, mine) in row.items()}
        assert ours["COVID-19, %"] == "100.0"
        assert (ours["common pneumonia, %"], ours["normal, %"]) == (pneumonia, normal)
        assert ours["overall, %"] == "75.0"
        f1 = (0.45 * 1 + 0.35 * 2 / 3 + 0.2 * 2 / 3) if classes == "3" else (0.45 * 0.8 + 0.2 * 2 / 3) / 0.65
        assert ours["F1"] == f"{f1:.3f}"

    def test_the_recipe_has_a_variant_for_every_row(self):
        recipe = recipes.load("ssm")
        rows = []
        for name in recipe.variants:
            one = recipe.variant(name)
            way = "scratch" if not one.options.get("pretrain") else None
            way = way or ("single" if one.network["branches"] == 1 else "parallel")
            rows.append((way, one.network["encoder"], one.network["blocks"]))
        assert sorted(rows) == sorted(paper.SSM_LESIONS) == sorted(paper.SSM_CLASSES)
