"""Files and folders that are complete or absent: renamed only when they are on the disk, and no leftovers."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from zebra import files
from zebra.errors import ZebraError
from zebra.files import append_lines, atomic_directory, atomic_file, atomic_write, check_writable, is_vacant, sync


def write_directory(target: Path) -> None:
    with atomic_directory(target) as partial:
        (partial / "deep").mkdir()
        (partial / "deep" / "weights").write_text("new")


def write_file(target: Path) -> None:
    atomic_write(target, "new")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("write", [write_file, write_directory])
def test_what_is_renamed_is_on_the_disk_and_so_is_its_new_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], None]
) -> None:
    events: list[tuple[int, int] | str] = []
    fsync, replace = os.fsync, os.replace

    def record_sync(descriptor: int) -> None:
        events.append((os.fstat(descriptor).st_dev, os.fstat(descriptor).st_ino))
        fsync(descriptor)

    def record_rename(source: Path, target: Path) -> None:
        events.append("rename")
        replace(source, target)

    monkeypatch.setattr(files.os, "fsync", record_sync)
    monkeypatch.setattr(files.os, "replace", record_rename)
    target = tmp_path / "new folder" / "target"
    write(target)

    def inodes(*paths: Path) -> set[tuple[int, int]]:
        return {(path.stat().st_dev, path.stat().st_ino) for path in paths}

    renamed = events.index("rename")
    assert inodes(target, *target.rglob("*")) <= {*events[:renamed]}
    assert inodes(target.parent) <= {*events[renamed:]}
    assert inodes(tmp_path) <= {*events}  # the entry of the new folder


KILLED = """
import os, sys
from pathlib import Path
from zebra.files import atomic_directory, atomic_file
with (atomic_directory if sys.argv[1] == "write_directory" else atomic_file)(sys.argv[2]) as partial:
    (partial / "half" if partial.is_dir() else partial).write_text("half")
    print(partial, flush=True)
    if sys.argv[3] == "killed":
        os.kill(os.getpid(), 9)
    sys.stdin.read()
"""


@pytest.mark.parametrize("write", [write_file, write_directory])
def test_the_next_writer_removes_what_killed_ones_left_and_not_what_is_being_written(
    tmp_path: Path, write: Callable[[Path], None]
) -> None:
    target = tmp_path / "a[b].json"
    command = [sys.executable, "-c", KILLED, write.__name__, str(target)]
    killed = subprocess.run([*command, "killed"], stdout=subprocess.PIPE, text=True)
    left = Path(killed.stdout.strip())
    assert left.exists()
    with subprocess.Popen([*command, "waits"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        live = Path(other.stdout.readline().strip())
        assert not left.exists()  # the other one was a writer too
        (tmp_path / ".a[b].json.notes.partial").write_text("of the user")
        write(target)
        assert live.exists()
        assert names(tmp_path) == sorted([".a[b].json.notes.partial", live.name, target.name])
        other.kill()
    write(tmp_path / "c")
    assert live.exists()  # of another target
    if write is write_directory:
        (target / "deep" / "weights").unlink()
        (target / "deep").rmdir()
    write(target)
    assert not live.exists()


def test_errors_name_the_target(tmp_path: Path) -> None:
    for kind in (atomic_file, atomic_directory):
        with pytest.raises(OSError, match=f"{tmp_path}/target") as raised, kind(tmp_path / "target") as partial:
            raise OSError(errno.ENOSPC, "full", str(partial / "x"))
        with (
            pytest.raises(ZebraError, match=f"^{tmp_path}/target is bad") as raised,
            kind(tmp_path / "target") as partial,
        ):
            raise ZebraError(f"{partial} is bad")
        assert ".target." not in str(raised.value)
    assert not names(tmp_path)


def test_a_target_that_appears_meanwhile_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ZebraError, match=r"target exists already"), atomic_directory(tmp_path / "target"):
        write_directory(tmp_path / "target")


def test_a_link_to_a_folder_is_that_folder(tmp_path: Path) -> None:
    """A link to another disk: the final rename used to fail after all the work, as a folder cannot replace a link."""
    (tmp_path / "empty").mkdir()
    for name in ("empty", "absent"):
        (tmp_path / f"link-{name}").symlink_to(name)
        write_directory(tmp_path / f"link-{name}")
        assert (tmp_path / f"link-{name}").is_symlink()
        assert names(tmp_path / name) == names(tmp_path / f"link-{name}") != []
        with pytest.raises(ZebraError, match="exists already"):
            write_directory(tmp_path / f"link-{name}")


def test_a_folder_or_a_device_is_no_file(tmp_path: Path) -> None:
    device = os.stat("/dev/null")
    for path in (tmp_path, "/dev/null"):
        for write in (lambda path: atomic_write(path, ""), lambda path: append_lines(path, ""), check_writable):
            with pytest.raises(ZebraError, match="is a folder, a device or a pipe"):
                write(path)
    assert os.stat("/dev/null").st_rdev == device.st_rdev


def test_lines_are_appended_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "lines"
    append_lines(path, "one\n")
    append_lines(path, "two\ntor")
    append_lines(path, "three\n")
    assert path.read_text() == "one\ntwo\ntor\nthree\n"

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="full"):
        append_lines(path, "four\n")
    assert path.read_text() == "one\ntwo\ntor\nthree\n"


def test_what_cannot_be_written_is_refused_and_the_check_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    check_writable(tmp_path / "a" / "b")
    check_writable(tmp_path / "file")
    assert names(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "old"
    for path in (tmp_path / "file" / "a", Path("/proc/a"), tmp_path / ("a" * 300)):
        with pytest.raises(ZebraError, match=r"cannot be written: .* Name another file"):
            check_writable(path)


def test_what_a_killed_writer_left_occupies_no_folder(tmp_path: Path) -> None:
    """A selection killed in its first write could not be started again."""
    assert is_vacant(tmp_path / "absent")
    (tmp_path / ".inputs.json.01234567.partial").write_text("half")
    assert is_vacant(tmp_path)
    (tmp_path / "notes").write_text("")
    assert not is_vacant(tmp_path)
    assert not is_vacant(tmp_path / "notes")


def test_only_a_folder_may_not_be_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(number: int) -> Callable[[int], None]:
        def fsync(_: int) -> None:
            raise OSError(number, os.strerror(number))

        return fsync

    monkeypatch.setattr(files.os, "fsync", failing(errno.EINVAL))
    sync(tmp_path)
    monkeypatch.setattr(files.os, "fsync", failing(errno.EIO))
    with pytest.raises(OSError, match="Input/output"):
        sync(tmp_path)
