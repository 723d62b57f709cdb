"""What a model folder's config says is checked before anything is built: one sentence for each mistake."""

import pytest

from softmoe_clip.models.written import check_written

GOOD = {
    "model_cfg": {"embed_dim": 8, "vision_cfg": {}, "text_cfg": {}},
    "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": (0.5, 0.5, 0.5), "interpolation": "bilinear"},
    "softmoe": {"image_moe": {"num_experts": 3, "layers": [1]}},
}


def changed(key, value):
    """The good config with one setting changed; a dotted key goes one level down."""
    outer, _, inner = key.partition(".")
    return GOOD | {outer: GOOD[outer] | {inner: value} if inner else value}


def test_a_good_config_passes():
    check_written(GOOD, "it")
    check_written(changed("softmoe", None), "it")


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("preprocess_cfg", None, "has no preprocess_cfg with mean, std: it can't be guessed"),
        ("preprocess_cfg", {"mean": [0.5] * 3}, "has no preprocess_cfg with std"),
        ("preprocess_cfg", "squash", "preprocess_cfg must be an object, got 'squash'"),
        ("preprocess_cfg.mean", "half", "preprocess_cfg.mean must be three numbers, got 'half'"),
        ("preprocess_cfg.std", [0.5], "preprocess_cfg.std must be three numbers"),
        ("preprocess_cfg.std", [0.5, 0, 0.5], "preprocess_cfg.std must be above 0, since pictures are divided by it"),
        ("preprocess_cfg.mode", "L", "preprocess_cfg.mode must be one of RGB, got 'L'"),
        ("preprocess_cfg.fill_color", "blue", "preprocess_cfg.fill_color must be one or three ints, got 'blue'"),
        ("preprocess_cfg.interpolation", "magic", "must be one of bicubic, bilinear, random, got 'magic'"),
        ("preprocess_cfg.resize_mode", "crop", "must be one of shortest, longest, squash, got 'crop'"),
        ("model_cfg", {}, "has no model_cfg with embed_dim, vision_cfg, text_cfg"),
        ("model_cfg.vision_cfg", "ViT", "model_cfg.vision_cfg must be an object, got 'ViT'"),
        ("softmoe", [1], "softmoe must be an object with image_moe or text_moe"),
        ("softmoe", {"audio_moe": {}}, "softmoe must be an object with image_moe or text_moe"),
        ("softmoe.image_moe", 3, "softmoe.image_moe must be an object, got '3'"),
        ("softmoe.image_moe", {"num_expert": 3}, "softmoe.image_moe: unknown key num_expert .* num_experts"),
        ("softmoe.text_moe", {"num_experts": 0}, "softmoe.text_moe: .*at least one expert"),
    ],
)
def test_a_mistake_is_one_sentence_that_names_the_file(key, value, told):
    with pytest.raises(ValueError, match=told) as error:
        check_written(changed(key, value), "folder/open_clip_config.json")
    assert str(error.value).startswith("folder/open_clip_config.json")
    assert "\n" not in str(error.value)
