import re
import subprocess
import sys

import pytest
import torch

from sscloud.architecture import Architecture
from training.memory import advise, is_out_of_memory, step_bytes

SMALL = Architecture(classes=6, base_width=8)


def bytes_of(batch: int = 1, scale: float = 0.5, *, amp: bool = False) -> int:
    return step_bytes(SMALL, batch, (int(512 * scale), int(1024 * scale)), amp=amp)


def advice(batch: int, available: int, *, scale: float = 0.5, amp: bool = False) -> str:
    return advise(SMALL, batch, (512, 1024), scale, amp=amp, available=available)


def test_grows_with_what_is_kept() -> None:
    fixed = 4 * 4 * sum(p.numel() for p in _parameters())

    assert bytes_of() > fixed
    assert bytes_of(2) - fixed == pytest.approx(2 * (bytes_of() - fixed), rel=0.02)
    assert bytes_of(scale=1.0) - fixed == pytest.approx(4 * (bytes_of() - fixed), rel=0.02)
    assert 0.4 < (bytes_of(amp=True) - fixed) / (bytes_of() - fixed) < 0.7


def _parameters() -> list[torch.nn.Parameter]:
    from sscloud.unet import UNet

    return list(UNet(SMALL).parameters())


def test_advice_names_the_largest_batch_and_scale_that_fit() -> None:
    text = advice(8, bytes_of(3) + 1)

    assert text.startswith("A step at --scale 0.5 --batch-size 8 needs about 1.0 GiB")
    batch, scale = re.findall(r"--batch-size (\d) --scale (0\.\d+)", text)
    assert batch == ("3", "0.5")
    assert scale[0] == "8"
    assert bytes_of(8, float(scale[1])) <= bytes_of(3) < bytes_of(8, float(scale[1]) + 0.01)
    assert "--amp" not in text


def test_advice_offers_mixed_precision_when_that_is_enough() -> None:
    available = (bytes_of(2) + bytes_of(2, amp=True)) // 2

    assert "--amp at --scale 0.5 --batch-size 2" in advice(2, available)
    assert "--amp at" not in advice(2, available, amp=True)


def test_advice_for_one_panorama_names_a_scale() -> None:
    text = advice(1, bytes_of(scale=0.3) + 1)

    assert "These would fit: --batch-size 1 --scale 0.3" in text


def test_advice_when_nothing_fits() -> None:
    assert advice(1, 1000).endswith("No scale fits this device; a smaller --base-width would.")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("size mismatch"), False),
        (ValueError("DefaultCPUAllocator"), False),
    ],
)
def test_what_counts_as_out_of_memory(error: BaseException, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


_MEASURE = """
import psutil, resource, sys, torch
from sscloud.unet import UNet
from sscloud.architecture import Architecture
from training.losses import segmentation_loss
height, width = int(sys.argv[1]), 2 * int(sys.argv[1])
torch.set_num_threads(1)
model = UNet(Architecture(classes=6, base_width=16))
optimizer = torch.optim.AdamW(model.parameters())
def step(h, w):
    target = torch.zeros(1, h, w, dtype=torch.int64)
    loss = segmentation_loss(model(torch.rand(1, 3, h, w)), target, torch.ones(6))
    optimizer.zero_grad(); loss.backward(); optimizer.step()
step(64, 128)
start = psutil.Process().memory_info().rss  # the peak so far is that of the imports
step(height, width); step(height, width)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - start)
"""


@pytest.mark.slow
@pytest.mark.parametrize("height", [384, 768])
def test_counted_bytes_are_near_the_measured_peak(height: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(height)], capture_output=True, text=True, check=True, timeout=250
    )
    architecture = Architecture(classes=6, base_width=16)
    # What the small step before it needed is part of the process already.
    counted = step_bytes(architecture, 1, (height, 2 * height), amp=False) - step_bytes(
        architecture, 1, (64, 128), amp=False
    )

    # PyTorch's own scratch buffers, some hundred MB whatever the size, are not counted.
    assert counted == pytest.approx(int(done.stdout), rel=0.35, abs=400 << 20)
