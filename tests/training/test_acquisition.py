"""What to label next, by numbers: scores against NumPy, turned scanners, duplicates, rare classes."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from sscloud.architecture import Architecture
from sscloud.bundle import Manifest, ModelBundle
from sscloud.checkpoint import save_bundle
from sscloud.errors import ConfigError
from sscloud.forward import TorchForward, find_device
from sscloud.frame import Azimuth, rotate_normals
from sscloud.inference import network_input
from sscloud.labels import LabelSchema
from sscloud.turns import rolls
from sscloud.unet import UNet
from training.acquisition import HEAVIEST, Jury, Maps, PoolFrame, describe, look_from, pick, rank, rarity

Panorama = Callable[..., NDArray[np.uint8]]
AZIMUTH = Azimuth(direction=1, column_0=0.0)


@pytest.fixture(scope="module")
def bundles(
    tmp_path_factory: pytest.TempPathFactory, make_unet: Callable[..., UNet], make_manifest: Callable[..., Manifest]
) -> list[ModelBundle]:
    """Two networks in the view frame, of the same labels."""
    made = []
    for seed in (0, 3):
        model = make_unet(seed=seed, contrast=2)
        manifest = make_manifest(
            model.architecture, version=seed + 1, azimuth=AZIMUTH, frame="view", elevation=(90.0, -60.0)
        )
        made.append(save_bundle(tmp_path_factory.mktemp("bundles") / "b", model, manifest))
    return made


def to_png(image: NDArray[np.uint8]) -> bytes:
    import io

    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return stream.getvalue()


def frame_of(image: NDArray[np.uint8], name: str = "1.png", **fields: Any) -> PoolFrame:
    data = to_png(image)
    return PoolFrame(name=name, read=lambda: data, **fields)


def turned(image: NDArray[np.uint8], columns: int) -> NDArray[np.uint8]:
    """The panorama of a scanner that is turned."""
    return rotate_normals(np.roll(image, columns, axis=1), 2 * np.pi * columns / image.shape[1])


def probabilities(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    powers = np.exp(logits.astype(np.float64))
    return powers / powers.sum(0)


def test_maps_are_the_entropy_of_the_mean_less_the_mean_of_the_entropies(
    bundles: list[ModelBundle], make_panorama: Panorama
) -> None:
    image = make_panorama((64, 128), seed=4)
    opinions = []
    for bundle in bundles:
        small, wrap = network_input(image, bundle.manifest, size_hw=(64, 128))
        forward = TorchForward(bundle, device=find_device("cpu"), precision="fp32")
        for turn, columns in enumerate(rolls(4, small.shape[1])):
            # In the view frame a turn moves pixels only; a mirror negates y.
            seen = np.roll(small, columns, axis=1)
            if turn % 2:
                normal = seen.astype(np.int32)
                normal[..., 1] = np.where(seen.any(-1), 255 - normal[..., 1], 0)
                seen = np.clip(normal, 0, 255).astype(np.uint8)[:, ::-1]
            found = probabilities(forward.logits(np.ascontiguousarray(seen), wrap=wrap))
            opinions.append(np.roll(found[..., ::-1] if turn % 2 else found, -columns, axis=2))
    mean = np.mean(opinions, axis=0)
    entropy = -(mean * np.log(mean)).sum(0)
    expected = entropy - np.mean([-(p * np.log(np.maximum(p, 1e-30))).sum(0) for p in opinions], axis=0)

    maps = Jury(bundles, shares=None, device="cpu", turns=4).maps(image)

    assert maps.mean.shape == (6, 32, 64)
    assert maps.mean.dtype == maps.entropy.dtype == np.float32
    np.testing.assert_allclose(maps.mean, mean, atol=2e-4)
    np.testing.assert_allclose(maps.entropy, entropy, atol=2e-3)
    np.testing.assert_allclose(maps.information, expected, atol=2e-3)
    assert maps.information.max() > 0.05


def random_maps(seed: int, *, shape: tuple[int, int, int] = (4, 12, 40)) -> Maps:
    rng = np.random.default_rng(seed)
    mean = rng.dirichlet(np.full(shape[0], 0.4), size=shape[1:]).transpose(2, 0, 1).astype(np.float32)
    area = rng.uniform(0, 1, shape[1:]).astype(np.float32) * (rng.random(shape[1:]) < 0.8)
    return Maps(
        mean=mean,
        entropy=rng.uniform(0, 1, shape[1:]).astype(np.float32),
        information=rng.uniform(0, 0.5, shape[1:]).astype(np.float32),
        area=area.astype(np.float32),
    )


def test_score_is_weighed_by_solid_angle_and_rarity_over_pixels_with_a_return() -> None:
    maps, weights = random_maps(1), np.array([1.0, 0.5, 8.0, 2.0])
    total = 0.0
    for y in range(12):
        for x in range(40):
            worth = sum(weights[c] * maps.mean[c, y, x] for c in range(4))
            total += maps.area[y, x] * maps.information[y, x] * worth

    look = look_from(maps, weights, measure="information")

    assert look.score == look.information == pytest.approx(total / maps.area.sum(), rel=1e-5)
    parts = [float((maps.information * maps.area * maps.mean[c]).sum()) * weights[c] for c in range(4)]
    assert look.doubt[0][0] == int(np.argmax(parts))
    assert sum(part for _, part in look.doubt) == pytest.approx(1)
    assert look_from(maps, weights, measure="entropy").score == pytest.approx(look.entropy)


def test_description_does_not_change_when_the_scanner_is_turned_or_the_scene_mirrored() -> None:
    maps = random_maps(2)
    found = describe(maps.mean, maps.area)

    assert np.linalg.norm(found) == pytest.approx(1)
    for columns in (1, 7, 25):
        rolled = describe(np.roll(maps.mean, columns, axis=2), np.roll(maps.area, columns, axis=1))
        np.testing.assert_allclose(rolled, found, atol=1e-6)
    np.testing.assert_allclose(describe(maps.mean[..., ::-1], maps.area[:, ::-1]), found, atol=1e-6)
    other = random_maps(3)
    assert np.linalg.norm(describe(other.mean, other.area) - found) > 0.05


def test_a_turned_scanner_has_nearly_the_same_score(bundles: list[ModelBundle], make_panorama: Panorama) -> None:
    jury = Jury(bundles[:1], shares=None, device="cpu")
    image = make_panorama((64, 128), seed=6)

    looks = [jury.look(turned(image, columns)) for columns in (0, 32, 50)]
    other = jury.look(make_panorama((64, 128), seed=9, black=0.6))

    for look in looks[1:]:
        assert look.score == pytest.approx(looks[0].score, rel=0.1)
        assert np.linalg.norm(look.description - looks[0].description) < 0.5 * np.linalg.norm(
            other.description - looks[0].description
        )


def test_picks_follow_the_conditional_variance() -> None:
    rng = np.random.default_rng(0)
    scores, points = rng.uniform(0.5, 1, 30), rng.normal(size=(30, 3)) * 0.3
    kernel = np.exp(-np.square(points[:, None] - points[None]).sum(-1) / (2 * 0.25**2))
    chosen: list[int] = []
    novelties = []
    for _ in range(8):
        novelty = np.ones(30)
        if chosen:
            across = kernel[:, chosen]
            novelty = 1 - np.einsum("ij,ij->i", across, np.linalg.solve(kernel[np.ix_(chosen, chosen)], across.T).T)
        gain = scores * novelty
        gain[chosen] = -1
        chosen.append(int(gain.argmax()))
        novelties.append(novelty[chosen[-1]])

    picks = pick(scores, points, count=8, bandwidth=0.25)

    assert [index for index, _ in picks] == chosen
    np.testing.assert_allclose([novelty for _, novelty in picks], novelties, atol=1e-8)


def test_of_twenty_scans_of_one_place_one_or_two_are_chosen(
    bundles: list[ModelBundle], make_panorama: Panorama
) -> None:
    rng = np.random.default_rng(1)
    pool = []
    place = make_panorama((64, 128), seed=20, black=0.1)
    for number in range(20):
        scan = turned(place, int(rng.integers(0, 128)))
        noisy = np.where(scan.any(-1, keepdims=True), scan + rng.integers(-3, 4, scan.shape), 0)
        lost = rng.random((64, 128)) < 0.01
        noisy[lost] = 0
        pool.append(frame_of(np.clip(noisy, 0, 255).astype(np.uint8), f"same-{number}.png"))
    for number in range(6):
        other = make_panorama((64, 128), seed=30 + number, black=0.15 + 0.1 * number)
        other[: 8 * number] = 0  # another horizon
        pool.append(frame_of(other, f"other-{number}.png"))

    choices = rank(pool, bundles, count=6, shares=None, device="cpu", quiet=True)

    same = [choice for choice in choices if choice.frame.name.startswith("same")]
    assert len(choices) == 6
    assert 1 <= len(same) <= 2


def test_rarity() -> None:
    schema = LabelSchema.default()
    shares = {0: 0.4, 2: 0.4, 5: 0.16, 6: 0.04}

    weights = rarity(shares, schema)

    expected = 1 / np.sqrt([0.4, 0.4, 0.16, 0.04])
    expected /= (expected * [0.4, 0.4, 0.16, 0.04]).sum()
    np.testing.assert_allclose(weights[:4], expected)
    assert weights[4:].tolist() == [HEAVIEST, HEAVIEST]  # nobody has labelled any yet
    assert rarity(None, schema).tolist() == rarity({}, schema).tolist() == [1.0] * 6


def test_doubt_about_a_rare_class_counts_more() -> None:
    common, rare = random_maps(5), random_maps(5)
    rare.mean[:] = rare.mean[[2, 1, 0, 3]]
    weights = np.array([0.5, 1.0, 8.0, 1.0])

    scores = [look_from(maps, weights).score for maps in (common, rare)]

    share = [float((maps.mean[2] * maps.area).sum()) for maps in (common, rare)]
    assert (scores[0] > scores[1]) == (share[0] > share[1])


def test_rank_explains_and_draws(bundles: list[ModelBundle], make_panorama: Panorama) -> None:
    pool = [frame_of(make_panorama((64, 128), seed=n, black=0.1 * n), f"{n}.png") for n in range(4)]
    pictures: dict[str, bytes] = {}
    skipped: list[str] = []

    choices = rank(
        pool,
        bundles,
        count=2,
        shares={0: 0.9, 2: 0.1},
        device="cpu",
        picture=pictures.__setitem__,
        skipped=skipped,
        quiet=True,
    )

    assert len(choices) == 2
    assert choices[0].novelty == 1
    assert choices[0].reason.startswith("The models are unsure about ")
    assert any(label.name in choices[0].reason for label in LabelSchema.default().labels)
    assert skipped == []
    left, top, right, bottom = choices[0].focus_xyxy
    assert 0 <= left < right <= 128
    assert 0 <= top < bottom <= 64
    assert sorted(pictures) == ["01", "02"]
    assert all(jpeg.startswith(b"\xff\xd8") for jpeg in pictures.values())
    again = rank(pool, bundles, count=2, shares={0: 0.9, 2: 0.1}, device="cpu", quiet=True)
    assert [choice.sha256 for choice in again] == [choice.sha256 for choice in choices]


def test_copies_broken_files_and_what_was_taken_are_left_out(
    bundles: list[ModelBundle], make_panorama: Panorama
) -> None:
    images = [make_panorama((64, 128), seed=n, black=0.3 * n) for n in range(3)]
    import hashlib

    taken = frozenset({hashlib.sha256(to_png(images[2])).hexdigest()})

    def gone() -> bytes:
        raise FileNotFoundError(2, "No such file", "gone.png")

    pool = [
        frame_of(images[0], "a.png"),
        frame_of(images[0], "copy.png"),
        PoolFrame(name="broken.png", read=lambda: b"no picture", task=3, job=1, number=5),
        PoolFrame(name="gone.png", read=gone),
        frame_of(images[2], "taken.png", taken=taken),
        frame_of(images[1], "b.png"),
    ]
    skipped: list[str] = []

    failed: list[str] = []
    choices = rank(pool, bundles[:1], count=5, shares=None, device="cpu", skipped=skipped, failed=failed, quiet=True)

    assert {choice.frame.name for choice in choices} == {"a.png", "b.png"}
    assert failed[0].startswith("broken.png (task 3, frame 5): ")
    assert failed[1].startswith("gone.png: ")
    text = "\n".join(skipped)
    assert "1 of the pool are files that were labelled or handed out before" in text
    assert "1 of the pool are copies of others, byte for byte" in text
    assert rank([], bundles[:1], count=5, shares=None, device="cpu", quiet=True) == []


def test_scans_of_what_was_chosen_are_no_further_choices() -> None:
    points = np.array([[0.0, 1.0], [0.0, 1.001], [1.0, 0.0]])

    picks = pick(np.array([1.0, 0.9, 0.2]), points, count=3)

    assert [index for index, _ in picks] == [0, 2]
    assert pick(np.zeros(0), np.zeros((0, 2)), count=3) == []


def test_what_is_known_lowers_the_novelty_and_forbids_nothing() -> None:
    rng = np.random.default_rng(3)
    points, known = rng.normal(size=(12, 3)) * 0.3, rng.normal(size=(5, 3)) * 0.3
    every = np.concatenate([points, known])
    kernel = np.exp(-np.square(every[:, None] - every[None]).sum(-1) / (2 * 0.25**2))
    across = kernel[:12, 12:]
    novelty = 1 - np.einsum("ij,ij->i", across, np.linalg.solve(kernel[12:, 12:], across.T).T)

    [(first, found)] = pick(np.ones(12), points, count=1, known=known, bandwidth=0.25)

    assert first == int(novelty.argmax())
    assert found == pytest.approx(novelty.max(), abs=1e-8)
    # A scan of a labelled place comes last, though its score is the largest; and once only.
    labelled, twin, other = [0.0, 1.0], [0.001, 1.0], [1.0, 0.0]
    picks = pick(np.array([9.0, 9.0, 0.1]), np.array([twin, twin, other]), count=3, known=np.array([labelled] * 20))
    assert picks[0][0] == 2
    assert len(picks) == 2
    assert picks[1][1] < 0.01


def test_what_is_known_is_looked_at_and_not_chosen(bundles: list[ModelBundle], make_panorama: Panorama) -> None:
    images = [make_panorama((64, 128), seed=40 + n, black=0.2 * n) for n in range(3)]
    pool = [frame_of(turned(images[0], 40), "again.png"), frame_of(images[1], "new.png")]
    skipped: list[str] = []
    lost = PoolFrame(name="lost.png", read=lambda: b"no picture")

    options: dict[str, Any] = {"count": 1, "shares": None, "device": "cpu", "quiet": True}
    alone = rank(pool, bundles[:1], **options)
    beside = rank(pool, bundles[:1], known=[frame_of(images[0]), lost], skipped=skipped, **options)

    assert alone[0].novelty == 1
    assert beside[0].frame.name == "new.png"
    assert beside[0].novelty < 1
    assert skipped[0].startswith("lost.png: ")


def test_wrong_questions(
    bundles: list[ModelBundle], make_unet: Callable[..., UNet], make_manifest: Callable[..., Manifest], tmp_path: Any
) -> None:
    labels = LabelSchema(labels=LabelSchema.default().labels[:2])
    model = make_unet(Architecture(classes=2, base_width=4))
    manifest = make_manifest(model.architecture, labels=labels, label_ids=labels.class_ids)
    other = save_bundle(tmp_path / "other", model, manifest)
    with pytest.raises(ConfigError, match=r"Name models with the same labels"):
        Jury([bundles[0], other], shares=None, device="cpu")
    with pytest.raises(ConfigError, match="Name a bundle"):
        Jury([], shares=None)
    with pytest.raises(ConfigError, match="turns must be 1 or more, found 0"):
        Jury(bundles, shares=None, turns=0)
    with pytest.raises(ConfigError, match="to choose must be 1 or more, found 0"):
        pick(np.ones(2), np.eye(2), count=0)


def test_a_model_that_cannot_be_turned_gives_one_opinion(tiny_bundle: ModelBundle, make_panorama: Panorama) -> None:
    maps = Jury([tiny_bundle], shares=None, device="cpu").maps(make_panorama((64, 128)))
    assert float(maps.information.max()) == 0
    assert float(maps.entropy.max()) > 0
