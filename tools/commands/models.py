"""`sscloud models`: the versions of the model: what they are, which is served, and what was served before."""

import argparse
import json
import math
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tools.promotion import FunctionUpdate, Promotion
    from training.cycle_config import CycleConfig
    from training.registry import ModelVersion, Registry

NAME = "models"
HELP = "list, compare, promote and roll back the versions of the model"
DESCRIPTION = """\
The registry of the workspace: every model that the loop has made is a version in it, with its data, configuration,
scores on the frozen test set and weights, and never changes. One of them is the champion: the model that is served. It
is kept in MLflow's store: runs/mlflow.db, unless MLFLOW_TRACKING_URI names another one, a team's server for example.

`promote` makes a version the champion, if the gate has accepted it in the present one's place: functions that follow
the model volume (served/) take it within seconds, without a new image. `rollback` makes the previous champion the
champion again; said twice, it goes back twice.

Where the workspace has a cycle.yaml, its `name`, `function`, `new_labels` and `gate` hold here too; flags win."""
EXAMPLES = """\
  sscloud models list
  sscloud models show 4
  sscloud models compare 3 4 --dataset dataset       # measured now, on the test panoramas
  sscloud models promote 4                           # the gate has accepted it
  sscloud models promote 2 --dataset dataset         # asks the gate now
  sscloud models promote 2 --force "v3 misses poles"
  sscloud models rollback
  sscloud models import street-48 --name street      # a bundle that was made elsewhere

`sscloud models ACTION --help` explains an action's flags."""

