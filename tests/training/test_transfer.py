import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sscloud.architecture import Architecture
from sscloud.errors import BundleError
from sscloud.labels import LabelSchema
from sscloud.unet import UNet
from training.transfer import Transfer, transfer

NAMES = ("Фон", "Земля", "Кусты", "Деревья")
IDS = (0, 2, 5, 6)


def schema(*labels: str | tuple[str, list[str]], void: tuple[int, ...] = (), ids: tuple[int, ...] = ()) -> LabelSchema:
    """Labels, with aliases or without; ids as in `IDS`, where they are not given."""
    entries: list[dict[str, Any]] = []
    for label, label_id in zip(labels, ids or (*IDS, 65, 66), strict=False):
        name, aliases = (label, []) if isinstance(label, str) else label
        entries.append({"name": name, "id": label_id, "aliases": aliases})
    return LabelSchema.from_dict({"labels": entries, "void": list(void)}, source="labels.yaml")


OLD = schema(*NAMES)


def network(channels: int, *, seed: int = 0, **changes: Any) -> UNet:
    torch.manual_seed(seed)
    return UNet(Architecture(classes=channels, base_width=2, **changes)).eval()


def go_on(
    new: LabelSchema,
    *,
    source: UNet | None = None,
    source_labels: LabelSchema | None = OLD,
    source_ids: tuple[int, ...] = IDS,
    surplus: int = 0,
) -> tuple[UNet, UNet, Transfer]:
    """The old network, the one that goes on from it, and what happened; fresh weights come from another seed."""
    source = source or network(len(source_ids))
    target = network(len(new.classes) + surplus, seed=1)
    done = transfer(
        source.state_dict(),
        source_labels=source_labels,
        source_ids=source_ids,
        target=target,
        target_ids=new.class_ids + (0,) * surplus,
        target_labels=new,
        source_name="old v3",
    )
    return source, target, done


def head(model: nn.Module) -> tuple[Tensor, Tensor]:
    state = model.state_dict()
    return state["outc.conv.weight"], state["outc.conv.bias"]


def probabilities(model: UNet) -> Tensor:
    picture = torch.rand(1, 3, 32, 64, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model(picture).double().softmax(1)


@pytest.mark.parametrize("surplus", [0, 3])
def test_the_same_labels_are_an_exact_copy(surplus: int) -> None:
    source = network(4 + surplus)
    source, target, done = go_on(OLD, source=source, source_ids=IDS + (0,) * surplus, surplus=surplus)

    assert all(torch.equal(value, target.state_dict()[name]) for name, value in source.state_dict().items())
    assert done.describe() == "Labels of old v3: kept Фон, Земля, Кусты, Деревья."


def test_the_old_network_is_not_changed() -> None:
    source = network(4)
    before = {name: value.clone() for name, value in source.state_dict().items()}

    go_on(schema("Деревья", "Фон", "Столбы"), source=source)

    assert all(torch.equal(value, source.state_dict()[name]) for name, value in before.items())


def test_channels_follow_their_labels() -> None:
    new = schema("деревья", "Фон", "Кусты", "Земля")  # other ids too; spelling does not count

    source, target, done = go_on(new)

    order = [3, 0, 2, 1]
    torch.testing.assert_close(probabilities(target), probabilities(source)[:, order])
    assert torch.equal(head(target)[0], head(source)[0][order])
    assert done.describe() == "Labels of old v3: kept деревья, Фон, Кусты, Земля."


def test_a_gained_label_is_fresh_and_the_others_as_they_were() -> None:
    new = schema("Фон", "Провода", "Земля", "Кусты", "Деревья")
    fresh = head(network(5, seed=1))

    source, target, done = go_on(new)

    assert torch.equal(head(target)[0][1], fresh[0][1])
    assert head(target)[1][1] == fresh[1][1]
    assert done.describe() == "Labels of old v3: kept Фон, Земля, Кусты, Деревья; new Провода."
    with torch.no_grad():
        head(target)[1][1] = -1e4
    torch.testing.assert_close(probabilities(target)[:, [0, 2, 3, 4]], probabilities(source))


def test_a_lost_label_leaves_the_ratios_of_the_others() -> None:
    source, target, done = go_on(schema("Фон", "Земля", "Деревья"))

    expected = probabilities(source)[:, [0, 1, 3]]
    torch.testing.assert_close(probabilities(target), expected / expected.sum(1, keepdim=True))
    assert done.dropped == ("Кусты",)
    assert done.describe() == "Labels of old v3: kept Фон, Земля, Деревья; dropped Кусты."


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Кусты", ("Растительность", ["кусты", "Трава"])),
        (("Кусты", ["Растительность"]), "Растительность"),
        (("Кусты", ["Зелень"]), ("Растительность", ["Зелень"])),
    ],
)
def test_a_renamed_label_is_found_by_an_alias_of_either(old: Any, new: Any) -> None:
    source, target, done = go_on(schema("Земля", new), source_labels=schema("Фон", "Земля", old), source_ids=IDS[:3])

    assert torch.equal(head(target)[0], head(source)[0][[1, 2]])
    assert torch.equal(head(target)[1], head(source)[1][[1, 2]])
    assert done.describe() == "Labels of old v3: kept Земля; renamed Кусты → Растительность; dropped Фон."


def test_merged_labels() -> None:
    source, target, done = go_on(schema("Фон", "Земля", ("Растительность", ["Кусты", "Деревья"])))

    (weight, bias), (old_weight, old_bias) = head(target), head(source)
    torch.testing.assert_close(weight[2], (old_weight[2] + old_weight[3]) / 2)
    assert float(bias[2]) == pytest.approx(float(old_bias[2] + old_bias[3]) / 2 + math.log(2))
    assert done.describe() == "Labels of old v3: kept Фон, Земля; merged Кусты + Деревья → Растительность."


