"""What to label next: panoramas ranked by how much labelling them should teach.

Every panorama of the pool is shown to the network several times, turned and mirrored, and to several networks where
there are several. Where the opinions p_1 … p_T of a pixel leave open what it is, there is something to learn:

    predictive entropy     H[mean p]               what is not known, for whatever reason
    mutual information     H[mean p] - mean H[p]   what the opinions disagree about, so that a label would settle it

The first is what is summed up unless another is asked for: neither did better than the other (benchmarks/selection.md),
and the second is small where a network answers turned panoramas alike. It is BALD (N. Houlsby et al., "Bayesian Active
Learning for Classification and Preference Learning", 2011; Y. Gal et al., "Deep Bayesian Active Learning with Image
Data", 2017). A pixel counts by the part of the sphere that it covers, and by how rare the class is that it may be: with
cos-latitude weights a, mean probabilities p_c and weights w_c of the classes, and U one of the two,

    score = sum over pixels a * U * (sum over c of p_c * w_c)  /  sum over pixels a        (pixels with a return only)

The panoramas with the largest scores are often scans of one place from one step aside. So they are chosen one after the
other, by score * novelty. Novelty is the part of a panorama's description that those already chosen, and those that are
labelled or handed out, do not explain: the variance that is left to a Gaussian process with the kernel exp(-d²/2s²)
over descriptions after it was observed at those, 1 for something new and 0 for a copy. That is the greedy search for
the most likely set of a determinantal point process whose kernel is weighed by the roots of the scores (A. Kulesza and
B. Taskar, "Determinantal Point Processes for Machine Learning", 2012; L. Chen et al., "Fast Greedy MAP Inference for
Determinantal Point Process", 2018).

In the simulation of benchmarks/selection.md it is novelty that does most; what the score adds to it was not to be seen.

A description says which classes are seen at which elevation and how they are spread around the scanner, in amplitudes
of the Fourier series over the azimuth: these do not change when the scanner is turned, or the scene mirrored.
"""

import contextlib
import hashlib
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from sscloud.ahead import Ahead
from sscloud.bundle import Manifest, ModelBundle
from sscloud.errors import ConfigError, ImageError, ServerError
from sscloud.image import decode_image, no_return
from sscloud.inference import Forward, make_forward, network_input
from sscloud.labels import LabelSchema
from sscloud.turns import TurnedForward
from sscloud.upsample import softmax
from training.latitude import row_weights
from training.prelabel import is_gone
from training.selection_page import draw

log = logging.getLogger(__name__)

Measure = Literal["information", "entropy"]

Stopping = Callable[[], contextlib.AbstractContextManager[object]]
"""Makes what reads files give up while the context is entered."""

TURNS: Final = 4
HEAVIEST: Final = 8.0
"""Bound on the weight of a rare class, as in training."""
BANDWIDTH: Final = 0.25
"""s of the kernel: descriptions this far apart are half strangers."""
LEAST_NOVELTY: Final = 0.02
"""A panorama to which the chosen ones leave a smaller part of its novelty is a scan of one of them."""
_LEAST_VARIANCE = 1e-9
"""Below it, rounding is all that is left of a variance."""
_BANDS, _WAVES = 6, 6
"""Of a description: bands of elevation, and terms of the Fourier series beside the constant one."""
_MOST_PIXELS = 1 << 20
"""Of a panorama that are looked at; of larger ones every n-th."""
_FOCUS = 16
"""Parts of a panorama's height in which the place that is shown to people is looked for."""
_UNLIKE = 0.5
"""Novelty above which a panorama is called unlike the others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolFrame:
    """A panorama that could be labelled next."""

    name: str
    """Of its file."""
    read: Callable[[], bytes]
    """The file as it was uploaded. Raises ServerError or OSError."""
    task: int | None = None
    """Where it is in CVAT; None for a file of this machine, as the next two."""
    job: int | None = None
    number: int | None = None
    """Of the frame in its task."""
    alone: bool = False
    """Whether it is the only frame of its job."""
    path: Path | None = None
    """Of a file of this machine."""
    taken: frozenset[str] = frozenset()
    """sha256 of images that were labelled or handed out already, from wherever: the same file is not chosen again."""

    @property
    def title(self) -> str:
        """Name and place, for people."""
        return self.name if self.task is None else f"{self.name} (task {self.task}, frame {self.number})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What the networks make of a panorama."""

    score: float
    entropy: float
    """The score by predictive entropy, nats."""
    information: float
    """The score by mutual information, nats."""
    description: NDArray[np.float64]
    """(D,) of unit length; the same for a turned and for a mirrored scanner."""
    doubt: tuple[tuple[int, float], ...]
    """Class index → its part of the score, the largest first."""
    pair: tuple[int, int] | None
    """The two classes between which most of the doubt is."""
    focus_xyxy: tuple[float, float, float, float]
    """The place with the most doubt: shares of the width and the height, 0 to 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A panorama to label next."""

    frame: PoolFrame
    sha256: str
    """Of the file."""
    size_hw: tuple[int, int]
    score: float
    entropy: float
    information: float
    novelty: float
    """0 to 1; see the module."""
    reason: str
    """Why it was chosen, a sentence."""
    focus_xyxy: tuple[float, float, float, float]
    """Where to look first, pixels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A panorama of the pool that was looked at."""

    frame: PoolFrame
    sha256: str
    size_hw: tuple[int, int]
    look: Look


