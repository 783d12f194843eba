"""Slices judged one by one, and the tables of two papers with our figures beside."""

import json
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pytest
from rich.console import Console

from tests.test_evaluation import Classifier, Honest, Page, boxes, case, evaluated, judged, solid
from triage.domain import Grade
from triage.training import metrics, paper, published, report, tables
from triage.training import recipe as recipes
from triage.training.cases import Diagnosis
from triage.training.evaluation import Evaluation, from_json, summarise, to_json
from triage.training.run import chain
from triage.training.scores import BySlice, SliceAnswer

NOT_HERE = "not measurable here"


class Judges(Honest):
    """Also judges slices: by the share of haze in its lungs, ten times as sure, so that 5 % are 0.5."""

    def predict(self, volume):
        findings = super().predict(volume)
        lesion, lung = (m.sum(axis=(1, 2)) for m in (findings.lesion_mask, findings.lung_mask))
        scores = np.minimum(1, 10 * lesion / np.maximum(lung, 1)).astype(np.float32)
        return replace(findings, slice_scores=scores)


class Grades(Judges):
    """By the mean over slices."""

    def predict(self, volume):
        return replace(super().predict(volume), grade_from="percent_infection")


def of(system: str, networks: Mapping[str, Mapping[str, str]], *cases, model=None) -> Evaluation:
    """An evaluation of a network of another system, built from these facts."""
    plain = evaluated(*cases, model=model or Judges())
    return replace(plain, info=replace(plain.info, system=system), networks=networks)


def cells(table: published.Published) -> dict[str, dict[str, tuple[str, str]]]:
    return {name: dict(zip(table.columns, row, strict=True)) for name, row in table.rows}


class TestMeasures:
    def test_by_hand(self):
        """Of 5 positives 4 are found, of 5 others 3 are called so too."""
        counts = metrics.Counts(tp=4, fp=2, fn=1, tn=3)
        assert counts.accuracy == pytest.approx(7 / 10)
        assert counts.sensitivity == pytest.approx(4 / 5)
        assert counts.specificity == pytest.approx(3 / 5)
        assert counts.precision == pytest.approx(4 / 6)
        assert counts.f1 == pytest.approx(2 * (4 / 6) * (4 / 5) / (4 / 6 + 4 / 5))
        assert counts.average_accuracy == pytest.approx(0.7)
        assert np.isnan(metrics.Counts(0, 0, 0, 3).sensitivity)

    def test_are_of_all_answers_together(self):
        patients = ["a"] * 4 + ["b"] * 2 + ["c"] * 2
        truth = [True, True, False, False, True, False, True, False]
        found = [True, False, False, True, True, False, True, False]
        figures = metrics.measures(found, truth, patients)
        assert figures["accuracy"].value == pytest.approx(6 / 8)
        assert figures["sensitivity"].value == pytest.approx(3 / 4)
        assert (figures["sensitivity"].n, figures["sensitivity"].patients) == (8, 3)
        assert figures["accuracy"].low < 6 / 8 < figures["accuracy"].high

    def test_a_mean_of_slices_counts_slices(self):
        figure = metrics.slice_mean([1.0, 0.5], [30, 10], ["a", "b"])
        assert figure.value == pytest.approx((30 + 5) / 40)
        assert (figure.n, figure.patients) == (40, 2)

    def test_the_papers_interval_is_that_of_its_tables(self):
        """Table 5, lungs of DenseNet161 UNet, and table 8, CT-2 of 125 patients; 0.5 ± 0.196 of 25."""
        assert published.r(0.5, 25) == pytest.approx(1.96 * 0.1)
        assert 100 * published.r(0.9719, 4616) == pytest.approx(0.48, abs=0.005)
        assert 100 * published.r(0.712, 125) == pytest.approx(7.94, abs=0.005)
        assert published.r(1.0, 7) == 0


