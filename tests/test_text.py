"""Our text tower: equal to a loop over captions, blind to padding where it masks it; mistakes are caught."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from text_oracle import by_hand
from timm.layers import LayerNorm
from torch import nn

from softmoe_clip.config import MoEConfig
from softmoe_clip.models import text
from softmoe_clip.models.text import TextTower, through_first_end
from softmoe_clip.moe import SoftMoE, collect_routing, install

END, VOCABULARY, LENGTH = 1, 20, 7
# Rows of 1, 3, 7 and 7 real tokens; the last one has no end token. What follows an end token is of no meaning.
TOKEN_IDS = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [5, 9, 1, 4, 4, 1, 8], [2, 3, 4, 5, 6, 7, 1], [9, 8, 7, 6, 5, 4, 3]])
LENGTHS = [1, 3, 7, 7]


def tower(pool="last", padding="attend", moe=False, perturb=True):
    """A small tower in float64 in which every parameter matters."""
    torch.manual_seed(0)
    built = TextTower(LENGTH, VOCABULARY, 16, 2, 2, 24, 12, pool=pool, padding=padding, eos_id=END)
    if moe:
        install(built, MoEConfig(layers=[0, 1], num_experts=3, slots_per_expert=2))
    built = built.double().eval()
    if perturb:
        with torch.no_grad():
            for parameter in built.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return built


def error(model):
    """The largest difference from the oracle."""
    rows = TOKEN_IDS.numpy()
    if model.padding == "mask":
        rows = [row[:length] for row, length in zip(rows, LENGTHS, strict=True)]
    expected = np.stack([by_hand(model, row) for row in rows])
    return np.abs(model(TOKEN_IDS).detach().numpy() - expected).max()


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "soft"])
@pytest.mark.parametrize("padding", ["attend", "mask"])
@pytest.mark.parametrize("pool", ["last", "map"])
def test_the_tower_equals_a_loop_over_captions(pool, padding, moe):
    assert error(tower(pool, padding, moe)) < 1e-12


def test_what_is_real_goes_through_the_first_end_token():
    assert through_first_end(TOKEN_IDS, END).sum(1).tolist() == LENGTHS
    assert through_first_end(TOKEN_IDS, END)[1].tolist() == [True] * 3 + [False] * 4


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "soft"])
@pytest.mark.parametrize("pool", ["last", "map"])
def test_a_captions_embedding_does_not_change_with_the_amount_of_padding(pool, moe):
    model = tower(pool, "mask", moe)
    for padded in (3, 4, 6):
        cut = model(TOKEN_IDS[1:2, :padded])
        torch.testing.assert_close(cut, model(TOKEN_IDS[1:2]), rtol=0, atol=1e-13)
    other = TOKEN_IDS.clone()
    other[1, 3:] = 13
    assert torch.equal(model(TOKEN_IDS), model(other))
    attending = tower(pool, "attend", moe)
    assert not torch.allclose(attending(TOKEN_IDS)[1], attending(other)[1])


def test_no_gradient_reaches_the_padding():
    model = tower("last", "mask", moe=True)
    model(TOKEN_IDS[1:2]).square().sum().backward()
    assert (model.positional_embedding.grad.abs().sum(1) > 0).tolist() == [True] * 3 + [False] * 4


def without_mask_in_attention(model, patch):
    patch.setattr(text, "attention_bias", lambda mask, tokens: None)


def without_mask_in_soft_moe(model, patch):
    whole = SoftMoE.forward
    patch.setattr(SoftMoE, "forward", lambda layer, tokens, mask=None: whole(layer, tokens))


def without_mask_in_pooling(model, patch):
    whole = TextTower.pooled
    patch.setattr(TextTower, "pooled", lambda model, tokens, mask: whole(model, tokens, None))


def without_the_end_token(model, patch):
    patch.setattr(text, "through_first_end", lambda ids, end: (ids != end).cumprod(1).bool())


def through_the_last_end(model, patch):
    patch.setattr(text, "through_first_end", lambda ids, end: (ids == end).flip(1).cumsum(1).flip(1) > 0)


def other_gelu(model, patch):
    for block in model.blocks:
        patch.setattr(block.mlp, "act", nn.GELU())


def other_eps(model, patch):
    patch.setattr(model.blocks[1].norm1, "eps", 1e-5)


def without_qk_norm(model, patch):
    patch.setattr(model.blocks[0].attn, "k_norm", nn.Identity())


def first_instead_of_last(model, patch):
    patch.setattr(TextTower, "pooled", lambda model, tokens, mask: tokens[:, 0])


def pooled_before_the_final_norm(model, patch):
    model.norm = nn.Identity()


def without_qk_norm_in_map(model, patch):
    model.attn_pool.q_norm = nn.Identity()


def probe_added_to_what_it_finds(model, patch):
    model.attn_pool.proj.register_forward_hook(lambda module, inputs, out: out + model.attn_pool.latent)


def map_without_its_mlp(model, patch):
    model.attn_pool.mlp = None


MUTANTS = {
    without_mask_in_attention: ("last", True),
    without_mask_in_soft_moe: ("last", True),
    without_mask_in_pooling: ("map", True),
    without_the_end_token: ("last", True),
    through_the_last_end: ("last", True),
    other_gelu: ("last", False),
    other_eps: ("last", False),
    without_qk_norm: ("last", False),
    first_instead_of_last: ("last", False),
    pooled_before_the_final_norm: ("last", False),
    without_qk_norm_in_map: ("map", False),
    probe_added_to_what_it_finds: ("map", False),
    map_without_its_mlp: ("map", False),
}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_mistakes_are_caught(mutant, monkeypatch):
    pool, moe = MUTANTS[mutant]
    model = tower(pool, "mask", moe)
    mutant(model, monkeypatch)
    rows = [row[:length] for row, length in zip(TOKEN_IDS.numpy(), LENGTHS, strict=True)]
    found = model(TOKEN_IDS).detach().numpy()
    monkeypatch.undo()
    assert np.abs(found - np.stack([by_hand(tower(pool, "mask", moe), row) for row in rows])).max() > 1e-7


def test_the_start_is_the_references():
    torch.manual_seed(0)
    built = TextTower(16, 500, 64, 2, 1, 256, 48, pool="map")
    deviations = {
        built.token_embedding.weight: 64**-0.5,
        built.positional_embedding: 0.02,
        built.head.weight: 64**-0.5,
        built.blocks[0].attn.qkv.weight: 64**-0.5,
        built.blocks[0].mlp.fc1.weight: (2 / 320) ** 0.5,
        built.blocks[0].mlp.fc1.bias: 1e-6,
        built.attn_pool.kv.weight: 64**-0.5,
        built.attn_pool.latent: (2 / 65) ** 0.5,
        built.attn_pool.mlp.fc2.bias: 1e-6,
    }
    for parameter, std in deviations.items():
        assert parameter.std().item() == pytest.approx(std, rel=4 / parameter.numel() ** 0.5)
    assert not any((built.head.bias.any(), built.attn_pool.q.bias.any(), built.blocks[0].attn.qkv.bias.any()))
    norms = [module for module in built.modules() if isinstance(module, LayerNorm)]
    assert {norm.eps for norm in norms} == {1e-6}
    assert not any("q_norm.bias" in name or "k_norm.bias" in name for name in built.state_dict())


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for enable in (False, True):
        model = tower("map", "mask", moe=True).train()
        model.set_grad_checkpointing(enable)
        model(TOKEN_IDS).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients)


def test_the_mask_works_in_half_precision_and_under_autocast():
    model = tower("map", "mask", moe=True).float()
    expected = model(TOKEN_IDS)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(TOKEN_IDS).float(), expected, rtol=0.1, atol=0.3)
    found = model.bfloat16()(TOKEN_IDS)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.3)


EXPORTED = """
import torch
from softmoe_clip.config import MoEConfig
from softmoe_clip.models.text import TextTower
from softmoe_clip.moe import install
for pool in ("last", "map"):
    tower = TextTower(7, 20, 16, 2, 2, 24, 12, pool=pool, padding="mask", eos_id=1).eval()
    install(tower, MoEConfig(layers=[1], num_experts=3))
    token_ids = torch.tensor([[5, 9, 1, 4, 4, 1, 8], [2, 3, 4, 5, 6, 7, 1], [3, 1, 1, 1, 1, 1, 1]])
    exported = torch.export.export(tower, (token_ids,), dynamic_shapes=({0: torch.export.Dim("b", min=1, max=64)},))
    torch.testing.assert_close(exported.module()(token_ids[:2]), tower(token_ids[:2]))
    compiled = torch.compile(tower, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(token_ids), tower(token_ids))
"""


@pytest.mark.slow
def test_the_tower_is_exported_for_any_batch_and_compiled_in_one_graph():
    # In a process of its own: the shape checks that the tests switch on cannot be compiled.
    subprocess.run([sys.executable, "-c", EXPORTED], check=True)


def test_routing_is_reported_under_the_text_towers_name():
    with collect_routing() as collected:
        tower("last", "mask", moe=True)(TOKEN_IDS)
    assert list(collected.means()) == ["text/block_0", "text/block_1"]


def test_captions_longer_than_the_context_are_refused():
    with pytest.raises(ValueError, match="captions of 8 ids do not fit a context_length of 7"):
        tower()(torch.zeros(1, 8, dtype=torch.long))


def test_masking_needs_an_end_token():
    with pytest.raises(ValueError, match="give the text tower an eos_id"):
        TextTower(LENGTH, VOCABULARY, 16, 2, 1, 24, 12, padding="mask")