def rank(
    pool: Iterable[PoolFrame],
    bundles: Sequence[ModelBundle],
    *,
    count: int,
    shares: Mapping[int, float] | None,
    known: Iterable[PoolFrame] = (),
    seed: int = 0,
    device: str = "auto",
    turns: int = TURNS,
    picture: Callable[[str, bytes], None] | None = None,
    measure: Measure = "entropy",
    skipped: list[str] | None = None,
    failed: list[str] | None = None,
    stopping: Stopping = contextlib.nullcontext,
    quiet: bool = False,
) -> list[Choice]:
    """Choose what to label next.

    Args:
        pool: the candidates; each file is read and decoded once, and again for the picture of a chosen one.
        bundles: the model, and others with the same labels if there are any, whose opinions count alike.
        count: how many to choose; fewer where the rest of the pool shows what the chosen ones show.
        shares: label id → share of the labelled pixels, 0 to 1; None: no class is rare.
        known: what is labelled or handed out already, and like which nothing needs to be chosen; looked at, too.
        seed: decides between equal ones.
        device: `auto`, `cpu`, `cuda`, …
        turns: opinions of each network.
        picture: told of a JPEG for every choice, by its place: `01`, `02`, …
        measure: what is summed up in the score.
        skipped: told what was left out with good reason, a sentence each.
        failed: told what could not be looked at, a sentence each.
        stopping: entered on the way out, where it has to end what still reads a file: `Server.stopping`.
        quiet: no progress bar.

    Returns:
        The choices, the most instructive first.

    Raises:
        ConfigError: bundles with different labels, a count or turns below 1, or a device that does not exist.
        ServerError: the server cannot be reached any more.
    """
    jury = Jury(bundles, shares=shares, device=device, turns=turns, measure=measure)
    skipped = [] if skipped is None else skipped
    failed = [] if failed is None else failed
    candidates = look_at(pool, jury, skipped=skipped, failed=failed, stopping=stopping, quiet=quiet)
    seen = look_at(known, jury, skipped=[], failed=skipped, stopping=stopping, quiet=quiet) if candidates else []
    picks = pick(
        np.array([candidate.look.score for candidate in candidates]),
        np.array([candidate.look.description for candidate in candidates]),
        count=count,
        known=np.array([other.look.description for other in seen]) if seen else None,
        seed=seed,
    )
    left = min(count, len(candidates)) - len(picks)
    if left > 0:
        skipped.append(f"{left} fewer than asked for: the other panoramas show what the chosen ones show")
    choices = []
    for place, (index, novelty) in enumerate(picks):
        candidate = candidates[index]
        look, (height, width) = candidate.look, candidate.size_hw
        left_, top, right, bottom = look.focus_xyxy
        choices.append(
            Choice(
                frame=candidate.frame,
                sha256=candidate.sha256,
                size_hw=candidate.size_hw,
                score=look.score,
                entropy=look.entropy,
                information=look.information,
                novelty=novelty,
                reason=explain(look, jury, novelty=novelty, first=place == 0),
                focus_xyxy=(left_ * width, top * height, right * width, bottom * height),
            )
        )
    if picture is not None:
        for place, choice in enumerate(choices, 1):
            try:
                picture(f"{place:02d}", draw(choice, jury))
            except (ImageError, ServerError, OSError) as error:
                if isinstance(error, ServerError) and is_gone(error):
                    raise
                failed.append(f"{choice.frame.title} has no picture: {error}")
    return choices


