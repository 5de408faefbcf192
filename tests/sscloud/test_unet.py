"""UNet: milesial's parameters and values, and the seam."""

import re
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from sscloud.architecture import Architecture, Upsampling
from sscloud.errors import BundleError
from sscloud.unet import UNet, architecture_of, build

MakeUNet = Callable[..., UNet]


def expected_shapes(base: int, classes: int, *, bilinear: bool) -> dict[str, tuple[int, ...]]:
    """The state dict of milesial/Pytorch-UNet, in its order, from its unet_model.py and unet_parts.py."""
    shapes: dict[str, tuple[int, ...]] = {}

    def double_conv(prefix: str, entering: int, leaving: int, middle: int | None = None) -> None:
        middle = middle or leaving
        for index, size in ((0, (middle, entering, 3, 3)), (3, (leaving, middle, 3, 3))):
            shapes[f"{prefix}.double_conv.{index}.weight"] = size
            for name in ("weight", "bias", "running_mean", "running_var"):
                shapes[f"{prefix}.double_conv.{index + 1}.{name}"] = (size[0],)
            shapes[f"{prefix}.double_conv.{index + 1}.num_batches_tracked"] = ()

    level = [base * 2**n for n in range(5)]
    factor = 2 if bilinear else 1
    double_conv("inc", 3, base)
    for n in (1, 2, 3, 4):
        double_conv(f"down{n}.maxpool_conv.1", level[n - 1], level[n] // (factor if n == 4 else 1))
    for n in (1, 2, 3, 4):
        entering, leaving = level[5 - n], level[4 - n] // (factor if n < 4 else 1)
        if not bilinear:
            shapes[f"up{n}.up.weight"] = (entering, entering // 2, 2, 2)
            shapes[f"up{n}.up.bias"] = (entering // 2,)
        double_conv(f"up{n}.conv", entering, leaving, entering // 2 if bilinear else None)
    shapes["outc.conv.weight"] = (classes, base, 1, 1)
    shapes["outc.conv.bias"] = (classes,)
    return shapes


def shapes_of(model: UNet) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, tuple(tensor.shape)) for name, tensor in model.state_dict().items()]


def run(model: UNet, x: Tensor, **options: bool) -> Tensor:
    with torch.inference_mode():
        return model(x, **options)


class TestParameters:
    @pytest.mark.parametrize("upsampling", ["transposed", "bilinear", "bilinear-aligned"])
    def test_names_shapes_and_order_are_milesials(self, upsampling: Upsampling) -> None:
        with torch.device("meta"):
            model = UNet(Architecture(classes=68, upsampling=upsampling, wrap=False))
        expected = expected_shapes(64, 68, bilinear=upsampling != "transposed")
        assert shapes_of(model) == list(expected.items())

    def test_spot_checks_written_out(self) -> None:
        with torch.device("meta"):
            transposed = dict(shapes_of(UNet(Architecture(classes=68))))
            bilinear = dict(shapes_of(UNet(Architecture(classes=68, upsampling="bilinear"))))
        assert len(transposed) == 118
        assert len(bilinear) == 110
        assert list(transposed)[:2] == ["inc.double_conv.0.weight", "inc.double_conv.1.weight"]
        assert transposed["inc.double_conv.0.weight"] == (64, 3, 3, 3)
        assert transposed["down4.maxpool_conv.1.double_conv.3.weight"] == (1024, 1024, 3, 3)
        assert transposed["up1.up.weight"] == (1024, 512, 2, 2)
        assert transposed["up4.conv.double_conv.0.weight"] == (64, 128, 3, 3)
        assert bilinear["down4.maxpool_conv.1.double_conv.3.weight"] == (512, 512, 3, 3)
        assert bilinear["up1.conv.double_conv.0.weight"] == (512, 1024, 3, 3)
        assert bilinear["up1.conv.double_conv.3.weight"] == (256, 512, 3, 3)
        assert list(transposed.items())[-2:] == [("outc.conv.weight", (68, 64, 1, 1)), ("outc.conv.bias", (68,))]

    def test_the_published_number_of_parameters(self) -> None:
        with torch.device("meta"):
            model = UNet(Architecture(classes=1))
        assert sum(parameter.numel() for parameter in model.parameters()) == 31_037_633

    def test_no_convolution_but_the_last_has_a_bias(self) -> None:
        with torch.device("meta"):
            convolutions = [m for m in UNet(Architecture(classes=2)).modules() if isinstance(m, torch.nn.Conv2d)]
        assert [c.bias is not None for c in convolutions] == [False] * 18 + [True]

    @pytest.mark.parametrize("base", [1, 2, 6])
    def test_other_base_widths_follow_the_same_rule(self, base: int) -> None:
        for upsampling, bilinear in (("transposed", False), ("bilinear", True)):
            model = UNet(Architecture(classes=3, base_width=base * 2, upsampling=upsampling))
            assert shapes_of(model) == list(expected_shapes(base * 2, 3, bilinear=bilinear).items())


class TestParity:
    @pytest.mark.parametrize("upsampling", ["transposed", "bilinear-aligned"])
    @pytest.mark.parametrize("size_hw", [(64, 128), (32, 32), (51, 103), (16, 17), (40, 81)])
    def test_without_wrap_it_computes_what_milesial_does(
        self, upsampling: Upsampling, size_hw: tuple[int, int], make_unet: MakeUNet, milesial: SimpleNamespace
    ) -> None:
        model = make_unet(Architecture(classes=5, base_width=4, upsampling=upsampling, wrap=False), contrast=1).double()
        x = torch.rand(2, 3, *size_hw, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        expected = milesial.logits(model.state_dict(), x, bilinear=upsampling != "transposed")
        found = run(model, x)
        assert found.shape == (2, 5, *size_hw)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)

    def test_full_width(self, make_unet: MakeUNet, milesial: SimpleNamespace) -> None:
        model = make_unet(Architecture(classes=68, wrap=False), contrast=1)
        x = torch.rand(1, 3, 33, 50, generator=torch.Generator().manual_seed(1))
        expected = milesial.logits(model.state_dict(), x, bilinear=False)
        torch.testing.assert_close(run(model, x), expected, rtol=1e-4, atol=1e-3)

    @pytest.mark.parametrize("upsampling", ["transposed", "bilinear"])
    @pytest.mark.parametrize("size_hw", [(64, 128), (33, 103)])
    def test_wrap_can_be_switched_off_for_crops(
        self, upsampling: Upsampling, size_hw: tuple[int, int], make_unet: MakeUNet
    ) -> None:
        around = make_unet(Architecture(classes=3, base_width=4, upsampling=upsampling, wrap=True))
        flat = UNet(Architecture(classes=3, base_width=4, upsampling=upsampling, wrap=False)).eval()
        flat.load_state_dict(around.state_dict())
        x = torch.rand(1, 3, *size_hw, generator=torch.Generator().manual_seed(1))
        assert torch.equal(run(around, x, wrap=False), run(flat, x))
        assert torch.equal(run(around, x, wrap=True), run(around, x))
        assert not torch.equal(run(around, x), run(flat, x))

    def test_wrap_cannot_be_switched_on(self, make_unet: MakeUNet) -> None:
        flat = make_unet(Architecture(classes=3, base_width=4, upsampling="bilinear-aligned", wrap=False))
        x = torch.rand(1, 3, 32, 64, generator=torch.Generator().manual_seed(1))
        assert torch.equal(run(flat, x, wrap=True), run(flat, x))


class TestSeam:
    @pytest.mark.parametrize("upsampling", ["transposed", "bilinear"])
    @pytest.mark.parametrize("size_hw", [(32, 64), (64, 128), (51, 208), (33, 16), (16, 400)])
    def test_a_roll_by_16_rolls_the_logits_exactly(
        self, upsampling: Upsampling, size_hw: tuple[int, int], make_unet: MakeUNet
    ) -> None:
        model = make_unet(Architecture(classes=4, base_width=4, upsampling=upsampling)).double()
        x = torch.rand(1, 3, *size_hw, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        expected = run(model, x)
        assert expected.std() > 0.3
        for columns in {16, 32, size_hw[1] // 2 // 16 * 16, size_hw[1] - 16}:
            assert torch.equal(run(model, x.roll(columns, 3)), expected.roll(columns, 3))

    @pytest.mark.parametrize("upsampling", ["transposed", "bilinear"])
    def test_in_single_precision_too(self, upsampling: Upsampling, make_unet: MakeUNet) -> None:
        model = make_unet(Architecture(classes=4, base_width=8, upsampling=upsampling))
        x = torch.rand(2, 3, 64, 128, generator=torch.Generator().manual_seed(2))
        assert torch.equal(run(model, x.roll(48, 3)), run(model, x).roll(48, 3))

    def test_without_wrap_a_roll_changes_the_logits(self, make_unet: MakeUNet) -> None:
        model = make_unet(Architecture(classes=4, base_width=4))
        x = torch.rand(1, 3, 32, 64, generator=torch.Generator().manual_seed(2))
        assert not torch.allclose(run(model, x.roll(16, 3), wrap=False), run(model, x, wrap=False).roll(16, 3))

    def test_rows_do_not_wrap(self, make_unet: MakeUNet) -> None:
        model = make_unet(Architecture(classes=4, base_width=4))
        x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(2))
        assert not torch.allclose(run(model, x.roll(16, 2)), run(model, x).roll(16, 2))

    @pytest.mark.parametrize("upsampling", ["transposed", "bilinear"])
    @pytest.mark.parametrize("width", [16, 17, 31, 33, 100, 101, 102, 103, 104, 105, 111, 819])
    def test_every_width_keeps_its_shape(self, upsampling: Upsampling, width: int, make_unet: MakeUNet) -> None:
        model = make_unet(Architecture(classes=4, base_width=2, upsampling=upsampling))
        found = run(model, torch.rand(1, 3, 19, width))
        assert found.shape == (1, 4, 19, width)
        assert torch.isfinite(found).all()

    @pytest.mark.parametrize("upsampling", ["transposed", "bilinear"])
    @pytest.mark.parametrize("seed", [0, 1, 2])
    def test_odd_widths_have_no_break_at_the_seam(self, upsampling: Upsampling, seed: int) -> None:
        """At 103 columns pooling cells shift under a roll, so nothing is exact; the seam is not worse than the rest."""
        width, roll = 103, 55
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = UNet(Architecture(classes=4, base_width=8, upsampling=upsampling)).eval()  # calm: initial weights
            x = torch.nn.functional.interpolate(torch.rand(1, 3, 8, 13), size=(64, width), mode="bilinear")
        near = torch.zeros(width, dtype=torch.bool)
        near[:8] = near[-8:] = near[roll - 8 : roll + 8] = True  # the seam of the rolled input, and the original one

        def differences(*, wrap: bool) -> Tensor:
            rolled = run(model, x.roll(roll, 3), wrap=wrap)
            return (rolled - run(model, x, wrap=wrap).roll(roll, 3)).abs().mean(dim=(0, 1, 2))

        around, flat = differences(wrap=True), differences(wrap=False)
        assert around[near].max() < 6 * around[~near].max()
        assert around[near].mean() < flat[near].mean() / 6
        assert around[near].max() < flat[near].max() / 10

    def test_training_reaches_every_parameter(self) -> None:
        model = UNet(Architecture(classes=3, base_width=2))
        model(torch.rand(2, 3, 32, 35)).square().mean().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())


class TestArchitecture:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"classes": 0}, "1 to 256 classes, found 0"),
            ({"classes": 257}, "1 to 256 classes, found 257"),
            ({"classes": 2, "base_width": 0}, "base width is 1 to 512 channels, found 0"),
            ({"classes": 2, "base_width": 513}, "base width is 1 to 512 channels, found 513"),
            ({"classes": 2, "upsampling": "bilinear-aligned", "wrap": True}, "align_corners=True.*cannot wrap.*"),
        ],
    )
    def test_impossible_ones_are_refused(self, fields: dict[str, object], message: str) -> None:
        with pytest.raises(BundleError, match=message):
            Architecture(**fields)  # type: ignore[arg-type]

    @pytest.mark.parametrize("upsampling", ["transposed", "bilinear-aligned"])
    @pytest.mark.parametrize(("base", "classes"), [(4, 6), (10, 68), (64, 2)])
    def test_is_found_in_a_state_dict(self, upsampling: Upsampling, base: int, classes: int) -> None:
        architecture = Architecture(classes=classes, base_width=base, upsampling=upsampling, wrap=False)
        with torch.device("meta"):
            state = UNet(architecture).state_dict()
        assert architecture_of(state, wrap=False, source="a.pth") == architecture

    @pytest.mark.parametrize(
        ("name", "value", "message"),
        [
            ("outc.conv.weight", None, "a.pth is not .*'outc.conv.weight' should have 4 dim.*none of that name"),
            ("outc.conv.weight", torch.zeros(3), r"'outc.conv.weight' should have 4 dimensions, found shape \(3,\)"),
            ("inc.double_conv.0.weight", "text", "'inc.double_conv.0.weight' should have 4 dimensions, found str"),
            ("inc.double_conv.0.weight", torch.zeros(0, 3, 3, 3), "base width is 1 to 512 channels, found 0"),
        ],
    )
    def test_what_decides_is_named(self, name: str, value: object, message: str) -> None:
        state: dict[str, object] = dict(UNet(Architecture(classes=2, base_width=2)).state_dict())
        del state[name]
        if value is not None:
            state[name] = value
        with pytest.raises(BundleError, match=message):
            architecture_of(state, wrap=False, source="a.pth")

    def test_another_networks_first_keys_are_shown(self) -> None:
        with pytest.raises(BundleError, match=re.escape("Its first keys are ['encoder.weight', 'epoch'].")):
            architecture_of({"encoder.weight": torch.zeros(1), "epoch": 3}, wrap=False, source="a.pth")