_WIDTH = 24
"""Of names in tables; longer ones are cut."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True, help="what to do:")
    listing = _action(actions, "list", "all versions")
    listing.add_argument("--json", action="store_true", help="print them as JSON")
    show = _action(actions, "show", "everything about one version")
    show.add_argument("version", type=_version, metavar="V", help="number of the version")
    show.add_argument("--json", action="store_true", help="print it as JSON")
    comparing = _action(actions, "compare", "what differs between two versions")
    comparing.add_argument("a", type=_version, metavar="V", help="number of a version")
    comparing.add_argument("b", type=_version, metavar="W", help="number of another version")
    comparing.add_argument(
        "--dataset", type=Path, help="measure both now on this data set's test panoramas, and say which is better"
    )
    comparing.add_argument("--device", default="auto", help="auto, cpu, cuda … (default: auto)")
    comparing.add_argument("--json", action="store_true", help="print it as JSON")
    promoting = _action(actions, "promote", "make a version the one that is served")
    promoting.add_argument("version", type=_version, metavar="V", help="number of the version")
    promoting.add_argument(
        "--dataset", type=Path, help="ask the gate now, on this data set's test panoramas, unless it has accepted V"
    )
    promoting.add_argument("--device", default="auto", help="for the gate: auto, cpu, cuda … (default: auto)")
    promoting.add_argument("--force", metavar="REASON", help="promote it whatever the gate says; the reason is kept")
    back = _action(actions, "rollback", "serve the previous champion again")
    for each in (promoting, back):
        _add_serving_arguments(each)
        each.add_argument("--json", action="store_true", help="print what came of it as JSON")
    importing = _action(actions, "import", "make a bundle that was made elsewhere the next version")
    importing.add_argument("bundle", type=Path, metavar="BUNDLE", help="a model's folder")
    importing.add_argument(
        "--dataset", type=Path, help="measure it on this data set's test panoramas, and keep the scores"
    )
    importing.add_argument("--device", default="auto", help="auto, cpu, cuda … (default: auto)")


def _action(actions: Any, name: str, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = actions.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    parser.add_argument(
        "--workspace", type=Path, default=Path(), metavar="FOLDER", help="where everything is (default: this folder)"
    )
    parser.add_argument("--name", help="the registered model (default: cycle.yaml's, else the only one)")
    return parser


def _add_serving_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--volume", type=Path, metavar="FOLDER", help="model volume (default: WORKSPACE/served)")
    parser.add_argument(
        "--new-labels",
        action="store_true",
        help="without --function: whoever serves the volume is packaged anew for a version with other labels",
    )
    parser.add_argument("--url", help="address of a running function to wait for, such as http://127.0.0.1:32001")
    function = parser.add_argument_group("the function in Nuclio (default: cycle.yaml's, else none)")
    function.add_argument("--function", metavar="NAME", help="its name")
    function.add_argument("--redeploy", action="store_true", help="build and start it anew where its labels change")
    function.add_argument("--gpu", action="store_true", help="then deploy function-gpu.yaml")
    function.add_argument("--platform", choices=("local", "kube"), help="Docker or Kubernetes (default: local)")
    function.add_argument("--namespace", help="Nuclio's namespace (default: nuclio)")
    function.add_argument("--network", help="CVAT's Docker network (default: cvat_cvat)")
    function.add_argument("--registry", metavar="URL", help="registry for images (Kubernetes needs one)")


def _version(text: str) -> int:
    number = text.removeprefix("v")
    if not number.isascii() or not number.isdecimal() or int(number) < 1:
        raise argparse.ArgumentTypeError(f"expected the number of a version, as 4 or v4, found {text}")
    return int(number)


def run(args: argparse.Namespace) -> int:
    """Do what the action says."""
    from tools.tracking import quiet_mlflow

    quiet_mlflow()
    # A server that is away shall be named within seconds, not minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    return {
        "list": _list,
        "show": _show,
        "compare": _compare,
        "promote": _promote,
        "rollback": _roll_back,
        "import": _import,
    }[args.action](args)


def _registry(args: argparse.Namespace, *, name: str | None = None) -> "Registry":
    from tools.tracking import store_uri
    from training.registry import default_uri, open_registry, registered_names

    uri, named = store_uri(args.workspace), args.name or name
    if args.action != "import" and uri == default_uri(args.workspace):
        _require_store(args.workspace)
    if named is None and (settings := _settings(args.workspace)) is not None and settings.name in registered_names(uri):
        named = settings.name
    return open_registry(uri, name=named, cache=args.workspace / "runs" / "cache")


def _require_store(workspace: Path) -> None:
    """Refuse a folder without a registry: to ask its store would make one."""
    from sscloud.errors import ConfigError

    if not (workspace / "runs" / "mlflow.db").is_file():
        raise ConfigError(
            f"There is no model in {workspace.resolve()}: it has no runs/mlflow.db. If your workspace is another "
            "folder, name it with --workspace; in a new one `sscloud cycle`, or `sscloud models import BUNDLE`, makes "
            "the first version."
        )


# --- looking ----------------------------------------------------------------------------------------------------------


def _list(args: argparse.Namespace) -> int:
    registry = _registry(args)
    versions = registry.versions()
    if args.json:
        print(_json([version.to_dict() for version in versions]))
        return 0
    if not versions:
        print(f"{registry.name} has no versions yet.")
        return 0
    rows = [("", "made", "mIoU", "decision", "learned", "parent", "")]
    rows += [
        (
            f"v{version.version}",
            version.created[:16].replace("T", " ") or "—",
            _score(version.metrics.get("miou", math.nan)),
            "damaged" if version.problem else version.decision or "—",
            str(version.learned),
            _cut(version.parent or "—"),
            ", ".join(sorted(version.aliases)),
        )
        for version in versions
    ]
    print(f"{registry.name}\n{_table(rows)}")
    return 0


def _show(args: argparse.Namespace) -> int:
    from sscloud.errors import BundleError, RegistryError

    registry = _registry(args)
    version = registry.get(args.version)
    path: str | None = None
    problem: BundleError | RegistryError | None = None
    try:
        path = str(registry.bundle(version.version).path)
    except BundleError as error:
        problem = error
    except RegistryError as error:
        if version.problem is None:  # the store, not the version
            raise
        problem = error
    if args.json:
        print(_json({**version.to_dict(), "bundle": path, "problem": str(problem) if problem else None}))
        return 0 if problem is None else 2
    if version.problem is None:
        print(_described(version, path))
    if problem is not None:
        raise problem
    return 0


def _described(version: "ModelVersion", path: str | None) -> str:
    named = f" ({', '.join(sorted(version.aliases))})" if version.aliases else ""
    against = f" in place of {version.against}" if version.against else ""
    measured = f", on the panoramas {version.test_snapshot}" if version.test_snapshot else ""
    lines = [
        f"{version.title}{named}",
        f"  made       {version.created}, SSCloud {version.code_version}",
        f"  parent     {version.parent or '—'}",
        f"  learned    {version.learned} panoramas, data set {version.snapshot or '—'}",
        f"  weights    sha256 {version.weights_sha256}",
        f"  files      {path or 'damaged'}",
        f"  MLflow     run {version.run}",
        f"  decision   {version.decision or '—'}{against if version.decision else ''}",
        *(f"    {reason}" for reason in version.reasons),
    ]
    for approval in version.approvals:
        how = "forced" if approval.forced else "accepted"
        lines += [f"  {how}     {approval.at}, in place of {approval.against or 'none'}", *_indented(approval.reasons)]
    if version.metrics:
        lines += [f"  test{measured}", *_score_lines(version.metrics)]
    changed = _not_default(version.config)
    if changed:
        lines += [
            "  configuration, where it is not the default",
            *(f"    {name}: {_value(changed[name])}" for name in changed),
        ]
    return "\n".join(lines)


def _indented(lines: Sequence[str]) -> list[str]:
    return [f"    {line}" for line in lines]


def _score_lines(metrics: Mapping[str, float]) -> list[str]:
    return [f"    {name.removeprefix('iou/'):{_WIDTH}} {_score(value)}" for name, value in metrics.items()]


def _not_default(config: Mapping[str, Any]) -> dict[str, Any]:
    import dataclasses

    from training.config import TrainConfig

    default = {
        field.name: field.default
        for field in dataclasses.fields(TrainConfig)
        if field.default is not dataclasses.MISSING
    }
    return {name: value for name, value in config.items() if name not in default or value != default[name]}


def _compare(args: argparse.Namespace) -> int:
    from sscloud.errors import ConfigError

    if args.a == args.b:
        raise ConfigError(f"Version {args.a} is the same as itself: name two different versions.")
    registry = _registry(args)
    first, second = registry.get(args.a), registry.get(args.b)
    bundles = [registry.bundle(version.version) for version in (first, second)]
    learned = [set(bundle.manifest.learned) for bundle in bundles]
    names = sorted({*first.config, *second.config})
    config = {
        name: [first.config.get(name), second.config.get(name)]
        for name in names
        if first.config.get(name) != second.config.get(name)
    }
    is_same_test = first.test_snapshot is not None and first.test_snapshot == second.test_snapshot
    data: dict[str, Any] = {
        "a": first.to_dict(),
        "b": second.to_dict(),
        "config": config,
        "learned": {
            "both": len(learned[0] & learned[1]),
            "a": len(learned[0] - learned[1]),
            "b": len(learned[1] - learned[0]),
        },
        "same_test": is_same_test,
    }
    lines = [f"A: {first.title}   B: {second.title}", ""]
    lines += [f"{name}: {_value(ours)} → {_value(theirs)}" for name, (ours, theirs) in config.items()]
    lines += [
        "" if config else "The configurations are the same.\n",
        "Learned from: {both} panoramas by both, {a} by A only, {b} by B only.".format(**data["learned"]),
        "",
    ]
    if args.dataset is not None:
        from training.compare import compare, comparison_table, comparison_to_dict
        from training.gate import test_part

        labels = _labels_file(args.workspace, _settings(args.workspace))
        comparison = compare(bundles[0], bundles[1], test_part(args.dataset, labels=labels), device=args.device)
        data["comparison"] = comparison_to_dict(comparison)
        lines += [comparison_table(comparison)]
    elif is_same_test:
        rows = [("test", "A", "B", "B - A")]
        for name in dict.fromkeys([*first.metrics, *second.metrics]):
            ours, theirs = (version.metrics.get(name, math.nan) for version in (first, second))
            change = theirs - ours
            shown = "—" if math.isnan(change) else f"{change:+.3f}"
            rows.append((_cut(name.removeprefix("iou/")), _score(ours), _score(theirs), shown))
        lines += [_table(rows), "", "Whether the differences are more than chance, --dataset tells."]
    else:
        lines += ["They were not measured on the same test panoramas: --dataset measures both now."]
    print(_json(data) if args.json else "\n".join(lines))
    return 0


# --- serving ----------------------------------------------------------------------------------------------------------


def _promote(args: argparse.Namespace) -> int:
    from sscloud.errors import ConfigError
    from tools.promotion import promote
    from training.registry import objection

    registry = _registry(args)
    if args.force is not None and not args.force.strip():
        raise ConfigError("--force needs a reason, which is kept with the version.")
    settings = _settings(args.workspace)
    version, champion = registry.get(args.version), registry.champion()
    problem = objection(version, champion)
    if problem is not None and args.force is not None:
        against = champion.title if champion is not None else None
        registry.approve(version.version, against=against, reasons=[args.force.strip()], forced=True)
    elif problem is not None and args.dataset is not None:
        _ask_gate(registry, version, champion, args, settings)
    elif problem is not None:
        raise ConfigError(
            f"{version.title} is not promoted: {problem}. Ask the gate now with --dataset DATASET, or give your "
            "reason to promote it all the same with --force REASON."
        )
    promotion = promote(
        registry,
        version.version,
        volume=args.volume or args.workspace / "served",
        function=_function(args, settings),
        say=_say,
        new_labels=_allows_new_labels(args, settings),
        url=args.url,
        expected=champion.version if champion is not None else None,
    )
    return _report(promotion, as_json=args.json)


def _ask_gate(
    registry: "Registry",
    version: "ModelVersion",
    champion: "ModelVersion | None",
    args: argparse.Namespace,
    settings: "CycleConfig | None",
) -> None:
    """Let the gate compare a version with the champion now; refused is an error."""
    from sscloud.errors import ConfigError
    from training.gate import decide, test_part

    decision = decide(
        registry.bundle(champion.version) if champion is not None else None,
        registry.bundle(version.version),
        test_part(args.dataset, labels=_labels_file(args.workspace, settings)),
        rules=settings.gate if settings is not None else None,
        device=args.device,
        earlier=registry.former_champions(),
    )
    if not decision.accepted:
        raise ConfigError(
            f"{decision.headline} {' '.join(decision.reasons)} To promote it all the same, give your reason with "
            "--force."
        )
    _say(decision.headline)
    registry.approve(version.version, against=decision.champion, reasons=decision.reasons, forced=False)


def _roll_back(args: argparse.Namespace) -> int:
    from tools.promotion import roll_back

    settings = _settings(args.workspace)
    promotion = roll_back(
        _registry(args),
        volume=args.volume or args.workspace / "served",
        function=_function(args, settings),
        say=_say,
        new_labels=_allows_new_labels(args, settings),
        url=args.url,
    )
    return _report(promotion, as_json=args.json)


def _settings(workspace: Path) -> "CycleConfig | None":
    """The workspace's cycle.yaml; None where there is none."""
    path = workspace / "cycle.yaml"
    if not path.exists():  # known before the imports, which take seconds
        return None
    from training.cycle_config import CycleConfig, read_settings

    settings = read_settings(path)
    # A project is a matter of the cycle: there it may come by a flag.
    return CycleConfig.from_dict({"project": 0, **settings}, source=str(path)) if settings else None


