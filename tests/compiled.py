"""A program: compile or export layers and towers, and compare with the plain ones.

It runs as a process of its own, since the shape checks that the tests switch on cannot be compiled. Its argument is
one of the functions; test_compile.py starts it.
"""

import sys
from contextlib import nullcontext

import timm
import torch
import torch._dynamo.testing
from torch import nn

from softmoe_clip.config import MoEConfig
from softmoe_clip.models.text import TextTower
from softmoe_clip.moe import collect_routing, install
from softmoe_clip.moe.install import new_layer

ROUTERS = {
    "soft": {},
    "soft_uniform": {},
    "uniform_soft": {},
    "uniform": {},
    "identity": {"slots_per_expert": 3},
    "tokens_choice": {"top_k": 2, "bpr": True, "noise_std": 1.0, "capacity_multiple_of": 1},
    "experts_choice": {"noise_std": 1.0, "capacity_multiple_of": 1},
    "hash": {},
    "sinkhorn": {},
}
SOFT = ("soft", "soft_uniform", "uniform_soft", "uniform", "identity")
IDS = torch.tensor([[5, 9, 1, 4, 4, 1, 8], [2, 3, 4, 5, 6, 7, 1], [3, 1, 1, 1, 1, 1, 1], [6, 2, 9, 1, 1, 1, 1]])


def moved(module: nn.Module) -> nn.Module:
    """Give every weight a value of its own."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return module


def layer(router: str, **more) -> nn.Module:
    return moved(new_layer(MoEConfig(router=router, num_experts=3, **ROUTERS[router] | more), 16, 24))


def towers() -> dict[str, tuple[nn.Module, torch.Tensor]]:
    """Image towers of timm and open_clip, our text tower, each with experts, and an input for it."""
    from open_clip.transformer import VisionTransformer

    import softmoe_clip.plugin  # noqa: F401  makes softmoe_vit_* known

    found = {}
    for pool, positions in (("avg", "learn"), ("map", "sincos2d")):
        names = {"global_pool": pool, "pos_embed": positions, "num_classes": 12, "depth": 2, "embed_dim": 32}
        found[f"timm {pool}"] = timm.create_model("softmoe_vit_demo_patch8_64", **names), torch.randn(4, 3, 64, 64)
    native = VisionTransformer(32, 8, 32, 2, 2, 4.0, output_dim=12)
    install(native, MoEConfig(num_experts=3))
    found["native"] = native, torch.randn(4, 3, 32, 32)
    for pool, padding in (("last", "mask"), ("map", "mask"), ("last", "attend")):
        text = TextTower(7, 20, 16, 2, 2, 24, 12, pool=pool, padding=padding, eos_id=1)
        install(text, MoEConfig(num_experts=3))
        found[f"text {pool} {padding}"] = text, IDS
    return {name: (moved(tower), inputs) for name, (tower, inputs) in found.items()}


def results(run, module: nn.Module, inputs: tuple, collect: bool) -> list[torch.Tensor]:
    """Return the output, what the collector got, and every gradient."""
    torch.manual_seed(1)  # noise of routers
    with collect_routing() if collect else nullcontext() as collected:
        out = run(*inputs)
    loss = out.square().sum()
    found = [out]
    if collect:
        loss = loss + collected.aux_loss()
        numbers = [value for reports in collected.reports.values() for report in reports for value in report.values()]
        assert numbers
        found += [collected.aux_loss(), *numbers]
    loss.backward()
    found += [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    module.zero_grad(set_to_none=True)
    return found


def check_compiled(module: nn.Module, *inputs: torch.Tensor, backend: str) -> None:
    """Compare forward and backward, without a collector and with one, for two batch sizes (inductor: for one)."""
    torch._dynamo.reset()  # else layers of one class share their budget of graphs
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    sizes = (inputs[0].shape[0],) if backend == "inductor" else (inputs[0].shape[0], 2)  # its graphs take long
    for rows in sizes:
        for collect in (False, True, False):
            part = tuple(tensor[:rows] for tensor in inputs)
            expected = results(module, module, part, collect)
            assert len(expected) > 3
            torch.testing.assert_close(results(compiled, module, part, collect), expected, rtol=1e-4, atol=1e-5)


def check_exported(module: nn.Module, *inputs: torch.Tensor) -> None:
    """Export with any batch, run other batches, and compare."""
    module.eval()
    exported = torch.export.export(module, inputs, dynamic_shapes=tuple({0: torch.export.Dim("b")} for _ in inputs))
    for rows in (1, 3, 4):
        part = tuple(tensor[:rows] for tensor in inputs)
        torch.testing.assert_close(exported.module()(*part), module(*part), rtol=1e-5, atol=1e-6)


def layers_in_one_graph() -> None:
    for router in ROUTERS:
        tokens = torch.randn(4, 7, 16)
        check_compiled(layer(router), tokens, backend="aot_eager")
        if router in SOFT:
            check_compiled(layer(router), tokens, torch.rand(4, 7) > 0.3, backend="aot_eager")
    for router in ("tokens_choice", "experts_choice"):
        check_compiled(layer(router, group_size=2), torch.randn(4, 7, 16), backend="aot_eager")


def towers_in_one_graph() -> None:
    for tower, inputs in towers().values():
        check_compiled(tower, inputs, backend="aot_eager")


def both_towers_in_one_graph() -> None:
    from softmoe_clip.config import ModelConfig
    from softmoe_clip.models.create import create_model

    class Similarities(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, images, token_ids):
            out = self.model(images, token_ids)
            return out["logit_scale"] * out["image_features"] @ out["text_features"].T

    model = Similarities(moved(create_model(ModelConfig("SoftMoE-demo"), 20, 7)))
    check_compiled(model, torch.randn(4, 3, 64, 64), IDS, backend="aot_eager")


def a_new_collector_each_step_needs_no_new_graph() -> None:
    for router in ("soft", "tokens_choice"):
        module, tokens = layer(router), torch.randn(4, 7, 16)
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(module, fullgraph=True, backend=counter)
        for step in range(30):
            torch.testing.assert_close(
                results(compiled, module, (tokens,), step % 2 == 0), results(module, module, (tokens,), step % 2 == 0)
            )
        assert counter.frame_count <= 2


def layers_are_exported() -> None:
    for router in ROUTERS:
        tokens = torch.randn(4, 7, 16)
        check_exported(layer(router), tokens)
        if router in SOFT:
            check_exported(layer(router), tokens, torch.rand(4, 7) > 0.3)


def towers_are_exported() -> None:
    for tower, inputs in towers().values():
        check_exported(tower, inputs)


def sparse_towers_are_exported() -> None:
    from open_clip.transformer import VisionTransformer

    for router in ("tokens_choice", "experts_choice", "hash", "sinkhorn"):
        native = VisionTransformer(32, 8, 32, 2, 2, 4.0, output_dim=12)
        install(native, MoEConfig(router=router, num_experts=3))
        check_exported(moved(native), torch.randn(4, 3, 32, 32))


def inductor() -> None:
    made = towers()
    for name in ("timm avg", "text last mask"):
        check_compiled(*made[name], backend="inductor")
    check_compiled(layer("tokens_choice", noise_std=0.0), torch.randn(4, 7, 16), backend="inductor")


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    globals()[sys.argv[1]]()
