"""The tar index under attack: cut, overwritten and forged tars never crash or hang it, or make it read elsewhere."""

import io
import random
import tarfile
import tempfile
import time
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from softmoe_clip.data_pipelines.check import check
from softmoe_clip.data_pipelines.tar_index import ShardSet
from softmoe_clip.data_pipelines.tar_samples import index_or_reason
from softmoe_clip.data_pipelines.tar_walk import BLOCK

MAX_SECONDS = 2  # a hang; an example takes about a millisecond
FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
KINDS = b"\001234567KLxgSVDXA\xff"
# What a size field can say: plain, huge, negative, and the two forms of base-256.
SIZES = (
    *(b"00000000000\0", b"00000001000\0", b"77777777777\0", b"-0000000100\0", b"           \0", b"0x100000000"),
    *(b"\x80" + n.to_bytes(11) for n in (0, 512, 2**40, 2**63, 2**64 - 512, 2**87)),
    *(b"\xff" + (-n % 2**88).to_bytes(11) for n in (1, 512, 1024, 1536, 10**6)),
)
PAX = (
    *(b"12 size=123\n", b"22 path=folder/a.jpg\n", b"13 size=-512\n", b"12 size=abc\n", b"99999999999999 path=a\n"),
    *(b"21 GNU.sparse.size=1\n", b"23 GNU.sparse.map=0,5\n", b"25 GNU.sparse.major=1.0\n0\n", b"16 size=1e300\n\n\n"),
    *(b"0 path=\n", b"x" * 40),
)
BOUNDED = settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))


class Tar(bytes):
    """Bytes that hypothesis does not print."""

    def __repr__(self) -> str:
        return f"{len(self)} bytes"


def small_tar(format: int, seed: int) -> bytes:
    rng = random.Random(seed)
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as tar:
        for key in range(3):
            folder = "é" * 60 + "/" + "long" * 30 + "/" if format != tarfile.USTAR_FORMAT and key == 1 else ""
            for extension in ("jpg", "txt"):
                info = tarfile.TarInfo(f"{folder}{key}.{extension}")
                info.size = rng.choice([0, 1, 511, 512, 513, 1500])
                info.mtime = rng.choice([0, 1.5])
                tar.addfile(info, io.BytesIO(rng.randbytes(info.size)))
    return file.getvalue()


def with_checksum(header: bytes) -> bytes:
    header = bytearray(header)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


@st.composite
def forged_tars(draw) -> bytes:
    """A good tar of any format in which headers say something else, with checksums that hold."""
    data = bytearray(small_tar(draw(st.sampled_from(FORMATS)), draw(st.integers(0, 3))))
    for _ in range(draw(st.integers(1, 3))):
        place = BLOCK * draw(st.integers(0, len(data) // BLOCK - 1))
        header = bytearray(data[place : place + BLOCK])
        what = draw(st.sampled_from(["size", "kind", "name", "pax", "bytes"]))
        if what == "size":
            header[124:136] = draw(st.sampled_from(SIZES)).ljust(12, b"\0")[:12]
        elif what == "kind":
            header[156] = draw(st.sampled_from(KINDS))
        elif what == "name":
            header[0:100] = draw(st.binary(max_size=100)).ljust(100, b"\0")
        elif what == "pax":
            text = draw(st.sampled_from(PAX))
            header[156], header[124:136] = ord(draw(st.sampled_from("xgL"))), b"%011o\0" % len(text)
            data[place + BLOCK : place + BLOCK + len(text)] = text
        else:
            start = draw(st.integers(0, BLOCK - 1))
            noise = draw(st.binary(min_size=1, max_size=40))[: BLOCK - start]
            header[start : start + len(noise)] = noise
        data[place : place + BLOCK] = with_checksum(header)
    return Tar(data)


@st.composite
def spoilt_tars(draw) -> bytes:
    """A good tar that was cut, overwritten, doubled, or had bytes put in or taken out."""
    data = bytearray(small_tar(draw(st.sampled_from(FORMATS)), draw(st.integers(0, 3))))
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(data)))
        match draw(st.sampled_from(["cut", "write", "insert", "remove", "double"])):
            case "cut":
                del data[place:]
            case "write":
                noise = draw(st.binary(max_size=600))
                data[place : place + len(noise)] = noise
            case "insert":
                data[place:place] = draw(st.binary(max_size=600))
            case "remove":
                del data[place : place + draw(st.integers(1, 1024))]
            case "double":
                data += data[place:][:20_000]
    return Tar(data)


def hold_promises(data: bytes) -> None:
    """A ValueError with the reason, or an index whose samples are bytes of the file, and reading gives these."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "0.tar"
        path.write_bytes(data)
        start = time.monotonic()
        part = index_or_reason(str(path))
        assert time.monotonic() - start < MAX_SECONDS
        if isinstance(part, str):
            return
        assert part.starts[0] == 0
        assert part.starts[-1] == len(part.extensions) == len(part.offsets) == len(part.sizes)
        assert (part.starts[1:] > part.starts[:-1]).all()
        assert (part.sizes >= 0).all()
        assert (part.offsets >= BLOCK).all()
        assert (part.offsets + part.sizes <= len(data)).all()
        assert all(problem.startswith("0.tar: ") for problem in part.problems)
        if not part.keys:
            return
        shards = ShardSet.open(folder)
        for index in range(len(shards)):
            members = range(part.starts[index], part.starts[index + 1])
            assert shards.read(index).members == {
                part.extensions[m]: data[part.offsets[m] : part.offsets[m] + part.sizes[m]] for m in members
            }


@given(spoilt_tars())
@BOUNDED
def test_spoilt_tars_are_read_or_refused(data):
    hold_promises(data)


@given(forged_tars())
@BOUNDED
def test_forged_headers_are_read_or_refused(data):
    hold_promises(data)


@given(st.binary(max_size=3000))
@settings(BOUNDED, max_examples=60)
def test_any_bytes_are_read_or_refused(data):
    hold_promises(data)


@given(st.one_of(spoilt_tars(), forged_tars()))
@settings(BOUNDED, max_examples=40)
def test_check_reads_whatever_it_is_given(data):
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "0.tar").write_bytes(data)
        report = check(folder, jobs=1)
        assert report.num_samples == sum(count.num_samples for count in report.counts)
        assert sum(count.num_good for count in report.counts) == 0, "nothing in it is a picture"
        if data != small_tar(tarfile.USTAR_FORMAT, 0):
            assert report.findings
