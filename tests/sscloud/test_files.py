"""Atomic files and folders: whole or not at all, and nothing left behind."""

import os
from pathlib import Path

import pytest

from sscloud.errors import ConfigError
from sscloud.files import atomic_folder, atomic_write


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


class TestAtomicWrite:
    def test_writes_bytes_and_makes_parents(self, tmp_path: Path) -> None:
        atomic_write(tmp_path / "а" / "б" / "файл.bin", b"\x00\xff")
        assert (tmp_path / "а" / "б" / "файл.bin").read_bytes() == b"\x00\xff"
        assert names(tmp_path / "а" / "б") == {"файл.bin"}

    def test_replaces_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "f").write_bytes(b"a longer old content")
        atomic_write(tmp_path / "f", b"new")
        assert (tmp_path / "f").read_bytes() == b"new"

    @pytest.mark.parametrize("failing", ["fsync", "replace"])
    def test_a_failure_keeps_the_old_file_and_no_temporary_one(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
    ) -> None:
        (tmp_path / "f").write_bytes(b"old")

        def fail(*_: object) -> None:
            raise OSError("No space left on device")

        if failing == "fsync":
            monkeypatch.setattr(os, "fsync", fail)
        else:
            monkeypatch.setattr(Path, "replace", fail)
        with pytest.raises(OSError, match="No space left"):
            atomic_write(tmp_path / "f", b"new")
        assert names(tmp_path) == {"f"}
        assert (tmp_path / "f").read_bytes() == b"old"

    def test_an_interruption_cleans_up_too(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupt(_: int) -> None:
            raise KeyboardInterrupt("stop")

        monkeypatch.setattr(os, "fsync", interrupt)
        with pytest.raises(KeyboardInterrupt, match="stop"):
            atomic_write(tmp_path / "f", b"new")
        assert names(tmp_path) == set()

    def test_permissions_follow_the_umask(self, tmp_path: Path) -> None:
        (tmp_path / "plain").touch()
        atomic_write(tmp_path / "f", b"")
        assert (tmp_path / "f").stat().st_mode == (tmp_path / "plain").stat().st_mode


class TestAtomicFolder:
    def test_takes_its_name_when_the_block_ends_well(self, tmp_path: Path) -> None:
        target = tmp_path / "new" / "folder"
        with atomic_folder(target, marker="old") as folder:
            assert folder.parent == target.parent
            assert not target.exists()
            (folder / "a").write_text("1")
        assert names(target) == {"a"}
        assert names(target.parent) == {"folder"}

    def test_vanishes_on_an_error(self, tmp_path: Path) -> None:
        def write_half(folder: Path) -> None:
            (folder / "a").write_text("1")
            raise RuntimeError("half way")

        with pytest.raises(RuntimeError, match="half way"), atomic_folder(tmp_path / "folder", marker="old") as folder:
            write_half(folder)
        assert names(tmp_path) == set()

    @pytest.mark.parametrize("kind", ["full", "empty", "file"])
    def test_does_not_touch_what_exists(self, tmp_path: Path, kind: str) -> None:
        target = tmp_path / "folder"
        if kind == "file":
            target.write_text("mine")
        else:
            target.mkdir()
            if kind == "full":
                (target / "mine").write_text("mine")
        with (
            pytest.raises(ConfigError, match=r"folder exists already\..*--overwrite"),
            atomic_folder(target, marker="old"),
        ):
            pytest.fail("the block must not run")
        assert names(tmp_path) == {"folder"}
        assert target.is_file() == (kind == "file")

    def test_overwrite_replaces_the_whole_folder(self, tmp_path: Path) -> None:
        target = tmp_path / "folder"
        target.mkdir()
        (target / "old").write_text("1")
        with atomic_folder(target, marker="old", overwrite=True) as folder:
            (folder / "new").write_text("2")
            assert names(target) == {"old"}
        assert names(target) == {"new"}
        assert names(tmp_path) == {"folder"}

    def test_a_failed_overwrite_keeps_the_old_folder(self, tmp_path: Path) -> None:
        target = tmp_path / "folder"
        target.mkdir()
        (target / "old").write_text("1")
        with pytest.raises(RuntimeError, match="half way"), atomic_folder(target, marker="old", overwrite=True):
            raise RuntimeError("half way")
        assert names(target) == {"old"}
        assert names(tmp_path) == {"folder"}

    @pytest.mark.parametrize("kind", ["folder", "file"])
    def test_a_folder_of_another_kind_is_never_replaced(self, tmp_path: Path, kind: str) -> None:
        target = tmp_path / "models"
        if kind == "file":
            target.write_text("mine")
        else:
            (target / "street").mkdir(parents=True)
        with (
            pytest.raises(ConfigError, match=r"models is not replaced: it has no manifest\.json"),
            atomic_folder(target, marker="manifest.json", overwrite=True),
        ):
            pytest.fail("the block must not run")
        assert target.is_file() == (kind == "file")
        assert kind == "file" or names(target) == {"street"}

    def test_a_failed_rename_brings_the_old_folder_back(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        target = tmp_path / "folder"
        target.mkdir()
        (target / "old").write_text("1")
        rename = Path.replace

        def refuse(self: Path, other: Path) -> Path:
            if other == target and "writing" in self.name:
                raise PermissionError("a file is open")
            return rename(self, other)

        monkeypatch.setattr(Path, "replace", refuse)
        with (
            pytest.raises(PermissionError, match="a file is open"),
            atomic_folder(target, marker="old", overwrite=True),
        ):
            pass
        assert names(target) == {"old"}
        assert names(tmp_path) == {"folder"}

    def test_others_may_enter_as_the_umask_says(self, tmp_path: Path) -> None:
        (tmp_path / "plain").mkdir()
        with atomic_folder(tmp_path / "folder", marker="old"):
            pass
        assert (tmp_path / "folder").stat().st_mode == (tmp_path / "plain").stat().st_mode
