"""The evaluator, with a network whose answers are known, and the command on tiny made-up data sets."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from tests.needs import DATA, needs_data
from tests.test_packages import Brighter, package
from triage.cli import app
from triage.config import Analysis
from triage.domain import Findings, Grade, ModelInfo, Status, Volume
from triage.errors import ConfigError, Rejected
from triage.models import packages
from triage.training import evaluation, metrics, paper, plots, report, tables
from triage.training.cases import Case, Diagnosis
from triage.training.evaluation import Evaluation, evaluate, summarise

ROOT = Path(__file__).parents[1]
SHAPE, SPACING = (6, 40, 60), (20.0, 4.0, 4.0)
TISSUE, LUNG, LESION = 40, -850, -450
THRESHOLD = 0.3


class Honest:
    """Sees what was painted: air is lung, haze is lesion with probability 0.8, the rest 0.1."""

    info = ModelInfo(
        name="ours", version="0123", summary="", calibrated=False, card="A <card>.", system="multitask"
    )
    settings = {"lesion_threshold": THRESHOLD}  # noqa: RUF012

    def predict(self, volume):
        lung = volume.array < -300
        if not lung.any():
            raise Rejected("no lungs found")
        lesion = (self.lesion_map(volume, lung) > THRESHOLD) & lung
        fraction = lesion.sum() / lung.sum()
        return Findings(float(fraction / (fraction + 0.03)), "score", False, lung, lesion)

    def lesion_map(self, volume, lung_mask):
        p = np.where(np.abs(volume.array - LESION) < 100, 0.8, 0.1).astype(np.float32)
        return p if lung_mask is None else p * lung_mask


class Classifier(Honest):
    """Draws no lesions."""

    settings = {"precision": "float32"}  # noqa: RUF012

    def predict(self, volume):
        return replace(Honest().predict(volume), lesion_mask=None, probability_kind="classifier")

    def lesion_map(self, volume, lung_mask):
        return None


def boxes(rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Lungs of 16 columns each; lesions fill some rows (of 20) of the left one."""
    lung, lesion = np.zeros((2, *SHAPE), dtype=bool)
    lung[1:5, 10:30, 6:22] = lung[1:5, 10:30, 38:54] = True
    lesion[1:5, 10 : 10 + rows, 38:54] = True
    return lung, lesion


def case(name: str, rows: int = 10, drawn: int | None = None, **changes) -> Case:
    """``rows`` are painted, ``drawn`` are drawn (the same unless told)."""
    lung, painted = boxes(rows)
    hu = np.full(SHAPE, TISSUE, dtype=np.int16)
    hu[lung], hu[painted] = LUNG, LESION
    lesion = boxes(rows if drawn is None else drawn)[1]
    plain = Case(
        name=name, patient=name, volume=Volume(hu, SPACING), lung=lung, lesions=(lesion,),
        diagnosis=Diagnosis.COVID,
    )  # fmt: skip
    return replace(plain, **changes)


def picture(name: str, painted: int = 10, drawn: int = 10) -> Case:
    hu = np.full((1, 20, 30), LUNG, dtype=np.int16)
    hu[0, :painted] = LESION
    truth = np.zeros(hu.shape, dtype=bool)
    truth[0, :drawn] = True
    return Case(
        name=name, patient=name, volume=Volume(hu, (1.0, 2.0, 2.0)), lesions=(truth,), millimetres=False,
        cropped=True,
    )  # fmt: skip


def solid(name: str, **changes) -> Case:
    """Drawn as ``case``, but the images show no lungs."""
    return replace(case(name, **changes), volume=Volume(np.full(SHAPE, TISSUE, dtype=np.int16), SPACING))


def ml(mask: np.ndarray) -> float:
    return float(mask.sum() * np.prod(SPACING) / 1000)


def judged(*cases: Case, model=None):
    return evaluate(model or Honest(), cases, "made-up")


