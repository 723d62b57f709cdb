"""What stands at a position is the same for any processes and workers, after any kill: keys, captions and pixels."""

import hashlib
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from few_samples import batches, picture
from hypothesis import given, settings
from hypothesis import strategies as st

from softmoe_clip.data_pipelines.images import decode_rgb
from softmoe_clip.data_pipelines.shard_writer import ShardWriter
from softmoe_clip.data_pipelines.tar_index import ShardSet
from softmoe_clip.data_pipelines.transforms import Augment, draw_crop


@pytest.fixture(scope="module")
def two_sources(tmp_path_factory):
    """Seventeen shards in two sources, read in windows of two; with what stands at the first 400 positions."""
    out = tmp_path_factory.mktemp("sources")
    for name, numbers in (("a", range(33)), ("b", range(33, 50))):
        with ShardWriter(out / name, shard_size=3) as writer:
            for number in numbers:
                image = b"bad" if number % 11 == 4 else picture(number)
                writer.add(image, "jpg", [f"{number}{letter}" for letter in "abc"])
    both = ShardSet.joined([ShardSet.open(str(out / name)) for name in "ab"], [2.0, 1.0])
    return both, at_each_position(batches(both, window=2, batch_size=1, num_batches=400))


def at_each_position(found):
    """Everything that batches hold, by position: key, caption, token ids, pixels, and what was replaced."""
    rows = {}
    for batch in found:
        replaced = {entry.position: [] for entry in batch.replaced}
        for entry in batch.replaced:
            replaced[entry.position].append(entry)
        for row, position in enumerate(batch.positions):
            assert position not in rows
            pixels = batch.images[row].numpy().tobytes()
            about = batch.keys[row], batch.captions[row], batch.token_ids[row].tolist(), replaced.get(position, [])
            rows[position] = (pixels, *about)
    return rows


@settings(deadline=None, max_examples=4)
@given(
    start=st.integers(0, 200),
    per_process=st.integers(1, 4),
    stages=st.lists(
        st.tuples(st.sampled_from([1, 2, 4]), st.sampled_from([0, 0, 0, 1, 4]), st.integers(1, 4)),
        min_size=1,
        max_size=3,
    ),
)
def test_each_position_is_the_same_for_any_number_of_processes_and_workers_even_if_it_changes(
    two_sources, start, per_process, stages
):
    """Each stage goes on where the one before stopped, on other processes: as after 2 became 1."""
    shards, expected = two_sources
    batch_size, position = 4 * per_process, start
    for world_size, num_workers, num_batches in stages:
        options = {"window": 2, "batch_size": batch_size, "num_batches": num_batches, "num_workers": num_workers}
        found = {}
        for rank in range(world_size):
            part = batches(shards, start=position, rank=rank, world_size=world_size, **options)
            rows = at_each_position(part)
            assert not found.keys() & rows.keys()
            found |= rows
        end = position + batch_size * num_batches
        assert found == {p: expected[p] for p in range(position, end)}
        position = end


def test_pixels_are_cropped_and_mirrored_by_draws_of_the_position_alone(two_sources):
    """The boxes themselves, not only what they cut out; and both kinds of mirrors, so that nothing is compared idly."""
    shards, _ = two_sources
    boxes = {}
    for world_size, num_workers in ((1, 0), (2, 1), (4, 0)):
        for rank in range(world_size):
            found = batches(
                shards, picture=Boxes(), window=2, rank=rank, world_size=world_size, num_workers=num_workers
            )
            for batch in found:
                for position, box in zip(batch.positions, batch.images.tolist(), strict=True):
                    assert boxes.setdefault(position, box) == box
    assert sorted(boxes) == list(range(80))
    assert len({tuple(box) for box in boxes.values()}) > 70
    assert 20 < sum(box[4] for box in boxes.values()) < 60


class Boxes:
    """Instead of pixels, where they are cut out."""

    def __call__(self, data, sample, rng):
        return torch.tensor(draw_crop(*decode_rgb(data).size, 224, Augment(flip=True), rng))


SHOW = """
import hashlib, sys
sys.path.insert(0, {tests!r})
from test_loader_positions import ShardSet, at_each_position, batches
folders, start, rank, world_size, num_workers = sys.argv[1:]
both = ShardSet.joined([ShardSet.open(folder) for folder in folders.split("::")], [2.0, 1.0])
options = dict(start=int(start), rank=int(rank), world_size=int(world_size), num_workers=int(num_workers))
for batch in batches(both, window=2, num_batches=(400 - int(start)) // 8, **options):
    for position, row in at_each_position([batch]).items():
        print(position, hashlib.sha256(repr(row).encode()).hexdigest(), flush=True)
"""


@pytest.mark.slow
def test_kill_9_at_any_moment_and_fewer_processes_afterwards_change_nothing(two_sources, tmp_path):
    """Two processes of two workers each are killed, one process goes on from the last global batch that both gave."""
    shards, expected = two_sources
    hashes = {p: hashlib.sha256(repr(row).encode()).hexdigest() for p, row in expected.items()}
    folders = "::".join(sorted({str(Path(url).parent) for url in shards.urls}))
    command = [sys.executable, "-c", SHOW.format(tests=str(Path(__file__).parent)), folders]
    found, start, moments = {}, 0, random.Random(0)
    while start < 400:
        world_size = 2 if start == 0 else 1
        files = [tmp_path / f"{start}_{rank}" for rank in range(world_size)]
        children = []
        for rank, file in enumerate(files):
            with open(file, "w") as out:
                line = [*command, str(start), str(rank), str(world_size), "2"]
                children.append(subprocess.Popen(line, stdout=out))
        enough = moments.randrange(40, 120)
        while any(child.poll() is None for child in children):
            if start < 200 and all(file.read_text().count("\n") >= enough for file in files):
                for child in children:
                    child.kill()
            time.sleep(0.01)
        lines = [line.partition(" ") for file in files for line in file.read_text().splitlines()]
        rows = {int(position): digest for position, _, digest in lines if len(digest) == 64}  # not the one cut short
        whole = 0
        while start + 8 * (whole + 1) <= 400 and all(start + 8 * whole + row in rows for row in range(8)):
            whole += 1
        assert whole, "a process did nothing"
        found |= {position: digest for position, digest in rows.items() if position < start + 8 * whole}
        start += 8 * whole
    assert found == hashes
