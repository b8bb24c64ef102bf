"""Links that lead out of a bundle's folder, as the Hugging Face cache lays files out: ``snapshots/<commit>/graphs/x``
is a link to ``blobs/<digest>``. Those are followed whose digest is compared, since whoever wrote it knew the content
(:meth:`.StoredFile.opened`). Here is what libraries need that open files by their names.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from ..errors import BundleError
from ..files import sha256
from .graph_file import GraphFile, stamp


@contextmanager
def plain_files(graph: GraphFile) -> Iterator[GraphFile]:
    """The graph for libraries that open a data file by its name and refuse one behind a link: both its files side by
    side, in a folder that goes with the context. The graph itself where no link leads out.

    Raises:
        BundleError: the data file was changed since it was compared.
        OSError: there is no room for it where it cannot be linked to.
    """
    if not graph.linked:
        yield graph
        return
    (_, (listed, _, digest)) = graph.stamps
    source = listed.resolve()
    with _folder_beside(source) as folder:
        model, data = folder / graph.path.name, folder / listed.name
        model.write_bytes(graph.model)
        try:
            os.link(source, data)
        except OSError:  # another file system, or one without links
            shutil.copyfile(source, data)
        before = stamp(os.stat(data))
        if sha256(data) != digest:
            raise BundleError(f"{listed} was changed while the bundle was being opened; try again")
        yield replace(graph, path=model, stamps=((data, before, digest),), linked=False)


@contextmanager
def _folder_beside(file: Path) -> Iterator[Path]:
    """On the file system of ``file``, if this process may write there: a link takes no room."""
    options = {"prefix": ".gtr-", "ignore_cleanup_errors": True}  # a file that is mapped cannot go on every system
    try:
        made = tempfile.TemporaryDirectory(dir=file.parent, **options)
    except OSError:
        made = tempfile.TemporaryDirectory(**options)
    with made as folder:
        yield Path(folder)