def test_merging_equal_channels_adds_their_probabilities() -> None:
    source = network(4)
    for tensor in head(source):
        tensor[3] = tensor[2]

    _, target, _ = go_on(schema("Фон", "Земля", ("Растительность", ["Кусты", "Деревья"])), source=source)

    before, after = probabilities(source), probabilities(target)
    torch.testing.assert_close(after, torch.cat([before[:, :2], before[:, 2:].sum(1, keepdim=True)], 1))


def test_merging_never_claims_more_than_the_parts_had() -> None:
    source, target, _ = go_on(schema("Фон", "Земля", ("Растительность", ["Кусты", "Деревья"])))

    before, after = probabilities(source), probabilities(target)
    assert (after[:, 2] <= before[:, 2:].sum(1) + 1e-7).all()


def test_the_parts_of_a_split_label_share_its_probability() -> None:
    old = schema("Фон", "Земля", ("Растительность", ["Кусты", "Деревья"]))

    source, target, done = go_on(OLD, source_labels=old, source_ids=IDS[:3])

    before, after = probabilities(source), probabilities(target)
    torch.testing.assert_close(after[:, :2], before[:, :2])
    torch.testing.assert_close(after[:, 2], before[:, 2] / 2)
    torch.testing.assert_close(after[:, 3], before[:, 2] / 2)
    assert done.describe() == (
        "Labels of old v3: kept Фон, Земля; split Растительность → Кусты, Растительность → Деревья."
    )


def test_without_names_labels_are_told_by_their_ids() -> None:
    new = schema("Забор", "Земля", "Дом", ids=(7, 2, 5))

    source, target, done = go_on(new, source_labels=None, source_ids=(5, 2, 9))

    assert torch.equal(head(target)[0][1:], head(source)[0][[1, 0]])
    assert torch.equal(head(target)[0][0], head(network(3, seed=1))[0][0])
    assert done.describe() == "Labels of old v3: kept Земля, Дом; new Забор; dropped id 9."


def test_surplus_channels_belong_to_no_label() -> None:
    # 0 is void on both sides: the last channels write it, and have learned nothing.
    old = schema("Фон", "Земля", "Кусты", void=(0,))
    new = schema("Фон", "Земля", "Деревья", void=(0,))

    source, target, done = go_on(new, source_labels=old, source_ids=(2, 5, 0), surplus=3)

    assert torch.equal(head(target)[0][[0, 2]], head(source)[0][[0, 2]])
    assert torch.equal(head(target)[0][[1, 3, 4]], head(network(5, seed=1))[0][[1, 3, 4]])
    assert done.describe() == "Labels of old v3: kept Земля; new Деревья; dropped Кусты."


def test_a_label_that_was_void_is_new() -> None:
    old = schema("Фон", "Земля", void=(0,))

    _, target, done = go_on(schema("Фон", "Земля"), source_labels=old, source_ids=(2, 0))

    assert torch.equal(head(target)[0][0], head(network(2, seed=1))[0][0])
    assert done.describe() == "Labels of old v3: kept Земля; new Фон."


def test_another_size_or_way_up_is_refused() -> None:
    other = UNet(dataclasses.replace(network(4).architecture, base_width=4))
    with pytest.raises(
        BundleError, match=r"old v3 holds .* base width 4 with transposed .* asked for were 2 and trans.*--base-width"
    ):
        go_on(OLD, source=other)
    with pytest.raises(BundleError, match=r"base width 2 with bilinear .* asked for were 2 and transposed"):
        go_on(OLD, source=network(4, upsampling="bilinear"))


class Other(nn.Module):
    """A network of another family: another head, of another kernel."""

    def __init__(self, channels: int, width: int = 3) -> None:
        super().__init__()
        self.encoder = nn.Conv2d(3, width, 1)
        self.segmentation_head = nn.Sequential(nn.Conv2d(width, channels, 3))


def transfer_other(source: nn.Module, *, name: str = "segmentation_head.0") -> Other:
    target = Other(2)
    transfer(
        source.state_dict(),
        source_labels=OLD,
        source_ids=IDS,
        target=target,
        target_ids=(6, 0),
        target_labels=schema("Деревья", "Фон", ids=(6, 0)),
        source_name="old v3",
        head=name,
    )
    return target


def test_other_networks_name_their_head() -> None:
    source = Other(4)

    target = transfer_other(source)

    torch.testing.assert_close(target.encoder.weight, source.encoder.weight)
    old, new = source.segmentation_head.state_dict(), target.segmentation_head.state_dict()
    assert torch.equal(new["0.weight"], old["0.weight"][[3, 0]])
    assert torch.equal(new["0.bias"], old["0.bias"][[3, 0]])


@pytest.mark.parametrize(
    ("source", "name", "reason"),
    [
        (
            Other(4, width=5),
            "segmentation_head.0",
            r"of 4 tensors encoder\.bias, .*head\.0\.weight differ",
        ),
        (network(4), "segmentation_head.0", r"of 122 tensors .* and 119 more differ"),
        (Other(4), "head", r"of 6 tensors head\.bias, head\.weight, .* differ"),
    ],
)
def test_another_network_is_refused(source: nn.Module, name: str, reason: str) -> None:
    with pytest.raises(BundleError, match=rf"old v3 holds another network .*{reason}"):
        transfer_other(source, name=name)
