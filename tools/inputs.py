"""The images that a command is given: files, and folders of them."""

from collections.abc import Sequence
from pathlib import Path

from sscloud.errors import ConfigError
from sscloud.image import SUFFIXES


def list_images(paths: Sequence[Path]) -> list[Path]:
    """Images as given, folders replaced by the images in them (hidden files left out), sorted by name.

    Raises:
        ConfigError: a path does not exist, or a folder holds no image.
    """
    images: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(
                file
                for file in path.iterdir()
                if file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and file.is_file()
            )
            if not inside:
                raise ConfigError(f"The folder {path} holds no images ({', '.join(sorted(SUFFIXES))}).")
            images += inside
        elif path.is_file():
            images.append(path)
        else:
            raise ConfigError(f"There is no image or folder {path}. Check the path.")
    return images
