import json
import os

import pytest
from PIL import Image

from softmoe_clip.data_pipelines.sources import NO_PICTURE, read_source


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)
    return path


def captions(items):
    return {item.name: item.captions for item in items}


def test_a_folder_pairs_pictures_with_texts_of_the_same_name(tmp_path):
    for name in ("a.jpg", "deep/b.PNG", "c.d.jpg", "zoë 日本.jpg", "alone.jpg", ".hidden.jpg", ".git/x.jpg"):
        picture(tmp_path / name)
    (tmp_path / "a.txt").write_text("one\n\n  two   words \n")
    (tmp_path / "deep" / "b.txt").write_bytes(b"\xef\xbb\xbfwith a mark\r\nand more\r\n")
    (tmp_path / "c.d.jpg.txt").write_text("three")
    (tmp_path / "zoë 日本.txt").write_text("Ünï", "utf-8")
    (tmp_path / "readme.txt").write_text("no picture")
    items = read_source(tmp_path).items
    assert captions(items) == {
        "a.jpg": ("one", "two words"),
        "alone.jpg": (),
        "c.d.jpg": ("three",),
        "deep/b.PNG": ("with a mark", "and more"),
        "zoë 日本.jpg": ("Ünï",),
        "readme.txt": (),
    }
    assert [item.problem for item in items] == [None] * 5 + [NO_PICTURE]


def test_a_text_that_is_not_utf8_and_a_pipe_are_problems_of_one_picture(tmp_path):
    picture(tmp_path / "a.jpg")
    (tmp_path / "a.txt").write_text("fine")
    picture(tmp_path / "b.jpg")
    (tmp_path / "b.txt").write_bytes("caf\xe9".encode("latin-1"))
    os.mkfifo(tmp_path / "c.jpg")
    (tmp_path / "c.txt").write_text("would hang")
    problems = [item.problem for item in read_source(tmp_path).items]
    assert problems[0] is None
    assert "b.txt is not UTF-8" in problems[1]
    assert problems[2] == "not a file"


@pytest.mark.parametrize("where", ["images", "."])
def test_captions_json_keeps_splits_captions_and_other_fields(tmp_path, where):
    picture(tmp_path / where / "a.jpg")
    entry = {"file_name": "a.jpg", "split": "val", "captions": ["one", " two "], "license": "x"}
    missing = {"file_name": "b.jpg", "split": "train", "captions": ["gone"]}
    (tmp_path / "captions.json").write_text(json.dumps({"image_dir": where, "images": [entry, missing]}))
    for source in (tmp_path, tmp_path / "captions.json"):
        a, b = read_source(source).items
        assert a[:1] + a[2:6] == ("a.jpg", ("one", "two"), "val", {"license": "x"}, None)
        assert a.path == tmp_path / where / "a.jpg"
        assert (b.name, b.problem) == ("b.jpg", NO_PICTURE)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.csv", 'image,caption\na.jpg,"one, with comma"\na.jpg,two\nb.jpg,three\n'),
        ("t.csv", "\ufeffFile_Name;Text\r\na.jpg;one, with comma\r\na.jpg;two\r\nb.jpg;three\r\n"),
        ("t.tsv", "filepath\ttitle\na.jpg\tone, with comma\na.jpg\ttwo\nb.jpg\tthree\n"),
        ("captions.txt", 'image,caption\na.jpg,"one, with comma"\na.jpg,two\nb.jpg,three'),
        (
            "t.jsonl",
            '{"image": "a.jpg", "caption": "one, with comma"}\n\n{"image": "a.jpg", "caption": "two"}\n'
            '{"image": "b.jpg", "caption": ["three"]}\n',
        ),
        ("t.json", '[{"image": "a.jpg", "captions": ["one, with comma", "two"]}, {"path": "b.jpg", "text": "three"}]'),
        ("t.json", '{"a.jpg": ["one, with comma", "two"], "b.jpg": "three"}'),
        (
            "t.json",
            '{"images": [{"id": 7, "file_name": "a.jpg"}, {"id": 8, "file_name": "b.jpg"}], "annotations": '
            '[{"image_id": 7, "caption": "one, with comma"}, {"image_id": 8, "caption": "three"}, '
            '{"image_id": 7, "caption": "two"}]}',
        ),
        (
            "t.json",
            '{"images": [{"filename": "a.jpg", "sentences": [{"raw": "one, with comma"}, {"raw": "two"}]}, '
            '{"filename": "b.jpg", "sentences": [{"raw": "three"}]}]}',
        ),
    ],
)
def test_tables_of_all_kinds_say_the_same(tmp_path, name, text):
    picture(tmp_path / "a.jpg")
    picture(tmp_path / "images" / "b.jpg")
    (tmp_path / name).write_text(text, "utf-8", newline="")
    items = read_source(tmp_path / name).items
    assert captions(items) == {"a.jpg": ("one, with comma", "two"), "b.jpg": ("three",)}
    assert [item.problem for item in items] == [None, None]


