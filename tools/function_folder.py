"""A bundle → a function folder that `nuctl deploy` takes as it is.

FOLDER/
  function.yaml, function-gpu.yaml   templates of `serverless/`, filled in from the bundle
  main.py, model_handler.py, …       what Nuclio calls
  sscloud/                           a copy of the package: Nuclio puts FOLDER first on the path
  bundle/                            weights and manifest
"""

import importlib.util
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import yaml

import sscloud
from sscloud.bundle import MANIFEST, WEIGHTS, Manifest, ModelBundle
from sscloud.errors import ConfigError
from sscloud.files import atomic_folder
from sscloud.inference import Backend
from sscloud.labels import LabelSchema
from sscloud.shapes import ATTRIBUTES

MODULES = ("champion.py", "main.py", "metrics.py", "model_handler.py", "settings.py")
TEMPLATES = ("function.yaml", "function-gpu.yaml")
OPENVINO_TEMPLATE = "function-openvino.yaml"
"""Takes the place of function.yaml: the same but for what computes."""

MODELS, BACKEND = "SSCLOUD_MODELS", "SSCLOUD_BACKEND"
"""Settings of the function that deploying has to know: the model volume, and what computes."""

MOUNT = "/opt/sscloud/models"
"""Where the model volume is in the function's container."""

LIBRARY = "pip install segmentation-models-pytorch==0.6.0 timm==1.0.31"
"""What computes networks of other families than `unet`; timm names the parameters of its encoders."""

TORCHVISION = {
    "function.yaml": "pip install torchvision==0.28.0+cpu --index-url https://download.pytorch.org/whl/cpu",
    "function-gpu.yaml": "pip install torchvision==0.28.0",
}
"""The one that is made for the torch of each template: timm imports it, and it fails with any other."""

_NAME = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?")
_MAX_NAME = 56
"""A Kubernetes label has 63 characters at most, and Nuclio puts "nuclio-" before the name."""


def package(
    bundle_path: Path,
    folder: Path,
    *,
    name: str | None = None,
    backend: Backend = "torch",
    calibrate: Sequence[Path] = (),
    models: Path | None = None,
    overwrite: bool = False,
    tell: Callable[[str], None] = lambda _: None,
) -> str:
    """Write a function folder, whole or not at all.

    Args:
        bundle_path: the bundle to serve.
        folder: the function folder to write.
        name: the function's name in Nuclio; None makes one of the bundle's name.
        backend: what function.yaml computes with; function-gpu.yaml takes PyTorch.
        calibrate: images to fit int8 to, which OpenVINO then computes in; none for its other precisions.
        models: a model volume on the machine where it will run, from which the function takes newer versions; None
            serves the bundle for good.
        overwrite: replace `folder` when it exists.
        tell: told, for people, how OpenVINO's results compare with PyTorch's.

    Returns:
        the function's name in Nuclio.

    Raises:
        BundleError: no valid bundle, or one that OpenVINO does not compute as PyTorch does.
        ConfigError: a name that Nuclio does not take, a folder that exists, no OpenVINO, or a network that it does
            not compute.
        ImageError: an image of `calibrate` cannot be used.
    """
    bundle = ModelBundle.load(bundle_path)
    function_name = find_name(bundle.manifest.name) if name is None else check_name(name)
    if calibrate and backend != "openvino":
        raise ConfigError("Only OpenVINO computes in int8. Add --backend openvino, or leave --calibrate out.")
    family = bundle.manifest.architecture.family
    if family != "unet" and backend == "openvino":
        raise ConfigError(
            f"{bundle_path} holds a network {family!r}; OpenVINO computes unets only here. Leave --backend openvino "
            "out."
        )
    with atomic_folder(folder, marker="function.yaml", overwrite=overwrite) as target:
        for template in TEMPLATES:
            openvino = backend == "openvino" and template == "function.yaml"
            text = (_source() / (OPENVINO_TEMPLATE if openvino else template)).read_text(encoding="utf-8")
            filled = fill_template(text, bundle.manifest, name=function_name)
            if family != "unet":
                filled = add_build_steps(filled, [TORCHVISION[template], LIBRARY])
            if models is not None:
                filled = mount_models(filled, models)
            (target / template).write_text(filled, encoding="utf-8", newline="\n")
        for module in MODULES:
            shutil.copyfile(_source() / module, target / module)
        _copy_package(Path(sscloud.__file__).parent, target / "sscloud")
        (target / "bundle").mkdir()
        for file in (WEIGHTS, MANIFEST):
            shutil.copyfile(bundle.path / file, target / "bundle" / file)
        if backend == "openvino":
            _check_openvino(ModelBundle.load(target / "bundle"), calibrate, tell)
    return function_name


