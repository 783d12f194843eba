"""Model packages: what a card must say, what is refused, and networks that others exported."""

import copy
import hashlib
import json
import pickle
import re
import shutil
import sys
import warnings
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import yaml
from scipy import ndimage
from torch import nn
from typer.testing import CliRunner

from tests.test_cli import triage
from tests.test_models import phantom
from triage import config, models
from triage.cli import app
from triage.config import Analysis
from triage.dicom import phantom as studies
from triage.domain import Volume
from triage.errors import ConfigError
from triage.models import compute, packages
from triage.models.networks import LungsNet
from triage.models.pipeline import Pipeline, lungs_network, slice_by_slice
from triage.models.preprocessing import Grid, prepare

ROOT = Path(__file__).parents[1]
GUIDE = ROOT / "deploy" / "models.md"
DIGEST = "0" * 64
FACTS = {
    "name": "mine",
    "system": "exported",
    "summary": "made up",
    "lungs": "multitask",
    "input": {"spacing_mm": 2, "window_hu": [-1000, 300], "multiple_of": 4},
    "output": {"activation": "sigmoid"},
    "training_data": [],
    "licence": "none",
    "limits": ["made up"],
}
FORMATS = ["onnx", "torchscript", "bundle"]


@cache
def lesions_net(outputs=1):
    """A small network of random weights that marks about half of a lung."""
    torch.manual_seed(3)
    network = LungsNet((4, 8, 16))
    network.head[2] = nn.Conv2d(4, outputs, 1)
    slices = prepare(phantom())[:, None]
    slices = slices[..., : slices.shape[2] // 4 * 4, : slices.shape[3] // 4 * 4]
    network(slices)
    network.eval().requires_grad_(False)
    values = network(slices)
    lung = (slices[:, 0] > 0.05) & (slices[:, 0] < 0.5)
    network.head[2].bias -= torch.stack([channel[lung].median() for channel in values.unbind(1)])
    return network


class Brighter(nn.Module):
    """Probability 1 above a value of the slices, 0 below: what it finds can be told without a network."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, slices):
        return (slices > self.value).float()


def to_onnx(network, path):
    axes = {0: "n", 2: "h", 3: "w"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(
            network, (torch.rand(2, 1, 64, 96),), path, dynamo=False, input_names=["slices"],
            output_names=["lesions"], dynamic_axes={"slices": axes, "lesions": axes},
        )  # fmt: skip
    return path


def to_torchscript(network, path):
    path.parent.mkdir(exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(network, torch.rand(2, 1, 64, 96)), path)
    return path


def metadata(**changes):
    image = {
        "type": "image", "format": "hounsfield", "num_channels": 1, "spatial_shape": ["4*n", "*"],
        "dtype": "float32", "value_range": [0, 1], "channel_def": {"0": "image"},
    }  # fmt: skip
    pred = {"type": "image", "num_channels": 1, "spatial_shape": ["4*n", "*"], "value_range": [0, 1]}
    for key, value in changes.items():
        kind, _, name = key.partition("_")
        {"in": image, "out": pred}[kind][name] = value
    formats = {"inputs": {"image": image}, "outputs": {"pred": pred}}
    return json.dumps({"version": "0.1.0", "network_data_format": formats})


def package(folder, network, kind="onnx", described=None, **facts):
    """The folder of an exported network."""
    folder.mkdir(exist_ok=True)
    if kind == "onnx":
        files = {"network": to_onnx(network, folder / "lesions.onnx")}
    elif kind == "torchscript":
        files = {"network": to_torchscript(network, folder / "lesions.ts")}
    else:
        (folder / "configs").mkdir(exist_ok=True)
        (folder / "configs" / "metadata.json").write_text(described or metadata())
        files = {
            "network": to_torchscript(network, folder / "models" / "model.ts"),
            "metadata": folder / "configs" / "metadata.json",
        }
    packages.write(folder, {**FACTS, "lesion_threshold": 0.5, **facts}, files)
    return folder


def load(folder, **settings):
    return models.load(Analysis(model=str(folder), threads=2, device="cpu", **settings))


def dice(a, b):
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def edit(folder, **changes):
    """Other facts on a card, without asking whether they are right; None takes a key away."""
    path = folder / "model.yaml"
    card = {**yaml.safe_load(path.read_text()), **changes}
    path.write_text(yaml.safe_dump({key: value for key, value in card.items() if value is not None}))


@pytest.fixture
def mine(tmp_path):
    return package(tmp_path / "mine", lesions_net(), "torchscript")


@cache
def as_torch_judges(outputs):
    """The same network without any export, in the same pipeline."""
    running = compute.choose(Analysis(device="cpu", precision="float32", threads=2))
    network = lesions_net(outputs)
    activation = torch.sigmoid if outputs == 1 else lambda values: values.softmax(1)[:, 1:2]
    shipped = packages.read(models.MODELS["multitask"])
    find = slice_by_slice(network, network.stride, running, activation)
    lungs = lungs_network(shipped.file("lungs"), running)
    return Pipeline(shipped.info, running, lungs, lambda slices, _, mm: find(slices, mm[0]), 0.5).predict(
        phantom()
    )


class TestExported:
    @pytest.mark.parametrize("kind", FORMATS)
    def test_is_judged_as_torch_judges_it(self, tmp_path, kind):
        model = load(package(tmp_path / "mine", lesions_net(), kind))
        findings, expected = model.predict(phantom()), as_torch_judges(1)
        assert 0.02 < expected.lesion_mask.sum() / expected.lung_mask.sum() < 0.98, "a telling network"
        assert dice(findings.lesion_mask, expected.lesion_mask) >= 0.999
        assert np.array_equal(findings.lung_mask, expected.lung_mask)
        assert findings.probability == pytest.approx(expected.probability, abs=1e-3)
        assert findings.probability_kind == "score"
        assert not findings.calibrated
        assert model.settings["precision"] == "float32"
        assert model.info.name == "mine"

    @pytest.mark.parametrize("kind", ["onnx", "torchscript"])
    def test_the_card_says_which_channel_is_the_lesions(self, tmp_path, kind):
        output = {"channels": 2, "lesion_channel": 1, "activation": "softmax"}
        model = load(package(tmp_path / "mine", lesions_net(2), kind, output=output))
        expected = as_torch_judges(2).lesion_mask
        assert expected.any()
        assert dice(model.predict(phantom()).lesion_mask, expected) >= 0.999

    @pytest.mark.parametrize("hu", [-800, -500])
    @pytest.mark.parametrize(
        ("spacing", "window"), [(2, [-1000, 300]), (1, [-1350, 150]), (1.6, [-900, 100])]
    )
    def test_it_sees_the_values_that_the_card_names(self, tmp_path, spacing, window, hu):
        """Clear lung has -850 HU and a hazy one -450: a window 50 HU off would not tell them apart."""
        takes = {"spacing_mm": spacing, "window_hu": window, "multiple_of": 16}
        network = Brighter((hu - window[0]) / (window[1] - window[0]))
        folder = package(
            tmp_path / "mine", network, "torchscript", input=takes, output={"activation": "none"}
        )
        noisy = phantom((6, 240, 280), (8.0, 1.3, 1.3))
        volume = Volume(ndimage.median_filter(noisy.array, (1, 7, 7)), noisy.spacing)
        findings = load(folder).predict(volume)
        assert dice(findings.lesion_mask, findings.lung_mask & (volume.array > hu)) > 0.9

    def test_it_sees_pixels_of_the_size_that_the_card_names(self):
        volume = phantom((3, 200, 300), (8.0, 1.0, 0.5))
        assert prepare(volume).shape == (3, 100, 75)
        assert prepare(volume, Grid(1.0)).shape == (3, 200, 150)
        assert Grid(1.0).margin == 2 * Grid().margin

    def test_its_lesion_map_is_for_evaluation(self, mine):
        model, volume = load(mine), phantom()
        findings = model.predict(volume)
        found = model.lesion_map(volume, findings.lung_mask)
        assert found.dtype == np.float32
        assert dice((found > 0.5) & findings.lung_mask, findings.lesion_mask) > 0.999
        picture = Volume(volume.array[4:5], volume.spacing)
        assert model.lesion_map(picture, None).shape == picture.array.shape

    def test_the_settings_threshold_goes_before_the_cards(self, mine):
        assert load(mine).settings["lesion_threshold"] == 0.5
        assert load(mine, lesion_threshold=0.7).settings["lesion_threshold"] == 0.7
        edit(mine, lesion_threshold=None)
        with pytest.raises(ConfigError, match=r"model\.yaml: lesion_threshold: missing"):
            load(mine)

    def test_a_network_for_one_size_is_told_at_start(self, tmp_path):
        class Fixed(nn.Module):
            def __init__(self):
                super().__init__()
                self.seen = nn.Parameter(torch.zeros(1, 1, 64, 96))

            def forward(self, slices):
                return slices + self.seen

        for kind in ("onnx", "torchscript"):
            with pytest.raises(ConfigError, match=r"cannot take slices .*free number, height and width"):
                load(package(tmp_path / kind, Fixed(), kind))

    def test_a_wrong_multiple_is_told_at_start(self, tmp_path):
        takes = {**FACTS["input"], "multiple_of": 65}
        with pytest.raises(ConfigError, match=r"input\.multiple_of"):
            load(package(tmp_path / "mine", lesions_net(), "torchscript", input=takes))

    def test_a_network_in_training_mode_is_told_at_start(self, tmp_path):
        network = copy.deepcopy(lesions_net()).train()
        with pytest.raises(ConfigError, match=r"beside others: export it after eval\(\)"):
            load(package(tmp_path / "mine", network, "torchscript"))

    def test_what_it_gives_must_be_what_the_card_says(self, tmp_path):
        folder = package(tmp_path / "a", lesions_net(), "torchscript", output={"activation": "none"})
        with pytest.raises(ConfigError, match=r"no probabilities: set output\.activation"):
            load(folder)
        folder = package(
            tmp_path / "b", lesions_net(), "torchscript", output={"activation": "sigmoid", "channels": 2}
        )
        with pytest.raises(ConfigError, match=r"not one tensor \(1, 2, 64, 64\) as output\.channels says"):
            load(folder)

    @pytest.mark.parametrize(
        ("kind", "told"),
        [("onnx", "1 inputs and 2 outputs, not one each"), ("torchscript", "gives tuple, not one tensor")],
    )
    def test_a_network_with_two_outputs_is_refused(self, tmp_path, kind, told):
        """Which of them are the lesions, nobody has said."""

        class Two(nn.Module):
            def forward(self, slices):
                return slices, slices + 1

        with pytest.raises(ConfigError, match=told):
            load(package(tmp_path / "mine", Two(), kind))

    @pytest.mark.parametrize(
        ("changes", "key"),
        [
            ({"in_num_channels": 3}, "input num_channels = 3"),
            ({"in_value_range": [-1, 1]}, "input value_range"),
            ({"in_dtype": "float16"}, "input dtype"),
            ({"in_spatial_shape": [256, 256]}, "input spatial_shape"),
            ({"in_spatial_shape": ["8*n", "8*n"]}, "input spatial_shape"),
            ({"in_spatial_shape": ["*", "*", "*"]}, "input spatial_shape"),
            ({"out_num_channels": 2}, "output num_channels = 2"),
            ({"in_num_channels": "many"}, "num_channels = 'many'"),
        ],
    )
    def test_a_bundle_that_contradicts_its_card_is_refused(self, tmp_path, changes, key):
        folder = package(tmp_path / "mine", lesions_net(), "bundle", metadata(**changes))
        with pytest.raises(ConfigError, match=rf"metadata\.json.*{re.escape(key)}"):
            load(folder)

    def test_a_bundles_other_configs_are_never_read(self, tmp_path):
        folder = package(tmp_path / "mine", lesions_net(), "bundle")
        for name in ("inference.json", "metadata.yaml"):
            (folder / "configs" / name).write_text("{\"network_def\": \"$open('ran', 'w')\"}")
        load(folder)
        assert not Path("ran").exists()

    def test_onnx_without_its_package_names_the_remedy(self, tmp_path, monkeypatch):
        folder = package(tmp_path / "mine", lesions_net(), "onnx")
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
        with pytest.raises(ConfigError, match=r"pip install triage\[onnx\]"):
            load(folder)


class Trap:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


class TestRefused:
    def test_pickles_are_never_read(self, tmp_path):
        ran = tmp_path / "ran"
        for name in (
            "plain.pt",
            "plain.onnx",
            "torch.pt",
            "torch.ts",
            "net.pkl",
            "net.pt2",
            "net.safetensors",
        ):
            path = tmp_path / name
            if name.startswith("torch"):
                torch.save(Trap(ran), path)
            else:
                path.write_bytes(pickle.dumps(Trap(ran)))
            packages.write(tmp_path / "mine", {**FACTS, "lesion_threshold": 0.5}, {"network": path})
            with pytest.raises(ConfigError, match=re.escape(name)):
                load(tmp_path / "mine")
        assert not ran.exists()

    def test_weights_that_are_a_pickle_are_not_read(self, tmp_path):
        folder = tmp_path / "copy"
        shutil.copytree(models.MODELS["multitask"], folder)
        (folder / "lungs.safetensors").write_bytes(pickle.dumps(Trap(tmp_path / "ran")))
        card = yaml.safe_load((folder / "model.yaml").read_text())
        card["files"]["lungs"]["sha256"] = hashlib.sha256(
            (folder / "lungs.safetensors").read_bytes()
        ).hexdigest()
        edit(folder, files=card["files"])
        with pytest.raises(ConfigError, match=r"lungs\.safetensors cannot be used"):
            load(folder)
        assert not (tmp_path / "ran").exists()

    def test_an_exchanged_file_is_refused_and_named(self, tmp_path):
        folder = tmp_path / "copy"
        shutil.copytree(models.MODELS["multitask"], folder)
        load(folder)
        damaged = bytearray((folder / "multitask.safetensors").read_bytes())
        damaged[-1] ^= 1
        (folder / "multitask.safetensors").write_bytes(damaged)
        with pytest.raises(ConfigError, match=r"multitask\.safetensors is not the file .*reinstall"):
            load(folder)
        (folder / "multitask.safetensors").unlink()
        with pytest.raises(ConfigError, match=r"cannot read .*multitask\.safetensors.*files\.multitask"):
            load(folder)

    def test_weights_in_a_second_file_are_refused(self, mine):
        network = onnx.load(to_onnx(lesions_net(), mine / "lesions.onnx"))
        onnx.save(
            network, mine / "lesions.onnx", save_as_external_data=True, location="rest.bin", size_threshold=0
        )
        packages.write(mine, {**FACTS, "lesion_threshold": 0.5}, {"network": mine / "lesions.onnx"})
        assert (mine / "rest.bin").exists()
        with pytest.raises(ConfigError, match=r"lesions\.onnx cannot be used"):
            load(mine)

    @pytest.mark.parametrize(
        ("changes", "told"),
        [
            ({"traning_data": []}, "traning_data: unknown key"),
            ({"licence": None}, "licence: missing"),
            ({"limits": None}, "limits: missing"),
            ({"system": "oracle"}, "system = 'oracle': there are cascade"),
            ({"lungs": "oracle"}, "lungs = 'oracle': there are "),
            ({"lungs": None}, "files.lungs: missing"),
            ({"input": None}, "input: missing"),
            ({"name": "Ours!"}, "name = 'Ours!'"),
            ({"lesion_threshold": 1.5}, "lesion_threshold = 1.5"),
            ({"input": {"spacing_mm": 2, "window_hu": [300, -1000]}}, "input.window_hu"),
            ({"output": {"activation": "sigmoid", "lesion_channel": 1}}, "lesion_channel 1: there are 1"),
            ({"files": {"network": {"path": "../mine/lesions.ts", "sha256": DIGEST}}}, "files.network.path"),
            ({"files": {"network": {"path": "/etc/passwd", "sha256": DIGEST}}}, "files.network.path"),
            ({"files": {}}, "files.network: missing"),
        ],
    )  # fmt: skip
    def test_a_wrong_card_is_told_by_file_and_key(self, mine, changes, told):
        edit(mine, **changes)
        with pytest.raises(ConfigError, match=rf"model\.yaml.*{re.escape(told)}"):
            load(mine)

    def test_a_card_that_is_no_card(self, mine, tmp_path):
        for text in ("name: [", "just text", "", "\x00"):
            (mine / "model.yaml").write_text(text)
            with pytest.raises(ConfigError, match=r"model\.yaml"):
                load(mine)
        with pytest.raises(ConfigError, match=r"a model is a folder with a model\.yaml"):
            load(tmp_path / "nowhere")
        with pytest.raises(ConfigError, match="put this file into a folder"):
            load(mine / "lesions.ts")


class TestVersion:
    def test_follows_what_changes_the_answer_and_nothing_else(self, mine):
        before = packages.read(mine).version
        assert re.fullmatch("[0-9a-f]{12}", before)
        edit(
            mine,
            summary="other words",
            licence="another",
            metrics=[{"name": "Dice", "value": 0.5, "measured_on": "x"}],
        )
        assert packages.read(mine).version == before
        seen = {before}
        for change in (
            {"lesion_threshold": 0.4},
            {"parameters": {"sigma_mm": 1.5}},
            {"input": {**FACTS["input"], "spacing_mm": 1.5}},
            {"output": {"activation": "none"}},
            {"calibrated": True},
        ):
            edit(mine, **change)
            seen.add(packages.read(mine).version)
        assert len(seen) == 6

    def test_follows_the_lungs_network_it_borrows(self, mine, tmp_path, monkeypatch):
        before = packages.read(mine).version
        lungs = packages.read(models.MODELS["multitask"]).file("lungs")
        other = tmp_path / "lungs.safetensors"
        other.write_bytes(lungs.read_bytes()[:-1] + b"x")
        facts = {**FACTS, "lungs": None, "system": "multitask"}
        monkeypatch.setitem(packages.MODELS, "multitask", tmp_path / "other")
        packages.write(tmp_path / "other", facts, {"lungs": other})
        assert packages.read(mine).version != before


class TestWrite:
    def test_what_is_written_is_read_back(self, tmp_path):
        elsewhere = tmp_path / "net.onnx"
        to_onnx(lesions_net(), elsewhere)
        written = packages.write(tmp_path / "mine", FACTS, {"network": elsewhere}, "long card")
        assert written == packages.read(tmp_path / "mine")
        assert (tmp_path / "mine" / "net.onnx").read_bytes() == elsewhere.read_bytes()
        assert written.text == "long card"
        again = packages.write(tmp_path / "mine", FACTS, {"network": tmp_path / "mine" / "net.onnx"})
        assert again.version == written.version

    def test_an_incomplete_card_is_not_written(self, tmp_path):
        with pytest.raises(ConfigError, match="licence: missing"):
            packages.write(tmp_path / "mine", {"name": "mine"}, {})
        assert not (tmp_path / "mine" / "model.yaml").exists()


class TestChoosing:
    def test_a_path_in_the_settings_is_relative_to_their_folder(self, tmp_path):
        package(tmp_path / "mine", lesions_net(), "torchscript")
        path = tmp_path / "config.yaml"
        path.write_text("analysis: {model: ./mine}")
        assert models.load(config.load(path).analysis).info.name == "mine"
        path.write_text(f"analysis: {{model: {tmp_path / 'mine'}}}")
        assert models.load(config.load(path).analysis).info.name == "mine"
        path.write_text("analysis: {model: multitask}")
        assert config.load(path).analysis.model == "multitask"

    def test_a_folder_never_takes_the_place_of_a_name(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "multitask").mkdir()
        assert packages.find("multitask") == packages.PACKAGES / "multitask"
        with pytest.raises(ConfigError, match=r"'mine'.*there are .*multitask.*\./mine"):
            packages.find("mine")

    def test_predict_judges_with_a_folder(self, mine, tmp_path):
        studies.write_study(tmp_path / "in", seed=2, slices=30, rows=128, slice_spacing=8)
        said = triage(
            "predict", tmp_path / "in", "--output", tmp_path / "out", "--model", mine, "--json"
        ).stdout
        (row,) = json.loads(said)
        assert row["status"] in ("positive", "negative")
        assert row["model"] == "mine"
        assert row["model_version"] == packages.read(mine).version
        assert row["affected_fraction"] is not None

    def test_check_tells_version_and_hashes(self, mine, tmp_path):
        path = tmp_path / "config.yaml"
        path.write_text("analysis: {model: ./mine}")
        checks = {c["what"]: c for c in json.loads(triage("-c", path, "check", "--json").stdout)}
        assert checks["weights"]["go"]
        assert f"mine {packages.read(mine).version}, hashes as its card says" in checks["weights"]["detail"]
        (mine / "lesions.ts").write_bytes(b"other")
        checks = {c["what"]: c for c in json.loads(triage("-c", path, "check", "--json", status=1).stdout)}
        assert "is not the file" in checks["weights"]["detail"]

    def test_models_lists_what_is_known_of_each(self):
        rows = json.loads(triage("models", "--json").stdout)
        assert [row["name"] for row in rows] == list(models.MODELS)
        for row in rows:
            shipped = packages.read(models.MODELS[row["name"]])
            assert row["version"] == shipped.version
            assert {"summary", "training_data", "metrics", "licence", "calibrated", "limits"} <= row.keys()
            for file in row["files"].values():
                data = (shipped.folder / file["path"]).read_bytes()
                assert file["sha256"] == hashlib.sha256(data).hexdigest()
        shown = triage("models").stdout
        assert rows[0]["version"] in shown
        assert "sha256" in shown

    def test_models_shows_units_what_is_not_measurable_and_what_may_be_claimed(self, tmp_path, monkeypatch):
        metrics = [
            {
                "name": "Volume",
                "value": 12.5,
                "low": 9,
                "high": 20,
                "unit": "ml",
                "patients": 4,
                "measured_on": "x",
            },
            {"name": "HD95", "value": None, "unit": "mm", "reason": "spacing unknown", "measured_on": "x"},
        ]
        facts = {"metrics": metrics, "claims": ["where opacities are"]}
        folder = package(tmp_path / "mine", lesions_net(), "torchscript", **facts)
        monkeypatch.setattr(models, "MODELS", {"mine": folder})
        shown = CliRunner().invoke(app, ["models"]).stdout
        for words in ("12.5 (9 to 20) ml, 4 patients, x", "not measurable here: spacing unknown"):
            assert words in shown
        assert re.search(r"claims +where opacities are +\n +limits +made up", shown)


class TestGuide:
    """``deploy/models.md`` is done as it says."""

    def blocks(self):
        """The indented blocks, in order."""
        blocks = re.findall(r"(?:^    .*\n|^\n(?=    ))+", GUIDE.read_text(encoding="utf-8"), re.M)
        return [re.sub(r"^    ", "", block, flags=re.M).strip() for block in blocks]

    def test_the_example_works(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "mine").mkdir()
        (code,) = (block for block in self.blocks() if block.startswith("import torch"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            exec(code, {"network": lesions_net()})
        (card,) = (block for block in self.blocks() if block.startswith("name: mine"))
        digest = hashlib.sha256((tmp_path / "mine" / "lesions.onnx").read_bytes()).hexdigest()
        (tmp_path / "mine" / "model.yaml").write_text(card.replace(DIGEST, digest))
        findings = load("./mine").predict(phantom())
        assert findings.lesion_mask.shape == phantom().array.shape

    def test_it_names_every_key(self):
        told = GUIDE.read_text(encoding="utf-8").partition("## Keys of model.yaml")[2]
        assert all(f"`{key}`" in told for key in packages.Card.model_fields)
