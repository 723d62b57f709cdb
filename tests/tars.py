"""Tars of any members, written by hand."""

import io
import tarfile


def write_tar(path, members, format=tarfile.USTAR_FORMAT, mtime=0):
    """Write pairs of a name and its bytes; return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), mtime
            tar.addfile(info, io.BytesIO(data))
    return path
