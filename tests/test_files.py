"""Every file of the project is written by one function: whole, or as it was."""

import importlib.util
import multiprocessing
import os
import re
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from helpers import refuses
from matplotlib.figure import Figure

from eoi_jax._internal.files import atomic_savefig, atomic_write, atomic_write_text


def write_many(path, letter):
    for _ in range(50):
        atomic_write_text(path, letter * 50_000)


@pytest.mark.slow
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

    def fails(file):
        file.write(b"half of it")
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

    old = os.umask(0o027)
    try:
        for umask, expected in ((0o027, 0o640), (0o022, 0o644), (0o077, 0o600), (0, 0o666)):
            os.umask(umask)
            path = tmp_path / f"{umask:o}"
            atomic_write_text(path, "new")
            assert mode(path) == expected
        for given in (0o604, 0o444, 0o200):
            path.chmod(given)
            atomic_write_text(path, "again")
            assert mode(path) == given
    finally:
        os.umask(old)


def test_names_as_long_as_the_file_system_allows(tmp_path):
    path = tmp_path / ("n" * os.pathconf(tmp_path, "PC_NAME_MAX"))
    atomic_write_text(path, "text\r\nwith line ends")
    assert path.read_bytes() == b"text\r\nwith line ends"


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo], ids=["folder", "pipe"])
def test_only_regular_files_are_replaced(make, tmp_path):
    make(tmp_path / "there")
    kind = stat.S_IFMT((tmp_path / "there").stat().st_mode)
    with refuses("path=", tmp_path / "there", error=OSError):
        atomic_write_text(tmp_path / "there", "text")
    assert stat.S_IFMT((tmp_path / "there").stat().st_mode) == kind
    assert os.listdir(tmp_path) == ["there"]


@pytest.mark.skipif(os.name != "posix", reason="Windows has no such limit")
def test_a_full_disk_is_an_error_and_leaves_no_file(tmp_path):
    import resource

    atomic_write_text(tmp_path / "file", "old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        for size in (1001, 10**6):  # the first is still in the buffer when it is closed
            with pytest.raises(OSError, match="too large"):
                atomic_write_text(tmp_path / "file", "n" * size)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


# Of a process that imports this one module alone.
KILLED = """
import importlib.util, os, pathlib, signal, sys
spec = importlib.util.spec_from_file_location("files", sys.argv[1])
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)

def write(file):
    file.write(b"half of it")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)

files.atomic_write(pathlib.Path(sys.argv[2]), write)
"""


@pytest.mark.skipif(os.name != "posix", reason="Windows has no such locks")
def test_what_killed_writers_have_left_is_removed_and_nothing_else(tmp_path):
    """Not what a living writer of the file has, and not what is left of another file."""
    names = ["a", "b", "n" * os.pathconf(tmp_path, "PC_NAME_MAX")]
    module = importlib.util.find_spec("eoi_jax._internal.files").origin
    for name in names:
        command = [sys.executable, "-c", KILLED, module, tmp_path / name]
        assert subprocess.run(command).returncode == -signal.SIGKILL
    left = set(os.listdir(tmp_path))
    assert len(left) == 3
    (tmp_path / ".other.tmp").touch()

    def write(file):
        """While this one writes, another does and is done."""
        file.write(b"outer")
        atomic_write_text(tmp_path / "a", "inner")
        assert (tmp_path / "a").read_text() == "inner"

    atomic_write(tmp_path / "a", write)
    assert (tmp_path / "a").read_text() == "outer"
    found = set(os.listdir(tmp_path))
    assert len(found & left) == 2
    assert found - left == {"a", ".other.tmp"}
    for name in names[1:]:
        atomic_write_text(tmp_path / name, "text")
    assert set(os.listdir(tmp_path)) == {*names, ".other.tmp"}


def test_figures_have_the_format_of_their_suffix(tmp_path):
    figure = Figure(figsize=(1, 1))
    starts = {"a.png": b"\x89PNG", "a.pdf": b"%PDF", "a.svg": b"<?xml", "a": b"\x89PNG"}
    for name, start in starts.items():
        atomic_savefig(tmp_path / name, figure, dpi=20)
        assert (tmp_path / name).read_bytes().startswith(start)
    assert len(os.listdir(tmp_path)) == 4
    with pytest.raises(ValueError, match="tiger"):
        atomic_savefig(tmp_path / "a.tiger", figure, dpi=20)
    assert len(os.listdir(tmp_path)) == 4


def test_nothing_else_in_the_project_writes_files():
    """Two modules write into files that are open already; a log is opened to be appended to."""
    allowed = {"eoi_jax/_internal/files.py", "experiments/reporting/figures.py"}
    root = Path(__file__).parent.parent
    writes = re.compile(r"""\.savefig\(|\.write_(text|bytes)\(|open\([^)]*["'][wx]b?\+?["']""")
    found = {
        str(path.relative_to(root))
        for folder in ("eoi_jax", "experiments")
        for path in (root / folder).rglob("*.py")
        if writes.search(path.read_text(encoding="utf-8"))
    }
    assert found <= allowed, found - allowed
