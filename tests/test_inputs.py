"""What a run reads beside its data is known by its bytes: changed under the same name, it is noticed at a resume."""

import json
import shutil

import pytest

from softmoe_clip.training.inputs import BLOCK, differences_of, fingerprint, fingerprints
from softmoe_clip.training.loop import train
from softmoe_clip.training.run_log import git_state


@pytest.fixture
def own_tokenizer(tokenizer_file, tmp_path):
    """A tokenizer that a test may change."""
    return shutil.copy(tokenizer_file, tmp_path / "tokenizer.model")


def test_a_tokenizer_trained_anew_under_the_same_name_is_refused_with_the_difference(
    own_tokenizer, tiny_config, scenes, tmp_path, folder_bytes
):
    from softmoe_clip.data_pipelines.samples import all_captions
    from softmoe_clip.data_pipelines.tar_index import ShardSet
    from softmoe_clip.data_pipelines.train_tokenizer import train_tokenizer

    settings = (f"tokenizer={own_tokenizer}", "optim.schedule=constant")
    run = train(tiny_config(*settings, "steps=3"))
    before = folder_bytes(run)
    captions = [caption.replace("red", "der") for caption in all_captions(ShardSet.open(str(scenes / "train")))]
    train_tokenizer(captions, own_tokenizer, vocab_size=100)
    told = r"other files than are there now \(tokenizer, tokenizer.model: [0-9a-f]{16} then, [0-9a-f]{16} now\): give"
    with pytest.raises(ValueError, match=told):
        train(tiny_config(*settings, "steps=6"))
    assert folder_bytes(run) == before


def test_an_architecture_that_says_something_else_is_refused(architecture_file, tiny_config, tmp_path):
    own = tmp_path / "own.json"
    own.write_bytes(architecture_file.read_bytes())
    settings = (f"model.arch={own}", "optim.schedule=constant")
    train(tiny_config(*settings, "steps=2"))
    own.write_text(json.dumps(json.loads(own.read_text()) | {"quick_gelu": True}))
    with pytest.raises(ValueError, match=r"\(model.arch, own.json: "):
        train(tiny_config(*settings, "steps=4"))


def test_what_only_gave_the_first_weights_is_written_down_but_may_go(tiny_config, tmp_path):
    constant = "optim.schedule=constant"
    first = train(tiny_config(constant, "steps=2", f"out={tmp_path}/first"))
    run = train(tiny_config(constant, "steps=2", f"init={first}"))
    inputs = json.loads((run / "versions.json").read_text())["inputs"]
    assert "open_clip_model.safetensors" in inputs["init"]
    train(tiny_config(constant, "steps=4", f"out={tmp_path}/first"))  # the first run goes on: other weights now
    train(tiny_config(constant, "steps=4", f"init={first}"))
    first.rename(tmp_path / "gone")
    train(tiny_config(constant, "steps=5", f"init={first}"))


def test_a_run_from_before_there_were_fingerprints_goes_on(tiny_config):
    run = train(tiny_config("optim.schedule=constant", "steps=2"))
    facts = json.loads((run / "versions.json").read_text())
    (run / "versions.json").write_text(json.dumps({n: v for n, v in facts.items() if n not in ("inputs", "begun")}))
    train(tiny_config("optim.schedule=constant", "steps=4"))


def test_a_tokenizer_in_a_model_folder_is_its_own_files_and_not_the_weights(tiny_config, tokenizer_file, tmp_path):
    from softmoe_clip.data_pipelines.tokenizers import load_tokenizer

    folder = tmp_path / "model"
    load_tokenizer(tokenizer_file, 12).save(folder)
    (folder / "open_clip_model.safetensors").write_bytes(b"weights")
    found = fingerprints(tiny_config(f"tokenizer={folder}"))
    assert found["tokenizer"].keys() == {"tokenizer.model", "softmoe_tokenizer.json"}
    assert found.keys() == {"tokenizer", "model.arch"}
    assert fingerprints(tiny_config("tokenizer=open_clip")).keys() == {"model.arch"}


def test_a_fingerprint_sees_each_byte_of_a_small_file_and_the_ends_of_a_large_one(tmp_path):
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_bytes(bytes(BLOCK + 5))
    with large.open("wb") as file:
        file.truncate(100 * BLOCK)
    for file, places in ((small, (0, BLOCK - 1, BLOCK, BLOCK + 4)), (large, (0, 100 * BLOCK - 1))):
        seen = {fingerprint(file)}
        for place in places:
            with file.open("r+b") as opened:
                opened.seek(place)
                opened.write(b"x")
            seen.add(fingerprint(file))
        assert len(seen) == len(places) + 1


def test_differences_name_what_came_and_what_went():
    before, now = {"tokenizer": {"a": "1", "b": "2"}}, {"tokenizer": {"b": "3", "c": "4"}, "model.arch": {"d": "5"}}
    assert differences_of(before, now) == [
        "tokenizer, a: 1 then, absent now",
        "tokenizer, b: 2 then, 3 now",
        "tokenizer, c: absent then, 4 now",
    ]


def test_the_commit_of_a_folder_is_told_and_whether_it_was_changed(tmp_path):
    import subprocess

    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", tmp_path, *identity, *arguments], check=True, capture_output=True)

    file = tmp_path / "train.py"
    file.write_text("one")
    assert git_state(tmp_path) is None
    git("init")
    assert git_state(tmp_path) is None
    git("add", ".")
    git("commit", "-m", "one")
    commit = git_state(file)
    assert len(commit) == 12
    file.write_text("two")
    assert git_state(tmp_path) == git_state(file) == f"{commit}-dirty"
    (tmp_path / "installed.py").write_text("not of this repository")
    assert git_state(tmp_path / "installed.py") is None
