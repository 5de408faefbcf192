import base64
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cvat_sdk.masks import encode_mask
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import scenes, serving
from benchmarks.reference import ReferenceUNet, answer, cvat_runs
from sscloud.architecture import Architecture
from sscloud.stages import Stages
from sscloud.unet import UNet

ROOT = Path(__file__).resolve().parents[2]


def test_the_reference_network_is_ours() -> None:
    torch.manual_seed(0)
    network = UNet(Architecture(classes=5, base_width=64, wrap=False)).eval()
    reference = ReferenceUNet(5).eval()
    reference.load_state_dict(network.state_dict())
    batch = torch.rand(1, 3, 35, 50)  # odd at every level

    with torch.no_grad():
        torch.testing.assert_close(reference(batch), network(batch), rtol=1e-4, atol=1e-5)


def test_counts_the_network_s_operations() -> None:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        ReferenceUNet(68).eval()(torch.rand(1, 3, 51, 102))

    assert serving.flops(68, (51, 102)) == counter.get_total_flops()


def test_the_reference_answers_one_crop_a_class() -> None:
    classes = np.zeros((6, 8), np.int64)
    classes[2, 3:6] = 1
    classes[4, 1] = 1
    classes[0, 0] = 2
    picture = subprocess.check_output(
        [sys.executable, "-c", "import sys; from PIL import Image; Image.new('RGB', (8, 6)).save(sys.stdout, 'PNG')"]
    )
    seen: list[tuple[int, int]] = []

    def predict(image: Image.Image, stages: Stages) -> np.ndarray:
        seen.append(image.size)
        return classes

    stages = Stages()
    fields = {"image": base64.b64encode(picture).decode()}
    items = json.loads(answer(fields, predict=predict, names={1: "a", 2: "b", 3: "absent"}, stages=stages))

    assert seen == [(8, 6)]
    assert [item["label"] for item in items] == ["a", "b"]
    assert items[0]["mask"] == [0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 2, 5, 4]
    assert items[1]["mask"] == [1, 0, 0, 0, 0]
    assert list(stages.milliseconds) == ["parse", "decode", "regions", "answer"]


def test_reads_an_answer_as_cvat_does() -> None:
    mask = np.zeros((9, 12), bool)
    mask[2:5, 3:9] = True
    mask[3, 5] = False
    *runs, left, top, right, bottom = (int(value) for value in encode_mask(mask))
    crop = mask[top : bottom + 1, left : right + 1]
    item = {"type": "mask", "mask": [*crop.ravel().astype(int).tolist(), left, top, right, bottom]}

    assert cvat_runs(json.dumps([item, {"type": "polygon", "points": [0, 0, 1, 0, 1, 1]}]).encode()) == (
        crop.size,
        len(runs),
    )


def test_likeness_names_the_worst_class() -> None:
    wanted = np.array([[0, 0, 0, 1], [2, 2, 1, 1]], np.uint8)
    found = np.array([[0, 0, 0, 0], [2, 2, 1, 1]], np.uint8)

    assert serving.likeness(found, wanted) == {"equal": 7 / 8, "worst_iou": 2 / 3}


def test_divides_classes_by_azimuth() -> None:
    class_map = np.repeat(np.arange(6, dtype=np.uint8)[:, None], 128, axis=1)

    divided = scenes.divide(class_map, 68)

    assert np.array_equal(divided[:4], class_map[:4])
    assert np.unique(divided[4:]).tolist() == list(range(4, 68))
    assert scenes.divide(class_map, 2).max() == 1


@pytest.mark.slow
def test_a_process_of_its_own_has_a_peak_of_its_own(tmp_path: Path) -> None:
    ballast = np.ones(1 << 26)  # half a gibibyte in this process
    np.save(tmp_path / "logits.npy", np.random.default_rng(0).normal(size=(4, 40, 80)).astype(np.float32))
    maps = []
    for way in ("reference", "ours"):
        save = tmp_path / f"{way}.npy"
        found = serving.run(
            "upsample", way=way, source=str(tmp_path / "logits.npy"), size_hw=[400, 800], save=str(save)
        )
        assert 0 < found["seconds"] < 60
        assert found["extra"] < ballast.nbytes / 2
        maps.append(np.load(save))

    assert maps[0].shape == (400, 800)
    assert np.array_equal(*maps)


def test_says_which_task_failed() -> None:
    with pytest.raises(SystemExit, match=r"(?s)^nothing \{'of': 'it'\} ended with 1:.*KeyError: 'nothing'"):
        serving.run("nothing", of="it")


@pytest.mark.slow
def test_the_whole_benchmark(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.serving", "--classes", "6", "--width", "1024", "--rounds", "1"]
    done = subprocess.run(
        [*command, "--json", "--cache", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert [(case["width"], case["classes"]) for case in found["cases"]] == [(1024, 6), (512, 6)]
    for case in found["cases"]:
        ratios = case["ratios"]["torch fp32"]
        assert ratios["equal"] > 0.998
        assert all(ratios[name] > 0 for name in ("end to end", "forward", "upsample", "answer", "peak", "answer bytes"))
        assert case["sides"]["reference"]["equal"] == 1
    whole = found["cases"][0]["ratios"]["torch fp32"]
    assert whole["class map equal"] == 1
    assert 0 < whole["crops"] < 1
    assert "| end to end |" in done.stdout
