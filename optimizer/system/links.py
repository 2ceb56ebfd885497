"""Symbolic links among the files of a checkpoint or an engine: followed only inside its folder and the hub's cache.

Files of a checkpoint are copied beside an engine, which is published. A link to a private file would publish that file,
so a link out of the folder is refused. The cache of Hugging Face consists of links::

    models--google--bert/snapshots/1a2b3c/config.json -> ../../blobs/4d5e6f

to `blobs` of the same repository, which are accepted.
"""

from __future__ import annotations

import os
from pathlib import Path

from planish.optimizer.errors import BadInput


def file_in(folder: Path, name: str | Path) -> Path | None:
    """The file ``name`` of a checkpoint's folder; None if it does not exist.

    BadInput if the file, or a folder of its path, is a link to a place outside.
    """
    path = folder / name
    if not path.is_file():
        return None
    if not _stays(path, folder):
        raise _leading_out(path)
    return path


def refuse_links_out(folder: Path, *roots: Path) -> None:
    """Raise BadInput if something below ``folder`` is a link to a place outside of it and of ``roots``.

    The folder itself may be a link.
    """
    for place, folders, files in os.walk(folder):
        for path in (Path(place, name) for name in (*folders, *files)):
            if path.is_symlink() and not any(_stays(path, root) for root in (folder, *roots)):
                raise _leading_out(path)


def _stays(path: Path, folder: Path) -> bool:
    """True if the target of a path is in a folder, or in the blobs of the hub's cache for that folder."""
    root, target = (Path(os.path.realpath(one)) for one in (folder, path))  # unlike `resolve`, it bears links in a ring
    return any(target.is_relative_to(place) for place in (root, *_blobs(root)))


def _leading_out(path: Path) -> BadInput:
    kind = "folder" if path.is_dir() else "file"
    return BadInput(
        f"this is a link to a {kind} outside of the folder, which is not followed",
        where=path,
        advice=f"put a copy of the {kind} there",
    )


def _blobs(root: Path) -> list[Path]:
    """The blob folders of the hub's cache for a snapshot folder."""
    repositories = [parent.parent for parent in (root, *root.parents) if parent.name == "snapshots"]
    return [path / "blobs" for path in repositories if path.name.startswith(("models--", "datasets--", "spaces--"))]
