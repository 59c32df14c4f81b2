"""The compiled module and the C++ library beside it."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from frspec import _core


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm (binutils) is not installed")
def test_the_module_exports_nothing_of_the_libraries_in_it() -> None:
    """A libstdc++ that is linked statically would be mixed with that of other modules: numbers in
    error texts went missing, and streams crashed."""
    listed = subprocess.run(
        ["nm", "--dynamic", "--defined-only", "--demangle", _core.__file__],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    names = [line.split(maxsplit=2)[2] for line in listed.stdout.splitlines()]
    assert "PyInit__core" in names
    kinds = {line.split(maxsplit=2)[1] for line in listed.stdout.splitlines()}
    assert "u" not in kinds, "unique symbols are one for the whole process"
    assert not [name for name in names if name.startswith(("frspec::", "nlohmann::"))]
