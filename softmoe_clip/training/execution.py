"""How towers are run, which changes no number but for float error: computed again for backward, and compiled."""

import open_clip
from open_clip.transformer import CustomResidualAttentionBlock
from torch import Tensor, nn

from softmoe_clip.config import TrainConfig

BACKEND = "inductor"  # of torch.compile
TOWERS = ("visual", "text", "transformer", "text_decoder")  # as open_clip's models call them


def set_execution(model: nn.Module, config: TrainConfig) -> None:
    """Prepare the towers for what the config says of memory and speed; names of parameters stay as they are."""
    if config.grad_checkpointing:
        checkpoint_gradients(model)
    if config.compile:
        for name in TOWERS:
            if isinstance(tower := getattr(model, name, None), nn.Module):
                tower.compile(backend=BACKEND)  # in place: torch.compile(tower) would rename all within


class CustomBlock(CustomResidualAttentionBlock):
    """A block of open_clip's with qk-norm, as towers that compute it again call it: with what other blocks take."""

    def forward(self, x: Tensor, *others: Tensor | None, attn_mask: Tensor | None = None) -> Tensor:
        return super().forward(x, others[-1] if others else attn_mask)


def checkpoint_gradients(model: nn.Module) -> None:
    """Let both towers keep only their blocks' inputs; ValueError, one sentence, for a tower that cannot."""
    for block in model.modules():
        if type(block) is CustomResidualAttentionBlock:
            block.__class__ = CustomBlock  # all else stays: names, weights, hooks
    trunk = getattr(model.visual, "trunk", None)
    try:
        if trunk is not None:  # open_clip only warns of it
            trunk.set_grad_checkpointing(True)
        if isinstance(getattr(model, "text", None), open_clip.hf_model.HFTextEncoder):
            # The other form warns, and does without gradients where only a part of a tower is trained.
            model.text.transformer.gradient_checkpointing_enable({"use_reentrant": False})
            model.visual.set_grad_checkpointing(True)
        else:
            model.set_grad_checkpointing(True)
    except (AssertionError, AttributeError, NotImplementedError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"grad_checkpointing: a tower has no such thing ({reason}): leave it out") from None