class TestSlices:
    def test_means_count_an_empty_slice_as_found(self):
        """Of six slices four have lung; the lesion fills 10 rows in each, 16 are drawn."""
        (score,) = judged(case("a", rows=10, drawn=16))
        assert score.lungs_by_slice == BySlice(6, 1.0, 1.0, 1.0)
        wrong = 6 * 16 / (40 * 60)  # rows × columns of a slice
        means = score.lesions_by_slice
        assert means.n == 6
        assert means.dice == pytest.approx((4 * 20 / 26 + 2) / 6)
        assert means.iou == pytest.approx((4 * 10 / 16 + 2) / 6)
        assert means.accuracy == pytest.approx((4 * (1 - wrong) + 2) / 6)
        assert score.lesions.dice == pytest.approx(20 / 26)

    def test_of_a_rejected_case_nothing_is_right(self):
        (score,) = judged(solid("a"), model=Judges())
        assert score.lungs_by_slice == score.lesions_by_slice == BySlice(6, 0.0, 0.0, 0.0)
        assert score.slices == ()

    def test_are_scored_where_a_network_judges_them(self):
        judge, other = (judged(case("a", rows=10), model=model)[0] for model in (Judges(), Honest()))
        assert other.slices == ()
        drawn = [False, True, True, True, True, False]
        assert [answer.drawn for answer in judge.slices] == drawn
        assert [answer.score > 0.5 for answer in judge.slices] == drawn
        assert from_json(to_json([judge])) == [judge]
        assert judged(case("a", lesions=()), model=Judges())[0].slices == ()

    def test_are_positive_where_half_of_the_raters_drew(self):
        both, one = boxes(10)[1], boxes(10)[1]
        one[2:] = False
        nobody = np.zeros_like(one)
        (score,) = judged(case("a", lesions=(both, one, nobody, nobody)), model=Judges())
        assert [answer.drawn for answer in score.slices] == [False, True, False, False, False, False]

    def test_figures_are_of_all_slices(self):
        """Faint haze of one row, 5 % of the lungs, is missed in the four slices of one patient of four."""
        cases = [case(f"p{k}", rows=10) for k in range(3)] + [case("faint", rows=1)]
        figures = summarise(judged(*cases, model=Judges())).figures
        assert figures["slices_sensitivity"].value == pytest.approx(12 / 16)
        assert figures["slices_specificity"].value == 1
        assert figures["slices_accuracy"].value == pytest.approx(20 / 24)
        assert figures["slices_average_accuracy"].value == pytest.approx((12 / 16 + 1) / 2)
        assert figures["slices_auc"].value == 1
        assert (figures["slices_auc"].n, figures["slices_auc"].patients) == (24, 4)
        assert figures["slices_accuracy"].low < 20 / 24 < figures["slices_accuracy"].high
        rows = {name: text for name, _, text in tables.figure_rows(evaluated(*cases, model=Judges()))}
        assert rows["Slices, sensitivity"].startswith("24 slices of 4 patients")

    def test_figures_say_why_there_are_none(self):
        def reason(*cases, model):
            return summarise(judged(*cases, model=model)).figures["slices_auc"].reason

        assert "judges no slices" in reason(case("a"), model=Honest())
        assert "no volume with both drawn" in reason(case("a", lesions=()), model=Judges())
        assert "with and without lesions" in reason(case("a", rows=0), model=Judges())
        shown = [name for name, *_ in tables.figure_rows(evaluated(case("a"), model=Honest()))]
        assert "Lungs, Dice" in shown
        assert not [name for name in shown if name.startswith("Slices")]
        lost = [case(f"p{k}") for k in range(3)] + [solid("lost")]
        assert "1 cases without an answer left out" in reason(*lost, model=Judges())

    def test_accuracy_of_studies_needs_both_groups(self):
        ill = [case(f"p{k}", rows=k) for k in (0, 5, 9)]
        well = [case(f"w{k}", rows=0, diagnosis=Diagnosis.HEALTHY) for k in range(2)]
        figures = summarise(judged(*ill)).figures
        assert figures["accuracy"].value is figures["average_accuracy"].value is None
        figures = summarise(judged(*ill, *well, solid("lost", rows=0, diagnosis=Diagnosis.OTHER))).figures
        assert figures["accuracy"].value == pytest.approx(4 / 6)
        assert figures["average_accuracy"].value == pytest.approx(2 / 3)
        assert figures["sensitivity"].value == figures["specificity"].value == pytest.approx(2 / 3)

    def test_a_grade_is_of_what_the_network_grades_by(self):
        """Half of the worse lung, a quarter of both in each slice; two graders of the same masks."""
        worse, mean = (judged(case("a"), model=model)[0] for model in (Judges(), Grades()))
        assert (worse.found.fraction, worse.found.percent_infection) == pytest.approx((0.5, 0.25))
        assert (worse.found.grade, mean.found.grade) == (Grade.CT2, Grade.CT1)
        assert (worse.drawn.grade, mean.drawn.grade) == (Grade.CT2, Grade.CT1)


CASCADE = {
    "lungs": {"network": "cascade_lungs", "encoder": "densenet161", "decoder": "unet"},
    "cascade": {"network": "cascade", "encoder": "densenet201", "decoder": "fpn"},
}


