"""What an optimizer keeps in its parameter groups follows the parameters, however they are grouped."""

import pytest
import torch
from safetensors.torch import load_file
from timm.optim import create_optimizer_v2

from softmoe_clip.training.checkpoint import Progress, load_newest, save_checkpoint
from softmoe_clip.training.distributed import make_accelerator
from softmoe_clip.training.loop import train
from softmoe_clip.training.optimizer_state import fill_optimizer, innermost, optimizer_tensors, toy, toy_steps
from softmoe_clip.training.setup import make_stepper, set_up

IN_GROUPS = ["adan", "lamb", "lookahead_lamb"]


def two_groups(name):
    return toy(lambda groups: create_optimizer_v2(groups, name, lr=0.01))


def four_groups(name):
    """The same settings for each parameter, in other groups."""

    def make(groups):
        alone = [group | {"params": [parameter]} for group in groups for parameter in group["params"]]
        return create_optimizer_v2(alone[::-1], name, lr=0.01)

    return toy(make)


@pytest.mark.parametrize("name", IN_GROUPS)
@pytest.mark.parametrize(("before", "after"), [(two_groups, four_groups), (four_groups, two_groups)])
def test_parameters_in_other_groups_go_on_to_the_same_bits(name, before, after):
    (model, optimizer), (twin, again) = before(name), after(name)
    toy_steps(model, optimizer, 3)
    twin.load_state_dict(model.state_dict())
    fill_optimizer(twin, again, {key: tensor.clone() for key, tensor in optimizer_tensors(model, optimizer).items()})
    assert [int(group["step"]) for group in innermost(again).param_groups] == [3] * len(innermost(again).param_groups)
    toy_steps(model, optimizer, 4)
    toy_steps(twin, again, 4)
    assert all(torch.equal(twin[key], parameter) for key, parameter in model.items())


@pytest.mark.parametrize("name", IN_GROUPS)
def test_a_checkpoint_with_a_copy_for_each_group_is_read_too(name):
    model, optimizer = two_groups(name)
    toy_steps(model, optimizer, 3)
    tensors = optimizer_tensors(model, optimizer)
    older = {key: tensor for key, tensor in tensors.items() if not key.startswith("group all|")}
    for key in tensors.keys() - older.keys():
        older |= {key.replace("all", number): tensors[key] for number in ("0", "1")}
    for make in (two_groups, four_groups):
        twin, again = make(name)
        fill_optimizer(twin, again, older)
        found = optimizer_tensors(twin, again)
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[key], tensors[key]) for key in tensors)


def test_groups_that_differ_are_refused_for_what_they_are(tmp_path, monkeypatch):
    model, optimizer = two_groups("lamb")
    toy_steps(model, optimizer, 3)
    per_group = {"group 0|step": torch.tensor(6.0), "group 1|step": torch.tensor(2.0)}
    monkeypatch.setattr("softmoe_clip.training.checkpoint.optimizer_tensors", lambda *_: per_group)
    save_checkpoint(tmp_path, model, optimizer, Progress(3, 24), keep_last=1)
    told = "step_00000003 cannot be gone on from, as the optimizer's parameter groups have not all the same step: use"
    with pytest.raises(ValueError, match=told):
        load_newest(tmp_path, *two_groups("lamb"), print)
    optimizer.param_groups[1]["step"] = torch.tensor(2.0)
    with pytest.raises(ValueError, match="parameter groups have not all the same step"):
        optimizer_tensors(model, optimizer)


@pytest.mark.parametrize("settings", [("optim.lr_scale={'^text[.]': 0.5}",), ("optim.weight_decay={}",)])
def test_a_branch_with_other_groups_counts_on(tiny_config, tmp_path, monkeypatch, settings):
    monkeypatch.chdir(tmp_path)
    train(tiny_config("out=trunk", "steps=2", "optim.name=lamb"))
    point = "init=trunk/checkpoints/step_00000002"
    branch = train(tiny_config("out=branch", "steps=3", "optim.name=lamb", point, *settings))
    state = load_file(branch / "checkpoints/step_00000003/optimizer.safetensors")
    assert {key: int(step) for key, step in state.items() if key.startswith("group ")} == {"group all|step": 3}


def test_an_optimizers_state_stays_where_it_was_put_when_accelerate_takes_it_over(tiny_config):
    config = tiny_config("optim.name=nadamw")
    accelerator = make_accelerator(config.precision)
    setup = set_up(config, accelerator)
    parameter = setup.towers.logit_scale
    setup.optimizer.state[parameter]["step"] = torch.zeros((), device="meta")  # cannot be moved without an error
    optimizer = make_stepper(config, setup, accelerator)[1]
    assert innermost(optimizer).state[parameter]["step"].device.type == "meta"
