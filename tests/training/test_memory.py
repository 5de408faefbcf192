import re
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

from sscloud.architecture import Architecture
from sscloud.errors import TrainingError
from sscloud.forward import is_out_of_memory
from sscloud.unet import UNet
from training.config import LossName
from training.losses import make_loss
from training.memory import (
    Plan,
    _count,
    _count_once,
    _LiveBytes,
    advise,
    available_bytes,
    plan,
    step_bytes,
)

SMALL = Architecture(classes=6, base_width=8)


def bytes_of(batch: int = 1, scale: float = 0.5, *, amp: bool = False) -> int:
    return step_bytes(SMALL, batch, (int(512 * scale), int(1024 * scale)), amp=amp)


def advice(batch: int, available: int, *, scale: float = 0.5, amp: bool = False) -> str:
    return advise(SMALL, batch, (512, 1024), scale, amp=amp, available=available)


def test_grows_with_what_is_kept() -> None:
    fixed = 4 * parameter_bytes() + (400 << 20)

    assert bytes_of() > fixed
    assert bytes_of(2) - fixed == pytest.approx(2 * (bytes_of() - fixed), rel=0.001)
    assert bytes_of(scale=1.0) - fixed == pytest.approx(4 * (bytes_of() - fixed), rel=0.02)
    assert 0.4 < (bytes_of(amp=True) - fixed) / (bytes_of() - fixed) < 0.7
    assert step_bytes(SMALL, 1, (256, 512), amp=False, ema=True) - bytes_of() == parameter_bytes()


@pytest.mark.parametrize("name", ["ce", "focal+dice", "ce+tversky", "ce+lovasz"])
def test_other_losses_are_counted(name: LossName) -> None:
    """Against what the loss alone holds at the size in question."""

    def held(name: LossName) -> int:
        loss, live = make_loss(name, weights=torch.ones(SMALL.classes)), _LiveBytes([])
        logits = torch.randn(1, SMALL.classes, 96, 160, requires_grad=True)
        with live:
            loss(logits, torch.randint(SMALL.classes, (1, 96, 160)).byte()).backward()
        return live.peak

    counted = step_bytes(SMALL, 1, (96, 160), amp=False, loss=name) - step_bytes(SMALL, 1, (96, 160), amp=False)

    assert counted == pytest.approx(max(0, held(name) - held("ce+dice")), rel=0.05)


def parameter_bytes() -> int:
    return 4 * sum(p.numel() for p in UNet(SMALL).parameters())


