"""Tables as a source: Parquet beside the text forms, and columns of any name."""

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from test_sources import captions, picture

from softmoe_clip.data_pipelines.sources import NO_PICTURE, read_source


def png(colour):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("listed", [False, True])
def test_parquet_names_pictures_in_several_rows_or_with_a_list_of_captions(tmp_path, listed):
    for name in ("a.jpg", "images/b.jpg"):
        picture(tmp_path / name)
    rows = [("a.jpg", ["one", "two"], 7), ("b.jpg", ["three"], 8)]
    if not listed:
        rows = [(name, text, number) for name, texts, number in rows for text in texts]
    names, texts, numbers = zip(*rows, strict=True)
    table = pa.table({"image_path": list(names), "caption": list(texts), "number": list(numbers)})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=2)
    items = read_source(tmp_path / "t.parquet").items
    assert captions(items) == {"a.jpg": ("one", "two"), "b.jpg": ("three",)}
    assert [(item.problem, item.extra) for item in items] == [(None, {"number": 7}), (None, {"number": 8})]


@pytest.mark.parametrize("form", ["bytes", "struct"])
def test_parquet_may_hold_the_pictures_themselves(tmp_path, form):
    pictures = [png(colour) for colour in ("red", "green", "blue")]
    values = pictures if form == "bytes" else [{"bytes": data, "path": "image.png"} for data in pictures]
    (tmp_path / "data").mkdir()
    for split, chosen in (("train", slice(2)), ("test", slice(2, 3))):
        table = pa.table({"image": values[chosen], "text": ["red", "green", "blue"][chosen], "other": pictures[chosen]})
        pq.write_table(table, tmp_path / "data" / f"{split}-00000-of-00001.parquet", row_group_size=1)
    items = {item.captions[0]: item for item in read_source(tmp_path).items}
    assert [items[colour].read() for colour in ("red", "green", "blue")] == pictures
    assert [items[colour].split for colour in ("red", "green", "blue")] == ["train", "train", "test"]
    assert items["red"].extra == {}
    assert len({item.name for item in items.values()}) == 3


def test_columns_can_be_named_and_several_hold_captions(tmp_path):
    picture(tmp_path / "a.jpg")
    row = {"image": "wrong.jpg", "foto": "a.jpg", "kurz": "one", "lang": ["two", "three"], "caption": "not this"}
    (tmp_path / "t.jsonl").write_text(json.dumps(row))
    (item,) = read_source(tmp_path / "t.jsonl", "foto", ["lang", "kurz"]).items
    assert (item.name, item.captions, item.problem) == ("a.jpg", ("two", "three", "one"), None)
    assert item.extra == {"image": "wrong.jpg", "caption": "not this"}


def test_unknown_columns_are_found_by_what_is_in_them(tmp_path):
    picture(tmp_path / "a.jpg")
    (tmp_path / "t.csv").write_text("nr,foto,beschreibung\n1,a.jpg,ein roter Hund\n")
    assert captions(read_source(tmp_path / "t.csv").items) == {"a.jpg": ("ein roter Hund",)}


def test_root_is_where_the_pictures_are(tmp_path):
    picture(tmp_path / "elsewhere" / "images" / "a.jpg")
    (tmp_path / "t.csv").write_text("image,caption\na.jpg,one\n")
    (item,) = read_source(tmp_path / "t.csv", root=tmp_path / "elsewhere").items
    assert (item.path, item.problem) == (tmp_path / "elsewhere" / "images" / "a.jpg", None)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"image_column": "foto"}, r"t\.csv has no column 'foto': it has image, caption"),
        ({"caption_columns": ["caption", "titel"]}, r"t\.csv has no column 'titel'"),
        ({"prompts": lambda name: [name]}, "has captions of its own, not classes: leave out --templates"),
    ],
)
def test_options_that_do_not_fit_the_table_are_refused(tmp_path, options, reason):
    picture(tmp_path / "a.jpg")
    (tmp_path / "t.csv").write_text("image,caption\na.jpg,one\n")
    with pytest.raises(ValueError, match=reason):
        read_source(tmp_path / "t.csv", **options)


def test_options_of_tables_are_refused_for_folders(tmp_path):
    picture(tmp_path / "a.jpg")
    (tmp_path / "a.txt").write_text("one")
    with pytest.raises(ValueError, match=r"is no table: leave out --caption-column"):
        read_source(tmp_path, caption_columns=["x"])
    (tmp_path / "t.jsonl").write_text('{"image": "a.jpg", "caption": "one"}')
    with pytest.raises(ValueError, match=r"t\.jsonl has no column 'titel': it has image, caption"):
        read_source(tmp_path / "t.jsonl", caption_columns=["titel"])
    with pytest.raises(ValueError, match=r"entry 1 has no picture in the column 'foto'"):
        read_source(tmp_path / "t.jsonl", image_column="foto")