def look_at(
    pool: Iterable[PoolFrame],
    jury: "Jury",
    *,
    skipped: list[str],
    failed: list[str],
    stopping: Stopping = contextlib.nullcontext,
    quiet: bool = False,
) -> list[Candidate]:
    """Look at every panorama of a pool once; identical files are one.

    Args:
        pool: the panoramas.
        jury: looks.
        skipped: told of copies.
        failed: told of what could not be looked at.
        stopping: see `rank`.
        quiet: no progress bar.

    Raises:
        ServerError: the server cannot be reached any more.
    """
    frames = list(pool)
    candidates: list[Candidate] = []
    seen: dict[str, int] = {}
    copies = done = 0
    files = Ahead[int, bytes](lambda place: frames[place].read())
    try:
        for place in tqdm(range(len(frames)), "Looking", unit="img", disable=quiet or None):
            frame = frames[place]
            try:
                data = files.take(place, following=place + 1 if place + 1 < len(frames) else None)
                digest = hashlib.sha256(data).hexdigest()
                if digest in frame.taken or digest in seen:
                    done += digest in frame.taken
                    copies += digest not in frame.taken
                    continue
                image = decode_image(data)
                del data
                candidate = Candidate(frame=frame, sha256=digest, size_hw=image.shape[:2], look=jury.look(image))
                del image
            except (ImageError, ServerError, OSError) as error:
                if isinstance(error, ServerError) and is_gone(error):
                    raise
                failed.append(f"{frame.title}: {error}")
                continue
            seen[digest] = place
            candidates.append(candidate)
    finally:
        with stopping():
            files.close()
    if done:
        skipped.append(f"{done} of the pool are files that were labelled or handed out before")
    if copies:
        skipped.append(f"{copies} of the pool are copies of others, byte for byte")
    return candidates


class Jury:
    """Networks that look at panoramas.

    Args:
        bundles: with the same labels.
        shares: label id → share of the labelled pixels.
        device: `auto`, `cpu`, …
        turns: opinions of each network; one where a bundle's panoramas cannot be turned.
        measure: of the score.

    Raises:
        ConfigError: no bundle, other labels, no turns, or no such device.
    """

    def __init__(
        self,
        bundles: Sequence[ModelBundle],
        *,
        shares: Mapping[int, float] | None,
        device: str = "auto",
        turns: int = TURNS,
        measure: Measure = "entropy",
    ) -> None:
        if not bundles:
            raise ConfigError("There is no model to ask what it does not know. Name a bundle.")
        if turns < 1:
            raise ConfigError(f"The turns must be 1 or more, found {turns}.")
        first = bundles[0].manifest
        self.schema: LabelSchema = first.labels
        self.bundles = tuple(bundles)
        self.measure: Measure = measure
        for bundle in bundles[1:]:
            if bundle.manifest.labels.class_ids != self.schema.class_ids:
                raise ConfigError(
                    f"{bundle.manifest.title} has the label ids {list(bundle.manifest.labels.class_ids)}, "
                    f"{first.title} has {list(self.schema.class_ids)}. Name models with the same labels."
                )
        self.weights = rarity(shares, self.schema)
        self._members = [_Member(bundle, self.schema, device=device, turns=turns) for bundle in bundles]

    def maps(self, image: NDArray[np.uint8]) -> "Maps":
        """What is known of every pixel of a panorama.

        Args:
            image: (H, W, 3) uint8 RGB.

        Raises:
            ImageError: too small for a model.
        """
        tally: _Tally | None = None
        for member in self._members:
            for probability in member.opinions(image):
                tally = tally or _Tally(probability.shape)
                tally.add(probability)
        assert tally is not None  # noqa: S101 - there is a member, and each has an opinion
        manifest = self.bundles[0].manifest
        mean, entropy, information = tally.result()
        height = mean.shape[1]
        area = np.repeat(row_weights(height, manifest.elevation)[:, None], mean.shape[2], axis=1)
        if manifest.encoding == "normals":
            small, _ = network_input(image, manifest, size_hw=(image.shape[0], image.shape[1]))
            black = no_return(small).astype(np.uint8)
            area[cv2.resize(black, (mean.shape[2], height), interpolation=cv2.INTER_NEAREST) > 0] = 0
        return Maps(mean=mean, entropy=entropy, information=information, area=area.astype(np.float32))

    def look(self, image: NDArray[np.uint8]) -> Look:
        """A panorama in a few numbers; see the module.

        Args:
            image: (H, W, 3) uint8 RGB.

        Raises:
            ImageError: too small for a model.
        """
        return look_from(self.maps(image), self.weights, measure=self.measure)


