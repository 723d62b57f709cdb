"""From raw members to a pair, or to a reason."""

import pickle

import pytest

from softmoe_clip.data_pipelines.samples import BadSample, Pair, read_pair
from softmoe_clip.data_pipelines.tar_index import RawSample


def raw(**members: bytes) -> RawSample:
    return RawSample("000000007", "00000.tar", members)


@pytest.mark.parametrize(
    ("members", "captions", "label"),
    [
        ({"jpg": b"p", "txt": b"a dog\n\n  a cat \r\n"}, ("a dog", "a cat"), None),
        ({"png": b"p", "json": b'{"captions": ["a", "", null, "b"]}'}, ("a", "b"), None),
        ({"webp": b"p", "txt": b" \n", "json": b'{"caption": "a"}'}, ("a",), None),
        ({"jpeg": b"p", "txt": "\ufeffça va 猫".encode()}, ("ça va 猫",), None),
        ({"jpg": b"p", "cls": b"12\n"}, (), 12),
        ({"jpg": b"p", "txt": b"a", "cls": b"0"}, ("a",), 0),
    ],
)
def test_captions_and_labels_are_read(members, captions, label):
    assert read_pair(raw(**members)) == Pair("000000007", "00000.tar", b"p", captions, label)


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"txt": b"a dog"}, "no picture"),
        ({"jpg": b"p"}, "no caption"),
        ({"jpg": b"p", "txt": b" \n "}, "no caption"),
        ({"jpg": b"p", "json": b'{"caption": null}'}, "no caption"),
        ({"jpg": b"p", "json": b"[1]"}, "no caption"),
        ({"jpg": b"p", "txt": b"\xff\xfe\x00"}, "not UTF-8"),
        ({"jpg": b"p", "json": b'{"caption": '}, "json is damaged"),
        ({"jpg": b"p", "json": b"[" * 100_000}, "json is damaged"),
        ({"jpg": b"p", "cls": b"dog"}, "whole number"),
    ],
)
def test_bad_samples_say_which_and_why(members, reason):
    with pytest.raises(BadSample, match=reason) as caught:
        read_pair(raw(**members))
    assert (caught.value.key, caught.value.shard) == ("000000007", "00000.tar")
    assert str(caught.value).startswith("000000007 in 00000.tar: ")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
