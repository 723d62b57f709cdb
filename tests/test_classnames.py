"""Class names: found beside the shards or above them, and never fewer than the labels need."""

import numpy as np
import pytest

from softmoe_clip.eval.classnames import check_classes, find_classnames


@pytest.mark.parametrize("where", ["test", "."])
@pytest.mark.parametrize("data", ["test", "test/{0..3}.tar", "test/0.tar::other/1.tar"])
def test_classnames_are_found_with_the_shards_or_above_them(tmp_path, where, data):
    (tmp_path / "test").mkdir()
    (tmp_path / where / "classnames.txt").write_text("cat\nred dog\n\n")
    assert find_classnames(f"{tmp_path}/{data}", None) == ["cat", "red dog"]


def test_a_given_list_or_file_comes_first(tmp_path):
    (tmp_path / "names.txt").write_text("owl\n")
    (tmp_path / "classnames.txt").write_text("cat\n")
    assert find_classnames(str(tmp_path), str(tmp_path / "names.txt")) == ["owl"]
    assert find_classnames(str(tmp_path), ["a", "b"]) == ["a", "b"]


def test_a_byte_order_mark_is_no_part_of_the_first_name(tmp_path):
    (tmp_path / "classnames.txt").write_text("cät\nred dog\n", "utf-8-sig")
    assert find_classnames(str(tmp_path), None) == ["cät", "red dog"]


def test_the_names_of_imagenet_come_from_open_clip():
    names = find_classnames("anywhere", "imagenet")
    assert len(names) == 1000
    assert names[0] == "tench"


def test_missing_and_broken_lists_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"no classnames\.txt"):
        find_classnames(str(tmp_path), None)
    (tmp_path / "classnames.txt").write_text("cat\n\ndog\n")
    with pytest.raises(ValueError, match=r"line 2 of .*classnames\.txt is empty"):
        find_classnames(str(tmp_path), None)
    (tmp_path / "classnames.txt").write_bytes(b"c\xe4t\n")
    with pytest.raises(ValueError, match=r"classnames\.txt is not UTF-8"):
        find_classnames(str(tmp_path), None)
    (tmp_path / "classnames.txt").write_text("\n")
    with pytest.raises(ValueError, match="holds no class names"):
        find_classnames(str(tmp_path), None)


@pytest.mark.parametrize("blank", ["", " "])
def test_an_empty_name_in_a_given_list_is_refused(blank):
    with pytest.raises(ValueError, match="name 3 of the 4 classnames is empty: every class needs a name"):
        find_classnames("anywhere", ["x", "y", blank, "z"])


def test_labels_beyond_the_list_are_refused():
    check_classes(3, np.array([0, 2]))
    with pytest.raises(ValueError, match="label 3 has no name: the class list has 3 names"):
        check_classes(3, np.array([0, 3]))
    with pytest.raises(ValueError, match="label -1 is negative"):
        check_classes(3, np.array([0, -1]))