def _labels_file(workspace: Path, settings: "CycleConfig | None") -> Path | None:
    """The label schema that the cycle measures by; None: the data set's own."""
    return workspace / settings.labels if settings is not None and settings.labels is not None else None


def _function(args: argparse.Namespace, settings: "CycleConfig | None") -> "FunctionUpdate | None":
    import dataclasses

    from sscloud.errors import ConfigError
    from tools.promotion import FunctionUpdate

    flags = ("platform", "namespace", "network", "registry", "redeploy", "gpu")
    given = {name: value for name in flags if (value := getattr(args, name))}
    if args.function is not None:
        return FunctionUpdate(name=args.function, **given)
    if settings is not None and settings.function is not None:
        from tools.cycle import function_update  # imports all that a cycle needs, which takes a while

        found = function_update(settings)
        return dataclasses.replace(found, **given) if found is not None else None
    if given:
        raise ConfigError(f"--{next(iter(given))} goes with --function, which names the function in Nuclio.")
    return None


def _allows_new_labels(args: argparse.Namespace, settings: "CycleConfig | None") -> bool:
    return bool(args.new_labels) or (settings is not None and settings.new_labels)


def _report(promotion: "Promotion", *, as_json: bool) -> int:
    for note in promotion.notes:
        _say(note)
    before = promotion.previous
    if as_json:
        data = {
            "champion": promotion.champion.title,
            "previous": before.title if before is not None else None,
            "folder": promotion.folder,
            "seconds": promotion.seconds,
            "notes": list(promotion.notes),
        }
        print(_json(data))
        return 0
    instead = f" in place of {before.title}" if before and before.version != promotion.champion.version else ""
    seconds = promotion.seconds
    took = f"; all workers that answered had it after {seconds:.1f} s" if seconds is not None else ""
    print(f"{promotion.champion.title} is served{instead}{took}.")
    return 0


