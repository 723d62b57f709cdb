"""check tells of tars that webdataset, and so open_clip, makes other samples of than we do."""

import pytest
import webdataset
from picture_shards import png
from tars import write_tar

from softmoe_clip.data_pipelines.check import check
from softmoe_clip.data_pipelines.clean import write_clean

MEMBERS = sorted(("__key__", "__url__", "__local_path__", "png", "txt"))


# webdataset leaves its files open
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("order", "num_samples", "reason"),
    [
        (("a.png", "a.txt", "b.png", "b.txt", "c.png", "c.txt"), 3, None),
        (("a.png", "a.txt", "b.png", "c.png", "c.txt", "b.txt"), 3, "1 of its 3 samples lie there not side by side"),
        (("a.png", "b.png", "c.png", "c.txt", "b.txt", "a.txt"), 3, "2 of its 3 samples lie there not side by side"),
        (("x.a.png", "x.a.txt", "x.b.png", "x.b.txt"), 2, "2 of its 2 samples lie there with dots in the key"),
        (("v1.0/a.png", "v1.0/a.txt", "v1.0/b.png", "README", "v1.0/b.txt"), 2, None),
    ],
)
def test_a_tar_is_told_of_where_webdataset_makes_other_samples(tmp_path, order, num_samples, reason):
    members = [(name, png(ord(name[-5])) if name.endswith("png") else f"of {name}".encode()) for name in order]
    tar = write_tar(tmp_path / "in/0.tar", members)
    theirs = [sorted(sample) for sample in webdataset.WebDataset(str(tar), shardshuffle=False)]
    assert (theirs == [MEMBERS] * num_samples) == (reason is None)
    report = check(str(tmp_path / "in"))
    assert [(f["severity"], f["kind"]) for f in report.findings] == [("warning", "read otherwise")] * bool(reason)
    assert all(reason in finding["reason"] for finding in report.findings)
    assert write_clean(report, tmp_path / "out").num_written == num_samples
    assert check(str(tmp_path / "out")).findings == []
