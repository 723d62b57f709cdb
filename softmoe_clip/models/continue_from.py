"""Start a new model from the weights of another one, also at another resolution."""

from torch import Tensor, nn

from softmoe_clip.models.alike import differences, same_tokenizer, shapes_of
from softmoe_clip.models.create import preprocessing_of, see_pictures_as
from softmoe_clip.models.store import load
from softmoe_clip.moe.expert_parallel import OtherExperts, own_share

NEW_WHERE_MISSING = {"logit_bias"}  # a model trained with the softmax loss has none


def continue_from(model: nn.Module, source: str, tokenizer) -> None:
    """Fill `model` with the weights of `source` (whatever `load` takes), and let it see pictures as that did.

    Image positions are resized, slots are kept.
    Raises ValueError where the two are not built alike, or where the tokenizer is not the one of `source`.
    """
    loaded = load(source)
    ours, theirs = model.state_dict(), loaded.model.state_dict()
    resize_positions(theirs, model)
    try:
        theirs = own_share(theirs, model)
    except OtherExperts as error:
        raise ValueError(f"init: {source} is not built as `model` says: {error}") from None
    if different := differences(shapes_of(ours), shapes_of(theirs), NEW_WHERE_MISSING):
        raise ValueError(f"init: {source} is not built as `model` says: {different}")
    # After the weights: another vocabulary size has been named by now.
    if not same_tokenizer(tokenizer, loaded.tokenizer):
        raise ValueError(f"init: {source} was trained with another tokenizer: use the one in its model folder")
    model.load_state_dict({name: theirs.get(name, tensor) for name, tensor in ours.items()})
    see_pictures_as(model, preprocessing_of(loaded.model))


def resize_positions(state: dict[str, Tensor], model: nn.Module) -> None:
    """Resize the positions of an image tower, in place: timm's way for its trunks, open_clip's for its own towers."""
    import open_clip
    from timm.layers import resample_abs_pos_embed

    open_clip.model.resize_pos_embed(state, model)
    trunk, name = getattr(model.visual, "trunk", None), "visual.trunk.pos_embed"
    positions = getattr(trunk, "pos_embed", None)
    if positions is not None and name in state and state[name].shape != positions.shape:
        grid = trunk.patch_embed.grid_size
        state[name] = resample_abs_pos_embed(state[name], new_size=grid, num_prefix_tokens=trunk.num_prefix_tokens)
