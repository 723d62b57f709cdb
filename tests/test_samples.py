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
        ({"tiff": b"p", "text": b"a"}, ("a",), None),
        ({"gif": b"p", "caption": b"a", "json": b'{"caption": "b"}'}, ("a",), None),
        ({"seg.png": b"n", "jpg": b"p", "json": b'["a", "b"]'}, ("a", "b"), None),
        ({"jpg": b"p", "json": b'{"caption": "", "text": "a", "url": "u"}'}, ("a",), None),
        ({"jpg": b"p", "cls": b"12\n"}, (), 12),
        ({"jpg": b"p", "txt": b"a", "cls": b"0"}, ("a",), 0),
    ],
)
def test_captions_and_labels_are_read(members, captions, label):
    assert read_pair(raw(**members)) == Pair("000000007", "00000.tar", b"p", captions, label)


def test_longer_extensions_of_webdataset_count_where_there_is_no_plain_one():
    members = {"caption.txt": b"a", "photo.jpg": b"p", "captions.json": b'["b"]'}
    assert read_pair(RawSample("k", "0.tar", members)) == Pair("k", "0.tar", b"p", ("a",))
    assert read_pair(RawSample("k", "0.tar", members | {"txt": b"c"})).captions == ("c",)
    assert read_pair(RawSample("k", "0.tar", {"png": b"q", **members})).image == b"q"


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"txt": b"a dog"}, r"no picture .* among its members: only \.txt"),
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
