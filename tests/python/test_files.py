"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import stat

import pytest

from frspec.files import write_whole


def test_a_link_keeps_its_place(tmp_path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_bytes(b"before")
    link.symlink_to(target)
    write_whole(link, b"after")
    assert link.is_symlink() and target.read_bytes() == b"after"


def test_what_is_no_file_is_refused_and_stays(tmp_path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OSError, match="expected a file, found a device or a pipe"):
        write_whole(pipe, b"data")
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    with pytest.raises(OSError, match="is a folder"):
        write_whole(tmp_path, b"data")
    assert os.listdir(tmp_path) == ["pipe"]