class TestScore:
    def test_of_a_perfect_answer(self):
        (score,) = judged(case("a"))
        assert score.lungs == score.lesions == evaluation.Overlap(1.0, 1.0, 0.0, 0.0)
        assert score.drawn == score.found
        assert score.found.fraction == pytest.approx(0.5)  # of the left lung
        assert score.found.both_lungs == pytest.approx(0.25)
        assert score.found.grade == Grade.CT2
        assert (score.status, score.picture, score.data) == (Status.POSITIVE, False, "made-up")
        assert score.seconds > 0

    def test_of_lesions_drawn_larger(self):
        (score,) = judged(case("a", rows=10, drawn=16))
        assert score.lesions.dice == pytest.approx(2 * 10 / 26)
        assert score.lesions.iou == pytest.approx(10 / 16)
        assert score.lesions.hd95_mm == pytest.approx(24.0)
        assert score.lesions.volume_error_ml == pytest.approx(-6 * 16 * 4 * 20 * 4 * 4 / 1000)
        assert (score.drawn.fraction, score.found.fraction) == pytest.approx((0.8, 0.5))
        assert (score.drawn.grade, score.found.grade) == (Grade.CT4, Grade.CT2)

    def test_without_millimetres_nothing_is_in_mm_or_ml(self):
        (score,) = judged(case("a", millimetres=False))
        for overlap in (score.lungs, score.lesions):
            assert overlap.dice == 1
            assert overlap.hd95_mm is overlap.volume_error_ml is None

    def test_several_raters_are_averaged(self):
        raters = (boxes(10)[1], boxes(16)[1])
        (score,) = judged(case("a", lesions=raters))
        assert score.lesions.dice == pytest.approx((1 + 20 / 26) / 2)
        assert score.drawn.fraction == pytest.approx((0.5 + 0.8) / 2)
        assert len(score.histograms) == 2
        assert score.fraction_error_at(THRESHOLD) == pytest.approx((0.5 - 0.65) / 2)

    def test_where_nobody_drew_the_lungs_the_networks_serve(self):
        (score,) = judged(case("a", drawn=16, lung=None))
        assert score.lungs is None
        assert score.drawn.fraction == pytest.approx(0.8)

    def test_where_nobody_drew_lesions_only_the_answer_is_kept(self):
        (score,) = judged(case("a", lesions=()))
        assert score.lesions is score.drawn is None
        assert score.found.fraction == pytest.approx(0.5)
        assert score.fraction_error_at(0.5) is None

    def test_a_single_slice_has_no_answer(self):
        """Whole lungs cannot be seen in it; that is not a failure of the network."""
        (score,) = judged(replace(picture("a", drawn=4), cropped=False))
        assert score.picture
        assert score.lesions is not None
        assert (score.status, score.reason) == (None, "")

    def test_of_a_rejected_case_is_an_honest_zero_with_the_reason(self):
        rejected, good = judged(solid("a"), case("b"))
        assert (rejected.status, rejected.reason) == (Status.NOT_ANALYSABLE, "no lungs found")
        assert rejected.lungs == evaluation.Overlap(0.0, 0.0, None, -ml(boxes(10)[0]))
        assert rejected.lesions == evaluation.Overlap(0.0, 0.0, None, -ml(boxes(10)[1]))
        assert rejected.found == evaluation.Extent(0.0, 0.0, None, 0.0, 0.0)
        assert rejected.drawn == good.drawn
        assert rejected.probability is None
        assert good.status == Status.POSITIVE
        assert evaluation.from_json(evaluation.to_json([rejected])) == [rejected]

    def test_of_a_rejected_case_says_nothing_of_what_nobody_drew(self):
        (score,) = judged(solid("a", lung=None, lesions=()))
        assert score.lungs is score.lesions is score.drawn is None

    def test_a_rejected_case_is_no_perfect_answer_where_no_lesion_was_drawn(self):
        (score,) = judged(solid("a", rows=0))
        assert score.lesions.dice == 0

    def test_a_rejected_case_of_a_network_without_lesions_has_none(self):
        (score,) = judged(solid("a"), model=Classifier())
        assert score.lungs.dice == 0
        assert score.lesions is score.found is None

    def test_nobody_is_negative_in_doubt(self):
        lung, _ = boxes(0)
        lung[:] = lung[1]  # the images end inside the lungs
        hu = np.where(lung, LUNG, TISSUE).astype(np.int16)
        (score,) = judged(case("a", volume=Volume(hu, SPACING)))
        assert score.status == Status.NOT_ANALYSABLE
        assert "end inside the lungs" in score.reason
        assert score.lesions is not None

    def test_of_too_little_lung_is_not_analysable_where_ml_are_known(self):
        small = Volume(case("a").volume.array, (5.0, 2.0, 2.0))
        known, unknown = judged(case("a", volume=small), case("b", volume=small, millimetres=False))
        assert (known.status, known.reason) == (
            Status.NOT_ANALYSABLE,
            "only 51 ml of lung found, below 500 ml",
        )
        assert unknown.status == Status.POSITIVE

    def test_the_working_point_is_the_settings(self):
        faint = case("a", rows=2)  # 5 % of both lungs, 10 % of the left one
        strict = Analysis(positive_probability=0.9, positive_fraction=0.11)
        assert judged(faint)[0].status == Status.POSITIVE
        assert evaluate(Honest(), [faint], analysis=strict)[0].status == Status.NEGATIVE

    def test_of_a_picture(self):
        (score,) = judged(picture("a", painted=5, drawn=10))
        assert score.picture
        assert score.status is score.found is score.lungs is None
        assert score.lesions.dice == pytest.approx(10 / 15)
        stretched = np.zeros((1, 20, 30), dtype=np.float32)
        stretched[0, :5] = 1
        truth = picture("a", drawn=10).lesions[0]
        assert score.threshold_averaged_dice == pytest.approx(
            metrics.threshold_averaged_dice(stretched, truth)
        )

    def test_of_a_network_that_only_classifies(self):
        volume, slice_ = judged(case("a"), picture("b"), model=Classifier())
        assert volume.probability > 0.5
        assert volume.lungs.dice == 1
        assert volume.found is volume.lesions is slice_.lesions is None

    def test_is_stored_and_read_back(self):
        scores = judged(
            case("a", lesions=(boxes(3)[1], boxes(5)[1])), picture("b"), case("c", grade=Grade.CT3)
        )
        assert evaluation.from_json(evaluation.to_json(scores)) == scores

    def test_the_affected_fraction_at_any_threshold_comes_from_the_stored_score(self):
        cases = [case("a", drawn=16), case("b", drawn=4)]
        stored = evaluation.from_json(evaluation.to_json(judged(*cases)))
        curve = evaluation.threshold_curve(stored, [0.05, 0.3, 0.9])
        drawn = np.array([16 / 40, 4 / 40])  # rows of both lungs
        for threshold, found in ((0.05, 1), (0.3, 10 / 40), (0.9, 0)):
            assert curve[threshold] == pytest.approx(np.abs(found - drawn).mean())


