"""The sampled scenes of a simulation: panoramas with their truth, grouped into sites as surveyors work."""

import json
import multiprocessing
import os
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from sscloud.errors import ConfigError
from sscloud.files import atomic_write
from sscloud.image import read_label_map, write_label_map
from training.sample.generate import encode_image, panorama_size, render

Role = Literal["test", "seed", "pool"]

ELEVATION: Final = (90.0, -60.0)
"""Top and bottom edge in degrees: a scanner with a blind cone, as most are."""
GROUP_BY: Final = r"^(site\d+)_"
"""Finds the site in a file name."""

_PLAN: Final = "scenes.json"
_WORTH_A_PROCESS: Final = 8
"""Scenes; for fewer, starting another process takes longer than it saves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScenePlan:
    """Which scenes there are."""

    seed: int = 1
    width: int = 512
    """Pixels."""
    test_sites: int = 10
    """One scan each: they measure every model, and the gate resamples them."""
    seed_sites: int = 3
    seed_scans: int = 2
    """Of each seed site; labelled by hand before there is a model."""
    pool: int = 45
    """Scans from which the loop chooses."""
    pool_scans: int = 3
    """Of each site of the pool."""

    def __post_init__(self) -> None:
        panorama_size(self.width, ELEVATION)
        for name, least in (("test_sites", 2), ("seed_sites", 2), ("seed_scans", 1), ("pool", 1), ("pool_scans", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"A simulation needs {least} or more {name}, found {getattr(self, name)}.")
        if self.seed < 0:
            raise ConfigError(f"The seed is {self.seed}; expected 0 or more. Change --seed.")

    def sites(self) -> "list[SitePlan]":
        """The sites in their order."""
        test: tuple[Role, int] = ("test", 1)
        seed: tuple[Role, int] = ("seed", self.seed_scans)
        counts = [test] * self.test_sites + [seed] * self.seed_sites
        rest = self.pool
        while rest > 0:
            counts.append(("pool", min(rest, self.pool_scans)))
            rest -= self.pool_scans
        return [
            SitePlan(name=f"site{number:03d}", role=role, scans=scans) for number, (role, scans) in enumerate(counts, 1)
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class SitePlan:
    """Scans that belong together."""

    name: str
    role: Role
    scans: int

    @property
    def images(self) -> tuple[str, ...]:
        """Names of the files."""
        return tuple(f"{self.name}_{scan}.jpg" for scan in range(1, self.scans + 1))


@dataclass(frozen=True, slots=True)
class Scenes:
    """The sampled files.

    FOLDER/
      scenes.json       the plan: scenes of another one are not used
      imgs/site001_1.jpg
      masks/site001_1.png
    """

    folder: Path
    plan: ScenePlan

    def image(self, name: str) -> bytes:
        """A panorama's file."""
        return (self.folder / "imgs" / name).read_bytes()

    def truth(self, name: str) -> NDArray[np.uint8]:
        """(H, W) uint8 label ids of a panorama; `name` is that of its image, in whatever folder.

        Raises:
            ConfigError: it is none of these scenes.
        """
        path = self._mask(Path(name).name)
        if not path.is_file():
            raise ConfigError(f"{name!r} is no panorama of this simulation ({self.folder}).")
        return read_label_map(path)

    def is_whole(self) -> bool:
        """Whether all scenes of the plan are there."""
        try:
            known: Mapping[str, Any] = json.loads((self.folder / _PLAN).read_bytes())
        except (OSError, ValueError):
            return False
        return known == asdict(self.plan)

    def sample(self, *, quiet: bool = False) -> None:
        """Cast the rays, on all cores; scenes of this plan that are there already stay."""
        if self.is_whole():
            return
        names = [name for site in self.plan.sites() for name in site.images]
        processes = min(os.cpu_count() or 1, len(names) // _WORTH_A_PROCESS)
        # A new interpreter for each: a fork would inherit whatever threads there are.
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(processes, mp_context=context) if processes > 1 else nullcontext()
        with pool as executor, tqdm(total=len(names), desc="Scanning", unit="scene", disable=quiet or None) as bar:
            if executor is None:
                for number, name in enumerate(names, 1):
                    self.scan(number, name)
                    bar.update()
            else:
                for done in as_completed(executor.submit(self.scan, *each) for each in enumerate(names, 1)):
                    done.result()
                    bar.update()
        atomic_write(self.folder / _PLAN, json.dumps(asdict(self.plan), indent=1).encode() + b"\n")

    def scan(self, number: int, name: str) -> None:
        """Render and write one scene."""
        scan = render(self.plan.seed, number, width=self.plan.width, elevation=ELEVATION)
        atomic_write(self.folder / "imgs" / name, encode_image(scan.image))
        write_label_map(self._mask(name), scan.label_map)

    def _mask(self, name: str) -> Path:
        return self.folder / "masks" / f"{Path(name).stem}.png"
