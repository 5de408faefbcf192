"""Averaging what a network says of a panorama over turns of the scanner.

The same place scanned by a turned or mirrored scanner has the same labels, so each turned copy of a panorama is another
opinion of it. A network whose convolutions wrap gives nearly the same opinion after a roll by a multiple of its stride,
where its pooling falls on the same columns; the turns therefore differ in what remains of them by the stride.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sscloud.architecture import STRIDE
from sscloud.frame import Azimuth, Frame, reflect_normals, rotate_normals
from sscloud.image import Encoding
from sscloud.upsample import softmax

if TYPE_CHECKING:
    from sscloud.inference import Forward

_RESIDUE_STEP = 5
"""How far the turns move on within the network's stride: prime to it, so that all columns of it have their turn."""


class TurnedForward:
    """A network that sees every panorama several times, turned, and every other time mirrored too.

    Its logits are those that become the mean probability when they are divided by the temperature. Crops have no other
    side to turn to: they are seen once.

    Args:
        forward: runs the network.
        turns: times that it sees a panorama.
        encoding: of the images; colours move but do not change.
        frame: in which the network sees normals; in the view frame a turn moves them, too, without a change.
        azimuth: how columns relate to directions; needed for normals in the scanner's frame only.
        temperature: that logits are divided by before they become probabilities.
    """

    def __init__(
        self,
        forward: "Forward",
        *,
        turns: int,
        encoding: Encoding,
        frame: Frame,
        azimuth: Azimuth | None,
        temperature: float = 1.0,
    ) -> None:
        self._forward = forward
        self._turns = turns
        self._temperature = np.float32(temperature)
        self._has_normals = encoding == "normals"
        # A mirrored scene has y negated in the view frame, as if at a plane through azimuth 0; a turn changes nothing.
        self._azimuth = azimuth if frame == "scanner" else None

    @property
    def tuned_to_size(self) -> bool:
        """Whether the first image of a size takes longer."""
        return self._forward.tuned_to_size

    def describe(self) -> str:
        """Library, device and precision, for a log."""
        return f"{self._forward.describe()}, mean of {self._turns} turns"

    def logits(self, image: NDArray[np.uint8], *, wrap: bool) -> NDArray[np.float32]:
        """(h, w, 3) uint8 RGB → (C, h, w) float32; see `sscloud.inference.Forward`."""
        if not wrap:
            return self._forward.logits(image, wrap=False)
        mean = np.maximum(sum(self.opinions(image)) / np.float32(self._turns), np.finfo(np.float32).tiny)
        logits: NDArray[np.float32] = np.log(mean) * self._temperature
        return logits

    def opinions(self, image: NDArray[np.uint8]) -> Iterator[NDArray[np.float32]]:
        """(h, w, 3) uint8 RGB of a whole panorama → for each turn (C, h, w) float32 probabilities, as it was given."""
        for turn, columns in enumerate(rolls(self._turns, image.shape[1])):
            yield self._probability(image, columns, mirrored=turn % 2 == 1)

    def _probability(self, image: NDArray[np.uint8], columns: int, *, mirrored: bool) -> NDArray[np.float32]:
        """(C, h, w) float32 of the panorama as it is, from one that is turned."""
        turned = self._turned(image, columns)
        if mirrored:
            turned = self._mirrored(turned)
        logits = self._forward.logits(np.ascontiguousarray(turned), wrap=True)
        probability = softmax(logits / self._temperature)
        if mirrored:
            probability = probability[..., ::-1]
        return np.roll(probability, -columns, axis=2)

    def _turned(self, image: NDArray[np.uint8], columns: int) -> NDArray[np.uint8]:
        rolled = np.roll(image, columns, axis=1)
        if not self._has_normals or self._azimuth is None or columns == 0:
            return rolled
        return rotate_normals(rolled, self._azimuth.direction * 2 * np.pi * columns / image.shape[1])

    def _mirrored(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        if not self._has_normals:
            return image[:, ::-1]
        return reflect_normals(image, self._azimuth.column_0 if self._azimuth else 0.0)[:, ::-1]


def rolls(turns: int, width: int) -> list[int]:
    """Columns to roll a panorama of `width` columns by: spread over the turn, the first one 0."""
    return [(turn * width // turns // STRIDE * STRIDE + turn * _RESIDUE_STEP % STRIDE) % width for turn in range(turns)]