class TestSummary:
    def test_says_what_the_cases_cannot_tell(self):
        figures = summarise(judged(case("a", millimetres=False))).figures
        assert figures.keys() == evaluation.FIGURES.keys()
        for key in ("auc_healthy", "specificity", "lesions_hd95", "lungs_volume_error", "pictures_dice"):
            assert figures[key].value is None
            assert figures[key].reason
        assert (
            figures["auc_others"].reason == "needs patients of both groups; here 1 with COVID-19 and 0 others"
        )
        assert figures["lesions_dice"].value == 1
        assert "fewer than 3 patients" in figures["lesions_dice"].reason

    def test_named_figures_keep_unit_and_reason(self):
        named = summarise(judged(case("a", drawn=16))).named()
        assert list(named) == list(evaluation.FIGURES)
        assert named["fraction_error"] == {
            "name": "Affected fraction, mean error", "value": pytest.approx(30), "low": None, "high": None,
            "n": 1, "patients": 1, "unit": "points", "where": "made-up",
            "reason": "no interval from fewer than 3 patients",
        }  # fmt: skip
        assert named["specificity"]["value"] is None
        assert named["specificity"]["reason"] == "no volume of a patient without COVID-19"

    def test_identification_needs_both_groups(self):
        ill = [case(f"ill{k}", rows=2 + 3 * k) for k in range(5)]
        well = [case(f"well{k}", rows=0, diagnosis=Diagnosis.HEALTHY) for k in range(4)]
        other = case("other", rows=4, diagnosis=Diagnosis.OTHER)
        figures = summarise(judged(*ill, *well, other)).figures
        assert figures["auc_healthy"].value == 1
        assert figures["auc_others"].value == pytest.approx((5 * 4 + 4) / 25)  # one ill below "other"
        assert figures["auc_others"].low < figures["auc_others"].value < figures["auc_others"].high
        assert (figures["sensitivity"].value, figures["sensitivity"].n) == (1, 5)
        assert figures["specificity"].value == pytest.approx(4 / 5)
        assert figures["specificity"].low == pytest.approx(metrics.wilson(4, 5)[0])
        assert figures["spearman"].value == pytest.approx(1)

    def test_what_was_not_analysable_is_told_and_counts_as_wrong(self):
        summary = summarise(judged(case("a"), solid("b"), case("c")))
        assert summary.not_analysable == (("b", "no lungs found"),)
        assert summary.figures["sensitivity"].value == pytest.approx(2 / 3)

    def test_lungs_that_were_not_found_are_in_every_figure(self):
        good = [case(f"p{k}", grade=Grade.CT2) for k in range(6)]
        figures = summarise(judged(*good, solid("lost", grade=Grade.CT2))).figures
        for key in ("lungs_dice", "lungs_iou", "lesions_dice", "lesions_dice_over_1_percent", "lesions_iou"):
            assert (figures[key].value, figures[key].n) == (pytest.approx(6 / 7), 7), key
        assert figures["lungs_dice_worst"].value == 0
        assert figures["fraction_error"].value == pytest.approx(50 / 7)
        assert figures["fraction_error_worst"].value == pytest.approx(50)
        assert figures["fraction_bias"].value == pytest.approx(-50 / 7)
        assert figures["grade_agreement"].value == pytest.approx(6 / 7)
        assert figures["grade_agreement_read"].value == pytest.approx(6 / 7)

    def test_lungs_that_nobody_marked_do_not_hide_a_zero(self):
        figures = summarise(judged(case("a"), solid("b", lung=None))).figures
        assert figures["lesions_dice_over_1_percent"].value == pytest.approx(0.5)

    def test_an_auc_tells_of_cases_without_an_answer(self):
        well = [case(f"w{k}", rows=0, diagnosis=Diagnosis.HEALTHY) for k in range(3)]
        figures = summarise(judged(case("a"), solid("b"), *well)).figures
        assert "1 without an answer left out" in figures["auc_healthy"].reason

    def test_patients_count_once(self):
        twice = [case("a1", patient="a", drawn=16), case("a2", patient="a", drawn=16)]
        figures = summarise(judged(*twice, case("b"))).figures
        assert figures["lesions_dice"].value == pytest.approx((20 / 26 + 1) / 2)
        assert (figures["lesions_dice"].n, figures["lesions_dice"].patients) == (3, 2)
        assert figures["fraction_error"].value == pytest.approx(15)
        assert figures["fraction_error_worst"].value == pytest.approx(30)
        assert figures["fraction_bias"].value == pytest.approx(-15)

    def test_the_worst_is_a_volume_not_a_patients_mean(self):
        good, bad = case("a1", patient="a"), case("a2", patient="a", drawn=16)
        half = replace(bad, lung=boxes(0)[0] & (np.arange(SHAPE[2]) < 30))
        figures = summarise(judged(good, half, case("b"))).figures
        assert figures["lungs_dice"].value == pytest.approx(((1 + 2 / 3) / 2 + 1) / 2)
        assert figures["lungs_dice_worst"].value == pytest.approx(2 / 3)
        figures = summarise(judged(good, bad)).figures
        worst = figures["fraction_error_worst"]
        assert (worst.value, worst.n, worst.patients) == (pytest.approx(30), 2, 1)
        assert worst.reason == "an extreme: no interval"

    def test_next_to_no_lesion_is_kept_out_of_one_figure(self):
        speck = np.zeros(SHAPE, dtype=bool)
        speck[2, 12, 40:44] = True
        figures = summarise(judged(case("a"), case("b", rows=0, lesions=(speck,)))).figures
        assert figures["lesions_dice"].value == pytest.approx(0.5)
        assert figures["lesions_dice_over_1_percent"].value == 1

    def test_a_classifier_is_ranked_by_its_probability(self):
        cases = [case(f"p{k}", rows=k) for k in (3, 6, 9, 12)]
        figures = summarise(judged(*cases, model=Classifier())).figures
        assert figures["lesions_dice"].value is None
        assert figures["spearman"].value == pytest.approx(1)

    def test_the_radiologists_grade_is_compared_apart(self):
        cases = [case("a", grade=Grade.CT2), case("b", grade=Grade.CT4), case("c")]
        figures = summarise(judged(*cases)).figures
        assert (figures["grade_agreement_read"].value, figures["grade_agreement_read"].n) == (0.5, 2)
        assert figures["grade_agreement"].value == 1

    def test_of_pictures(self):
        figures = summarise(judged(picture("a"), picture("b", drawn=5), picture("c", drawn=15))).figures
        assert figures["pictures_dice"].value == pytest.approx((1 + 10 / 15 + 20 / 25) / 3)
        assert figures["pictures_dice_threshold_averaged"].value < figures["pictures_dice"].value
        assert figures["lesions_dice"].value is None


