"""Which splits of torchvision's data sets are read, told by a stand-in for FGVCAircraft and others."""

import pytest

from softmoe_clip.data_pipelines.sources import read_source
from softmoe_clip.data_pipelines.sources.torchvision_sets import open_part


@pytest.fixture
def fake(monkeypatch):
    """Put a data set with the given splits and the pictures' names in each in place of FGVCAircraft."""
    from torchvision import datasets
    from torchvision.datasets.utils import verify_str_arg

    def put(**splits):
        class Fake(datasets.VisionDataset):
            classes = ("fox", "owl")

            def __init__(self, root, split="train"):
                self.targets = [0] * splits[verify_str_arg(split, "split", tuple(splits))]

            def __len__(self):
                return len(self.targets)

        open_part.cache_clear()
        monkeypatch.setattr(datasets, "FGVCAircraft", Fake)
        found = read_source("torchvision:FGVCAircraft").items
        return {split: sum(item.split == split for item in found) for split in {item.split for item in found}}

    yield put
    open_part.cache_clear()


def test_a_set_with_train_val_and_trainval_gives_each_picture_once(fake, capsys):
    assert fake(train=3, val=2, trainval=5, test=4) == {"train": 3, "val": 2, "test": 4}
    assert not capsys.readouterr().err


def test_trainval_is_train_where_the_set_knows_no_train(fake):
    assert fake(trainval=5, test=4) == {"train": 5, "test": 4}
    assert fake(train=5, valid=4) == {"train": 5, "val": 4}


def test_a_set_without_train_says_so(fake, capsys):
    assert fake(**{"train-standard": 5, "val": 2, "test": 4}) == {"val": 2, "test": 4}
    assert capsys.readouterr().err == (
        "torchvision:FGVCAircraft has no split train or trainval: there are only val, test, "
        "take training pictures from another source\n"
    )


def test_a_set_with_none_of_the_splits_is_refused(fake):
    with pytest.raises(ValueError, match="FGVCAircraft has none of the splits train, trainval, val, valid, test: use"):
        fake(letters=3)