class TestCascade:
    def test_ours_stand_beside_the_same_network(self):
        cases = [case(f"p{k}", rows=10, drawn=16) for k in range(3)]
        lungs, lesions, detection, _ = published.tables([of("cascade", CASCADE, *cases)])
        ours = "ours 0123"
        for table, name in ((lungs, "DenseNet161 UNet"), (lesions, detection_row := "DenseNet201 FPN")):
            rows = cells(table)
            assert len(rows) == 13
            assert [row for row in rows if "ours" in row] == [f"{name}, ours: {ours}"]
        assert f"{detection_row}, ours: {ours}" in cells(detection)
        row = cells(lungs)[f"DenseNet161 UNet, ours: {ours}"]
        assert row["DSC, %"] == ("97.19 ± 0.48", "100.00 ± 0.00")
        assert row[published.BY_PATIENT] == ("–", "1.000")
        row = cells(lesions)[f"DenseNet201 FPN, ours: {ours}"]
        dice = (4 * 20 / 26 + 2) / 6
        half = 1.96 * np.sqrt(dice * (1 - dice) / 18)  # three volumes of six slices
        assert row["DSC, %"] == ("94.13 ± 0.62", f"{100 * dice:.2f} ± {100 * half:.2f}")
        assert row[published.BY_PATIENT] == ("–", "0.769")
        row = cells(detection)[f"DenseNet201 FPN, ours: {ours}"]
        assert row["sensitivity, %"] == ("99.64 ± 0.20", "100.00 ± 0.00")
        assert cells(lungs)["UNet"]["IoU, %"] == ("95.04 ± 0.63", "")
        assert any("means over slices" in note for note in lungs.notes)

    def test_another_networks_lungs_stand_below(self):
        lungs, lesions, *_ = published.tables([of("cascade", {"cascade": CASCADE["cascade"]}, case("a"))])
        assert list(cells(lungs))[-1] == "ours: ours 0123"
        assert len(lungs.rows) == 14
        assert len(lesions.rows) == 13

    def test_grades_are_those_of_radiologists(self):
        """CT-2 is read in four and found in three of them; once it is found where CT-1 is read."""
        read = [Grade.CT2] * 4 + [Grade.CT1] * 2
        rows = [9, 9, 9, 3, 9, 3]
        cases = [case(f"p{k}", rows=r, grade=g) for k, (r, g) in enumerate(zip(rows, read, strict=True))]
        figures, n = published.graded(judged(*cases), Grade.CT2)
        assert [figure.value for figure in figures] == pytest.approx([4 / 6, 3 / 4, 3 / 4, 6 / 8, 1 / 2])
        assert n == 4
        assert (figures[2].low, figures[2].high) == pytest.approx(metrics.wilson(3, 4))
        severity = cells(published.tables([of("cascade", CASCADE, *cases)])[3])
        low, high = metrics.wilson(3, 4)
        half = 1.96 * np.sqrt(0.75 * 0.25 / 4)
        assert severity["CT-2"]["sensitivity, %"] == (
            "71.20 ± 7.94",
            f"75.00 ± {100 * half:.2f} ({100 * low:.1f} to {100 * high:.1f})",
        )
        assert severity["CT-4"]["sensitivity, %"] == ("100 ± 0", NOT_HERE)

    def test_every_combination_is_there(self):
        every = {(e, d) for e in paper.ENCODERS for d in paper.DECODERS} - {("unet", "fpn")}
        for rows in (paper.CASCADE_LUNGS, paper.CASCADE_LESIONS, paper.CASCADE_DETECTION):
            assert set(rows) == every


def test_the_recipes_have_a_variant_for_every_row():
    def networks(name: str) -> list[list[Mapping[str, object]]]:
        recipe = recipes.load(name)
        return [[part.network for part in chain(recipe.variant(one))] for one in recipe.variants]

    cascade = [(network["encoder"], network["decoder"]) for *_, network in networks("cascade")]
    assert sorted(cascade) == sorted(paper.CASCADE_LESIONS)
    ablation = [(slices["attention"], study["mapping"]) for *_, slices, study in networks("dcn")]
    assert sorted(ablation) == sorted(paper.DCN_ABLATION)


def dcn(attention: bool, mapping: bool) -> Mapping[str, Mapping[str, str]]:
    return {"dcn_slices": {"attention": str(attention)}, "dcn_study": {"mapping": str(mapping)}}