class TestPicturesWithoutDrawings:
    """As in SARS-CoV-2 CT-scan: slices cut to the lungs of patients with and without COVID-19, no masks."""

    cases = tuple(
        replace(picture(f"{diagnosis.value}{rows}", painted=rows), lesions=(), diagnosis=diagnosis)
        for diagnosis, every in ((Diagnosis.COVID, (3, 9, 14)), (Diagnosis.OTHER, (0, 1, 5)))
        for rows in every
    )

    def test_are_ordered_by_their_share_of_lesion(self):
        scores = judged(*self.cases)
        shares = [rows / 20 for rows in (3, 9, 14, 0, 1, 5)]
        assert [s.probability for s in scores] == pytest.approx([share / (share + 0.03) for share in shares])
        assert scores[0].lesions is scores[0].status is scores[0].found is None
        figure = summarise(scores).figures["pictures_auc"]
        assert (figure.value, figure.n) == (pytest.approx(8 / 9), 6)  # 3 rows of the ill, 5 of another

    def test_have_no_interval_where_patients_are_unknown(self):
        figure = summarise(judged(*self.cases)).figures["pictures_auc"]
        assert figure.low is figure.high is None
        assert figure.reason == "patients unknown: no interval"
        known = [replace(case, patient=f"p{k}") for k, case in enumerate(self.cases)]
        assert summarise(judged(*known)).figures["pictures_auc"].low is not None

    def test_are_not_for_a_network_without_lesions(self):
        figure = summarise(judged(*self.cases, model=Classifier())).figures["pictures_auc"]
        assert figure.value is None
        assert figure.reason == "the network finds no lesions, and is not asked about cropped pictures"