class TestBuild:
    @pytest.fixture
    def model(self) -> UNet:
        return UNet(Architecture(classes=2, base_width=2))

    def test_loads_every_value(self, model: UNet, make_unet: MakeUNet) -> None:
        other = make_unet(Architecture(classes=2, base_width=2))
        found = build(other.architecture, other.state_dict(), source="a.pth")
        assert not found.training
        assert all(torch.equal(found.state_dict()[name], tensor) for name, tensor in other.state_dict().items())

    def test_every_problem_is_named(self, model: UNet) -> None:
        state: dict[str, object] = dict(model.state_dict())
        del state["up1.up.bias"]
        state["extra.weight"] = torch.zeros(1)
        state["down1.maxpool_conv.1.double_conv.0.weight"] = torch.zeros(4, 2, 3, 5)
        state["outc.conv.bias"] = torch.tensor([1.0, float("nan")])
        state["up2.up.bias"] = [0.0]
        with pytest.raises(BundleError, match=r"^The tensors of a\.pth do not fit the network: ") as caught:
            build(model.architecture, state, source="a.pth")
        for part in (
            "up1.up.bias: missing",
            "extra.weight: not part of the network",
            "down1.maxpool_conv.1.double_conv.0.weight: shape (4, 2, 3, 5), expected (4, 2, 3, 3)",
            "outc.conv.bias: holds values that are not finite",
            "up2.up.bias: is a list, not a tensor",
        ):
            assert part in str(caught.value)

    def test_a_long_list_is_cut(self, model: UNet) -> None:
        with pytest.raises(BundleError, match=r"inc\.double_conv\.0\.weight: missing; .*\(and 110 more\)\.$"):
            build(model.architecture, {}, source="a.pth")

    def test_dtype_of_halves_is_widened(self, model: UNet) -> None:
        state = {name: tensor.half() for name, tensor in model.state_dict().items()}
        found = build(model.architecture, state, source="a.pth")
        assert found.outc.conv.weight.dtype == torch.float32
        assert np.allclose(found.outc.conv.weight.detach(), state["outc.conv.weight"].float())

    def test_a_small_file_takes_little_memory(self) -> None:
        """One tensor of a huge network: refused before the network is made (7.9 GB of weights)."""
        state = {"inc.double_conv.0.weight": torch.zeros(512, 3, 3, 3), "outc.conv.weight": torch.zeros(2, 512, 1, 1)}
        architecture = architecture_of(state, wrap=False, source="a.pth")
        with pytest.raises(BundleError, match=r"inc\.double_conv\.1\.weight: missing"):
            build(architecture, state, source="a.pth")


