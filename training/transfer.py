"""Going on from a trained network when the labels changed: gained, lost, renamed, merged or split ones.

All but the head is copied. A channel of the head belongs to a label, so it follows the label's names: what the new
schema calls by a name or alias of an old label goes on from that label's channel. With the z of the old channels:

- merged: the right logit is the log of the sum of exp z, which no channel can compute; the mean of z plus log n is its
  tangent where the n channels agree, nowhere above it (Jensen's inequality), and, as softmax itself, indifferent to
  what all channels have in common. It is linear: the mean of the weights, the mean of the biases plus log n.
- split into m: each z minus log m, so that the parts sum to what the label had and no other label changes.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from sscloud.architecture import Architecture
from sscloud.errors import BundleError
from sscloud.labels import Label, LabelSchema, default_color, name_key
from sscloud.unet import UNet, architecture_of


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelOrigin:
    """Where a label's channel came from."""

    name: str
    sources: tuple[str, ...]
    """Names of the old labels, by channel; of a label that is new, none."""
    is_split: bool = False
    """Whether an old label is the source of others too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """What became of the labels."""

    source: str
    """Where the weights came from."""
    labels: tuple[LabelOrigin, ...]
    """By class index of the new schema."""
    dropped: tuple[str, ...]
    """Old labels that the new schema lacks."""

    def describe(self) -> str:
        """A sentence that names every label, for the log."""
        fates = [_fate(label) for label in self.labels] + [("dropped", name) for name in self.dropped]
        lists = {what: ", ".join(text for fate, text in fates if fate == what) for what in _FATES}
        return f"Labels of {self.source}: {'; '.join(f'{what} {names}' for what, names in lists.items() if names)}."


_FATES = ("kept", "renamed", "merged", "split", "new", "dropped")


def transfer(
    source: Mapping[str, Tensor],
    *,
    source_labels: LabelSchema | None,
    source_ids: tuple[int, ...],
    target: nn.Module,
    target_ids: tuple[int, ...],
    target_labels: LabelSchema,
    source_name: str,
    head: str = "outc.conv",
) -> Transfer:
    """Load a trained network's weights into a fresh one whose head has other labels.

    Where several channels write the same id, the first one is the label's and the others are surplus; so are channels
    of labels that are void, and those beyond the ids. Surplus channels take the weights of the old surplus channels as
    far as these go. Channels of new labels, and surplus ones beyond, stay as they are in `target`.

    Args:
        source: state dict of the trained network; not changed.
        source_labels: the schema it was trained with; None: labels are told by their ids.
        source_ids: the label id that each of its channels writes.
        target: the fresh network; its weights are overwritten.
        target_ids: the label id that each of its channels writes.
        target_labels: the schema it will be trained with.
        source_name: of the trained network, for messages.
        head: name of the last layer, a convolution with a bias; its tensors are `head.weight` and `head.bias`.

    Raises:
        BundleError: the networks differ in more than their number of channels.
    """
    own = target.state_dict()
    _check_fit(source, target, own, head=head, source_name=source_name)
    old = _class_channels(source_ids, source_labels or _schema_of(source_ids, target_labels))
    new = _class_channels(target_ids, target_labels)
    origins = {i: [j for j in old if _names(old[j]) & _names(new[i])] for i in new}
    uses = {j: sum(j in sources for sources in origins.values()) for j in old}

    weight, bias = own[f"{head}.weight"].clone(), own[f"{head}.bias"].clone()
    old_weight, old_bias = source[f"{head}.weight"].to(weight), source[f"{head}.bias"].to(bias)
    for i, sources in origins.items():
        if sources:
            parts = old_bias.new_tensor([math.log(uses[j]) for j in sources])
            weight[i] = old_weight[sources].mean(0)
            bias[i] = (old_bias[sources] - parts).mean() + math.log(len(sources))
    surplus = [i for i in range(len(bias)) if i not in new]
    old_surplus = [j for j in range(len(old_bias)) if j not in old]
    for i, j in zip(surplus, old_surplus, strict=False):
        weight[i], bias[i] = old_weight[j], old_bias[j]
    target.load_state_dict({**source, f"{head}.weight": weight, f"{head}.bias": bias})
    return Transfer(
        source=source_name,
        labels=tuple(
            LabelOrigin(
                name=new[i].name,
                sources=tuple(old[j].name for j in sources),
                is_split=any(uses[j] > 1 for j in sources),
            )
            for i, sources in origins.items()
        ),
        dropped=tuple(old[j].name for j, count in uses.items() if not count),
    )


def _check_fit(
    source: Mapping[str, Tensor], target: nn.Module, own: Mapping[str, Tensor], *, head: str, source_name: str
) -> None:
    def shape(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...] | None:
        if name not in tensors:
            return None
        size = tuple(tensors[name].shape)
        return size[1:] if name in (f"{head}.weight", f"{head}.bias") else size

    names = sorted({f"{head}.weight", f"{head}.bias", *source, *own})
    wrong = [name for name in names if shape(source, name) is None or shape(source, name) != shape(own, name)]
    if not wrong:
        return
    if isinstance(target, UNet):
        found, asked = architecture_of(source, wrap=False, source=source_name), target.architecture
        raise BundleError(
            f"{source_name} holds a network of base width {found.base_width} with {_way_up(found)} up-sampling; asked "
            f"for were {asked.base_width} and {_way_up(asked)}. Set --base-width and --bilinear as it was trained."
        )
    some = ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
    raise BundleError(
        f"{source_name} holds another network than the one asked for: of {len(names)} tensors {some} differ in name or "
        "size. Ask for the network that it was trained as."
    )


def _way_up(architecture: Architecture) -> str:
    return "transposed" if architecture.upsampling == "transposed" else "bilinear"


def _schema_of(ids: tuple[int, ...], labels: LabelSchema) -> LabelSchema:
    """A schema for ids without names: the labels that have these ids, as all that is known of them."""
    return LabelSchema(
        labels=tuple(labels.by_id(i) or Label(name=f"id {i}", id=i, color=default_color(i)) for i in dict.fromkeys(ids))
    )


def _class_channels(ids: tuple[int, ...], labels: LabelSchema) -> dict[int, Label]:
    """The channels that learned a label, or will, in order."""
    by_id = {label.id: label for label in labels.classes}
    return {i: by_id[label_id] for i, label_id in enumerate(ids) if label_id in by_id and label_id not in ids[:i]}


def _names(label: Label) -> set[str]:
    return {name_key(name) for name in (label.name, *label.aliases)}


def _fate(label: LabelOrigin) -> tuple[str, str]:
    sources = " + ".join(label.sources)
    if not sources:
        return "new", label.name
    if len(label.sources) > 1:
        return "merged", f"{sources} → {label.name}"
    if label.is_split:
        return "split", f"{sources} → {label.name}"
    if name_key(sources) != name_key(label.name):
        return "renamed", f"{sources} → {label.name}"
    return "kept", label.name
