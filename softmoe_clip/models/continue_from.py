"""Start a new model from the weights of another one, also at another resolution."""

from torch import Tensor, nn

from softmoe_clip.models.alike import PROBES, differences, first_not_finite, same_tokenizer, shapes_of
from softmoe_clip.models.create import preprocessing_of, see_pictures_as
from softmoe_clip.models.same_function import changed_embeddings, other_experts
from softmoe_clip.models.store import LoadedModel, load
from softmoe_clip.moe.expert_parallel import OtherExperts, own_share, spread_parameters

NEW_WHERE_MISSING = {"logit_bias"}  # a model trained with the softmax loss has none


def continue_from(model: nn.Module, source: str, tokenizer, written: dict | None = None) -> None:
    """Fill `model` with the weights of `source` (whatever `load` takes), and let it see pictures as that did.

    Image positions are resized, slots are kept. `written` is what `model` was built from.
    Raises ValueError where the two are not built alike, compute something else from the same weights, or have not the
    same tokenizer.
    """
    loaded = load(source)
    ours, theirs = model.state_dict(), loaded.model.state_dict()
    resize_positions(theirs, model)
    try:
        theirs = own_share(theirs, model)
    except OtherExperts as error:
        raise ValueError(f"init: {source} is not built as `model` says: {error}") from None
    shapes = shapes_of(ours), shapes_of(theirs)
    if different := other_experts(written, loaded.config) or differences(*shapes, NEW_WHERE_MISSING):
        raise ValueError(f"init: {source} is not built as `model` says: {different}")
    # After the weights: another vocabulary size has been named by now.
    if not same_tokenizer(tokenizer, loaded.tokenizer):
        raise ValueError(f"init: {source} was trained with another tokenizer: use the one in its model folder")
    if damaged := first_not_finite(theirs):
        raise ValueError(f"init: {damaged} of {source} holds NaN or infinity: take another checkpoint of it")
    model.load_state_dict({name: theirs.get(name, tensor) for name, tensor in ours.items()})
    check_function(model, loaded, source, tokenizer)
    see_pictures_as(model, preprocessing_of(loaded.model))


def check_function(model: nn.Module, loaded: LoadedModel, source: str, tokenizer) -> None:
    """Refuse a model that computes something else from its weights than the one they come from did."""
    if spread_parameters(model):
        return  # a share of the experts alone gives no embedding
    rows = [each(list(PROBES)) for each in (tokenizer, loaded.tokenizer)]
    changed = changed_embeddings(model, loaded.model, min(rows, key=lambda row: row.shape[1]))
    if changed:
        told = " and ".join(f"{name} embeddings differ by {100 * change:.3g} %" for name, change in changed.items())
        raise ValueError(
            f"init: {source} computes something else from its weights than `model` would ({told}): its architecture "
            "must be that of model.arch also in pooling, heads, causal mask and QuickGELU"
        )


def resize_positions(state: dict[str, Tensor], model: nn.Module) -> None:
    """Resize the positions of an image tower, in place: timm's way for its trunks, open_clip's for its own towers."""
    import open_clip
    from timm.layers import resample_abs_pos_embed

    open_clip.model.resize_pos_embed(state, model)
    trunk, name = getattr(model.visual, "trunk", None), "visual.trunk.pos_embed"
    positions = getattr(trunk, "pos_embed", None)
    if positions is not None and name in state and state[name].shape != positions.shape:
        prefix = 0 if getattr(trunk, "no_embed_class", False) else trunk.num_prefix_tokens
        grid = trunk.patch_embed.grid_size
        state[name] = resample_abs_pos_embed(state[name], new_size=grid, num_prefix_tokens=prefix)
