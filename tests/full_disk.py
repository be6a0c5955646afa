"""A disk that is full when a certain file is to take its name, as `rat_jax.files` gives names."""

import errno
import os
import pathlib

import pytest


def fill_disk(patch: pytest.MonkeyPatch, name: str) -> None:
    """Has the system refuse files of that name."""
    replace = os.replace

    def refuse_or_replace(old, new):
        if pathlib.Path(new).name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(new))
        replace(old, new)

    patch.setattr(os, "replace", refuse_or_replace)