def _import(args: argparse.Namespace) -> int:
    from sscloud.bundle import ModelBundle
    from tools.tracking import store_uri
    from training.registry import objection, registered_names

    bundle = ModelBundle.load(args.bundle)
    known = registered_names(store_uri(args.workspace))
    registry = _registry(args, name=None if known else bundle.manifest.name)
    metrics: Mapping[str, float] = {}
    snapshot, doubts = None, []
    if args.dataset is not None:
        from training.gate import decide, test_part

        labels = _labels_file(args.workspace, _settings(args.workspace))
        decision = decide(None, bundle, test_part(args.dataset, labels=labels), device=args.device)
        metrics, snapshot = decision.metrics, decision.test_snapshot
        # What speaks for it is no news: nobody was there to be compared with.
        doubts = [reason for reason in decision.reasons if reason in (*decision.refusals, *decision.warnings)]
        for doubt in doubts:
            _say(doubt)
    before = {each.version for each in registry.versions()}
    version = registry.import_bundle(bundle, metrics=metrics, test_snapshot=snapshot, reasons=doubts)
    found = f"{args.bundle} is {version.title}{' already' if version.version in before else ''}"
    champion = registry.champion()
    if champion is not None and champion.version == version.version:
        print(f"{found}, and the champion: there is nothing more to do.")
        return 0
    command = ["sscloud", "models", "promote", str(version.version)]
    if args.workspace != Path():
        command += ["--workspace", str(args.workspace)]
    if args.name is not None:
        command += ["--name", args.name]
    if objection(version, champion) is not None:  # the gate has to compare them first
        command += ["--dataset", str(args.dataset or args.workspace / "dataset")]
    print(f"{found}. Next: {shlex.join(command)}")
    return 0


# --- words ------------------------------------------------------------------------------------------------------------


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _json(data: Any) -> str:
    return json.dumps(data, ensure_ascii=False, allow_nan=False)


def _value(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _score(value: float) -> str:
    return "—" if math.isnan(value) else f"{value:.3f}"


def _cut(text: str) -> str:
    return text if len(text) <= _WIDTH else f"{text[: _WIDTH - 1]}…"


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of equally many texts; the first column is left, numbers are right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    numbers = [
        all(row[column][:1] in "0123456789+-—" and ":" not in row[column] for row in rows[1:])
        for column in range(len(rows[0]))
    ]
    return "\n".join(
        "  ".join(
            text.rjust(width) if is_number else text.ljust(width)
            for text, width, is_number in zip(row, widths, numbers, strict=True)
        ).rstrip()
        for row in rows
    )
