"""Paths as a user writes them in an experiment file, made absolute, so that they mean the same from another folder."""

from __future__ import annotations

import os
from pathlib import Path

from lazypipe.stages.data.source_files import looks_like_a_path


def absolute(path: str) -> str:
    """`path` below the working directory, `~` expanded; globs and symbolic links stay as they are, and so does ''."""
    if not path:
        return path  # its Config refuses it; as a path it would be the working directory
    return os.path.abspath(os.path.expanduser(path))  # noqa: PTH100, PTH111  (keeps globs and symbolic links as they are)


def absolute_directory(name: str) -> str:
    """A hub name that is a local directory or can only be a path, made absolute; any other as it is.

    Whether there is such a directory is asked when planning, for it may be on the cluster only.
    """
    path = absolute(name)
    return path if looks_like_a_path(name) or (name and Path(path).is_dir()) else name
