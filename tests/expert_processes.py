"""What the processes of test_expert_parallel.py do; a module of its own, so that they need not import pytest."""

import os
import socket
from contextlib import contextmanager
from multiprocessing import get_context

import torch
import torch.distributed as dist
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from softmoe_clip.config import MoEConfig
from softmoe_clip.moe import expert_parallel
from softmoe_clip.moe.expert_parallel import ExpertGroup, own_share, spread_over, spread_parameters
from softmoe_clip.moe.install import new_layer
from softmoe_clip.training.distributed import PATIENCE
from softmoe_clip.training.expert_parallel import make_mesh

SECONDS = 300
# What the process that others are forked from imports, for layers alone and for runs. There is one such process for all
# tests of a session; that which only needs layers must not have started it where runs come later.
LAYERS_ALONE = ("expert_processes",)
WHOLE_PROGRAM = ("softmoe_clip.training.loop", "softmoe_clip.plugin", "open_clip", "accelerate")
WIDTH, HIDDEN, NUM_TOKENS, NUM_IMAGES = 6, 8, 9, 8
CASES = {
    "soft": {"slots_per_expert": 2},
    "soft_uniform": {},
    "uniform_soft": {},
    "uniform": {},
    "identity": {"slots_per_expert": 3},
    "tokens_choice": {"top_k": 2, "group_size": 2},
    "experts_choice": {},
    "hash": {},
    "sinkhorn": {},
    "base": {},
}
SOFT = ("soft", "soft_uniform", "uniform_soft", "uniform", "identity")


def moe_config(router):
    return MoEConfig(router=router, layers=[0], num_experts=4, **CASES[router])


def fresh_layer(router, group=None):
    torch.manual_seed(3)
    with spread_over(group):
        return new_layer(moe_config(router), WIDTH, HIDDEN)


def layers(router, group):
    """A whole layer whose experts differ, and this process's share of the same one, in float64."""
    whole, spread = fresh_layer(router).double(), fresh_layer(router, group).double()
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    spread.load_state_dict(own_share(whole.state_dict(), spread))
    return whole, spread


def inputs(router):
    """Tokens of all processes, weights that make a loss of the outputs, and a mask where the router takes one."""
    generator = torch.Generator().manual_seed(1)
    tokens, probe = torch.randn(2, NUM_IMAGES, NUM_TOKENS, WIDTH, generator=generator, dtype=torch.float64)
    mask = torch.rand(NUM_IMAGES, NUM_TOKENS, generator=generator) < 0.7
    return tokens, probe, [mask] if router in SOFT else []


def outcome(layer, tokens, probe, mask, run=None):
    """The layer's output, and the gradients of its tokens and parameters."""
    tokens = tokens.clone().requires_grad_()
    layer.zero_grad()
    output = layer(tokens, *mask) if run is None else run(layer, tokens, *mask, use_reentrant=False)
    (output * probe).sum().backward()
    return output.detach(), tokens.grad, {name: p.grad for name, p in layer.named_parameters()}


def compare(router, group, run=None):
    """Compare a spread layer on this process's images with the whole layer on all images."""
    whole, spread = layers(router, group)
    tokens, probe, mask = inputs(router)
    output, token_gradient, gradients = outcome(whole, tokens, probe, mask)
    own = [part.chunk(group.size)[group.rank] for part in (tokens, probe, *mask)]
    own_output, own_token_gradient, own_gradients = outcome(spread, own[0], own[1], own[2:], run)
    exact = {"rtol": 1e-10, "atol": 1e-10}
    assert_close(own_output, output.chunk(group.size)[group.rank], **exact)
    assert_close(own_token_gradient, token_gradient.chunk(group.size)[group.rank], **exact)
    expected = own_share({name: g for name, g in gradients.items() if g is not None}, spread)
    assert {name for name, g in own_gradients.items() if g is not None} == expected.keys()
    for name in expected:
        if name not in spread_parameters(spread):  # each process has only what its own images want of these
            dist.all_reduce(own_gradients[name])
        assert_close(own_gradients[name], expected[name], **exact, msg=lambda text, name=name: f"{name}: {text}")


@contextmanager
def counted_exchanges():
    """List how many numbers each all-to-all inside takes, those that stay in their process too."""
    sent, exchange = [], dist.all_to_all_single

    def counting(received, parts, **options):
        sent.append(parts.numel())
        return exchange(received, parts, **options)

    dist.all_to_all_single = counting
    yield sent
    dist.all_to_all_single = exchange


def is_caught(router, group):
    try:
        compare(router, group)
    except AssertionError:
        return True
    return False


def layer_process(rank, num_processes, folder):
    """Be one of several processes that share the experts of every kind of layer."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=num_processes)
    group = ExpertGroup(dist.group.WORLD, rank, dist.get_world_size())
    for router in CASES:
        with counted_exchanges() as sent:
            compare(router, group)
        if (
            router == "soft"
        ):  # docs/scaling.md counts on it: each slot goes to its expert and back, forward and backward
            num_slots = 4 * CASES["soft"]["slots_per_expert"]
            assert sent == [NUM_IMAGES // num_processes * num_slots * WIDTH] * 4
    compare("soft", group, run=checkpoint)
    assert {len(p) for name, p in fresh_layer("soft", group).named_parameters() if "experts" in name} == {
        4 // num_processes
    }
    mesh, first = make_mesh(2, num_processes), rank - rank % 2
    assert dist.get_process_group_ranks(mesh.row.processes) == [first, first + 1]
    assert dist.get_process_group_ranks(mesh.column) == [*range(rank % 2, num_processes, 2)]
    assert (mesh.row.rank, mesh.row.size, mesh.row_number) == (rank % 2, 2, rank // 2)
    for processes in (mesh.row.processes, mesh.column):  # they wait as long for the main process as all do
        assert processes._get_backend(torch.device("cpu")).options._timeout == PATIENCE
    half = torch.arange(2.0 * num_processes, dtype=torch.bfloat16).view(num_processes, 2) + 100 * rank
    received = expert_parallel.all_to_all(half, dist.group.WORLD)
    assert received[:, 0].tolist() == [2 * rank + 100 * other for other in range(num_processes)]
    # A backward pass that leaves the gradients where they are gives the right loss, and the wrong experts.
    expert_parallel._Exchange.backward = staticmethod(lambda ctx, grad: (grad, None))
    caught = torch.tensor(float(is_caught("soft", group)))
    dist.all_reduce(caught)
    torch.save({"size": dist.get_world_size(), "caught": caught.item()}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def train_process(rank, num_processes, port, configs):
    """Be one process of several, in one run after the other."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_processes, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
    os.environ["SOFTMOE_CLIP_QUIET"] = "1"
    torch.set_num_threads(1)
    from softmoe_clip.training.loop import train

    for config in configs:
        train(config)
    assert dist.get_world_size() == num_processes
    dist.destroy_process_group()


def run_processes(target, num_processes, *arguments, preload=WHOLE_PROGRAM):
    """Start as many processes from one that has imported everything, and wait for them."""
    context = get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    processes = [
        context.Process(target=target, args=(rank, num_processes, *arguments)) for rank in range(num_processes)
    ]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(SECONDS)
        assert [process.exitcode for process in processes] == [0] * num_processes
    finally:
        for process in processes:
            process.kill()


def train_on(num_processes, *configs):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run_processes(train_process, num_processes, port, configs)
