"""The function's settings: what the environment says, and what is refused."""

import json
import re
from pathlib import Path

import pytest
import yaml

import serverless
from serverless.settings import Settings
from sscloud.errors import ConfigError
from sscloud.image import MAX_PIXELS

NAMES = {"SSCLOUD_" + name.upper() for name in Settings.__slots__}


def read(**environment: str) -> Settings:
    return Settings.from_environment(environment)


def test_defaults() -> None:
    settings = read(PATH="/bin", SSCLOUDY="1")
    assert settings == Settings()
    assert (settings.min_area, settings.max_regions, settings.device) == (None, 1000, "auto")
    assert (settings.shapes, settings.tolerance, settings.budget) == ("mask", 0, 20_000_000)
    assert (settings.max_pixels, settings.max_bytes) == (MAX_PIXELS, 128 * 1024 * 1024)
    assert (settings.precision, settings.decode, settings.backend) == ("auto", "full", "torch")


def test_every_setting_is_read() -> None:
    given = {
        "SSCLOUD_MIN_AREA": "7",
        "SSCLOUD_MAX_REGIONS": "50",
        "SSCLOUD_SHAPES": "polygon",
        "SSCLOUD_TOLERANCE": "1.5",
        "SSCLOUD_BUDGET": "2.5",
        "SSCLOUD_MAX_PIXELS": "1000000",
        "SSCLOUD_MAX_BYTES": "999",
        "SSCLOUD_DEVICE": "cuda:1",
        "SSCLOUD_PRECISION": "fp32",
        "SSCLOUD_DECODE": "draft",
        "SSCLOUD_BACKEND": "openvino",
        "SSCLOUD_MODELS": "/srv/served",
        "SSCLOUD_POLL": "2.5",
    }
    assert given.keys() == NAMES
    assert Settings.from_environment(given) == Settings(
        min_area=7,
        max_regions=50,
        shapes="polygon",
        tolerance=1.5,
        budget=2_500_000,
        max_pixels=1_000_000,
        max_bytes=999,
        device="cuda:1",
        precision="fp32",
        decode="draft",
        backend="openvino",
        models=Path("/srv/served"),
        poll=2.5,
    )


def test_what_is_given_goes_into_the_log() -> None:
    given = read(SSCLOUD_MODELS="/srv/served", SSCLOUD_POLL="1", SSCLOUD_MIN_AREA="7").given()
    assert json.dumps(given) == '{"min_area": 7, "models": "/srv/served"}'


def test_an_empty_value_is_none() -> None:
    assert Settings.from_environment(dict.fromkeys(NAMES, "")) == Settings()


@pytest.mark.parametrize("name", ["SSCLOUD_MIN_AREA", "SSCLOUD_MAX_REGIONS", "SSCLOUD_MAX_PIXELS", "SSCLOUD_MAX_BYTES"])
@pytest.mark.parametrize("value", ["0", "-1", "1.5", "many", " 1", "٣", "1" * 5000])
def test_no_whole_number(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{name} is .{{1,50}}\. Set a whole number from 1 to \d+, or leave it out"):
        read(**{name: value})


def test_more_pixels_than_can_be_decoded() -> None:
    assert read(SSCLOUD_MAX_PIXELS="178956970").max_pixels == 178_956_970
    with pytest.raises(ConfigError, match=r"SSCLOUD_MAX_PIXELS is '178956971'. Set a whole number from 1 to 178956970"):
        read(SSCLOUD_MAX_PIXELS="178956971")


@pytest.mark.parametrize("value", ["-1", "-0.5", "nan", "inf", "1e3", "1,5", ".5", "½", "٣", "1" * 5000])
def test_no_number(value: str) -> None:
    for name, least in (("SSCLOUD_TOLERANCE", "from 0"), ("SSCLOUD_BUDGET", "above 0"), ("SSCLOUD_POLL", "above 0")):
        with pytest.raises(ConfigError, match=rf"^{name} is .{{1,50}}\. Set a number {least} such as 1\.5"):
            read(**{name: value})


def test_zero_is_a_tolerance_but_no_budget() -> None:
    assert read(SSCLOUD_TOLERANCE="0").tolerance == 0
    with pytest.raises(ConfigError, match=r"SSCLOUD_BUDGET is '0\.0'\. Set a number above 0"):
        read(SSCLOUD_BUDGET="0.0")


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        ("SSCLOUD_SHAPES", "mask, polygon"),
        ("SSCLOUD_PRECISION", "auto, fp32, bf16, fp16, int8"),
        ("SSCLOUD_DECODE", "full, draft"),
        ("SSCLOUD_BACKEND", "torch, openvino"),
    ],
)
def test_no_choice(name: str, choices: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{name} is 'Mask'\. Set one of {choices}, or leave it out\.$"):
        read(**{name: "Mask"})


@pytest.mark.parametrize("name", ["SSCLOUD_MINAREA", "SSCLOUD_min_area", "SSCLOUD_"])
def test_a_mistyped_name(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{name} is no setting of this function\. .*SSCLOUD_MIN_AREA, "):
        read(**{name: ""})


@pytest.mark.parametrize(
    "template", sorted(Path(serverless.__file__).parent.glob("*.yaml")), ids=lambda path: path.name
)
def test_the_yaml_tells_of_every_setting(template: Path) -> None:
    text = template.read_text(encoding="utf-8")
    assert set(re.findall(r"^  #   (SSCLOUD_[A-Z_]+) ", text, re.MULTILINE)) == NAMES
    trigger = yaml.safe_load(text)["spec"]["triggers"]["myHttpTrigger"]
    assert trigger["attributes"]["maxRequestBodySize"] == Settings().max_bytes