@dataclass(frozen=True, slots=True, kw_only=True)
class Maps:
    """What is known of the pixels of a panorama, at the model's scale or thinned."""

    mean: NDArray[np.float32]
    """(C, h, w) mean probability of each class."""
    entropy: NDArray[np.float32]
    """(h, w) of the mean, nats."""
    information: NDArray[np.float32]
    """(h, w) entropy of the mean, less the mean of the entropies, nats."""
    area: NDArray[np.float32]
    """(h, w) solid angle, relative; 0 where there is no return."""


class _Tally:
    """Opinions, summed up."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._sum = np.zeros(shape, np.float32)
        self._entropies = np.zeros(shape[1:], np.float32)
        self._count = 0

    def add(self, probability: NDArray[np.float32]) -> None:
        """One opinion, (C, h, w); of another size it is brought to the first one's."""
        if probability.shape != self._sum.shape:
            height, width = self._sum.shape[1:]
            probability = np.stack(
                [cv2.resize(plane, (width, height), interpolation=cv2.INTER_LINEAR) for plane in probability]
            )
        self._sum += probability
        self._entropies += entropy_of(probability)
        self._count += 1

    def result(self) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
        """Mean probability, its entropy, and the mutual information."""
        mean = self._sum / np.float32(self._count)
        entropy = entropy_of(mean)
        return mean, entropy, np.maximum(entropy - self._entropies / np.float32(self._count), 0)


