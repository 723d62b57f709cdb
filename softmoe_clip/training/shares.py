"""What each of several processes holds of a model, told also where they are not there yet."""

import math

from torch import nn

from softmoe_clip.config import TrainConfig
from softmoe_clip.moe.expert_parallel import ExpertGroup
from softmoe_clip.moe.experts import Experts

# Of processes that weights may be shared out over, where none has been launched to count.
EXAMPLES = (2, 8, 64)


def sharings(config: TrainConfig, num_processes: int) -> dict[str, int]:
    """Return the numbers of processes worth telling what each of them holds, in words; none where each holds all."""
    if config.expert_parallel > 1:  # any multiple of these holds the same
        return {f"in each process, experts over {config.expert_parallel}": config.expert_parallel}
    if config.sharding == "full":
        return {f"in each of {n} processes": n for n in ([num_processes] if num_processes > 1 else EXAMPLES)}
    return {}


def largest_shares(model: nn.Module, config: TrainConfig, num_processes: int) -> dict[str, int]:
    """Return how many numbers of each parameter lie in that one of so many processes which holds most of it.

    The model may be shared out already. Raises ValueError where its experts cannot be.
    """
    shapes = {name: [*parameter.shape] for name, parameter in model.named_parameters()}
    for module_name, module in model.named_modules():
        if isinstance(module, Experts):
            for name, parameter in module.named_parameters(prefix=module_name):
                num_experts = module.num_experts
                if num_processes > 1 and config.expert_parallel > 1:
                    num_experts = len(ExpertGroup(None, 0, config.expert_parallel).share(num_experts))
                shapes[name] = [num_experts, *parameter.shape[1:]]
    if config.sharding == "full":
        for name, shape in shapes.items():
            if shape and "." in name:  # `shard` leaves scalars, and what lies outside of towers, in every process
                shape[0] = math.ceil(shape[0] / num_processes)
    return {name: math.prod(shape) for name, shape in shapes.items()}
