"""Every file of the project is written by one function: whole, or as it was."""

import multiprocessing
import os
import stat
import threading

import pytest

from eoi_jax._internal.files import atomic_write, atomic_write_text


def write_many(path, letter):
    for _ in range(50):
        atomic_write_text(path, letter * 50_000)


def test_of_many_writers_one_wins_whole(tmp_path):
    path = tmp_path / "file"
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=write_many, args=(path, letter)) for letter in "ab"]
    writers += [threading.Thread(target=write_many, args=(path, letter)) for letter in "cd"]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        text = path.read_text() if path.exists() else ""
        assert text in ("", *(letter * 50_000 for letter in "abcd"))
    for writer in writers:
        writer.join()
        assert getattr(writer, "exitcode", 0) == 0
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("existed", [False, True])
def test_a_failure_leaves_what_was_there(tmp_path, existed):
    path = tmp_path / "file"
    if existed:
        atomic_write_text(path, "old")

    def fails(partial):
        partial.write_text("half of it")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        atomic_write(path, fails)
    assert [path.read_text() for path in tmp_path.iterdir()] == (["old"] if existed else [])


def test_what_cannot_be_brought_to_the_disk_is_not_there(tmp_path, monkeypatch):
    path = tmp_path / "file"
    atomic_write_text(path, "old")

    def stop(descriptor):
        raise OSError("input/output error")

    monkeypatch.setattr(os, "fsync", stop)
    with pytest.raises(OSError, match="input/output error"):
        atomic_write_text(path, "new")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_a_symbolic_link_stays(tmp_path):
    (tmp_path / "folder").mkdir()
    link, target = tmp_path / "link", tmp_path / "folder" / "target"
    link.symlink_to(target)
    for text in ("first", "second"):  # the target is missing at first
        atomic_write_text(link, text)
        assert link.is_symlink()
        assert target.read_text() == text
    assert os.listdir(tmp_path / "folder") == ["target"]


@pytest.mark.skipif(os.name != "posix", reason="Windows has no umask")
def test_permissions_are_those_of_the_file_or_of_the_umask(tmp_path):
    def mode(path):
        return stat.S_IMODE(path.stat().st_mode)

    def replaces(partial):
        partial.unlink()
        descriptor = os.open(partial, os.O_CREAT | os.O_WRONLY, 0o600)
        os.close(descriptor)

    old = os.umask(0o027)
    try:
        atomic_write(tmp_path / "new", replaces)
        assert mode(tmp_path / "new") == 0o640
        (tmp_path / "new").chmod(0o604)
        atomic_write_text(tmp_path / "new", "again")
        assert mode(tmp_path / "new") == 0o604
    finally:
        os.umask(old)


def test_names_as_long_as_the_file_system_allows(tmp_path):
    path = tmp_path / ("n" * os.pathconf(tmp_path, "PC_NAME_MAX"))
    atomic_write_text(path, "text\r\nwith line ends")
    assert path.read_bytes() == b"text\r\nwith line ends"
