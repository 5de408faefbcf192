import html
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sscloud.architecture import Architecture
from sscloud.bundle import Manifest, ModelBundle
from sscloud.checkpoint import save_bundle
from sscloud.errors import ConfigError, DatasetError
from sscloud.labels import Label, LabelSchema, count_ids
from sscloud.unet import UNet
from tests.training.conftest import write_item
from training import gate
from training.compare import Difference
from training.dataset import DatasetFolder, digest, open_dataset
from training.evaluate import evaluate
from training.gate import ClassChange, Decision, GateRules, decide
from training.manifest import DatasetWriter
from training.registry import ModelVersion
from training.splits import SplitPlan

SCHEMA = LabelSchema.default()
GROUND, BUSH, WALL, CLUTTER = 1, 2, 3, 5  # channels
Change = Callable[[UNet], object]
MakeBundle = Callable[..., ModelBundle]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten panoramas of sky, wall, ground and a bush."""
    root = tmp_path_factory.mktemp("gate") / "scenes"
    for folder in ("imgs", "masks"):
        (root / folder).mkdir(parents=True)
    for number in range(1, 11):
        write_item(root, number)
    return root


@pytest.fixture
def test(scenes: Path) -> DatasetFolder:
    """Five of them: as few as the gate takes."""
    whole = open_dataset(scenes)
    return replace(whole, items=whole.items[:5])


@pytest.fixture(scope="module")
def good_model(tmp_path_factory: pytest.TempPathFactory, make_unet: Callable[..., UNet]) -> UNet:
    """A random network whose last layer is fitted to other scenes: it finds what is there, within a second."""
    root = tmp_path_factory.mktemp("gate-train") / "scenes"
    for folder in ("imgs", "masks"):
        (root / folder).mkdir(parents=True)
    for number in range(1, 5):
        write_item(root, number, seed=1)
    model = make_unet(Architecture(classes=6, base_width=12))
    seen: list[torch.Tensor] = []
    handle = model.outc.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    features, classes = [], []
    for item in open_dataset(root).items:
        image = np.array(Image.open(item.image).resize((64, 32), Image.Resampling.BOX))
        with torch.no_grad():
            model(torch.from_numpy(image).permute(2, 0, 1)[None] / 255)
        features.append(torch.cat(seen, dim=2)[0].flatten(1).T.numpy())
        seen.clear()
        classes.append(SCHEMA.class_map(np.asarray(Image.open(item.mask)))[::2, ::2].ravel())
    handle.remove()
    # Least squares, each class with the same weight.
    x, y = np.concatenate(features).astype(np.float64), np.concatenate(classes)
    x = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    weights = 1 / np.bincount(y, minlength=6)[y]
    gram = x.T @ (x * weights[:, None]) + 1e-9 * np.eye(x.shape[1])
    head = torch.from_numpy(np.linalg.solve(gram, x.T @ (np.eye(6)[y] * weights[:, None])) * 20).float().T
    with torch.no_grad():
        model.outc.conv.weight.copy_(head[:, :-1, None, None])
        assert model.outc.conv.bias is not None
        model.outc.conv.bias.copy_(head[:, -1])
    return model


@pytest.fixture
def bundle(tmp_path: Path, good_model: UNet, make_manifest: Callable[..., Manifest]) -> Callable[..., ModelBundle]:
    """Makes a version of the good model, changed as the test says."""

    def make(version: int, change: Change = lambda model: None, **fields: object) -> ModelBundle:
        model = UNet(good_model.architecture).eval()
        model.load_state_dict(good_model.state_dict())
        with torch.no_grad():
            change(model)
        return save_bundle(
            tmp_path / f"v{version}", model, make_manifest(model.architecture, version=version, **fields)
        )

    return make


def biased(channel: int, by: float) -> Change:
    """Says a class more or less often."""

    def change(model: UNet) -> None:
        assert model.outc.conv.bias is not None
        model.outc.conv.bias[channel] += by

    return change


def show(decision: Decision) -> str:
    return "\n".join(decision.reasons)


class TestVerdicts:
    def test_an_equal_one_is_accepted(self, test: DatasetFolder, bundle: MakeBundle) -> None:
        decision = decide(bundle(3), bundle(4), test, device="cpu")

        assert decision.accepted
        assert decision.headline == "Улица v4 may become the champion in place of Улица v3."
        assert decision.difference == Difference(value=0.0, limits=(0.0, 0.0))
        assert decision.bound == 0.0
        assert decision.refusals == ()
        assert "Overall it is not worse: mIoU of the 4 judged classes" in decision.reasons[0]
        assert "No class falls by more than its floor: none falls at all." in decision.reasons
        assert "It has learned from none of the 5 test panoramas." in decision.reasons

    def test_a_better_one_is_accepted(self, test: DatasetFolder, bundle: MakeBundle) -> None:
        decision = decide(bundle(3, biased(WALL, -50)), bundle(4), test, device="cpu")

        assert decision.accepted
        assert decision.bound is not None
        assert decision.bound > 0

    def test_a_damaged_one_is_refused(self, test: DatasetFolder, bundle: MakeBundle) -> None:
        def damage(model: UNet) -> None:
            generator = torch.Generator().manual_seed(0)
            for parameter in model.parameters():
                parameter += 0.5 * parameter.std() * torch.randn(parameter.shape, generator=generator)

        decision = decide(bundle(3), bundle(4, damage), test, device="cpu")

        assert not decision.accepted
        assert decision.headline == "Улица v4 is refused: Улица v3 stays."
        assert decision.refusals[0].startswith("Overall it may be worse")

    def test_swapped_labels_are_refused(self, test: DatasetFolder, bundle: MakeBundle) -> None:
        def swap(model: UNet) -> None:
            order = [0, WALL, BUSH, GROUND, 4, 5]
            assert model.outc.conv.bias is not None
            model.outc.conv.weight.copy_(model.outc.conv.weight[order].clone())
            model.outc.conv.bias.copy_(model.outc.conv.bias[order].clone())

        decision = decide(bundle(3), bundle(4, swap), test, device="cpu")

        assert not decision.accepted
        assert any(text.startswith("Земля falls too far: IoU 0.") for text in decision.refusals)
        assert any(text.startswith("Здание falls too far: IoU 0.") for text in decision.refusals)

    def test_a_rare_class_is_not_traded_away(self, test: DatasetFolder, bundle: MakeBundle) -> None:
        champion, challenger = bundle(3, biased(WALL, -50)), bundle(4, biased(BUSH, -50))

        strict = decide(champion, challenger, test, device="cpu")
        lenient = decide(champion, challenger, test, rules=GateRules(floors={"растительность ": 0.5}), device="cpu")

        assert strict.bound is not None
        assert strict.bound > 0  # overall it is better
        assert [text.split(":")[0] for text in strict.refusals] == ["Растительность falls too far"]
        assert lenient.accepted
        assert "the largest fall is that of Растительность" in show(lenient)

    def test_a_little_worse_is_a_matter_of_the_margin(self, test: DatasetFolder, bundle: MakeBundle) -> None:
        champion, challenger = bundle(3), bundle(4, biased(BUSH, 1))

        strict, lenient = (
            decide(champion, challenger, test, rules=GateRules(margin=margin, floor=1.0), device="cpu")
            for margin in (0.0, 0.1)
        )

        assert strict.bound == lenient.bound
        assert strict.bound is not None
        assert -0.1 < strict.bound < 0
        assert not strict.accepted
        assert lenient.accepted


class TestNumbers:
    def test_the_bound_is_that_of_a_bootstrap_by_hand(self, test: DatasetFolder, bundle: MakeBundle) -> None:
        decision = decide(bundle(3), bundle(4, biased(BUSH, -1)), test, rules=GateRules(level=0.9), device="cpu")

        comparison = decision.comparison
        assert comparison is not None
        rows = [0, GROUND, BUSH, WALL]  # what the masks hold
        rng = np.random.default_rng(0)
        differences = []
        for _ in range(1000):
            times = rng.multinomial(5, [1 / 5] * 5)
            mious = []
            for side in (comparison.a, comparison.b):
                total = np.zeros((6, 6))
                for number, panorama in zip(times, side.panoramas, strict=True):
                    total += number * panorama.confusion
                mious.append(np.mean([total[i, i] / (total[i].sum() + total[:, i].sum() - total[i, i]) for i in rows]))
            differences.append(mious[1] - mious[0])
        assert decision.bound == pytest.approx(np.percentile(differences, 10))
        assert decision.difference is not None
        assert decision.difference.limits == pytest.approx(tuple(np.percentile(differences, [2.5, 97.5])))

    def test_a_class_that_is_only_imagined_is_not_judged(self, test: DatasetFolder, bundle: MakeBundle) -> None:
        """Pixels of a class that the masks lack: its IoU of 0 would pull the mean of one side down."""
        decision = decide(bundle(3), bundle(4, biased(CLUTTER, 8)), test, device="cpu")

        change = next(each for each in decision.classes if each.label.name == "Обстановка")
        assert change.standing == "not in the masks"
        assert change.challenger == 0
        assert decision.comparison is not None
        assert decision.comparison.b.scores.miou < decision.comparison.a.scores.miou
        judged = [each for each in decision.classes if each.standing == "judged"]
        assert decision.miou == pytest.approx(np.mean([each.challenger for each in judged]))
        assert "the test panoramas' masks do not hold them: Конструкции, Обстановка" in show(decision)

    def test_differences_that_are_no_numbers_are_no_proof(self) -> None:
        for value, kept in ((0.0, True), (-0.05, True), (-0.051, False), (math.nan, False)):
            change = ClassChange(
                label=SCHEMA.labels[1],
                standing="judged",
                champion=0.5,
                challenger=0.5 + value,
                difference=Difference(value=value, limits=None),
                floor=0.05,
            )
            assert change.is_kept is kept

    def test_metrics_are_of_all_classes(self, test: DatasetFolder, bundle: MakeBundle) -> None:
        decision = decide(bundle(3), bundle(4, biased(WALL, -50)), test, device="cpu")

        measured = evaluate(bundle(5, biased(WALL, -50)), test, device="cpu")
        assert decision.metrics["miou"] == measured.scores.miou
        assert decision.metrics["iou/Здание"] == 0
        assert decision.champion_metrics["iou/Здание"] > 0
        assert math.isnan(decision.metrics["iou/Конструкции"])
        assert decision.metrics.keys() == {*measured.summary(), *(f"iou/{label.name}" for label in SCHEMA.classes)}


class TestDamage:
    def test_weights_that_are_no_numbers(self, test: DatasetFolder, bundle: MakeBundle) -> None:
        def damage(model: UNet) -> None:
            model.down3.maxpool_conv[1].double_conv[0].weight[0, 0, 0, 0] = math.nan  # type: ignore[index,union-attr]

        broken = bundle(4, damage)
        decision = decide(bundle(3), broken, test, device="cpu")

        assert not decision.accepted
        assert decision.refusals[0].startswith(f"The challenger is damaged. The tensors of {broken.path}")
        assert "holds values that are not finite" in decision.refusals[0]
        assert decision.metrics == {}
        assert decision.comparison is None
        json.dumps(decision.to_dict(), allow_nan=False)

    @pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:overflow:RuntimeWarning")
    def test_answers_that_are_no_numbers(self, test: DatasetFolder, bundle: MakeBundle) -> None:
        def damage(model: UNet) -> None:  # numbers, each of them, until they are added up
            model.outc.conv.weight.fill_(3e38)

        decision = decide(bundle(3), bundle(4, damage), test, device="cpu")

        assert not decision.accepted
        assert "Улица v4 gives no numbers for 1_normals.png" in decision.refusals[0]

    def test_a_damaged_champion_does_not_stay_for_ever(self, test: DatasetFolder, bundle: MakeBundle) -> None:
        broken = bundle(3, lambda model: model.outc.conv.weight.fill_(math.nan))

        decision = decide(broken, bundle(4), test, device="cpu")

        assert decision.accepted
        assert decision.champion == "Улица v3"
        assert decision.warnings[0].startswith("The champion is damaged, so there is nothing to compare with.")
        assert "better than to call everything" in show(decision)


class TestTheFirstModel:
    def test_has_to_beat_one_class_everywhere(self, test: DatasetFolder, bundle: MakeBundle) -> None:
        decision = decide(None, bundle(1), test, device="cpu")

        assert decision.accepted
        assert decision.headline == "Улица v1 may become the champion."
        total = sum(count_ids(np.asarray(Image.open(item.mask))) for item in test.items)
        assert decision.champion_miou == pytest.approx(total.max() / total.sum() / 4)  # type: ignore[union-attr]
        assert decision.miou is not None
        assert f"mIoU {decision.miou:.3f} against {decision.champion_miou:.3f}" in decision.reasons[0]

    def test_is_refused_when_it_does_not(self, test: DatasetFolder, bundle: MakeBundle) -> None:
        decision = decide(None, bundle(1, biased(CLUTTER, 100)), test, device="cpu")

        assert not decision.accepted
        assert decision.headline == "Улица v1 is refused."
        assert decision.warnings == ("It finds nothing of what is there of Фон, Земля, Растительность, Здание: IoU 0.",)
        assert "not better than to call everything Фон" in show(decision) or "everything Земля" in show(decision)


class TestLabels:
    def test_a_new_class_is_gated_on_those_that_both_know(
        self, scenes: Path, tmp_path: Path, good_model: UNet, bundle: MakeBundle, make_manifest: Callable[..., Manifest]
    ) -> None:
        data = self.with_water(scenes, tmp_path / "water")
        champion = bundle(3)
        model = UNet(replace(good_model.architecture, classes=7)).eval()
        state = dict(good_model.state_dict())
        state["outc.conv.weight"] = torch.cat([state["outc.conv.weight"], torch.zeros(1, 12, 1, 1)])
        state["outc.conv.bias"] = torch.cat([state["outc.conv.bias"], torch.full((1,), -50.0)])
        model.load_state_dict(state)
        challenger = save_bundle(
            tmp_path / "seven",
            model,
            make_manifest(model.architecture, version=4, labels=data.schema, label_ids=data.schema.class_ids),
        )

        decision = decide(champion, challenger, data, device="cpu")

        assert decision.accepted  # it is the same, but for the class
        assert [each.label.name for each in decision.classes if each.standing == "only the challenger knows it"] == [
            "Вода"
        ]
        assert "Not judged, because the champion does not know them (pixels of them are left out for both): Вода." in (
            decision.warnings
        )
        # As if water were void.
        void = replace(data, schema=replace(data.schema, void_ids=data.schema.void_ids | {9}))
        iou = evaluate(champion, void, device="cpu").scores.iou
        assert decision.champion_miou == pytest.approx(np.nanmean(iou))
        assert decision.champion_metrics["iou/Вода"] == 0

    def test_a_class_that_is_given_up(self, test: DatasetFolder, bundle: MakeBundle) -> None:
        fewer = LabelSchema(labels=tuple(label for label in SCHEMA.labels if label.id != 5))
        challenger = bundle(4, label_ids=(0, 2, 0, 6, 65, 66), labels=fewer)

        decision = decide(bundle(3), challenger, test, rules=GateRules(margin=1, floor=1), device="cpu")

        assert "the challenger does not know them (pixels of them are left out for both): Растительность" in show(
            decision
        )
        assert [each.label.id for each in decision.classes if each.standing == "judged"] == [0, 2, 6]

    def test_nothing_in_common(self, test: DatasetFolder, bundle: MakeBundle) -> None:
        labels = LabelSchema(labels=(Label(name="Вода", id=9, color=(0, 0, 255)),))

        decision = decide(bundle(3), bundle(4, labels=labels, label_ids=(9,) * 6), test, device="cpu")

        assert not decision.accepted
        assert decision.refusals[0].startswith("The masks hold no class that both models know")

    @staticmethod
    def with_water(scenes: Path, root: Path) -> DatasetFolder:
        """Five of the scenes, with a stripe of water in the ground."""
        (root / "masks").mkdir(parents=True)
        (root / "imgs").mkdir()
        for number in range(1, 6):
            name = f"{number}_normals.png"
            (root / "imgs" / name).write_bytes((scenes / "imgs" / name).read_bytes())
            mask = np.array(Image.open(scenes / "masks" / name))
            mask[50:56] = 9
            Image.fromarray(mask).save(root / "masks" / name)
        schema = LabelSchema(labels=(*SCHEMA.labels, Label(name="Вода", id=9, color=(0, 0, 255))))
        (root / "labels.yaml").write_text(schema.to_yaml(), encoding="utf-8")
        return open_dataset(root)


class TestTheTestPart:
    def test_must_be_new_to_the_challenger(self, test: DatasetFolder, bundle: MakeBundle) -> None:
        learned = (digest(test.items[0]), "0" * 64)

        decision = decide(bundle(3), bundle(4, learned=learned), test, device="cpu")

        assert not decision.accepted
        assert decision.refusals == (
            "It has learned from 1 of the 5 test panoramas (1_normals), so its scores on them say nothing. Train it "
            "without them: on a data set with frozen splits.",
        )

    def test_known_to_the_champion_favours_it(self, test: DatasetFolder, bundle: MakeBundle) -> None:
        learned = tuple(digest(item) for item in test.items)

        decision = decide(bundle(3, learned=learned), bundle(4), test, device="cpu")

        assert decision.accepted
        assert (
            "The champion has learned from 5 of the 5 test panoramas (1_normals, 2_normals, 3_normals, …): the "
            "comparison favours it."
        ) in decision.warnings

    def test_of_one_group_does_not_tell(self, test: DatasetFolder, bundle: MakeBundle) -> None:
        decision = decide(bundle(3), bundle(4), test, group_by="(normals)", device="cpu")

        assert not decision.accepted
        assert decision.bound is None
        assert "The 5 test panoramas are of one group, and the gate asks for 5: with fewer" in decision.refusals[0]

    def test_of_too_few_groups_decides_nothing(self, test: DatasetFolder, bundle: MakeBundle) -> None:
        """However much better the challenger is; unless somebody takes the risk, or there is nobody to lose."""
        three = replace(test, items=test.items[:3])
        champion, challenger = bundle(3, biased(WALL, -50)), bundle(4)

        strict = decide(champion, challenger, three, device="cpu")
        lenient = decide(champion, challenger, three, rules=GateRules(min_groups=3), device="cpu")

        assert strict.bound is not None
        assert strict.bound > 0
        (refusal,) = strict.refusals
        assert "but that decides nothing. The 3 test panoramas are of only 3 groups, and the gate asks for 5" in refusal
        assert "min_groups" in refusal
        assert lenient.accepted
        first = decide(None, challenger, three, device="cpu")
        assert first.accepted
        assert first.warnings[0].startswith("There are only 3 test panoramas, of 3 groups (sites, as a rule): what")
        assert "needs" not in (gate.says_little(1, 5, GateRules()) or "")
        assert gate.too_few_groups(three, GateRules()) is not None
        assert gate.too_few_groups(three, GateRules(min_groups=3)) is None

    def test_of_few_groups_is_said(self, test: DatasetFolder, scenes: Path, bundle: MakeBundle) -> None:
        few = decide(bundle(3), bundle(4), test, device="cpu")
        many = decide(bundle(5), bundle(6), open_dataset(scenes), device="cpu")

        text = "There are only 5 groups of test panoramas: with fewer than 10 the confidence is overstated."
        assert text in few.warnings
        assert "groups of test panoramas" not in show(many)

    def test_small_losses_do_not_add_up_unseen(self, test: DatasetFolder, bundle: MakeBundle) -> None:
        def earlier(version: int, miou: float, snapshot: str) -> ModelVersion:
            return ModelVersion(
                name="Улица", version=version, created="", parent=None, snapshot=None, code_version="",
                weights_sha256="", metrics={"miou": miou}, test_snapshot=snapshot, config={}, decision="accepted",
                reasons=(), run=None, aliases=frozenset(),
            )  # fmt: skip

        champion, challenger, here = bundle(5), bundle(6), gate.test_snapshot(test)
        now = decide(champion, challenger, test, device="cpu").metrics["miou"]
        versions = [
            earlier(1, now + 0.5, "elsewhere"), earlier(2, now + 0.02, here), earlier(3, now + 0.03, here),
            earlier(4, math.nan, here),
        ]  # fmt: skip

        decision = decide(champion, challenger, test, device="cpu", earlier=versions)
        kept = decide(champion, challenger, test, device="cpu", earlier=versions, rules=GateRules(margin=0.05))

        assert decision.accepted
        assert decision.warnings[-1].startswith(
            f"An earlier champion, Улица v3, was better on these panoramas: mIoU {now + 0.03:.3f}"
        )
        assert "An earlier champion" not in show(kept)

    def test_has_an_identity(self, test: DatasetFolder, tmp_path: Path) -> None:
        before = gate.test_snapshot(test)

        assert gate.test_snapshot(replace(test, items=test.items[::-1])) == before
        assert gate.test_snapshot(replace(test, items=test.items[1:])) != before
        assert gate.test_snapshot(replace(test, schema=replace(SCHEMA, void_ids=frozenset({2, 255})))) != before
        other = tmp_path / "mask.png"
        Image.fromarray(np.full((64, 128), 2, np.uint8)).save(other)
        changed = (replace(test.items[0], mask=other), *test.items[1:])
        assert gate.test_snapshot(replace(test, items=changed)) != before

    def test_is_the_frozen_one(self, make_dataset: Callable[..., Path]) -> None:
        root = make_dataset(6)
        with pytest.raises(DatasetError, match="has no frozen test panoramas"):
            gate.test_part(root)
        with DatasetWriter(root, schema=SCHEMA) as writer:
            writer.freeze_splits(SplitPlan(group_by="image", validation=17, test=33))
            writer.commit()

        found = gate.test_part(root)

        assert {item.split for item in found.items} == {"test"}
        assert len(found.items) == 2


class TestRules:
    def test_unknown_labels_are_named(self, test: DatasetFolder, bundle: MakeBundle) -> None:
        with pytest.raises(ConfigError, match=r"Floors are set for 'Wires', 'Ржа', but the labels are Фон, Земля, "):
            decide(bundle(3), bundle(4), test, rules=GateRules(floors={"Wires": 0.1, "Земля": 0.1, "Ржа": 0.2}))

    @pytest.mark.parametrize(
        ("rule", "message"),
        [
            ({"margin": -0.1}, "The gate's margin must lie between 0 and 1, found -0.1"),
            ({"floor": math.nan}, "The gate's floor must lie between 0 and 1, found nan"),
            ({"floors": {"Земля": 5}}, "The gate's Земля must lie between 0 and 1, found 5"),
            ({"level": 1.0}, "The gate's level must be at least 0.5 and below 1"),
            ({"min_groups": 1}, "The gate's min_groups must be 2 or above, found 1"),
        ],
    )
    def test_are_checked(self, rule: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            GateRules(**rule)


class TestPage:
    def test_shows_what_was_decided(
        self, test: DatasetFolder, bundle: MakeBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("training.compare.PICTURES", 1)
        pictures: dict[str, bytes] = {}
        decision = decide(bundle(3), bundle(4, biased(BUSH, -50)), test, device="cpu", picture=pictures.__setitem__)

        gate.write_gate_page(tmp_path / "gate.html", decision, pictures)

        page = (tmp_path / "gate.html").read_text(encoding="utf-8")
        assert "<h1>Улица v4 is refused: Улица v3 stays.</h1>" in page
        assert all(html.escape(reason, quote=True).replace("&#x27;", "&#39;") in page for reason in decision.reasons)
        assert page.count("data:image/jpeg;base64,") == len(pictures) == 1
        assert page.count('<span class="axis"') == 4
        assert "in 95 of 100 such draws it lies within" in page
        assert "not judged: not in the masks" in page
        assert decision.test_snapshot in page
        assert "http" not in page.replace("http-equiv", "")

    def test_of_a_first_model_and_of_a_damaged_one(self, test: DatasetFolder, bundle: MakeBundle) -> None:
        broken = bundle(2, lambda model: model.outc.conv.weight.fill_(math.nan))
        for model in (bundle(1), broken):
            pictures: dict[str, bytes] = {}
            decision = decide(None, model, test, device="cpu", picture=pictures.__setitem__)
            page = gate.render_gate_page(decision, pictures)
            assert decision.headline in page
            assert "What becomes of each class" not in page
            assert ("How well each class is found" in page) is (model is not broken)
            assert page.count("data:image/jpeg") == (0 if model is broken else 5)

    def test_everything_is_escaped(self, test: DatasetFolder, bundle: MakeBundle) -> None:
        decision = decide(bundle(3, name="<b>x"), bundle(4, name="<script>alert(1)</script>"), test, device="cpu")

        assert "<script" not in gate.render_gate_page(decision, {"<i>": b""})
        assert "<b>x" not in gate.render_gate_page(decision, {})
        assert json.loads(json.dumps(decision.to_dict(), allow_nan=False))["accepted"] is True