def test_coco_keeps_annotations_and_pictures_side_by_side_and_names_the_split_in_the_file(tmp_path):
    for split, year in (("val", "2017"), ("train", "2017")):
        picture(tmp_path / f"{split}{year}" / f"{split}1.jpg")
        content = {
            "info": {},
            "images": [
                {"id": 7, "file_name": f"{split}1.jpg", "license": 3},
                {"id": 8, "file_name": "gone.jpg", "license": 3},
            ],
            "annotations": [
                {"id": 1, "image_id": 7, "caption": f"a {split} "},
                {"id": 2, "image_id": 8, "caption": "no picture"},
                {"id": 3, "image_id": 7, "caption": "b"},
            ],
        }
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / "annotations" / f"captions_{split}{year}.json").write_text(json.dumps(content))
    items = {item.name: item for item in read_source(tmp_path).items}
    assert items["val1.jpg"].captions == ("a val", "b")
    assert {name: item.split for name, item in items.items() if not item.problem} == {
        "val1.jpg": "val",
        "train1.jpg": "train",
    }
    assert items["gone.jpg"].problem == NO_PICTURE
    one = read_source(tmp_path / "annotations" / "captions_val2017.json").items
    assert one[0].path == tmp_path / "val2017" / "val1.jpg"


@pytest.mark.parametrize("flat", [False, True])
def test_karpathy_joins_folder_and_name_and_counts_restval_as_train(tmp_path, flat):
    images = []
    for number, split in enumerate(("train", "restval", "val", "test")):
        name = f"COCO_val2014_{number}.jpg"
        picture(tmp_path / ("images" if flat else "val2014") / name)
        sentences = [{"raw": f"caption {number}", "tokens": ["caption"], "sentid": 1}, {"raw": "again", "tokens": []}]
        entry = {"filepath": "val2014", "filename": name, "split": split, "sentences": sentences, "sentids": [1, 2]}
        images.append({**entry, "cocoid": number})
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": images, "dataset": "coco"}))
    items = read_source(tmp_path).items
    assert [(item.split, item.captions, item.problem) for item in items] == [
        (split, (f"caption {number}", "again"), None) for number, split in enumerate(("train", "train", "val", "test"))
    ]
    assert items[0].extra == {"cocoid": 0}


def test_a_damaged_parquet_is_named(tmp_path):
    pq.write_table(pa.table({"image": ["a.jpg"], "caption": ["one"]}), tmp_path / "t.parquet")
    data = (tmp_path / "t.parquet").read_bytes()
    (tmp_path / "t.parquet").write_bytes(data[:4] + b"\xff" * 60 + data[64:])
    with pytest.raises(ValueError, match=r"t\.parquet is (damaged|no Parquet file)"):
        read_source(tmp_path / "t.parquet")


def test_one_file_under_several_names_is_one_picture(tmp_path):
    picture(tmp_path / "images" / "i.jpg")
    (tmp_path / "images" / "link.jpg").symlink_to("i.jpg")
    names = ["i.jpg", "./i.jpg", "images/i.jpg", "images/../images//i.jpg", tmp_path / "images/i.jpg", "link.jpg"]
    rows = [f"{name},caption {number}\n" for number, name in enumerate([*names, "i.jpg", "gone.jpg", "./gone.jpg"])]
    (tmp_path / "t.csv").write_text("image,caption\n" + "".join(rows))
    expected = {"i.jpg": tuple(f"caption {number}" for number in range(7))}
    items = read_source(tmp_path / "t.csv").items
    assert captions(items) == {**expected, "gone.jpg": ("caption 7",), "./gone.jpg": ("caption 8",)}
    assert [item.problem for item in items] == [None, NO_PICTURE, NO_PICTURE]


def test_names_may_lead_to_objects_with_caption_and_split(tmp_path):
    told = {"a.jpg": {"caption": "one", "split": "val", "licence": 3}, "b.jpg": {"captions": ["two", "three"]}}
    for name in told:
        picture(tmp_path / name)
    (tmp_path / "t.json").write_text(json.dumps(told))
    items = read_source(tmp_path / "t.json").items
    assert captions(items) == {"a.jpg": ("one",), "b.jpg": ("two", "three")}
    assert [(item.split, item.extra) for item in items] == [("val", {"licence": 3}), (None, {})]