class TestCheckpointing:
    """Activations computed twice: the same training, in less memory."""

    @staticmethod
    def step(model: UNet, x: Tensor, *, wrap: bool) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """Logits, gradients and statistics after one backward pass in training."""
        model.zero_grad()
        logits = model.train()(x, wrap=wrap)
        weights = torch.rand(logits.shape, generator=torch.Generator().manual_seed(2), dtype=logits.dtype)
        (logits.softmax(1) * weights).sum().backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        return logits.detach(), gradients, {name: b.clone() for name, b in model.named_buffers()}

    @pytest.mark.parametrize("upsampling", ["transposed", "bilinear"])
    @pytest.mark.parametrize("wrap", [True, False])
    @pytest.mark.parametrize("size_hw", [(32, 64), (35, 51)])
    def test_logits_gradients_and_statistics_are_the_same(
        self, upsampling: Upsampling, wrap: bool, size_hw: tuple[int, int], make_unet: MakeUNet
    ) -> None:
        plain, twice = (make_unet(Architecture(classes=3, base_width=4, upsampling=upsampling)) for _ in range(2))
        twice.checkpointing = True
        x = torch.rand(2, 3, *size_hw, generator=torch.Generator().manual_seed(1))
        for _ in range(2):
            for expected, found in zip(self.step(plain, x, wrap=wrap), self.step(twice, x, wrap=wrap), strict=True):
                torch.testing.assert_close(found, expected, rtol=0, atol=0)
        batches = [b for name, b in twice.named_buffers() if name.endswith("num_batches_tracked")]
        assert {int(b) for b in batches} == {3}  # one when the fixture gave it statistics, two here

    def test_normalisation_works_as_before_afterwards(self, make_unet: MakeUNet) -> None:
        model = make_unet(Architecture(classes=3, base_width=4))
        model.checkpointing = True
        x = torch.rand(1, 3, 32, 64, generator=torch.Generator().manual_seed(1))
        self.step(model, x, wrap=True)
        norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        assert {norm.momentum for norm in norms} == {0.1}
        assert all(isinstance(norm.num_batches_tracked, Tensor) for norm in norms)

    def test_a_failed_backward_pass_leaves_normalisation_as_it_was(self, make_unet: MakeUNet) -> None:
        model = make_unet(Architecture(classes=3, base_width=4)).train()
        model.checkpointing = True
        logits = model(torch.rand(1, 3, 32, 64, generator=torch.Generator().manual_seed(1)))
        model.up4.up.register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory")))
        with pytest.raises(RuntimeError, match="out of memory"):
            logits.sum().backward()
        norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        assert {norm.momentum for norm in norms} == {0.1}

    def test_it_is_no_part_of_the_weights(self, make_unet: MakeUNet) -> None:
        model = make_unet(Architecture(classes=3, base_width=4))
        names = list(model.state_dict())
        model.checkpointing = True
        assert list(model.state_dict()) == names
        assert not UNet(model.architecture).checkpointing

    def test_without_gradients_nothing_changes(self, make_unet: MakeUNet) -> None:
        model = make_unet(Architecture(classes=3, base_width=4))
        x = torch.rand(1, 3, 40, 81, generator=torch.Generator().manual_seed(1))
        expected = run(model, x)
        model.checkpointing = True
        assert torch.equal(run(model, x), expected)

    @pytest.mark.parametrize("wrap", [True, False])
    def test_a_quarter_is_kept_for_the_backward_pass(self, wrap: bool) -> None:
        def kept(*, checkpointing: bool) -> int:
            with torch.device("meta"):
                model = UNet(Architecture(classes=6, wrap=wrap))
                x = torch.empty(1, 3, 256, 512)
            model.checkpointing = checkpointing
            owned = {p.untyped_storage()._cdata for p in model.parameters()}
            saved: dict[int, Tensor] = {}

            def keep(tensor: Tensor) -> Tensor:
                saved[tensor.untyped_storage()._cdata] = tensor
                return tensor

            # Inside a level, checkpoint sets its own hooks; these see the levels' inputs.
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                model(x)
            return sum(t.untyped_storage().nbytes() for key, t in saved.items() if key not in owned)

        assert 0 < kept(checkpointing=True) < 0.25 * kept(checkpointing=False)
