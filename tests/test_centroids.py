"""Slots at the centroids of a layer's tokens: found, kept to real tokens, and nearer to the dense MLP."""

import pytest
import torch
from timm.layers import Mlp

from softmoe_clip.moe import SoftMoE
from softmoe_clip.moe.centroids import SCALES, centroids, set_slots, slots_from_tokens


def clusters(num_clusters=4, num_tokens=400, width=16, spread=0.05):
    """Tokens around directions that are at right angles; how long they are means nothing."""
    torch.manual_seed(0)
    directions = torch.eye(width)[:num_clusters]
    of = torch.arange(num_tokens) % num_clusters
    return directions, (directions[of] + spread * torch.randn(num_tokens, width)) * (1 + of[:, None])


def test_centroids_are_the_directions_around_which_tokens_lie():
    directions, tokens = clusters()
    found = centroids(tokens, 12)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(12))
    nearest = found @ directions.T
    assert (nearest.max(1).values > 0.95).all()  # none lies between two clusters


def test_each_further_round_of_clustering_brings_tokens_no_further_from_their_centroid(monkeypatch):
    tokens = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    unit, near = torch.nn.functional.normalize(tokens, dim=-1), []
    for rounds in range(6):
        monkeypatch.setattr("softmoe_clip.moe.centroids.NUM_ROUNDS", rounds)
        near.append((unit @ centroids(tokens, 10).T).max(1).values.mean().item())
    assert near == sorted(near)
    assert near[-1] > near[0] + 0.01


def test_fewer_tokens_than_slots_are_one_sentence():
    with pytest.raises(ValueError, match="12 centroids need as many tokens, and 11 were seen: give more pictures"):
        centroids(torch.randn(11, 4), 12)


def dense_and_soft():
    """An MLP, and a layer whose experts are copies of it."""
    torch.manual_seed(0)
    mlp = Mlp(16, 24, act_layer=torch.nn.GELU)
    layer = SoftMoE(16, 4, 2, hidden=24, activation="gelu")
    for weights, biases, linear in (
        (layer.experts.w_in, layer.experts.b_in, mlp.fc1),
        (layer.experts.w_out, layer.experts.b_out, mlp.fc2),
    ):
        weights.data.copy_(linear.weight.T.expand_as(weights))
        biases.data.copy_(linear.bias.expand_as(biases))
    return mlp, layer


def distance(layer, mlp, tokens):
    with torch.no_grad():
        return (layer(tokens) - mlp(tokens)).square().mean().item()


def test_such_slots_bring_copies_nearer_to_the_mlp_than_fresh_ones_at_any_scale():
    mlp, layer = dense_and_soft()
    tokens = clusters(8)[1].view(8, 50, 16)
    fresh = []
    for scale in (1.0, *SCALES):
        layer.router_scale.data.fill_(scale)
        fresh.append(distance(layer, mlp, tokens))
    set_slots(layer, mlp, tokens)
    assert layer.router_scale.item() in SCALES
    assert distance(layer, mlp, tokens) < 0.5 * min(fresh)
    torch.testing.assert_close(layer.slot_embed.norm(dim=0), torch.full((4, 2), 4**-0.5))


def test_padding_has_no_part_in_them():
    mlp, layer = dense_and_soft()
    tokens = clusters()[1].view(8, 50, 16)
    mask = torch.arange(50) < torch.randint(20, 50, (8, 1), generator=torch.Generator().manual_seed(0))
    found = []
    for padding in (0.0, 100.0):
        set_slots(layer, mlp, tokens.masked_fill(~mask[..., None], padding), mask)
        found.append((layer.slot_embed.detach().clone(), layer.router_scale.item()))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


def test_a_layer_sees_what_the_layers_before_it_give_and_is_set_once():
    torch.manual_seed(0)
    pairs = [dense_and_soft() for _ in range(2)]
    (_, first), (mlp, layer) = pairs
    tokens = torch.randn(8, 50, 16)
    with slots_from_tokens({layer: mlp for mlp, layer in pairs}):
        layer(first(tokens))
        layer(first(torch.randn(8, 50, 16)))
    _, again = dense_and_soft()
    set_slots(again, mlp, first(tokens))
    assert torch.equal(layer.slot_embed, again.slot_embed)
    assert not layer._forward_pre_hooks
    assert not first._forward_pre_hooks
