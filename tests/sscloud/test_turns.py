"""Averaging over turns: what the network is shown, and how its answers are put together."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from sscloud.architecture import Architecture
from sscloud.bundle import Manifest, ModelBundle
from sscloud.checkpoint import save_bundle
from sscloud.errors import ConfigError
from sscloud.frame import Azimuth, reflect_normals, rotate_normals, to_view_frame
from sscloud.image import no_return
from sscloud.inference import Predictor
from sscloud.turns import TurnedForward, rolls
from sscloud.unet import UNet

MakePanorama = Callable[..., NDArray[np.uint8]]
MakeUNet = Callable[..., UNet]
MakeManifest = Callable[..., Manifest]

AZIMUTH = Azimuth(direction=-1, column_0=217.3)


class Recorder:
    """A network of one pixel: its logits are a fixed mixture of the colours. Keeps what it is shown."""

    tuned_to_size = True

    def __init__(self) -> None:
        self.shown: list[NDArray[np.uint8]] = []

    def logits(self, image: NDArray[np.uint8], *, wrap: bool) -> NDArray[np.float32]:
        self.shown.append(image)
        mixture = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32) / 60
        return np.ascontiguousarray((image.astype(np.float32) @ mixture).transpose(2, 0, 1))

    def describe(self) -> str:
        return "a recorder"


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    power = np.exp(logits.astype(float))
    return np.asarray(power / power.sum(axis=0))


class TestRolls:
    @pytest.mark.parametrize(("turns", "width"), [(1, 128), (2, 64), (4, 819), (8, 128), (16, 1638), (24, 128)])
    def test_are_spread_and_differ_within_the_stride(self, turns: int, width: int) -> None:
        found = rolls(turns, width)
        assert len(set(found)) == turns
        assert found[0] == 0
        assert all(0 <= roll < width for roll in found)
        assert len({roll % 16 for roll in found}) >= min(turns, 16) - (width % 16 > 0)
        gaps = np.diff([*sorted(found), width])
        assert gaps.max() <= width / turns + 32


class TestWhatTheNetworkSees:
    def test_in_the_scanner_frame_the_normals_turn_along(self, make_panorama: MakePanorama) -> None:
        image, recorder = make_panorama(), Recorder()
        TurnedForward(recorder, turns=3, encoding="normals", frame="scanner", azimuth=AZIMUTH).logits(image, wrap=True)

        first, second, third = recorder.shown
        roll_1, roll_2 = rolls(3, 128)[1:]
        assert np.array_equal(first, image)
        turned = rotate_normals(np.roll(image, roll_1, 1), -2 * np.pi * roll_1 / 128)
        assert np.array_equal(second, reflect_normals(turned, 217.3)[:, ::-1])
        assert np.array_equal(third, rotate_normals(np.roll(image, roll_2, 1), -2 * np.pi * roll_2 / 128))
        assert not np.array_equal(third, np.roll(image, roll_2, 1))
        assert (third[no_return(np.roll(image, roll_2, 1))] == 0).all()

    def test_is_the_same_scene_in_either_frame(self, make_panorama: MakePanorama) -> None:
        image, scanner, view = make_panorama(), Recorder(), Recorder()
        TurnedForward(scanner, turns=4, encoding="normals", frame="scanner", azimuth=AZIMUTH).logits(image, wrap=True)
        TurnedForward(view, turns=4, encoding="normals", frame="view", azimuth=AZIMUTH).logits(
            to_view_frame(image, AZIMUTH), wrap=True
        )

        for in_scanner, in_view in zip(scanner.shown, view.shown, strict=True):
            difference = to_view_frame(in_scanner, AZIMUTH).astype(int) - in_view
            assert np.abs(difference).max() <= 3  # rounded up to three times

    def test_colours_only_move(self, make_panorama: MakePanorama) -> None:
        image, recorder = make_panorama(), Recorder()
        TurnedForward(recorder, turns=2, encoding="rgb", frame="scanner", azimuth=None).logits(image, wrap=True)

        assert np.array_equal(recorder.shown[1], np.roll(image, rolls(2, 128)[1], 1)[:, ::-1])

    def test_crops_are_seen_once(self, make_panorama: MakePanorama) -> None:
        image, recorder = make_panorama(), Recorder()
        turned = TurnedForward(recorder, turns=4, encoding="normals", frame="scanner", azimuth=AZIMUTH)

        found = turned.logits(image, wrap=False)

        assert len(recorder.shown) == 1
        assert np.array_equal(found, Recorder().logits(image, wrap=False))


class TestWhatItSays:
    def test_is_the_mean_probability_in_place(self, make_panorama: MakePanorama) -> None:
        """A network of one pixel says the same of colours wherever they are."""
        image = make_panorama()

        found = TurnedForward(Recorder(), turns=5, encoding="rgb", frame="scanner", azimuth=None).logits(
            image, wrap=True
        )

        assert found.shape == (4, 64, 128)
        assert found.dtype == np.float32
        np.testing.assert_allclose(softmax(found), softmax(Recorder().logits(image, wrap=True)), atol=1e-6)

    def test_opinions_are_averaged(self, make_panorama: MakePanorama) -> None:
        image, recorder = make_panorama(), Recorder()
        turned = TurnedForward(recorder, turns=2, encoding="normals", frame="scanner", azimuth=AZIMUTH)

        found = turned.logits(image, wrap=True)

        one, two = (softmax(Recorder().logits(shown, wrap=True)) for shown in recorder.shown)
        expected = (one + np.roll(two[..., ::-1], -rolls(2, 128)[1], 2)) / 2
        np.testing.assert_allclose(np.exp(found), expected, atol=1e-6)
        assert np.abs(one - expected).max() > 0.1

    def test_is_finite_where_all_agree(self) -> None:
        class Certain(Recorder):
            def logits(self, image: NDArray[np.uint8], *, wrap: bool) -> NDArray[np.float32]:
                return np.stack([np.full(image.shape[:2], value, np.float32) for value in (1e4, -1e4)])

        turned = TurnedForward(Certain(), turns=2, encoding="rgb", frame="scanner", azimuth=None)

        assert np.isfinite(turned.logits(np.zeros((16, 32, 3), np.uint8), wrap=True)).all()

    def test_is_described(self) -> None:
        turned = TurnedForward(Recorder(), turns=2, encoding="rgb", frame="scanner", azimuth=None)
        assert turned.describe() == "a recorder, mean of 2 turns"
        assert turned.tuned_to_size


class TestPredictor:
    @pytest.fixture
    def bundle(
        self, request: pytest.FixtureRequest, tmp_path: Path, make_unet: MakeUNet, make_manifest: MakeManifest
    ) -> ModelBundle:
        model = make_unet(Architecture(classes=6, base_width=2, wrap=request.param.pop("wrap", True)))
        return save_bundle(tmp_path / "b", model, make_manifest(model.architecture, **request.param))

    @pytest.mark.parametrize(
        "bundle",
        [{"azimuth": AZIMUTH}, {"azimuth": AZIMUTH, "frame": "view"}, {"encoding": "rgb"}],
        indirect=True,
        ids=["scanner", "view", "rgb"],
    )
    def test_a_turned_panorama_gets_the_turned_answer(self, bundle: ModelBundle, make_panorama: MakePanorama) -> None:
        image = make_panorama()
        once, often = (Predictor(bundle, device="cpu", turns=turns) for turns in (1, 16))

        turned = np.roll(image, 10, 1)  # five columns of the network's
        if bundle.manifest.encoding == "normals":
            turned = rotate_normals(turned, -2 * np.pi * 10 / 128)

        def moved(predictor: Predictor) -> float:
            """Mean change of the probability when the scanner is turned."""
            before, after = (predictor.predict(view).confidence.values for view in (image, turned))
            return float(np.abs(np.roll(before, 5, 1) - after).mean())

        assert moved(often) < 0.75 * moved(once)

    @pytest.mark.parametrize(
        ("bundle", "turns", "message"),
        [
            ({"azimuth": AZIMUTH}, 0, "turns to average over must be 1 or more, found 0"),
            ({}, 2, "Улица v3 does not say how columns relate to directions.*state the azimuth"),
            ({"azimuth": AZIMUTH, "wrap": False}, 2, "Улица v3 does not wrap at the seam.*without --no-wrap"),
        ],
        indirect=["bundle"],
    )
    def test_errors(self, bundle: ModelBundle, turns: int, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            Predictor(bundle, device="cpu", turns=turns)

    def test_one_turn_asks_for_nothing(self, tiny_bundle: ModelBundle, make_panorama: MakePanorama) -> None:
        image = make_panorama()
        found, expected = (Predictor(tiny_bundle, device="cpu", **more) for more in ({"turns": 1}, {}))
        assert np.array_equal(found.predict(image).class_map, expected.predict(image).class_map)