def test_a_caption_with_line_breaks_in_quotes_is_one_caption(tmp_path):
    picture(tmp_path / "a.jpg")
    (tmp_path / "t.csv").write_text('image,caption\na.jpg,"one\ntwo\u2028three"\n')
    assert captions(read_source(tmp_path / "t.csv").items) == {"a.jpg": ("one two three",)}


def test_captions_that_are_missing_or_no_text_are_none(tmp_path):
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        picture(tmp_path / name)
    rows = [
        '{"image": "a.jpg", "caption": NaN}',
        '{"image": "b.jpg", "caption": null}',
        '{"image": "c.jpg", "text": "c"}',
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(rows))
    assert captions(read_source(tmp_path / "t.jsonl").items) == {"a.jpg": (), "b.jpg": (), "c.jpg": ("c",)}


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("t.csv", "", r"t\.csv is empty"),
        ("t.csv", "a.jpg,a dog\nb.jpg,a cat\n", r"t\.csv: its first line should name the columns"),
        ("t.csv", "image,caption\na.jpg,a dog, running\n", r"t\.csv: line 2 is not valid CSV .*3 fields for 2 columns"),
        ("t.tsv", 'image\tcaption\na.jpg\t"a dog\nb.jpg\ta cat\n', r"t\.tsv: line 3 is not valid CSV"),
        ("t.csv", "image,note\na.jpg,x\n", r"none of the 1 pictures in .*t\.csv has a caption"),
        ("t.csv", "image,caption\nx.jpg,a\ny.jpg,b\n", r"none of their 2 pictures is there \(first: .*x\.jpg\)"),
        ("t.csv", "URL,TEXT\nhttps://h/a.jpg,a dog\n", r"by URL \(first: https://h/a\.jpg\): download them first"),
        ("t.jsonl", '{"image": "a.jpg"\n', r"t\.jsonl: line 1 is not valid JSON"),
        ("t.jsonl", '["a.jpg"]\n', r"t\.jsonl: line 1 should be"),
        ("t.jsonl", '{"caption": "x"}\n', r"t\.jsonl: entry 1 names no picture; it has caption"),
        ("t.json", '{"images": [', r"t\.json is not valid JSON"),
        ("t.json", '["a", "b"]', r"t\.json should hold"),
        ("t.json", '{"images": []}', r"t\.json is empty"),
        ("t.parquet", "PAR1", r"t\.parquet is no Parquet file"),
    ],
)
def test_a_table_that_can_not_be_used_is_named_with_the_reason(tmp_path, name, text, reason):
    picture(tmp_path / "a.jpg")
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=reason):
        read_source(tmp_path / name)


def test_missing_empty_and_one_sided_folders_are_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere does not exist"):
        read_source(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty is empty"):
        read_source(tmp_path / "empty")
    picture(tmp_path / "pictures" / "a.jpg")
    with pytest.raises(ValueError, match=r"none of the 1 pictures in .*pictures has a caption: put X\.txt"):
        read_source(tmp_path / "pictures")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a")
    with pytest.raises(ValueError, match="texts has captions but none of their 1 pictures is there"):
        read_source(tmp_path / "texts")


@pytest.mark.parametrize("name", ["captions.txt", "results.csv", "train.tsv"])
def test_a_folder_with_a_table_of_another_name_says_to_give_the_table(tmp_path, name):
    picture(tmp_path / "Images" / "a.jpg")
    (tmp_path / name).write_text("image\tcaption\na.jpg\ta dog\n")
    with pytest.raises(ValueError, match=rf"none of the 1 pictures .*: put X\.txt.* or give the table .*/{name}\?\)$"):
        read_source(tmp_path)
    assert captions(read_source(tmp_path / name).items) == {"a.jpg": ("a dog",)}


def test_linked_folders_are_read_once_and_circles_are_not_followed(tmp_path):
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "source"
    for place in (folder / "own/a", elsewhere / "deep/b"):
        picture(place.with_suffix(".jpg"))
        place.with_suffix(".txt").write_text(f"picture {place.name}")
    links = {"linked": elsewhere, "twice": elsewhere, "up": tmp_path, "same": folder / "own", "own/circle": folder}
    for name, target in links.items():
        (folder / name).symlink_to(target)
    (elsewhere / "deep/back").symlink_to(elsewhere)
    (elsewhere / "deep/again").symlink_to(elsewhere / "deep")
    items = read_source(folder).items
    assert captions(items) == {"linked/deep/b.jpg": ("picture b",), "own/a.jpg": ("picture a",)}
