"""Distillation: open_clip's loss, equal over processes; a teacher that sees what the student sees; taught runs."""

import json

import pytest
import torch
import torch.distributed as dist
from loss_oracle import NUM_PAIRS, draws, value_and_gradients
from open_clip.loss import DistillClipLoss
from safetensors.torch import load_file
from torch.nn import functional as F

from softmoe_clip.config import DistillConfig, ModelConfig
from softmoe_clip.data_pipelines.loader import Batch
from softmoe_clip.data_pipelines.tokenizers import open_clip_tokenizer
from softmoe_clip.data_pipelines.transforms import normalise
from softmoe_clip.models.create import create_model, folder_config
from softmoe_clip.models.store import LoadedModel, load, save, transform_of
from softmoe_clip.training import distill
from softmoe_clip.training.distill import Distilled, Taught, Teacher, distill_loss
from softmoe_clip.training.distributed import over_processes
from softmoe_clip.training.loop import train
from softmoe_clip.training.losses import clip_loss

STUDENT_CFG = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory):
    """A model of open_clip's that takes other pictures (48 pixels) and other ids (CLIP's) than the student."""
    folder = tmp_path_factory.mktemp("teacher")
    text = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    vision = {"image_size": 48, "patch_size": 16, "width": 16, "layers": 1, "head_width": 8}
    (folder / "teacher.json").write_text(json.dumps({"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}))
    config = ModelConfig(str(folder / "teacher.json"), init_logit_scale=3.0)
    torch.manual_seed(5)
    model, tokenizer = create_model(config, 49408, 16), open_clip_tokenizer(16)
    save(LoadedModel(model, tokenizer, transform_of(model), folder_config(config, 49408, 16)), folder / "model")
    return str(folder / "model")


def taught(dtype=torch.float64):
    """What a teacher with wider embeddings makes of the pairs."""
    generator = torch.Generator().manual_seed(9)
    image, text = (F.normalize(torch.randn(NUM_PAIRS, 7, generator=generator, dtype=dtype), dim=-1) for _ in range(2))
    return Taught(image, text, torch.tensor(11.0, dtype=dtype))


def open_clips(image, text, scale):
    return DistillClipLoss()(image, text, scale, *taught())[1]


def ours(image, text, scale):
    return distill_loss(image, text, scale, taught())


def assert_same(found, expected):
    for value, other in zip([found[0], *found[1]], [expected[0], *expected[1]], strict=True):
        torch.testing.assert_close(value, other, rtol=1e-10, atol=1e-12)


def test_the_loss_is_open_clips():
    *inputs, _ = draws()
    assert_same(value_and_gradients(ours, *inputs), value_and_gradients(open_clips, *inputs))


def test_the_loss_some_rows_at_a_time_is_the_same(monkeypatch):
    monkeypatch.setattr(distill, "ROWS", 4)
    *inputs, _ = draws()
    assert_same(value_and_gradients(ours, *inputs), value_and_gradients(open_clips, *inputs))


def test_it_is_added_to_the_contrastive_loss_with_its_weight():
    image, text, scale, bias = draws()
    both = Distilled(clip_loss, taught(), 0.3)
    expected = clip_loss(image, text, scale, bias) + 0.3 * open_clips(image, text, scale)
    torch.testing.assert_close(both(image, text, scale, bias), expected)
    torch.testing.assert_close(both.distill_loss, open_clips(image, text, scale).detach())


def test_it_is_smallest_for_a_student_that_agrees():
    image, text, scale = taught()
    agreed = distill_loss(image, text, scale, taught())
    assert agreed < distill_loss(image.roll(1, 0), text, scale, taught())
    assert agreed < distill_loss(image, text, scale * 0.5, taught())


def test_two_processes_compute_what_one_computes(tmp_path):
    context = torch.multiprocessing.get_context("fork")
    processes = [context.Process(target=one_of_two, args=(rank, str(tmp_path))) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    *inputs, _ = draws()
    value, gradients = value_and_gradients(ours, *inputs)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert all(torch.equal(found["value"], ranks[0]["value"]) for found in ranks)
    torch.testing.assert_close(ranks[0]["value"], value.detach(), rtol=1e-12, atol=0)
    found = [torch.cat([r["gradients"][i] for r in ranks]) / 2 for i in range(2)]
    found.append(sum(r["gradients"][2] for r in ranks) / 2)  # DDP's mean
    for gradient, expected in zip(found, gradients, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)


def one_of_two(rank, folder):
    """Compute the loss of half of the pairs, in a process of its own."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    try:
        assert dist.get_world_size() == 2
        size = NUM_PAIRS // 2
        half, (image, text, scale, _) = slice(size * rank, size * rank + size), draws()
        inputs = [image[half].detach().requires_grad_(), text[half].detach().requires_grad_(), scale]
        part = taught()._replace(image=taught().image[half], text=taught().text[half])
        value, gradients = value_and_gradients(lambda *student: distill_loss(*student, part), *inputs)
        torch.save({"value": over_processes(value, "mean"), "gradients": gradients}, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def a_batch(images, captions):
    ids = torch.zeros(len(captions), dtype=torch.int64)
    return Batch(images, torch.zeros(len(captions), 4, dtype=torch.int64), ids, ids, [], captions, [], [])


def bytes_of(num, side):
    return torch.randint(0, 256, (num, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


def test_the_teacher_embeds_the_same_pixels_and_captions_its_own_way(teacher_folder, monkeypatch):
    monkeypatch.setattr(distill, "CHUNK_SIZE", 2)
    loaded, captions = load(teacher_folder), ["a red circle", "Two squares", "three dots"]
    images, own = bytes_of(3, 48), loaded.preprocess_cfg
    found = Teacher(loaded, STUDENT_CFG, torch.device("cpu"))(a_batch(images, captions))
    with torch.no_grad():
        image = loaded.model.encode_image(normalise(images, own["mean"], own["std"]), normalize=True)
        text = loaded.model.encode_text(open_clip_tokenizer(16)(captions), normalize=True)
    torch.testing.assert_close(found.image, image)
    torch.testing.assert_close(found.text, text)
    assert not found.image.requires_grad
    torch.testing.assert_close(found.logit_scale.item(), float(torch.tensor(3.0).exp()))


def test_pictures_are_resized_and_floats_taken_back_to_pixels_first(teacher_folder):
    teacher = Teacher(load(teacher_folder), STUDENT_CFG, torch.device("cpu"))
    images = bytes_of(2, 32)
    own = teacher.loaded.preprocess_cfg
    resized = F.interpolate(images.float(), (48, 48), mode="bicubic", antialias=True).clamp(0, 255)
    expected = (resized / 255 - torch.tensor(own["mean"]).view(3, 1, 1)) / torch.tensor(own["std"]).view(3, 1, 1)
    torch.testing.assert_close(teacher.pixels(images), expected)
    floats = normalise(images, STUDENT_CFG["mean"], STUDENT_CFG["std"])
    torch.testing.assert_close(teacher.pixels(floats), expected, rtol=1e-4, atol=1e-4)


def test_a_caption_of_one_endless_word_does_not_hold_the_teacher_up(teacher_folder):
    teacher = Teacher(load(teacher_folder), STUDENT_CFG, torch.device("cpu"))
    assert teacher.token_ids(["a" * 20_000]).shape == (1, 16)


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_a_run_is_taught_by_a_model_of_another_size_and_vocabulary(tiny_config, teacher_folder, loss):
    settings = (f"loss={loss}", "steps=2", "optim.warmup=0")
    alone = train(tiny_config("out=alone", *settings))
    given = (*settings, f"distill={{model: {teacher_folder}, weight: 2.5}}")
    run = train(tiny_config("out=taught", *given))
    first, by_itself = metrics(run)[0], metrics(alone)[0]
    assert first["loss"] == pytest.approx(by_itself["loss"] + 2.5 * first["distill_loss"], rel=1e-5)
    assert "distill_loss" not in by_itself
    weights = [load_file(path / "model/open_clip_model.safetensors") for path in (run, alone)]
    assert weights[0].keys() == weights[1].keys()  # the teacher is no part of what is written
    assert not torch.equal(weights[0]["visual.conv1.weight"], weights[1]["visual.conv1.weight"])
    again = train(tiny_config("out=taught in two", *given[:1], "steps=1", *given[2:], "optim.schedule=constant"))
    again = train(tiny_config("out=taught in two", *given, "optim.schedule=constant"))
    constant = train(tiny_config("out=constant", *given, "optim.schedule=constant"))
    file = "model/open_clip_model.safetensors"
    assert (again / file).read_bytes() == (constant / file).read_bytes()


def test_a_student_comes_nearer_to_its_teacher(tiny_config, teacher_folder):
    settings = ("loss=clip", "steps=40", "batch_size=20", "data.caption=first", "data.crop_scale=[1,1]", "log_every=1")
    run = train(tiny_config(*settings, "optim.lr=0.003", f"distill={{model: {teacher_folder}, weight: 100}}"))
    losses = [line["distill_loss"] for line in metrics(run)]
    assert sum(losses[-5:]) < sum(losses[:5])


def test_pictures_are_needed_and_a_teacher_that_is_there(tiny_config, tmp_path):
    with pytest.raises(ValueError, match="no model at nowhere"):
        train(tiny_config("distill.model=nowhere"))
    config = tiny_config("distill.model=x", "data.augment=none", "data.image_features=features")
    with pytest.raises(ValueError, match=r"distill shows the teacher pictures, but data\.image_features holds none"):
        distill.load_teacher(config, STUDENT_CFG, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"distill\.weight must be above 0, got 0"):
        DistillConfig("x", weight=0.0)
    assert not (tmp_path / "run").exists()
