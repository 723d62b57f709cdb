"""The part of an image tower that can be computed once for a frozen one, and the head that may still be trained."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from softmoe_clip.models.store import LoadedModel
from softmoe_clip.moe.sparse import routed_together


def trunk_name(model: nn.Module) -> str:
    """Name the trunk's parameters: timm's trunk without open_clip's head, or the whole of open_clip's own towers."""
    return "visual.trunk." if hasattr(model.visual, "trunk") else "visual."


def trunk_features(model: nn.Module, images: Float[Tensor, "b 3 y x"]) -> Float[Tensor, "b d"]:
    """Run the trunk: what the head takes, or the image embedding before it is normalised."""
    features = getattr(model.visual, "trunk", model.visual)(images)
    return features[0] if isinstance(features, tuple) else features  # CoCa's tower gives its tokens, too


def head(model: nn.Module, features: Float[Tensor, "b d"]) -> Float[Tensor, "b z"]:
    """Run what follows the trunk: open_clip's head on a timm trunk; its own towers have theirs inside."""
    return model.visual.head(features) if hasattr(model.visual, "trunk") else features


class FromFeatures(nn.Module):
    """Two towers that take the trunk's features instead of pictures, and give what open_clip's models give."""

    def __init__(self, towers: nn.Module):
        super().__init__()
        self.towers = towers

    def forward(
        self, features: Float[Tensor, "b d"] | None, token_ids: Int64[Tensor, "b l"] | None
    ) -> dict[str, Tensor | None]:
        """Head, text tower, both normalised, and the scale; None of a side that is not given."""
        out = {
            "image_features": None if features is None else F.normalize(head(self.towers, features), dim=-1),
            "text_features": None if token_ids is None else self.towers.encode_text(token_ids, normalize=True),
            "logit_scale": self.towers.logit_scale.exp(),
        }
        return out if self.towers.logit_bias is None else out | {"logit_bias": self.towers.logit_bias}


@torch.no_grad()
def check_features(loaded: LoadedModel, images: list, rows: Float[Tensor, "b d"], folder: str) -> None:
    """Refuse features that train what they hold fixed, or that another trunk made; `images` are the pictures of `rows`.

    The model is in eval mode afterwards.
    """
    trained = [name for name, parameter in loaded.model.named_parameters() if parameter.requires_grad]
    name = trunk_name(loaded.model)
    if any(parameter.startswith(name) for parameter in trained):
        raise ValueError(f'data.image_features need a frozen trunk: set freeze=["^{name[:-1]}"] with them')
    if layer := routed_together(loaded.model.visual):
        raise ValueError(
            f"data.image_features: {layer.label} routes {layer.group_size} pictures together (group_size), so that "
            "features depend on their neighbours: train with the tower in the loop"
        )
    pixels = torch.stack([loaded.transform(image) for image in images]).to(loaded.model.logit_scale.device)
    with torch.compiler.set_stance("force_eager"):  # these few pictures are not worth it
        expected = trunk_features(loaded.model.eval(), pixels).cpu()
    near = 2e-2 * expected.norm(dim=1)  # features in half precision are within it
    if expected.shape != rows.shape or not ((expected - rows).norm(dim=1) <= near).all():
        raise ValueError(
            f"data.image_features: {folder} was made by another image tower than this run's (see `init`), or its rows "
            "are not in the order of the pictures"
        )