def _check_openvino(bundle: ModelBundle, calibrate: Sequence[Path], tell: Callable[[str], None]) -> None:
    from tools import openvino_check  # openvino is optional

    difference = openvino_check.check_parity(bundle)
    tell(f"OpenVINO's logits differ from PyTorch's by {difference:.0e} of the largest one, which is rounding.")
    if calibrate:
        found = openvino_check.calibrate(bundle, calibrate)
        label = bundle.manifest.labels.by_id(bundle.manifest.label_ids[found.worst_class])
        worst = "?" if label is None else label.name
        tell(
            f"In int8, {found.equal:.3%} of these images' pixels keep their label; IoU with fp32 is lowest for "
            f"{worst}: {found.worst_iou:.3f}."
        )


def find_name(bundle_name: str) -> str:
    """`sscloud-<bundle's name>` in Nuclio's alphabet.

    Raises:
        ConfigError: the bundle's name has nothing of that alphabet, or is too long.
    """
    slug = re.sub(r"[^a-z0-9]+", "-", bundle_name.lower()).strip("-")
    if not slug:
        raise ConfigError(
            f"The bundle's name {bundle_name!r} has no Latin letters or digits to make a function's name of. "
            "Give one with --name, for example --name sscloud-street."
        )
    return check_name(slug if slug.startswith("sscloud") else f"sscloud-{slug}")


def check_name(name: str) -> str:
    """Return `name` when Nuclio takes it (an RFC 1123 label, as Kubernetes names are).

    Raises:
        ConfigError: it does not.
    """
    if len(name) > _MAX_NAME or not _NAME.fullmatch(name):
        raise ConfigError(
            f"{name!r} is no name for a Nuclio function: it takes up to {_MAX_NAME} lower-case Latin letters, digits "
            "and hyphens, with a letter or digit at both ends. Give one with --name, for example --name sscloud-street."
        )
    return name


def fill_template(text: str, manifest: Manifest, *, name: str) -> str:
    """Put the bundle's name, version, labels and description into the text of a function's yaml; comments stay."""
    return replace_scalars(
        text,
        {
            ("metadata", "name"): name,
            ("metadata", "annotations", "name"): _quoted(manifest.title),
            ("metadata", "annotations", "version"): _quoted(str(manifest.version)),
            ("metadata", "annotations", "spec"): "|\n" + _indented(spec_json(manifest.labels), 6) + "\n",
            ("spec", "description"): _quoted(describe(manifest)),
            ("spec", "build", "image"): f"cvat.{name}",
        },
    )


def spec_json(labels: LabelSchema) -> str:
    """CVAT's `spec` annotation, one label a line."""
    lines = [_readable_json(label) for label in labels.cvat_spec(ATTRIBUTES)]
    return "[\n  " + ",\n  ".join(lines) + "\n]\n" if lines else "[]\n"


def describe(manifest: Manifest) -> str:
    """What people read under the model's name in CVAT."""
    iou = manifest.metrics.get("validation_miou")
    quality = "" if iou is None else f", mIoU {iou:.2f} on its validation panoramas"
    return f"Semantic segmentation of laser-scan panoramas: {manifest.title}, scale {manifest.scale:g}{quality}"


def replace_scalars(text: str, values: Mapping[tuple[str, ...], str]) -> str:
    """Replace scalars of a YAML document where they stand, so that comments and order stay.

    Args:
        text: the document; its root is a mapping.
        values: path of keys → the new scalar as YAML text (quoted where it must be).

    Raises:
        KeyError: the document has no scalar at a path.
    """
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    spans = []
    for path, value in values.items():
        node = root
        for key in path:
            children = node.value if isinstance(node, yaml.MappingNode) else []
            node = next((child for name, child in children if name.value == key), None)
        if not isinstance(node, yaml.ScalarNode):
            raise KeyError(".".join(path))
        spans.append((node.start_mark.index, node.end_mark.index, value))
    for start, end, value in sorted(spans, reverse=True):
        text = text[:start] + value + text[end:]
    return text


