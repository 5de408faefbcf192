"""A function packaged for OpenVINO, where PyTorch cannot be imported, against the same bundle's with PyTorch."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tools.function_folder import package

BLOCKER = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torch":
            raise ModuleNotFoundError(f"{name} is blocked on purpose", name=name)

sys.meta_path.insert(0, Blocker())
"""


@pytest.fixture(scope="module")
def openvino_host(
    varied_bundle: Path, tmp_path_factory: pytest.TempPathFactory, run_host: Callable[..., Any]
) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("openvino")
    (folder / "blocker").mkdir()
    (folder / "blocker" / "sitecustomize.py").write_text(BLOCKER, encoding="utf-8")
    package(varied_bundle, folder / "function", backend="openvino")
    with run_host(folder / "function", PYTHONPATH=str(folder / "blocker"), SSCLOUD_PRECISION="fp32") as host:
        yield host


def drawn(answer: list[dict[str, Any]], size_hw: tuple[int, int]) -> Any:
    """An answer's masks, drawn → (H, W) array of label names."""
    canvas = np.full(size_hw, "", dtype=object)
    for item in answer:
        *digits, left, top, right, bottom = item["mask"]
        mask = np.array(digits, bool).reshape(bottom - top + 1, right - left + 1)
        canvas[top : bottom + 1, left : right + 1][mask] = item["label"]
    return canvas


def test_pytorch_is_out_of_reach(varied_bundle: Path, tmp_path: Path, run_host: Callable[..., Any]) -> None:
    (tmp_path / "blocker").mkdir()
    (tmp_path / "blocker" / "sitecustomize.py").write_text(BLOCKER, encoding="utf-8")
    package(varied_bundle, tmp_path / "function")
    with (
        pytest.raises(AssertionError, match="blocked on purpose"),
        run_host(tmp_path / "function", PYTHONPATH=str(tmp_path / "blocker")),
    ):
        pass


@pytest.fixture(scope="module")
def torch_host(function_folder: Path, run_host: Callable[..., Any]) -> Iterator[Any]:
    with run_host(function_folder, SSCLOUD_PRECISION="fp32") as host:
        yield host


@pytest.mark.parametrize("size_hw", [(64, 128), (75, 150), (70, 90)], ids=["panorama", "odd", "crop"])
def test_answers_are_those_of_pytorch(
    openvino_host: Any,
    torch_host: Any,
    make_picture: Callable[..., bytes],
    make_body: Callable[..., bytes],
    size_hw: tuple[int, int],
) -> None:
    body = make_body(make_picture(size_hw))
    found, expected = openvino_host.post(body), torch_host.post(body)
    assert (found.status, expected.status) == (200, 200)
    maps = [drawn(answer.json(), size_hw) for answer in (found, expected)]
    assert len(set(maps[1].ravel())) > 3, "nothing to compare"
    assert (maps[0] == maps[1]).mean() >= 0.99999
    assert len(found.json()) == len(expected.json())


def test_the_log_names_the_library(openvino_host: Any) -> None:
    assert "openvino cpu fp32" in openvino_host.log
