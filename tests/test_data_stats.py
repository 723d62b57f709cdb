"""stats: counts equal to slow ones by any number of processes; a page that loads nothing, and pictures to look at."""

import io
import re
from collections import Counter

import numpy as np
import pytest
from picture_shards import encoded, scene, write_set
from PIL import Image
from tars import write_tar
from test_report import Page

from softmoe_clip.data_pipelines import stats as stats_module
from softmoe_clip.data_pipelines import tar_samples
from softmoe_clip.data_pipelines.samples import all_captions
from softmoe_clip.data_pipelines.stats import count, num_tokens, spread
from softmoe_clip.data_pipelines.tar_index import ShardSet
from softmoe_clip.data_pipelines.tokenizers import load_tokenizer
from softmoe_clip.report.data_stats import NUM_WORDS, write_stats

CAPTIONS = ["A red fox's den", "a red RED barn", "la niña  roja", "tail-lights", "<script>alert(1)</script> & more"]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Pictures of several sizes and formats, one turned by EXIF, one damaged, one without a caption."""
    exif = Image.Exif()
    exif[0x0112] = 6
    pictures = [
        ("jpg", encoded(scene(0).resize((60, 40)), "JPEG", exif=exif)),
        ("png", encoded(scene(1))),
        ("webp", encoded(scene(2).resize((30, 90)), "WEBP")),
        ("png", encoded(scene(3))),
        ("jpg", encoded(scene(4).resize((60, 40)), "JPEG")),
    ]
    members = []
    for number, (kind, data) in enumerate(pictures):
        members += [(f"{number}.{kind}", data), (f"{number}.txt", "\n".join(CAPTIONS[number:]).encode())]
    folder = tmp_path_factory.mktemp("mixed")
    write_tar(
        folder / "0.tar",
        [*members, ("cut.png", b"no picture"), ("cut.txt", b"unseen"), ("silent.png", encoded(scene(5)))],
    )
    return folder


def test_counts_are_what_one_counts_by_hand(mixed):
    stats = count(str(mixed))
    assert (stats.num_shards, stats.num_samples, stats.num_bad, stats.num_captions) == (1, 7, 2, 15)
    assert stats.captions_per_picture == {5: 1, 4: 1, 3: 1, 2: 1, 1: 1}
    assert stats.sizes == {(40, 60): 1, (96, 96): 2, (30, 90): 1, (60, 40): 1}, "the first is turned"
    assert stats.formats == {"JPEG": 2, "PNG": 2, "WEBP": 1}
    words = stats.captions_with_word
    assert (words["red"], words["fox's"], words["tail-lights"], words["niña"], words["unseen"]) == (3, 1, 4, 3, 0)
    # 4, 4, 3, 1 and 5 words; the caption at place n belongs to n + 1 pictures
    assert stats.words_per_caption == {4: 1 + 2, 3: 3, 1: 4, 5: 5}
    assert not stats.tokens_per_caption


def test_words_and_tokens_equal_a_slow_count(scenes, tokenizer_file):
    shards = str(scenes / "train")
    stats = count(shards, str(tokenizer_file), context_length=8)
    captions = list(all_captions(ShardSet.open(shards)))
    assert stats.words_per_caption == Counter(len(caption.split()) for caption in captions)
    tokenizer = load_tokenizer(tokenizer_file, 8)
    lengths = [len(tokenizer.processor.encode(caption.lower())) + 1 for caption in captions]
    assert stats.tokens_per_caption == Counter(min(length, 32) for length in lengths)
    assert stats.context_length == 8


def test_a_padding_that_is_no_end_token_is_not_counted():
    class Tokenizer:
        eos_id, pad_id = None, 0

        def __call__(self, captions):
            import torch

            return torch.tensor([[5, 0, 7, 0, 0], [1, 2, 3, 4, 5]])

    assert num_tokens(Tokenizer(), ["a", "b"]) == [3, 5]


def test_any_number_of_processes_counts_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(stats_module, "FEW_SAMPLES", 0)
    monkeypatch.setattr(stats_module, "HELD", 3)
    monkeypatch.setattr(tar_samples, "CHUNK", 3)
    pictures = [encoded(scene(seed).resize((20 + seed, 30))) for seed in range(11)]
    shards = write_set(tmp_path / "out", pictures, shard_size=5)
    one, two = (count(shards, jobs=jobs) for jobs in (1, 2))
    assert one == two
    assert one.num_samples == 11


def test_a_spread_is_that_of_the_values_one_by_one():
    values = np.random.default_rng(0).integers(1, 40, 1000)
    s = spread(Counter(values.tolist()))
    assert (s.least, s.most) == (values.min(), values.max())
    assert s.median == np.quantile(values, 0.5, method="inverted_cdf")
    assert s.most_of == np.quantile(values, 0.95, method="inverted_cdf")
    assert s.mean == pytest.approx(values.mean())


def test_the_page_is_whole_loads_nothing_and_escapes_what_it_shows(mixed, tmp_path, tokenizer_file):
    written = write_stats(count(str(mixed), str(tokenizer_file), context_length=4), "my <data>", tmp_path / "out")
    text = written.read_text("utf-8")
    page = Page(text)
    assert page.open == []
    assert page.fetched == ["data:,"] + [link for link in page.fetched if link.startswith("#")]
    assert len(page.ids) == len(set(page.ids))
    assert "script" not in page.tags
    assert "my &lt;data&gt;" in text
    assert "15 captions" in text
    assert "2 samples can&#39;t be read" in text
    assert re.search(r"The model takes 4: \d+ % of the captions are longer", text)
    assert text.count('class="word"') <= NUM_WORDS
    pictures = {file.stem for file in written.parent.glob("*.png")}
    assert pictures == {"words", "tokens", "captions", "sizes", "shorter_side", "ratios", "frequent_words"}
    for name in pictures:
        drawn = Image.open(io.BytesIO((written.parent / f"{name}.png").read_bytes())).convert("RGB")
        accent = (np.abs(np.asarray(drawn, int) - (180, 71, 31)).sum(-1) < 12).mean()
        assert accent > 0.002 or name == "sizes", f"{name} has no bars"
        assert (np.asarray(drawn).reshape(-1, 3).max(1) > 8).all(), f"{name} has stand-in colours left"


def test_what_is_the_same_everywhere_gets_no_chart(tmp_path):
    shards = write_set(tmp_path / "in", [encoded(scene(seed)) for seed in range(3)])
    written = write_stats(count(shards), "equal", tmp_path / "out")
    assert {file.stem for file in written.parent.glob("*.png")} == {"sizes", "ratios", "frequent_words"}


def test_words_in_any_script_are_counted_and_shown(tmp_path):
    captions = ["красная лиса", "红色的狐狸", "ثعلب أحمر", "a" * 300]
    shards = write_set(tmp_path / "in", [encoded(scene(seed)) for seed in range(4)], captions)
    text = write_stats(count(shards), "scripts", tmp_path / "out").read_text("utf-8")
    for word in ("красная", "红色的狐狸", "أحمر"):
        assert f">{word}</span>" in text


def test_stats_prints_a_table_and_draws_a_page(softmoe_clip, tmp_path, monkeypatch, scenes, tokenizer_file):
    monkeypatch.chdir(tmp_path)
    done = softmoe_clip("stats", f"{scenes}/val", "out", "--tokenizer", tokenizer_file, "--context-length", "8")
    assert done.returncode == 0
    assert "tokens per caption" in done.stdout
    assert "40 samples in 1 shards: out/stats.html" in done.stdout
    assert (tmp_path / "out/words.png").exists()
    assert (tmp_path / "out/stats.html").exists()


def test_shards_that_cannot_be_read_are_told_of(tmp_path, capsys):
    write_set(tmp_path / "out", [encoded(scene(0))])
    (tmp_path / "out/page.tar").write_bytes(b"<html>")
    assert count(str(tmp_path / "out")).num_samples == 1
    assert "1 of 2 shards damaged, `softmoe-clip check` lists them: page.tar is not a tar" in capsys.readouterr().err


def test_no_samples_is_an_error(tmp_path):
    (tmp_path / "0.tar").write_bytes(bytes(10240))
    with pytest.raises(ValueError, match="hold no samples"):
        count(str(tmp_path))


def test_a_lone_sentencepiece_model_does_not_say_what_the_model_takes(mixed, tmp_path, tokenizer_file):
    stats = count(str(mixed), str(tokenizer_file))
    assert stats.context_length is None
    assert stats.tokens_per_caption == count(str(mixed), str(tokenizer_file), context_length=64).tokens_per_caption
    written = write_stats(stats, "alone", tmp_path / "out")
    text = written.read_text("utf-8")
    assert "Tokens per caption" in text
    assert "The model takes" not in text


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--context-length", "3"), "the context length 3 says nothing without a tokenizer: give --tokenizer too"),
        (("--context-length", "0", "--tokenizer", "t.model"), "the context length is 0: give 2 or more"),
        (("--jobs", "-5"), "jobs is -5: give 1 or more"),
        (("--jobs", "0"), "jobs is 0: give 1 or more"),
    ],
)
def test_options_that_say_nothing_stop_before_anything_is_read(softmoe_clip, tmp_path, monkeypatch, options, reason):
    monkeypatch.chdir(tmp_path)
    done = softmoe_clip("stats", "shards", "out", *options)
    assert done.returncode == 2
    assert reason in " ".join(done.stderr.split())
    assert not (tmp_path / "out").exists()
