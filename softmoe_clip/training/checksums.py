"""Tell a folder whose files are still those that were written: sha256 of each, as `sha256sum -c` reads them."""

import hashlib
from pathlib import Path

CHECKSUMS = "SHA256SUMS"


def write_checksums(folder: Path) -> None:
    """Write the checksums of all files in a folder."""
    lines = [f"{sha256(file)}  {file.name}\n" for file in sorted(folder.iterdir()) if file.name != CHECKSUMS]
    (folder / CHECKSUMS).write_text("".join(lines))


def check_checksums(folder: Path) -> None:
    """Refuse a folder in which a file is missing or has other bytes; one without checksums is from before them."""
    if not (folder / CHECKSUMS).exists():
        return
    lines = (line.partition("  ") for line in (folder / CHECKSUMS).read_text().splitlines())
    digests = {name: digest for digest, _, name in lines}
    files = {file.name: file for file in folder.iterdir() if file.name != CHECKSUMS}
    if other := sorted(files.keys() ^ digests.keys()):
        raise ValueError(f"{other[0]} is not both there and in {CHECKSUMS}")
    for name, file in files.items():
        if sha256(file) != digests[name]:
            raise ValueError(f"{name} has other bytes than {CHECKSUMS} says")


def sha256(file: Path) -> str:
    """Hash a file of any size."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