class _Member:
    """One network of a jury."""

    def __init__(self, bundle: ModelBundle, schema: LabelSchema, *, device: str, turns: int) -> None:
        self._manifest: Manifest = bundle.manifest
        self._forward: Forward = make_forward(bundle, device=device, precision="fp32", backend="torch")
        index_of = {label_id: index for index, label_id in enumerate(schema.class_ids)}
        self._classes = len(index_of)
        self._class_of = [index_of.get(label_id) for label_id in self._manifest.label_ids]
        turnable = self._manifest.encoding == "rgb" or self._manifest.azimuth is not None
        self._turned: TurnedForward | None = None
        if turns > 1 and turnable and self._manifest.architecture.wrap:
            self._turned = TurnedForward(
                self._forward,
                turns=turns,
                encoding=self._manifest.encoding,
                frame=self._manifest.frame,
                azimuth=self._manifest.azimuth,
                temperature=self._manifest.temperature,
            )

    def opinions(self, image: NDArray[np.uint8]) -> Iterator[NDArray[np.float32]]:
        """(C, h, w) probabilities of the classes, for every turn."""
        scaled, wrap = network_input(image, self._manifest, size_hw=(image.shape[0], image.shape[1]))
        step = max(1, math.ceil(math.sqrt(scaled.shape[0] * scaled.shape[1] / _MOST_PIXELS)))
        if self._turned is not None and wrap:
            for probability in self._turned.opinions(scaled):
                yield self._by_class(probability[:, step // 2 :: step, step // 2 :: step])
        else:
            logits = self._forward.logits(scaled, wrap=wrap)
            thinned = logits[:, step // 2 :: step, step // 2 :: step]
            yield self._by_class(softmax(thinned / np.float32(self._manifest.temperature)))

    def _by_class(self, probability: NDArray[np.float32]) -> NDArray[np.float32]:
        """Channels → classes; channels that write the same label are added, those of no class left out."""
        result = np.zeros((self._classes, *probability.shape[1:]), np.float32)
        for channel, index in enumerate(self._class_of):
            if index is not None:
                result[index] += probability[channel]
        return result


def entropy_of(probability: NDArray[np.float32]) -> NDArray[np.float32]:
    """(C, h, w) probabilities → (h, w) entropy, nats."""
    total = np.zeros(probability.shape[1:], np.float32)
    for plane in probability:  # one after the other: logarithms of all of them would take as much memory again
        total -= plane * np.log(np.maximum(plane, np.finfo(np.float32).tiny))
    return total


def rarity(shares: Mapping[int, float] | None, schema: LabelSchema) -> NDArray[np.float64]:
    """(C,) weights of the classes, inversely proportional to the root of their share of the labelled pixels.

    They average to 1 over those pixels, are at most `HEAVIEST`, and `HEAVIEST` for a class that has none yet.

    Args:
        shares: label id → share, 0 to 1; None: all weigh 1.
        schema: the classes.
    """
    if shares is None:
        return np.ones(len(schema.class_ids))
    share = np.array([max(0.0, shares.get(label_id, 0.0)) for label_id in schema.class_ids])
    if share.sum() <= 0:
        return np.ones(len(share))
    share /= share.sum()
    weights = 1 / np.sqrt(np.maximum(share, 1e-12))
    weights /= (weights * share).sum()
    capped: NDArray[np.float64] = np.minimum(weights, HEAVIEST)
    return capped


def look_from(maps: Maps, weights: NDArray[np.float64], *, measure: Measure = "entropy") -> Look:
    """The numbers of a panorama; see the module.

    Args:
        maps: of its pixels.
        weights: (C,) of the classes.
        measure: of the score.
    """
    weighed = np.tensordot(weights.astype(np.float32), maps.mean, axes=1) * maps.area
    total = max(float(maps.area.sum()), 1e-12)
    scores = {
        name: float((weighed * getattr(maps, name)).sum(dtype=np.float64)) / total
        for name in ("entropy", "information")
    }
    doubt = getattr(maps, measure) * maps.area
    parts = np.array([float((plane * doubt).sum(dtype=np.float64)) for plane in maps.mean]) * weights
    order = np.argsort(-parts, kind="stable")
    whole = max(parts.sum(), 1e-12)
    return Look(
        score=scores[measure],
        entropy=scores["entropy"],
        information=scores["information"],
        description=describe(maps.mean, maps.area),
        doubt=tuple((int(index), float(parts[index] / whole)) for index in order),
        pair=_pair(maps.mean, doubt * (weighed / np.maximum(maps.area, 1e-12))),
        focus_xyxy=_focus(weighed * getattr(maps, measure)),
    )


def _pair(mean: NDArray[np.float32], doubt: NDArray[np.float32]) -> tuple[int, int] | None:
    """The two most likely classes of a pixel, by the doubt they share over all pixels."""
    if len(mean) < 2 or not doubt.any():
        return None
    best = np.argpartition(mean, -2, axis=0)[-2:]
    low, high = best.min(axis=0), best.max(axis=0)
    sums = np.bincount((low * len(mean) + high).ravel(), weights=doubt.ravel(), minlength=len(mean) ** 2)
    first, second = divmod(int(sums.argmax()), len(mean))
    return first, second


def _focus(doubt: NDArray[np.float32]) -> tuple[float, float, float, float]:
    """The square part with the most doubt, as shares of the width and height."""
    height, width = doubt.shape
    side = max(1, height // _FOCUS)
    sums = cv2.boxFilter(doubt.astype(np.float32), -1, (side, side), borderType=cv2.BORDER_CONSTANT)
    y, x = np.unravel_index(int(sums.argmax()), sums.shape)
    left, top = max(0, int(x) - side), max(0, int(y) - side)
    right, bottom = min(width, int(x) + side + 1), min(height, int(y) + side + 1)
    return left / width, top / height, right / width, bottom / height


def describe(mean: NDArray[np.float32], area: NDArray[np.float32]) -> NDArray[np.float64]:
    """What is seen where, whichever way the scanner was turned.

    Args:
        mean: (C, h, w) probability of the classes.
        area: (h, w) weight of the pixels.

    Returns:
        (D,) of unit length: for every band of elevation and class the amplitudes of the Fourier series over the azimuth
        of how much of it is seen.
    """
    height = mean.shape[1]
    band_of = np.minimum(np.arange(height) * _BANDS // height, _BANDS - 1)
    bands = (band_of == np.arange(_BANDS)[:, None]).astype(np.float32)
    seen = np.stack([bands @ (plane * area) for plane in mean]).astype(np.float64)
    amplitudes = np.abs(np.fft.rfft(seen, axis=2))[..., : _WAVES + 1]
    # Roots: a class that fills a hundredth of the sphere tells places apart as well as one that fills the half.
    description: NDArray[np.float64] = np.sqrt(amplitudes).ravel()
    return description / max(float(np.linalg.norm(description)), 1e-12)


def pick(
    scores: NDArray[np.float64],
    descriptions: NDArray[np.float64],
    *,
    count: int,
    known: NDArray[np.float64] | None = None,
    seed: int = 0,
    bandwidth: float = BANDWIDTH,
) -> list[tuple[int, float]]:
    """Choose by score and novelty, one after the other; see the module.

    The conditional variances follow from an incomplete Cholesky factorisation that grows by a column an observation.

    Args:
        scores: (N,).
        descriptions: (N, D).
        count: how many.
        known: (M, D) descriptions of what is labelled or handed out, which the chosen ones should differ from.
        seed: decides between equal ones.
        bandwidth: of the kernel.

    Returns:
        Index and novelty of each, in the order of choice; without those whose novelty the choices before them have
        brought below `LEAST_NOVELTY` of what it was. What is known only lowers it: where everything is much like what
        is labelled, the least alike is still chosen.

    Raises:
        ConfigError: a count below 1.
    """
    if count < 1:
        raise ConfigError(f"The number of panoramas to choose must be 1 or more, found {count}.")
    number = len(scores)
    if number == 0:
        return []
    tie = np.random.default_rng(seed).permutation(number)
    known = np.empty((0, descriptions.shape[1])) if known is None else known
    points = np.concatenate([descriptions, known])
    variance = np.ones(len(points))
    factor = np.zeros((min(count, number) + len(known), len(points)))
    rows = 0

    def observe(index: int) -> None:
        nonlocal rows
        distance = np.square(points - points[index]).sum(axis=1)
        kernel = np.exp(-distance / (2 * bandwidth**2))
        factor[rows] = (kernel - factor[:rows].T @ factor[:rows, index]) / math.sqrt(variance[index])
        np.clip(variance - factor[rows] ** 2, _LEAST_VARIANCE, 1.0, out=variance)
        rows += 1

    for index in range(number, len(points)):
        if variance[index] > LEAST_NOVELTY:  # others say nearly all that this one would
            observe(index)
    left = variance[:number].copy()
    free = np.ones(number, bool)
    picks: list[tuple[int, float]] = []
    for _ in range(min(count, number)):
        novelty = variance[:number]
        gain = np.where(free & (novelty >= LEAST_NOVELTY * left), scores * novelty, -np.inf)
        best = max(range(number), key=lambda i: (gain[i], -tie[i]))
        if not math.isfinite(gain[best]):
            break
        picks.append((best, float(novelty[best])))
        free[best] = False
        observe(best)
    return picks


def explain(look: Look, jury: Jury, *, novelty: float, first: bool) -> str:
    """Why a panorama was chosen, in a sentence."""
    classes = jury.schema.classes
    who, what = ("The models", "are unsure") if len(jury.bundles) > 1 else ("The model", "is unsure")
    named = [index for index, part in look.doubt[:2] if part >= 0.25] or [look.doubt[0][0]]
    parts = dict(look.doubt)
    text = f"{who} {what} about " + " and ".join(
        f"{classes[i].name} ({parts[i]:.0%} of all that is unclear)" for i in named
    )
    if look.pair is not None:
        a, b = look.pair
        text += f"; most often a place could be {classes[a].name} as well as {classes[b].name}"
    rare = [classes[i].name for i in named if jury.weights[i] >= 1.5]
    if rare:
        text += f"; {' and '.join(rare)} {'is' if len(rare) == 1 else 'are'} rare in what is labelled"
    if first:
        text += "; the most useful to label of all"
    elif novelty >= _UNLIKE:
        text += "; unlike those chosen or labelled before"
    return text + "."
