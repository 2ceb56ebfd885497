"""Links among the files of a checkpoint or an engine: followed inside its folder and the hub's cache, nowhere else.

A file of a checkpoint may be copied beside an engine, which is then given to others. A link to something private would
be copied with it, so a link that leads out of the folder is refused. The cache of Hugging Face consists of links::

    models--google--bert/snapshots/1a2b3c/config.json -> ../../blobs/4d5e6f

and these lead to `blobs` of the same repository. What an engine's folder gives is shown to whoever asks it.
"""

from __future__ import annotations

import os
from pathlib import Path

from planish.optimizer.errors import BadInput


def file_in(folder: Path, name: str | Path) -> Path | None:
    """The file ``name`` of a checkpoint's folder, or None if there is none.

    BadInput if it, or a folder on the way to it, is a link to a place outside.
    """
    path = folder / name
    if not path.is_file():
        return None
    if not _stays(path, folder):
        raise _leading_out(path)
    return path


def refuse_links_out(folder: Path, *roots: Path) -> None:
    """BadInput if something below ``folder`` is a link to a place outside of it and of ``roots``.

    The folder itself may be reached through links.
    """
    for place, folders, files in os.walk(folder):
        for path in (Path(place, name) for name in (*folders, *files)):
            if path.is_symlink() and not any(_stays(path, root) for root in (folder, *roots)):
                raise _leading_out(path)


def _stays(path: Path, folder: Path) -> bool:
    """Whether what a path leads to lies in a folder, or where the hub's cache keeps its files."""
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
    """Where the cache keeps the files of the repository that a snapshot's folder belongs to."""
    repositories = [parent.parent for parent in (root, *root.parents) if parent.name == "snapshots"]
    return [path / "blobs" for path in repositories if path.name.startswith(("models--", "datasets--", "spaces--"))]