class TestDcn:
    def test_ours_stand_beside_the_paper(self):
        ill = [case(f"p{k}", rows=k) for k in (3, 5, 9)]
        well = [case(f"w{k}", rows=0, diagnosis=Diagnosis.HEALTHY) for k in range(3)]
        masks, slices, studies, ablation, *_ = published.tables([of("dcn", dcn(True, True), *ill, *well)])
        assert cells(masks)["lungs, ours: ours 0123"]["DSC, %"] == ("99.11", "100.0")
        assert cells(slices)["DCN, ours: ours 0123"]["accuracy, %"] == ("95.99", "100.0")
        assert cells(slices)["DCN, ours: ours 0123"]["AUC"] == ("0.9755", "1.000")
        assert cells(studies)["DCN, internal"]["AUC"] == ("0.9864", "")
        assert cells(studies)["DCN, ours: ours 0123"]["AUC"] == ("–", "1.000")
        rows = cells(ablation)
        assert rows["with attention, with mapping: slices, ours: ours 0123"]["AA, %"] == ("93.59*", "100.0")
        assert rows["with attention, no mapping: studies"]["sensitivity, %"] == ("93.75*", "")
        assert any("95.59" in note for note in ablation.notes)

    def test_variants_have_a_row_each(self):
        both = [of("dcn", dcn(attention, True), case("a")) for attention in (True, False)]
        ablation = published.tables(both)[3]
        ours = [name for name in cells(ablation) if "ours" in name]
        assert ours == [
            "no attention, with mapping: slices, ours: ours 0123",
            "no attention, with mapping: studies, ours: ours 0123",
            "with attention, with mapping: slices, ours: ours 0123",
            "with attention, with mapping: studies, ours: ours 0123",
        ]
        assert cells(ablation)[ours[1]]["accuracy, %"] == ("94.31", NOT_HERE)

    def test_where_it_looked_and_the_size_of_what_it_noticed(self):
        one = of("dcn", dcn(True, True), case("a"))
        answers = (SliceAnswer(0.9, True, 100), SliceAnswer(0.1, True, 100), SliceAnswer(0.9, True, 9e3))
        score = replace(one.scores[0], attention={"attention 2": 0.5}, slices=answers)
        *_, looked, sizes = published.tables([replace(one, scores=(score,))])
        assert cells(looked)["DCN, ours: ours 0123"]["attention 1"] == ("0.28", NOT_HERE)
        theirs, ours = cells(looked)["DCN, ours: ours 0123"]["attention 2"]
        assert (theirs, ours[:5]) == ("0.56", "0.500")
        row = cells(sizes)["DCN, ours: ours 0123"]
        assert [ours[:4] for _, ours in row.values()] == ["50.0", *[NOT_HERE[:4]] * 4, "100."]

    def test_corrected_figures_agree_with_each_other(self):
        """AA is the mean of sensitivity and specificity, to the last digit but one."""
        for rows in paper.DCN_ABLATION.values():
            for accuracy, average, sensitivity, specificity in rows:
                numbers = [float(x.rstrip("*")) for x in (accuracy, average, sensitivity, specificity)]
                assert numbers[1] == pytest.approx((numbers[2] + numbers[3]) / 2, abs=0.06)
        for average, sensitivity, specificity in (row[1:4] for row in paper.DCN_SLICES.values()):
            assert float(average) == pytest.approx((float(sensitivity) + float(specificity)) / 2, abs=0.06)


class TestPrinted:
    def shown(self, *evaluations: Evaluation) -> str:
        console = Console(width=200)
        with console.capture() as printed:
            console.print(tables.for_people(evaluations))
        return printed.get()

    def test_only_beside_networks_of_the_paper(self):
        text = self.shown(evaluated(case("a")))
        assert "Qiblawey" not in text
        assert "Gao" not in text
        text = self.shown(of("cascade", CASCADE, case("a")), of("dcn", dcn(True, True), case("a")))
        for words in ("Goncharov et al., table 2", "table 5, lungs", "table 8", "Gao et al., table 4"):
            assert words in text
        assert "DenseNet161 UNet, ours: ours 0123" in text

    def test_of_a_network_that_draws_no_lesions(self):
        text = self.shown(of("cascade", CASCADE, case("a"), model=Classifier()))
        assert NOT_HERE in text

    def test_in_json_and_report(self, tmp_path):
        one = of("dcn", dcn(True, True), case("a"))
        answer = json.loads(json.dumps(tables.as_json(one), allow_nan=False))
        masks = answer["tables"][0]
        assert masks["title"] == "Gao et al., table 2, masks"
        assert masks["rows"]["lesions, ours: ours 0123"]["DSC, %"] == {"paper": "83.51", "ours": "100.0"}
        assert answer["tables"][1]["rows"]["VGG16"]["AUC"] == {"paper": "0.9392", "ours": None}
        page = Page(report.write(one, tmp_path, datetime(2026, 11, 21, tzinfo=UTC)))
        for words in ("Gao et al., table 3, slices, and ours", "ours 100.0", "exchanged"):
            assert words in page.text