def add_build_steps(text: str, commands: Sequence[str]) -> str:
    """Let a function's image run more commands, after those of its yaml; everything else stays as it is.

    Args:
        text: a function's yaml.
        commands: of one line, without characters that mean something in YAML.

    Raises:
        KeyError: the yaml has no steps.
    """
    node: yaml.Node | None = yaml.compose(text, Loader=yaml.SafeLoader)
    for key in ("spec", "build", "directives", "preCopy"):
        children = node.value if isinstance(node, yaml.MappingNode) else []
        node = next((child for name, child in children if name.value == key), None)
    if not isinstance(node, yaml.SequenceNode):
        raise KeyError("spec.build.directives.preCopy")
    indent = " " * (node.start_mark.column)
    steps = "".join(f"\n{indent}- kind: RUN\n{indent}  value: {command}" for command in commands)
    end = len(text[: node.end_mark.index].rstrip())
    return text[:end] + steps + text[end:]


def mount_models(text: str, models: Path) -> str:
    """Let a function mount a model volume and follow it.

    Args:
        text: a function's yaml.
        models: the volume's folder on the machine where the function runs.

    Raises:
        KeyError: the yaml has no `env` or no `volumes`.
    """
    spec = yaml.safe_load(text)["spec"]
    env = [entry for entry in spec["env"] or [] if entry["name"] != MODELS]
    volumes = [entry for entry in spec["volumes"] or [] if entry["volumeMount"]["mountPath"] != MOUNT]
    mount = {
        "volume": {"name": "models", "hostPath": {"path": str(models.resolve())}},
        "volumeMount": {"name": "models", "mountPath": MOUNT, "readOnly": True},
    }
    text = replace_list(text, ("spec", "env"), [*env, {"name": MODELS, "value": MOUNT}])
    return replace_list(text, ("spec", "volumes"), [*volumes, mount])


def replace_list(text: str, path: Sequence[str], values: Sequence[object]) -> str:
    """Replace a list of a YAML document where it stands, so that comments outside it and order stay.

    Args:
        text: the document; its root is a mapping.
        path: keys that lead to the list.
        values: the new one, not empty.

    Raises:
        KeyError: the document has no list there, or not in lines of its own.
    """
    node: yaml.Node | None = yaml.compose(text, Loader=yaml.SafeLoader)
    key_node: yaml.Node | None = None
    for key in path:
        pairs = node.value if isinstance(node, yaml.MappingNode) and not node.flow_style else []
        key_node, node = next((pair for pair in pairs if pair[0].value == key), (None, None))
    if key_node is None or not isinstance(node, yaml.SequenceNode):
        raise KeyError(".".join(path))
    end = node
    while not end.flow_style and isinstance(end, yaml.CollectionNode) and end.value:  # a block ends after its comments
        last = end.value[-1]
        end = last[1] if isinstance(last, tuple) else last
        if isinstance(end, yaml.ScalarNode):
            break
    indent = key_node.start_mark.column + 2
    block = _indented(yaml.safe_dump(list(values), allow_unicode=True, sort_keys=False, width=10_000), indent)
    return text[: key_node.end_mark.index] + ":\n" + block.rstrip() + text[end.end_mark.index :]


def _source() -> Path:
    """The folder of the package `serverless`, found without importing it."""
    spec = importlib.util.find_spec("serverless")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError("The package 'serverless' is not installed. Install SSCloud again.")
    return Path(next(iter(spec.submodule_search_locations)))


def _copy_package(source: Path, target: Path) -> None:
    """Copy a package's code and data; caches and whatever else lies there stay behind."""
    for file in sorted(source.rglob("*")):
        if file.suffix in (".py", ".yaml", ".typed") and "__pycache__" not in file.parts:
            copy = target / file.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)


def _quoted(text: str) -> str:
    """A YAML double-quoted scalar; JSON strings are."""
    return _readable_json(text)


def _readable_json(value: object) -> str:
    """JSON with Cyrillic as it is; characters that YAML forbids are escaped."""
    text = json.dumps(value, ensure_ascii=False)
    return text if text.isprintable() else json.dumps(value)


def _indented(text: str, columns: int) -> str:
    return "".join(" " * columns + line + "\n" for line in text.splitlines())