def test_activations_are_what_autograd_keeps_and_more() -> None:
    """Against another way to count: the tensors saved for the backward pass, which are alive when it begins."""
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    model = UNet(SMALL)
    owned = {p.untyped_storage()._cdata for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        make_loss("ce+dice", weights=torch.ones(6))(model(torch.rand(1, 3, 256, 512)), torch.zeros(1, 256, 512).byte())
    kept = sum(t.untyped_storage().nbytes() for key, t in saved.items() if key not in owned)
    counted = bytes_of() - 4 * parameter_bytes() - (400 << 20)

    assert kept < counted < 1.25 * kept


@pytest.mark.parametrize("size_hw", [(819, 1638), (64, 800)])
def test_a_count_is_shared_by_sizes_that_are_pooled_alike(size_hw: tuple[int, int]) -> None:
    """Counted as it is, the size needs what the one that stands for it makes believe."""
    exact = _count_once(SMALL, size_hw, amp=False, checkpointing=False, has_seam=True)
    estimated = _count(SMALL, size_hw, "ce+dice", amp=False, checkpointing=False, has_seam=True)

    assert 0.99 < estimated.image / exact.image < 1.05
    assert estimated.parameters == exact.parameters


def test_checkpointing_and_crops_need_less() -> None:
    def activations(**options: bool) -> int:
        needed = step_bytes(SMALL, 1, (512, 1024), **{"amp": False, **options})
        return needed - 4 * parameter_bytes() - (400 << 20)

    assert 0.3 < activations(checkpointing=True) / activations() < 0.45
    assert 0.8 < activations(has_seam=False) / activations() < 0.95


def test_many_classes_need_more() -> None:
    few, many = (Architecture(classes=classes, base_width=8) for classes in (6, 68))
    difference = step_bytes(many, 1, (256, 512), amp=False) - step_bytes(few, 1, (256, 512), amp=False)

    assert difference > 2 * 62 * 256 * 512 * 4  # logits or their logarithms, and their gradients


def test_advice_names_the_largest_batch_and_scale_that_fit() -> None:
    text = advice(8, bytes_of(3) + 1)

    assert text.startswith("A step at --scale 0.5 --batch-size 8 needs about 1.3 GiB")
    batch, scale = re.findall(r"--batch-size (\d) --scale (0\.\d+)", text)
    assert batch == ("3", "0.5")
    assert scale[0] == "8"
    assert bytes_of(8, float(scale[1])) <= bytes_of(3) < bytes_of(8, float(scale[1]) + 0.02)
    assert "--amp" not in text


@pytest.mark.slow
def test_advice_offers_mixed_precision_when_that_is_enough() -> None:
    available = (bytes_of(2) + bytes_of(2, amp=True)) // 2

    assert "--amp at --scale 0.5 --batch-size 2" in advice(2, available)
    assert "--amp at" not in advice(2, available, amp=True)


def test_advice_for_one_panorama_names_a_scale() -> None:
    assert "--batch-size 1 --scale 0.3" in advice(1, bytes_of(scale=0.3) + 1)


@pytest.mark.slow
def test_advice_names_checkpointing_and_crops() -> None:
    available = step_bytes(SMALL, 1, (512, 1024), amp=False, checkpointing=True)
    text = advice(1, available, scale=1.0)

    assert "--checkpointing at --scale 1 --batch-size 1" in text
    assert "--crop 512x512 at --scale 1 --batch-size 1" in advice(1, bytes_of(scale=1.0) - 1, scale=1.0)
    again = advise(SMALL, 1, (512, 1024), 1.0, amp=False, available=available // 2, crop=(512, 512), checkpointing=True)
    assert again.startswith("A step at --scale 1 --batch-size 1 --crop 512x512 --checkpointing needs about 0.5 GiB")
    assert "--checkpointing at" not in again


def test_advice_when_nothing_fits() -> None:
    assert advice(1, 1000).endswith("No scale fits this device; a smaller --base-width would.")


class TestPlan:
    FULL_HW = (4096, 8192)

    def plan(self, gigabytes: float, **options: Any) -> Plan:
        architecture = Architecture(classes=6, base_width=options.pop("base_width", 64))
        available = int(gigabytes * 10**9)
        found = plan(architecture, full_hw=self.FULL_HW, available=available, **{"amp": False, **options})
        assert found.needed <= 0.8 * available
        assert found.needed == step_bytes(
            architecture,
            found.batch_size,
            found.size_hw,
            amp=options.get("amp", False),
            checkpointing=found.checkpointing,
            has_seam=found.has_seam,
            ema=options.get("ema", False),
        )
        return found

    def test_whole_panoramas_where_they_fit(self) -> None:
        found = self.plan(64, scale=0.1)
        assert (found.crop, found.checkpointing, found.accumulate) == (None, False, 1)
        assert found.size_hw == (409, 819)
        assert found.has_seam
        assert found.batch_size == 8
        assert self.plan(16, scale=0.1).batch_size == 4
        assert self.plan(8, scale=0.1).batch_size == 2

    def test_activations_computed_twice_before_crops(self) -> None:
        found = self.plan(8, scale=0.2)
        assert (found.crop, found.checkpointing, found.batch_size) == (None, True, 1)

    @pytest.mark.parametrize("scale", [0.2, 0.5, 1.0])
    def test_eight_gigabytes_are_enough_for_every_scale(self, scale: float) -> None:
        found = self.plan(8, scale=scale)
        assert found.scale == scale
        assert found.size_hw[0] >= 512

    def test_crops_where_whole_panoramas_do_not_fit(self) -> None:
        found = self.plan(8, scale=1.0)
        assert (found.crop, found.checkpointing) == ((1024, 2048), True)
        assert not found.has_seam
        assert self.plan(24, scale=1.0).crop == (1024, 2048)
        assert not self.plan(24, scale=1.0).checkpointing
        assert self.plan(4, scale=1.0).crop == (512, 1024)

    def test_the_largest_scale_whose_crops_show_a_quarter_of_the_height(self) -> None:
        assert self.plan(8).scale == 1.0
        assert (self.plan(4).scale, self.plan(4).crop) == (0.5, (512, 1024))
        assert (self.plan(2.4).scale, self.plan(2.4).crop) == (0.1, None)

    def test_a_batch_that_does_not_fit_is_divided(self) -> None:
        found = self.plan(16, scale=0.1, batch_size=12)
        assert (found.batch_size, found.accumulate) == (4, 3)
        assert not found.checkpointing
        assert self.plan(16, scale=0.1, batch_size=7).accumulate == 7

    @pytest.mark.slow
    def test_what_was_given_is_kept(self) -> None:
        found = self.plan(64, scale=0.5, crop=(640, 9999), checkpointing=True, amp=True, ema=True)
        assert found.crop == (640, 4096)
        assert found.has_seam
        assert found.checkpointing

    def test_says_what_it_chose_and_why(self) -> None:
        text = self.plan(8, scale=0.5).describe()
        assert re.fullmatch(
            r"Planned for 7\.5 GiB, of which 80% may be used:\n"
            r"  Scale 0\.5: whole panoramas of 4096x2048 need \d\d\.\d GiB, \d\d\.\d GiB with activations computed "
            r"twice\.\n"
            r"  Scale 0\.5: crops of 2048x1024 need 1\d\.\d GiB, 5\.\d GiB with activations computed twice: 1 at a "
            r"time fit\.\n"
            r"  Chosen: --scale 0\.5 --crop 1024x2048 --batch-size 1 --checkpointing, 5\.\d GiB a step\.",
            text,
        )
        assert " --batch-size 2 --accumulate 2, " in self.plan(8, scale=0.1, batch_size=4).describe()

    def test_when_nothing_fits(self) -> None:
        with pytest.raises(
            TrainingError, match=r"(?s)^Nothing fits 1\.1 GiB.*crops of 416x409 need.*--base-width.*--amp"
        ):
            self.plan(1.2)

    def test_when_not_even_the_weights_fit(self) -> None:
        with pytest.raises(
            TrainingError,
            match=r"^The weights .* take 0\.9 GiB, more than 80% of the 0\.6 GiB .* --memory at least 1\.2",
        ):
            self.plan(0.6)


def test_available_memory_is_what_nobody_uses() -> None:
    assert 0 < available_bytes(torch.device("cpu")) < psutil.virtual_memory().total


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
