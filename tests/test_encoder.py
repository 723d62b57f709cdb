"""The encoder: unit vectors in float32 from any open_clip model, which is left as it was."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from softmoe_clip.data_pipelines.shard_writer import ShardWriter
from softmoe_clip.data_pipelines.tar_index import ShardSet
from softmoe_clip.eval.encoder import Encoder

TEXT = {"context_length": 16, "width": 32, "heads": 2, "layers": 1}
NATIVE = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16, "patch_dropout": 0.5}
TIMM = {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "avg", "timm_proj": "linear"}
TEXTS = ["a red cat", "two dogs, one blue", "owl", "an orange star", "nothing"]


def letters(texts):
    return torch.tensor([[ord(letter) % 32 for letter in text[:16].ljust(16)] for text in texts])


def open_clip_encoder(vision=NATIVE, tokenizer=letters, vocab_size=32, **settings):
    import open_clip
    from open_clip.transform import image_transform

    torch.manual_seed(0)
    shell = open_clip.CLIP if vision is NATIVE else open_clip.CustomTextCLIP
    model = shell(embed_dim=16, vision_cfg=vision, text_cfg={**TEXT, "vocab_size": vocab_size})
    return Encoder(model, tokenizer, image_transform(32, is_train=False), **{"batch_size": 2, **settings})


@pytest.fixture(scope="module", params=[NATIVE, TIMM], ids=["native", "timm"])
def encoder(request):
    import open_clip

    return open_clip_encoder(request.param, open_clip.SimpleTokenizer(context_length=16), vocab_size=49408)


@pytest.fixture
def size(encoder):
    return encoder.model.visual.image_size[0]


def png(seed, size=(40, 36)):
    pixels = np.random.default_rng(seed).integers(0, 255, size=(*size, 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "png")
    return data.getvalue()


def test_embeddings_are_those_of_open_clip(encoder, size):
    pictures = torch.randn(5, 3, size, size)
    encoder.model.eval()
    with torch.no_grad():
        images = encoder.model.encode_image(pictures, normalize=True)
        texts = encoder.model.encode_text(encoder.tokenizer(TEXTS), normalize=True)
    np.testing.assert_allclose(encoder.images(pictures), images, atol=1e-6)
    np.testing.assert_allclose(encoder.texts(TEXTS), texts, atol=1e-6)
    assert encoder.texts(TEXTS).dtype == np.float32


def test_the_mode_of_every_module_is_put_back(encoder, size):
    encoder.model.train()
    for name, child in encoder.model.named_children():
        child.train(name == "visual")  # as with a locked text tower
    before = [module.training for module in encoder.model.modules()]
    assert len(set(before)) == 2
    first = encoder.images(torch.randn(1, 3, size, size).repeat(2, 1, 1, 1))
    np.testing.assert_allclose(first[0], first[1], atol=1e-6)  # patch dropout is off
    assert [module.training for module in encoder.model.modules()] == before
    with pytest.raises(RuntimeError):
        encoder.images(torch.ones(2, 4, size, size))
    assert [module.training for module in encoder.model.modules()] == before
    assert torch.is_grad_enabled()


def test_a_model_can_train_on_after_it_was_scored():
    encoder = open_clip_encoder()
    encoder.texts(TEXTS)
    encoder.images(torch.ones(2, 3, 32, 32))
    encoder.model(torch.ones(2, 3, 32, 32), encoder.tokenizer(TEXTS[:2]))[0].sum().backward()


def test_the_batch_size_changes_nothing(encoder):
    whole = Encoder(encoder.model, encoder.tokenizer, encoder.transform, batch_size=100)
    np.testing.assert_allclose(encoder.texts(TEXTS), whole.texts(TEXTS), atol=1e-6)
    heard = []
    encoder.texts(TEXTS, heard.append)
    assert heard == [2, 2, 1]


@pytest.mark.parametrize("way", ["autocast", "weights"])
def test_half_precision_is_normalised_in_float32(way):
    exact = open_clip_encoder()
    half = open_clip_encoder(precision="bf16" if way == "autocast" else "float32")
    if way == "weights":
        half.model.bfloat16()
    pictures = torch.randn(3, 3, 32, 32)
    for found, reference in (
        (half.images(pictures), exact.images(pictures)),
        (half.texts(TEXTS), exact.texts(TEXTS)),
    ):
        assert found.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
        np.testing.assert_allclose(found, reference, atol=0.05)
        assert not np.array_equal(found, reference)


def test_what_the_encoder_cannot_do_is_named():
    encoder = open_clip_encoder()
    with pytest.raises(ValueError, match="precision must be one of float32, bf16, fp16, got 'bf17'"):
        Encoder(encoder.model, encoder.tokenizer, encoder.transform, precision="bf17")
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        Encoder(encoder.model, encoder.tokenizer, encoder.transform, batch_size=0)
    with pytest.raises(ValueError, match="workers must be 0 or more, got -1"):
        Encoder(encoder.model, encoder.tokenizer, encoder.transform, num_workers=-1)
    with torch.no_grad():
        encoder.model.token_embedding.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="embeddings of texts that are NaN or infinite"):
        encoder.texts(TEXTS)


def test_a_gpu_is_given_a_few_workers_and_a_cpu_none():
    """Nothing is computed on the device here."""
    assert Encoder(None, None, None, device="cpu").num_workers == 0
    assert 1 <= Encoder(None, None, None, device="cuda:1").num_workers <= 4
    assert Encoder(None, None, None, device="cuda", num_workers=0).num_workers == 0


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_set_of_pictures_is_embedded_in_order_without_the_bad_ones(tmp_path, num_workers):
    encoder = open_clip_encoder(num_workers=num_workers)
    with ShardWriter(tmp_path / "shards", shard_size=4) as writer:
        for number in range(7):
            writer.add(b"no picture" if number in (1, 2, 3) else png(number), "png", [f"c{number}", "d"], label=number)
    found = encoder.image_set(ShardSet.open(str(tmp_path / "shards")))
    assert found.indices == [0, 4, 5, 6]
    assert found.labels == [0, 4, 5, 6]
    assert found.captions == [(f"c{number}", "d") for number in found.indices]
    assert found.keys == ["000000000", "000010000", "000010001", "000010002"]
    assert [(bad.key, bad.shard) for bad in found.skipped] == [(f"00000000{i}", "00000.tar") for i in (1, 2, 3)]
    for number, embedding in zip(found.indices, found.embeddings, strict=True):
        picture = encoder.transform(Image.open(io.BytesIO(png(number))))
        np.testing.assert_allclose(embedding, encoder.images(picture[None])[0], atol=1e-6)