class TestGallery:
    def test_keeps_the_worst_upright(self):
        gallery = evaluation.Gallery(size=2)
        cases = [case(str(drawn), drawn=drawn) for drawn in (10, 2, 8, 5)]
        evaluate(Honest(), cases, gallery=gallery)
        assert [sketch.score.name for sketch in gallery.worst()] == ["2", "5"]
        worst = gallery.worst()[0]
        assert worst.image.shape == worst.drawn.shape == worst.found.shape == SHAPE[1:]
        assert (worst.found ^ worst.drawn).sum() == 8 * 16

        upside_down = Volume(cases[1].volume.array, SPACING, (1.0, 0.0, 0.0, 0.0, -1.0, 0.0))
        gallery = evaluation.Gallery()
        evaluate(Honest(), [replace(cases[1], volume=upside_down)], gallery=gallery)
        assert (gallery.worst()[0].image == worst.image[::-1]).all()

    def test_shows_lungs_that_were_not_found(self):
        gallery = evaluation.Gallery(size=1)
        evaluate(Honest(), [case("a", drawn=16), solid("lost")], gallery=gallery)
        (worst,) = gallery.worst()
        assert worst.score.name == "lost"
        assert worst.drawn.any()
        assert not worst.found.any()


def evaluated(*cases: Case, model=None) -> Evaluation:
    gallery = evaluation.Gallery()
    model = model or Honest()
    scores = evaluate(model, cases, "semiseg", gallery=gallery)
    return Evaluation(
        info=model.info, settings=model.settings, sources={"semiseg": Path("somewhere")}, trained_on=(),
        patients_chosen=(),
        scores=tuple(scores), summary=summarise(scores), worst=tuple(gallery.worst()),
    )  # fmt: skip


