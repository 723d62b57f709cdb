"""Which files beside the data a run is made of, and whether they still say the same."""

import hashlib
from pathlib import Path

from softmoe_clip.config import TrainConfig, find_config

# What of a folder is its tokenizer: ours, and all that transformers may call so. A model folder holds weights as well.
TOKENIZER_FILES = ("softmoe_tokenizer", "tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "spiece")
TOKENIZER_FILES += ("sentencepiece",)
# What only gives the first weights is written down, but may change or go: a run goes on from its checkpoint.
ONLY_AT_FIRST = {"init", "model.text_tower"}
# Of larger files so many blocks of a MiB are read, evenly spread, the first and the last among them.
BLOCKS, BLOCK = 64, 1 << 20


def fingerprints(config: TrainConfig) -> dict[str, dict[str, str]]:
    """Return the fingerprint of each file that a config names and a run reads, by setting and by file name."""
    arch = find_config(config.model.arch)
    named = {
        "tokenizer": tokenizer_files(Path(config.tokenizer)),
        "model.arch": files_of(str(arch)),
        "model.text_tower": files_of(config.model.text_tower),
        "init": files_of(config.init),
        "distill.model": files_of(config.distill and config.distill.model),
        "data.image_features": files_of(config.data.image_features),
    }
    return {
        setting: {name: fingerprint(file) for name, file in files.items()} for setting, files in named.items() if files
    }


def tokenizer_files(source: Path) -> dict[str, Path]:
    """Find the files of a tokenizer: a single one, or those of a folder that have to do with it."""
    files = files_of(str(source))
    return {n: file for n, file in files.items() if not source.is_dir() or n.startswith(TOKENIZER_FILES)}


def files_of(source: str | None) -> dict[str, Path]:
    """Find a file, or the files in a folder (of a run: in its model), by name; none where there is no such path."""
    path = Path((source or "").removeprefix("local-dir:"))
    if source is None or not path.is_dir():
        return {path.name: path} if source is not None and path.is_file() else {}
    path = path / "model" if (path / "model").is_dir() else path
    return {file.relative_to(path).as_posix(): file for file in sorted(path.rglob("*")) if file.is_file()}


def fingerprint(file: Path) -> str:
    """Hash size and bytes of a file, of a large one evenly spread blocks; sixteen digits of sha256."""
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    last = max(0, size - BLOCK)
    starts = range(0, size, BLOCK) if size <= BLOCKS * BLOCK else [last * i // (BLOCKS - 1) for i in range(BLOCKS)]
    with file.open("rb") as opened:
        for start in starts:
            opened.seek(start)
            digest.update(opened.read(BLOCK))
    return digest.hexdigest()[:16]


def differences_of(before: dict[str, dict[str, str]], now: dict[str, dict[str, str]]) -> list[str]:
    """Name each file that a resumed run reads and that is not as it was."""
    return [
        f"{setting}, {name}: {files.get(name, 'absent')} then, {now.get(setting, {}).get(name, 'absent')} now"
        for setting, files in before.items()
        if setting not in ONLY_AT_FIRST
        for name in sorted(files.keys() | now.get(setting, {}).keys())
        if files.get(name) != now.get(setting, {}).get(name)
    ]
