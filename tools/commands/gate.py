"""`sscloud gate`: champion, challenger + test panoramas → may the challenger take its place?"""

import argparse
import json
import math
from pathlib import Path

NAME = "gate"
HELP = "decide whether a new model may replace the one in use"
DESCRIPTION = """\
Measure the champion (the model in use) and a challenger on the frozen test panoramas of a data set, and decide whether
the challenger may take its place. It may if all of this holds:

  overall it is not worse: with 95 % confidence (a paired bootstrap over groups of panoramas) its mIoU is lower by
  less than --margin, and the panoramas are of --min-groups groups or more, for that to mean anything; no class loses
  more IoU than its floor; it has learned from none of the test panoramas; its weights and its answers are numbers.

Classes that only one of the two knows are shown, and not judged. A first model, with - as the champion, has to beat the
most frequent class everywhere. Nothing is changed anywhere; --output writes the decision as a page, gate.html, and as
gate.json.

Exit status: 0 accepted; 1 refused; 2 an error that a message explains; 70 a defect of the program."""
EXAMPLES = """\
  sscloud gate bundles/street-v3 runs/street-4/bundle dataset -o decision
  sscloud gate bundles/street-v3 runs/street-4/bundle dataset --margin 0.02 --class-floor Конструкции=0.1
  sscloud gate - runs/street/bundle dataset                       # there is no champion yet"""

MARKER = "gate.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument("champion", metavar="CHAMPION", help="folder of the model in use; - if there is none")
    parser.add_argument("challenger", type=Path, metavar="CHALLENGER", help="folder of the new model")
    parser.add_argument("dataset", type=Path, metavar="DATASET", help="data set with frozen test panoramas")
    parser.add_argument("--labels", type=Path, help="label schema (default: DATASET/labels.yaml)")
    parser.add_argument(
        "--margin", type=_share, default=0.01, metavar="X", help="mIoU that it may be worse by (default: 0.01)"
    )
    parser.add_argument(
        "--floor", type=_share, default=0.05, metavar="X", help="IoU that a class may lose (default: 0.05)"
    )
    parser.add_argument(
        "--class-floor",
        type=_class_floor,
        action="append",
        default=[],
        metavar="NAME=X",
        help="floor of one label; can be repeated",
    )
    parser.add_argument(
        "--level", type=float, default=0.95, metavar="X", help="confidence of the bound (default: 0.95)"
    )
    parser.add_argument(
        "--min-groups",
        type=int,
        default=5,
        metavar="N",
        help="groups of test panoramas without which nothing is accepted in a champion's place (default: 5, with fewer "
        "of which the bound does not mean 95 percent)",
    )
    parser.add_argument(
        "--group-by",
        metavar="RULE",
        help="panoramas that are resampled together: image, task, job, or a regular expression that finds the site in "
        "the file name (default: the groups of the data set)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda … (default: auto)")
    parser.add_argument("-o", "--output", type=Path, metavar="FOLDER", help="write gate.html and gate.json there")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder if it exists")
    parser.add_argument("--json", action="store_true", help="print the decision as JSON, in one line")


def run(args: argparse.Namespace) -> int:
    """Decide, and say why."""
    import contextlib

    from sscloud.bundle import ModelBundle
    from sscloud.files import atomic_folder, atomic_write
    from training.gate import PAGE, GateRules, decide, test_part, write_gate_page

    rules = GateRules(
        margin=args.margin,
        level=args.level,
        floor=args.floor,
        floors=dict(args.class_floor),
        min_groups=args.min_groups,
    )
    champion = None if args.champion == "-" else ModelBundle.load(Path(args.champion))
    challenger = ModelBundle.load(args.challenger)
    test = test_part(args.dataset, labels=args.labels)
    pictures: dict[str, bytes] = {}
    with contextlib.ExitStack() as stack:
        folder: Path | None = None
        if args.output is not None:
            folder = stack.enter_context(atomic_folder(args.output, marker=MARKER, overwrite=args.overwrite))
        decision = decide(
            champion,
            challenger,
            test,
            rules=rules,
            device=args.device,
            group_by=args.group_by,
            picture=pictures.__setitem__ if folder is not None else None,
        )
        data = decision.to_dict()
        if folder is not None:
            write_gate_page(folder / PAGE, decision, pictures)
            atomic_write(
                folder / MARKER, json.dumps(data, ensure_ascii=False, indent=2, allow_nan=False).encode() + b"\n"
            )
    if args.json:
        print(json.dumps(data, ensure_ascii=False, allow_nan=False))
    else:
        print(decision.headline)
        for reason in decision.reasons:
            mark = "✗" if reason in decision.refusals else "!" if reason in decision.warnings else "✓"
            print(f"  {mark} {reason}")
        if args.output is not None:
            print(f"Written to {args.output}")
    return 0 if decision.accepted else 1


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:  # NaN is refused, too
        raise argparse.ArgumentTypeError(f"must lie between 0 and 1, found {text}")
    return value


def _class_floor(text: str) -> tuple[str, float]:
    name, _, value = text.rpartition("=")
    if not name or not math.isfinite(float(value)):
        raise argparse.ArgumentTypeError(f"must look like NAME=0.1, found {text!r}")
    return name, _share(value)