class Page(HTMLParser):
    """Sources of a page's pictures, addresses it would ask, and its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.images: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name == "src":
                self.images.append(value)
            elif name in ("href", "action", "srcset", "data"):
                self.addresses.append(value)

    def handle_data(self, data):
        self.text += data


class TestReport:
    date = datetime(2026, 11, 21, tzinfo=UTC)

    def test_cases_that_were_trained_on_are_told(self, tmp_path):
        unseen = evaluated(case("a"), case("b"))
        seen = replace(unseen, trained_on=("b",))
        for asked, told in ((unseen, False), (seen, True)):
            page = Page(report.write(asked, tmp_path / str(told), self.date)).text
            console = Console(width=200)
            with console.capture() as printed:
                console.print(tables.for_people([asked]))
            for text in (page, printed.get()):
                assert ("1 of these 2 cases belong to what this network was trained on" in text) == told
        assert tables.as_json(seen)["trained_on"] == ["b"]

    def written(self, folder: Path, *cases: Case) -> Page:
        return Page(report.write(evaluated(*cases), folder / "report", self.date))

    def test_of_all_that_can_be_drawn(self, tmp_path):
        cases = [case(f"p{k}", rows=k, drawn=k + 1, grade=Grade.CT1) for k in range(1, 8)]
        well = [case(f"w{k}", rows=0, diagnosis=Diagnosis.HEALTHY) for k in range(4)]
        page = self.written(tmp_path, *cases, *well, picture("q<1>", drawn=4))
        folder = tmp_path / "report"
        assert {p.name for p in folder.glob("*.png")} == set(page.images)
        for name in (
            "ranking",
            "fractions",
            "bland_altman",
            "grades",
            "fractions_by_grade",
            "roc",
            "reliability",
        ):
            with Image.open(folder / f"{name}.png") as image:
                assert len(np.unique(np.asarray(image))) > 20, name
        assert "worst_6.png" in page.images
        assert page.addresses == []
        assert not re.search(r"url\(|@import|https?:", (folder / "report.html").read_text())
        for words in (
            "not a medical device",
            "2026-11-21",
            "multitask",
            "ours",
            "0123",
            "A <card>.",
            "q<1>",
            "p7",
        ):
            assert words in page.text
        assert evaluation.from_json((folder / "scores.json").read_text())[0].name == "p1"

    def test_of_lungs_that_were_not_found(self, tmp_path):
        page = self.written(
            tmp_path, *(case(f"p{k}", rows=k, grade=Grade.CT1) for k in (2, 5)), solid("lost")
        )
        assert "no lungs found" in page.text
        assert "affected fraction count as 0" in " ".join(page.text.split())

    def test_a_plot_without_data_is_a_sentence(self, tmp_path):
        page = self.written(tmp_path, picture("a"))
        assert page.images == ["reliability.png", "worst_1.png"]
        for sentence in (
            "No volume was judged",
            "A ROC curve needs",
            "No volume has a grade",
            "Limits of agreement",
        ):
            assert sentence in page.text

    def test_a_ranking_is_labelled_by_what_is_shown(self):
        cases = [case("p1", rows=4), case("p2", rows=12)]
        right = plots.ranking_plot(evaluated(*cases)).axes[1]
        assert right.get_ylabel() == "affected, % of the worse lung"
        assert [bar.get_height() for bar in right.patches] == pytest.approx([60, 20])
        by_p, drawn = plots.ranking_plot(evaluated(*cases, model=Classifier())).axes[1:]
        assert by_p.get_ylabel() == "P: the network finds no lesions"
        assert all(0.7 < bar.get_height() < 1 for bar in by_p.patches)
        assert drawn.get_ylabel() == "drawn (dashes): affected, % of the worse lung"
        assert drawn.collections[0].get_offsets()[:, 1].tolist() == pytest.approx([60, 20])

    def test_a_roc_curve_of_two_patients_has_no_band(self):
        few = [case("p1", rows=4), case("w1", rows=0, diagnosis=Diagnosis.HEALTHY)]
        many = [case(f"p{k}", rows=k) for k in (1, 4, 8)]
        many += [case(f"w{k}", rows=k, diagnosis=Diagnosis.HEALTHY) for k in (0, 2, 3)]
        assert len(plots.roc(evaluated(*few)).axes[0].collections) == 0
        assert len(plots.roc(evaluated(*many)).axes[0].collections) > 0

    def test_a_worst_case_shows_both_contours(self, tmp_path):
        self.written(tmp_path, case("a", drawn=16))
        with Image.open(tmp_path / "report" / "worst_1.png") as image:
            pixels = np.asarray(image.convert("RGB")).reshape(-1, 3).astype(int)
        for colour in ((0x56, 0xB4, 0xE9), (0xD5, 0x5E, 0x00)):
            assert (np.abs(pixels - colour).sum(axis=1) < 30).sum() > 100


class TestTables:
    def test_a_rejected_volume_has_zeros_and_no_grade(self):
        ((_, *cells),) = tables.volume_rows(evaluated(solid("lost")))
        assert cells == ["lost", "0.000", "0.000", "50.0 %", "0.0 %", "2 → –", "", "not analysable"]

    def test_the_papers_table_has_every_method_and_ours_beside(self):
        rows = dict(tables.paper_rows([evaluated(*(case(f"p{k}", rows=k) for k in (2, 5, 9)))]))
        names = [published.name for published in paper.TABLE.values()]
        assert [name.partition(", ours")[0] for name in rows] == names
        not_here = "not measurable here"
        ours = [("0.978", not_here), ("0.951", not_here), ("0.98", "1.000"), ("0.48", "1.000")]
        assert rows["Proposed (multitask), ours: ours 0123"] == ours
        assert rows["ResNet50"][3] == ("–", "not run")

    def test_networks_of_one_name_have_a_row_each(self):
        first = evaluated(case("a"))
        second = replace(evaluated(case("a", drawn=16)), info=replace(first.info, version="4567"))
        other = replace(first, info=replace(first.info, system="exported"))
        rows = dict(tables.paper_rows([first, second, other]))
        assert rows["Proposed (multitask), ours: ours 0123"][3] == ("0.48", "1.000")
        assert rows["Proposed (multitask), ours: ours 4567"][3] == ("0.48", "0.769")
        assert rows["ours: ours 0123"][3] == ("–", "1.000")
        assert [row[0] for row in tables.published_rows([first, second])][-2:] == [
            "ours: ours 0123", "ours: ours 4567",
        ]  # fmt: skip

    def test_json_is_of_the_pictures_where_there_are_any(self):
        answer = tables.as_json(evaluated(case("a"), picture("b", drawn=5), picture("c")))
        assert answer["dice"] == pytest.approx((10 / 15 + 1) / 2)
        assert answer["n"] == 2
        assert json.loads(json.dumps(answer, allow_nan=False))["figures"]["lesions_dice"]["value"] == 1
        volumes = tables.as_json(evaluated(case("a"), case("b", drawn=16)))
        assert volumes["dice"] == pytest.approx((1 + 20 / 26) / 2)
        assert volumes["dice_threshold_averaged"] is None


def triage(*arguments: str | Path, status: int = 0) -> Result:
    ended = CliRunner().invoke(app, ["evaluate", *map(str, arguments)])
    assert ended.exit_code == status, ended.stderr
    return ended


@pytest.fixture(scope="module")
def semiseg(tmp_path_factory) -> Path:
    """Three pictures as COVID-SemiSeg lays them out, turned by 90°, each with a bright patch.

    Drawn as lesion is the patch itself, the patch and as much beside it, and something else.
    """
    folder = tmp_path_factory.mktemp("semiseg50")
    for kind in ("Imgs", "GT"):
        (folder / kind).mkdir()
    rng = np.random.default_rng(1)
    for k in range(3):
        gray = rng.normal(30, 8, (200, 150)).clip(0, 255)
        gray[40 + 20 * k : 90 + 20 * k, 20:60] += 120
        truth = np.zeros(gray.shape, np.uint8)
        truth[40 + 20 * k : 90 + 20 * k, [slice(20, 60), slice(20, 100), slice(80, 120)][k]] = 255
        Image.fromarray(gray.clip(0, 255).astype(np.uint8)).save(folder / "Imgs" / f"{k}.jpg")
        Image.fromarray(truth).save(folder / "GT" / f"{k}.png")
    return folder


@pytest.fixture(scope="module")
def bright(tmp_path_factory) -> Path:
    """A network that calls lesion what is bright: its Dice on ``semiseg`` can be told without it."""
    return package(tmp_path_factory.mktemp("networks") / "bright", Brighter(0.3))


class TestCommand:
    def test_json_of_a_folder_of_pictures(self, semiseg, bright):
        """The patches are 50 by 40 pixels; the network sees them at 2 mm: rims are worth 1 or 2 %."""
        arguments = ["evaluate", "--model", str(bright), "--data", f"semiseg={semiseg}", "--json"]
        command = [sys.executable, "-m", "triage", *arguments]
        printed = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
        answer = json.loads(printed)
        assert answer["n"] == 3
        by_name = {score["name"]: score["lesions"]["dice"] for score in answer["scores"]}
        patch, wider, elsewhere = (by_name[f"semiseg_{k}"] for k in range(3))
        assert (patch, wider, elsewhere) == pytest.approx((1, 2 / 3, 0), abs=0.03)
        assert answer["dice"] == pytest.approx((patch + wider + elsewhere) / 3)
        assert answer["dice_threshold_averaged"] == pytest.approx(5 / 9, abs=0.03)

    def test_reports_of_two_networks_of_one_name_lie_beside_each_other(self, semiseg, bright, tmp_path):
        brighter = package(tmp_path / "bright", Brighter(0.4))
        arguments = ["--model", bright, "--model", brighter, "--data", f"semiseg={semiseg}"]
        text = triage(*arguments, "--patients", "semiseg_1", "--report", tmp_path / "report").stdout
        versions = [packages.read(folder).version for folder in (bright, brighter)]
        folders = [tmp_path / "report" / f"mine_{version}" for version in versions]
        assert sorted((tmp_path / "report").iterdir()) == sorted(folders)
        for folder, version in zip(folders, versions, strict=True):
            assert f"Weights {version}" in Page(folder / "report.html").text
            assert str(folder) in text

    def test_for_people_with_a_report(self, semiseg, tmp_path):
        folder = tmp_path / "report"
        text = triage("--data", f"semiseg={semiseg}", "--patients", "semiseg_1", "--report", folder).stdout
        for words in ("1 picture, semiseg", "not measurable here", "0.739", "Thresholding"):
            assert words in text
        assert "semiseg_0" not in text
        assert "semiseg_1" in Page(folder / "report.html").text

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["--data", "semiseg"], "KIND=PATH"),
            (["--data", "nosuch=/tmp"], "unknown kind of data"),
            (["--data", "semiseg=/nowhere"], "/nowhere"),
        ],
    )
    def test_a_mistake_is_told_in_a_sentence(self, arguments, words):
        ended = triage(*arguments, status=78)
        assert words in ended.stderr
        assert "Traceback" not in ended.stderr

    def test_a_patient_who_is_not_there(self, semiseg):
        with pytest.raises(ConfigError, match="no case of patient p9"):
            evaluation.run(Analysis(), {"semiseg": semiseg}, ("semiseg_0", "p9"))


@needs_data
def test_volumes_of_real_patients() -> None:
    """The whole pipeline on one patient; nothing here says how good the network is."""
    result = evaluation.run(Analysis(), {"medseg9": DATA / "train"}, ("p5",))
    assert [score.patient for score in result.scores] == ["p5", "p5"]
    assert result.summary.figures["lungs_dice"].value > 0.9
    for score in result.scores:
        threshold = float(result.settings["lesion_threshold"])
        found, wrong, missed = score.histograms[0].counts(threshold)
        assert 2 * found / (2 * found + wrong + missed) == pytest.approx(score.lesions.dice, abs=0.001)
