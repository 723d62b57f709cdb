"""Modules that draw for (seed, position): they do what those do whose place they take, whatever a batch is cut into."""

import re

import pytest
import torch
from open_clip.transformer import PatchDropout as OpenClipPatchDropout
from timm.layers import DropPath, PatchDropout, PatchDropoutWithIndices
from tiny_bert import write_bert
from torch import nn

from softmoe_clip.moe.tokens_choice import TokensChoiceMoE
from softmoe_clip.training.draws import drawing
from softmoe_clip.training.masks import HIDDEN_DRAWS, draw_by_position, no_hidden_draws

CPU = torch.device("cpu")
DRAWING = {
    "dropout": lambda: nn.Dropout(0.3),
    "drop path": lambda: DropPath(0.4),
    "timm's patch dropout": lambda: PatchDropout(0.5, num_prefix_tokens=1),
    "open_clip's patch dropout": lambda: OpenClipPatchDropout(0.5),
    "router noise": lambda: TokensChoiceMoE(8, 4, capacity_factor=1.0, noise_std=4.0, group_size=2),
}


def drawn(module):
    """A model of one module, ready to draw by position."""
    model = nn.Sequential(module).train()
    assert draw_by_position(model) == []
    return model


def run(model, x, positions, seed=0):
    with drawing(seed, positions, CPU):
        return model(x)


@pytest.mark.parametrize("kind", DRAWING)
def test_a_batch_that_is_cut_or_read_again_is_drawn_the_same(kind):
    model, x = drawn(DRAWING[kind]()), torch.randn(12, 9, 8)
    whole = run(model, x, range(12))
    parts = [run(model, x[rows], range(12)[rows]) for rows in (slice(0, 4), slice(4, 10), slice(10, 12))]
    assert torch.equal(torch.cat(parts), whole) or torch.allclose(torch.cat(parts), whole, atol=1e-6)
    assert not torch.allclose(run(model, x, range(12, 24)), whole)
    assert not torch.allclose(run(model, x, range(12), seed=1), whole)


@pytest.mark.parametrize("kind", DRAWING)
def test_evaluation_draws_nothing_and_needs_no_positions(kind):
    model, x = nn.Sequential(DRAWING[kind]()).eval(), torch.randn(4, 9, 8)
    before = model(x)
    draw_by_position(model)
    assert torch.equal(model(x), before)


def test_dropout_scales_what_stays_and_its_gradient_alike():
    x = torch.ones(6, 1000, requires_grad=True)
    out = run(drawn(nn.Dropout(0.25)), x, range(6))
    assert out.unique().tolist() == pytest.approx([0, 1 / 0.75])
    out.sum().backward()
    assert torch.equal(x.grad, out.detach())
    assert torch.equal(run(drawn(nn.Dropout(1.0)), x, range(6)), torch.zeros_like(x))


def test_drop_path_leaves_whole_samples_out_at_its_rate():
    x = torch.ones(5000, 2, 3, requires_grad=True)
    out = run(drawn(DropPath(0.2)), x, range(5000))
    samples = out.flatten(1)
    assert torch.equal(samples.amin(1), samples.amax(1))
    assert samples.amax(1).unique().tolist() == pytest.approx([0, 1.25])
    assert (samples[:, 0] == 0).double().mean() == pytest.approx(0.2, abs=0.025)
    out.sum().backward()
    assert torch.equal(x.grad, out.detach())


@pytest.mark.parametrize("ordered", [False, True])
def test_patch_dropout_keeps_the_prefix_and_so_many_patches_of_each_picture(ordered):
    x = torch.arange(300.0).repeat(50, 1)[..., None]
    out, kept = run(drawn(PatchDropoutWithIndices(0.25, num_prefix_tokens=2, ordered=ordered)), x, range(50))[0:2]
    assert out.shape == (50, 2 + int(298 * 0.75), 1)
    assert torch.equal(out[:, :2], x[:, :2])
    assert torch.equal(out[:, 2:, 0], (kept + 2).float())
    assert all(len(set(row.tolist())) == kept.shape[1] for row in kept)
    assert ordered == torch.equal(kept, kept.sort(dim=1).values)
    counts = torch.bincount(kept.flatten(), minlength=298)  # each patch stays equally often
    assert ((counts - 50 * 0.75).square() / (50 * 0.75 * 0.25)).mean() == pytest.approx(1, abs=0.4)


def test_two_modules_of_one_model_draw_different_masks():
    model = nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.5)).train()
    draw_by_position(model)
    x = torch.ones(4, 400)
    with drawing(0, range(4), CPU):
        first, second = (module(x) for module in model)
    assert ((first > 0) & (second > 0)).double().mean() == pytest.approx(0.25, abs=0.06)


class Attention(nn.Module):
    def __init__(self, rate):
        super().__init__()
        self.proj, self.attn_drop = nn.Linear(2, 2), nn.Dropout(rate)


@pytest.mark.parametrize("attention", [lambda: Attention(0.1), lambda: nn.MultiheadAttention(4, 2, dropout=0.1)])
def test_dropout_inside_a_fused_attention_is_refused_where_it_is_trained(attention):
    model = nn.ModuleDict({"tower": attention()})
    with pytest.raises(ValueError, match=r"tower drops attention weights at a rate of 0\.1, .* set it to 0"):
        draw_by_position(model)
    assert draw_by_position(model.requires_grad_(False)) == []


def test_a_transformers_tower_keeps_its_hidden_dropout_and_says_that_it_lost_that_of_attention(tmp_path):
    from transformers import BertModel

    write_bert(tmp_path)
    bert = BertModel.from_pretrained(tmp_path, add_pooling_layer=False).train()
    assert draw_by_position(bert) == [
        "dropout of 0.1 is turned off where (seed, position) could not determine it: "
        "encoder.layer.0.attention.self.dropout and 1 more"
    ]
    assert bert.encoder.layer[0].attention.output.dropout.p == 0.1
    ids = torch.randint(1, 10, (6, 5))
    with drawing(0, range(6), CPU), no_hidden_draws(CPU):
        whole = bert(ids).last_hidden_state
    with drawing(0, range(4, 6), CPU):
        torch.testing.assert_close(bert(ids[4:]).last_hidden_state, whole[4:])
    with drawing(1, range(6), CPU):
        assert not torch.allclose(bert(ids).last_hidden_state, whole)


def test_what_draws_from_torchs_own_generator_is_noticed():
    with pytest.raises(ValueError, match=re.escape(HIDDEN_DRAWS)), no_hidden_draws(CPU):
        nn.functional.dropout(torch.ones(3), 0.5)
