"""Links among the files of a checkpoint: followed inside its folder and inside the hub's cache, nowhere else.

A file of a checkpoint may be copied beside an engine, which is then given to others. A link to something private would
be copied with it, so a link that leads out of the folder is refused. The cache of Hugging Face consists of links::

    models--google--bert/snapshots/1a2b3c/config.json -> ../../blobs/4d5e6f

and these lead to `blobs` of the same repository.
"""

from __future__ import annotations

from pathlib import Path

from planish.optimizer.errors import BadInput


def file_in(folder: Path, name: str | Path) -> Path | None:
    """The file ``name`` of a checkpoint's folder, or None if there is none.

    BadInput if it, or a folder on the way to it, is a link to a place outside.
    """
    path = folder / name
    if not path.is_file():
        return None
    root, target = folder.resolve(), path.resolve()
    if target.is_relative_to(root) or any(target.is_relative_to(blobs) for blobs in _blobs(root)):
        return path
    raise BadInput(
        "this is a link to a file outside of the folder, which is not followed",
        where=path,
        advice="put a copy of the file into the folder",
    )


def _blobs(root: Path) -> list[Path]:
    """Where the cache keeps the files of the repository that a snapshot's folder belongs to."""
    repositories = [parent.parent for parent in (root, *root.parents) if parent.name == "snapshots"]
    return [path / "blobs" for path in repositories if path.name.startswith(("models--", "datasets--", "spaces--"))]
