"""Learning rates against the reference's schedules, and which parameters decay."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from softmoe_clip.config import CONTRASTIVE_DECAY, ModelConfig, OptimConfig
from softmoe_clip.models.create import create_model
from softmoe_clip.training.optim import adamw, decay_of, make_optimizer, schedule
from softmoe_clip.training.optimizer_state import fill_optimizer, optimizer_tensors, rehearse, toy, toy_steps

GOLDEN = np.load(Path(__file__).parent / "golden/lr_schedules.npz")
REFERENCE = {
    "jft": (OptimConfig(lr=1e-3, schedule="rsqrt", warmup=10_000, cooldown=50_000, timescale=10_000), 4_000_000),
    "laion": (OptimConfig(lr=1e-3, schedule="rsqrt", warmup=20_000, cooldown=20_000, timescale=10_000), 750_000),
}


@pytest.mark.parametrize("name", REFERENCE)
def test_rsqrt_with_warmup_and_cooldown_is_the_references_schedule(name):
    learning_rate = schedule(*REFERENCE[name])
    found = [learning_rate(step) for step in GOLDEN[f"{name}_steps"].tolist()]
    np.testing.assert_allclose(found, GOLDEN[f"{name}_lr"], rtol=1e-10, atol=1e-18)


def test_a_constant_rate_cools_down_on_a_line_as_the_references_linear_schedule_does():
    learning_rate = schedule(OptimConfig(lr=8e-4, schedule="constant", warmup=100, cooldown=900), 1000)
    found = [learning_rate(step) for step in GOLDEN["linear_steps"].tolist()]
    np.testing.assert_allclose(found, GOLDEN["linear_lr"], rtol=1e-10, atol=1e-18)


def test_cosine_rises_on_a_line_and_falls_to_zero():
    learning_rate = schedule(OptimConfig(lr=2.0, schedule="cosine", warmup=10), 110)
    assert [learning_rate(step) for step in (0, 5, 10)] == [0, 1, 2]
    assert learning_rate(60) == pytest.approx(1)
    assert learning_rate(110) == pytest.approx(0, abs=1e-12)
    falling = [learning_rate(step) for step in range(10, 111)]
    assert falling == sorted(falling, reverse=True)


def test_without_warmup_the_first_step_learns_at_the_full_rate():
    for name in ("cosine", "rsqrt", "constant"):
        assert schedule(OptimConfig(lr=0.5, schedule=name, warmup=0), 10)(0) == 0.5


def test_warmup_and_cooldown_must_fit_into_the_run():
    schedule(OptimConfig(schedule="rsqrt", warmup=60, cooldown=40), 100)
    with pytest.raises(ValueError, match=r"optim\.warmup 60 and optim\.cooldown 41 do not fit into 100 steps"):
        schedule(OptimConfig(schedule="rsqrt", warmup=60, cooldown=41), 100)


@pytest.fixture(scope="module")
def demo():
    return create_model(ModelConfig("SoftMoE-demo", init_logit_scale=2.3, init_logit_bias=-10.0), 300, 12)


def test_exactly_the_matrices_decay(demo):
    decays = {name: decay_of(name, CONTRASTIVE_DECAY) for name, _ in demo.named_parameters()}
    assert set(decays.values()) == {0.0, 0.1}
    for name, parameter in demo.named_parameters():
        # Expert biases (e, f) and slot embeddings (d, e, s) have more dimensions than one, but are no matrices.
        is_matrix = name.endswith((".weight", ".w_in", ".w_out", "text_projection", "in_proj_weight"))
        is_matrix &= parameter.ndim > 1 and "token_embedding" not in name
        assert decays[name] == (0.1 if is_matrix else 0.0), name


def test_the_names_that_must_not_decay_are_there(demo):
    names = [name for name, _ in demo.named_parameters() if decay_of(name, CONTRASTIVE_DECAY) == 0]
    for part in (
        "slot_embed",
        "router_scale",
        "logit_scale",
        "logit_bias",
        "experts.b_in",
        "experts.b_out",
        "norm1.weight",
        "q_norm.weight",
        "pos_embed",
        "positional_embedding",
        "token_embedding.weight",
        "ln_final.weight",
        "attn.qkv.bias",
        "text_projection.bias",
    ):
        assert any(name.endswith(part) for name in names), part


@pytest.mark.parametrize(
    "name",
    [
        "visual.trunk.blocks.0.ls1.gamma",
        "visual.trunk.cls_token",
        "visual.class_embedding",
        "visual.ln_pre.weight",
        "visual.trunk.attn_pool.latent",
        "visual.trunk.attn_pool.probe",
        "text.transformer.embeddings.LayerNorm.weight",
        "text.transformer.embeddings.position_embeddings.weight",
        "text.transformer.embeddings.word_embeddings.weight",
    ],
)
def test_what_other_towers_call_norms_positions_and_embeddings_does_not_decay(name):
    assert decay_of(name, CONTRASTIVE_DECAY) == 0


@pytest.mark.parametrize(
    "name", ["visual.proj", "visual.conv1.weight", "text.transformer.encoder.layer.0.output.dense.weight"]
)
def test_what_other_towers_call_matrices_decays(name):
    assert decay_of(name, CONTRASTIVE_DECAY) == 0.1


def test_the_first_matching_rule_wins_and_no_rule_means_no_decay():
    rules = {"bias": 0.0, "head": 0.3, ".*weight": 0.1}
    assert [decay_of(name, rules) for name in ("head.bias", "head.weight", "weight", "x")] == [0.0, 0.3, 0.1, 0.0]


def test_the_optimizer_holds_each_trained_parameter_once_in_the_group_of_its_decay():
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2), nn.Linear(2, 2))
    model[2].requires_grad_(False)
    config = OptimConfig(lr=0.25, beta1=0.8, beta2=0.9, eps=1e-5, weight_decay={r"\.bias$|^1": 0.0, ".*": 0.1})
    optimizer = adamw(model, config)
    groups = {group["weight_decay"]: [p.shape for p in group["params"]] for group in optimizer.param_groups}
    assert groups == {0.1: [(2, 3)], 0.0: [(2,), (2,), (2,)]}
    assert all(group["betas"] == (0.8, 0.9) and group["eps"] == 1e-5 for group in optimizer.param_groups)


def test_a_decay_rule_that_finds_nothing_is_refused_but_for_the_defaults():
    model = nn.Linear(1, 1)
    with pytest.raises(ValueError, match=r"optim\.weight_decay: 'wieght' is found in no parameter name"):
        make_optimizer(model, OptimConfig(weight_decay={"wieght": 0.1, ".*": 0.0}))
    assert len(make_optimizer(model, OptimConfig()).param_groups) == 2


@pytest.mark.parametrize("setting", ["weight_decay", "lr_scale"])
def test_a_rule_behind_one_that_finds_all_it_finds_is_refused_but_not_a_rest(setting):
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    told = rf"optim\.{setting}: 'bias' is never reached, as the first rule that is found counts and '\.\*' stands"
    with pytest.raises(ValueError, match=told):
        make_optimizer(model, OptimConfig(**{setting: {".*": 0.1, "bias": 0.5}}))
    for rules in ({"bias": 0.5, ".*": 0.1}, {"^0": 0.5, "^1": 0.2, ".*": 0.1}, {".*": 0.1, "bias": 0.1}):
        make_optimizer(model, OptimConfig(**{setting: rules}))


def test_decay_is_multiplied_by_the_rate():
    model = nn.Linear(1, 1, bias=False)
    before = model.weight.item()
    optimizer = adamw(model, OptimConfig(lr=0.5, weight_decay={".*": 0.1}))
    model.weight.grad = torch.zeros(1, 1)
    optimizer.step()
    assert model.weight.item() == pytest.approx(before * (1 - 0.5 * 0.1))


def test_six_steps_are_those_of_the_references_adam():
    golden = np.load(Path(__file__).parent / "golden/adam_jft_softmoe.npz")
    meta = json.loads(str(golden["meta"]))
    names = [name.removeprefix("init:") for name in golden if name.startswith("init:")]
    # A parameter's name may have no dot in it; the reference's are paths.
    model = nn.ParameterDict({name: nn.Parameter(torch.from_numpy(golden[f"init:{name}"])) for name in names})
    decay = dict(meta["weight_decay"])
    assert decay == {"head/kernel": 3.0, ".*/kernel": 0.03, ".*/Moe/Router/scale": 0.03}
    config = OptimConfig(
        lr=0.01,
        weight_decay={f"^{pattern}$": value for pattern, value in decay.items()},
        schedule="rsqrt",
        warmup=2,
        timescale=5,
    )
    assert (config.clip_norm, config.beta1, config.beta2, config.eps) == (1.0, meta["b1"], meta["b2"], meta["eps"])
    learning_rate, optimizer = schedule(config, 6), make_optimizer(model, config)
    for step in range(6):
        assert learning_rate(step) == pytest.approx(float(golden["lr"][step]), rel=1e-6, abs=1e-12)
        for group in optimizer.param_groups:
            group["lr"] = float(golden["lr"][step])
        for name, parameter in model.items():
            parameter.grad = torch.from_numpy(np.array(golden[f"grads:{name}"][step]))
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimizer.step()
        for name, parameter in model.items():
            expected = torch.from_numpy(np.array(golden[f"after:{name}"][step]))
            torch.testing.assert_close(parameter.detach(), expected, rtol=0, atol=1e-8, msg=f"{name} at {step}")


NEED_MORE = ("apex", "bitsandbytes", "Kron", "Adahessian")


@pytest.mark.slow
def test_every_optimizer_that_timm_has_goes_on_exactly_or_is_refused():
    from timm.optim import get_optimizer_info, list_optimizers

    model, refused, told = nn.Linear(2, 2), [], []
    for name in [*list_optimizers(), "lookahead_adamw", "lookahead_lion"]:
        cls = get_optimizer_info(name.removeprefix("lookahead_")).opt_class
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Kron's about a package it could use
                make_optimizer(model, OptimConfig(name=name))
        except ValueError as error:
            refused.append(cls if isinstance(cls, str) else cls.__name__)
            told.append(str(error))
    assert all(text.startswith("optim.name=") and " cannot be used here: " in text for text in told)
    assert all(name.startswith(NEED_MORE) for name in refused)
    assert {name.split(".")[0] for name in refused} >= {"Kron", "Adahessian"}


@pytest.mark.parametrize("name", ["lion", "adan", "lamb", "nadamlegacy", "adafactorbv", "lookahead_sgd"])
def test_state_of_every_kind_is_saved_as_tensors_and_comes_back(name):
    config = OptimConfig(name=name)
    model, optimizer = toy(lambda groups: make_optimizer_of(groups, config))
    toy_steps(model, optimizer, 4)
    tensors = optimizer_tensors(model, optimizer)
    assert tensors
    assert all(isinstance(tensor, torch.Tensor) for tensor in tensors.values())
    twin, again = toy(lambda groups: make_optimizer_of(groups, config))
    fill_optimizer(twin, again, tensors)
    found = optimizer_tensors(twin, again)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], tensors[key]) and found[key].dtype == tensors[key].dtype for key in tensors)
    kinds = {key.split("|")[-1] for key in tensors if key.count("|") == 2}
    assert kinds == {"adan": {"int"}, "nadamlegacy": {"int", "float"}, "lookahead_sgd": {"int"}}.get(name, set())
    if name in ("adan", "lamb", "lookahead_sgd"):
        assert any(key.startswith("group all|") for key in tensors)


def make_optimizer_of(groups, config):
    from timm.optim import create_optimizer_v2

    return create_optimizer_v2(groups, config.name, lr=config.lr)


def test_what_a_rehearsal_refuses():
    class Forgetful(torch.optim.SGD):
        """Steps that depend on something outside of the state."""

        def step(self):
            self.number = getattr(self, "number", 0) + 1
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.data.sub_(parameter.grad, alpha=0.1 / self.number)

    class Listing(torch.optim.SGD):
        def step(self):
            self.state[self.param_groups[0]["params"][0]]["history"] = [1, 2]

    with pytest.raises(ValueError, match="steps are not the same after it is saved and loaded"):
        rehearse(Forgetful)
    with pytest.raises(ValueError, match=r"it keeps a list \(bias\|history\), which a checkpoint cannot hold"):
        rehearse(Listing)
    rehearse(torch.optim.SGD)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"name": "lionn"}, "no optimizer is called 'lionn': did you mean 'lion'"),
        (
            {"name": "lion", "options": {"beta": [0.9, 0.99]}},
            r"optim\.options\.beta is no setting of lion: did you mean",
        ),
        ({"options": {"amsgard": True}}, r"optim\.options\.amsgard is no setting of adamw: did you mean 'amsgrad'"),
        ({"options": {"lr": 1.0}}, r"optim\.options\.lr has a setting of its own: optim\.lr"),
        ({"options": {"betas": [0.9, 0.9]}}, r"optim\.options\.betas has a setting of its own: optim\.beta1"),
        ({"name": "lion", "beta2": 0.98}, r"optim\.beta2=0\.98 is a setting of adamw, not of lion"),
        ({"name": "sgd", "options": {"momentum": 0.0}}, "cannot be used here: Nesterov momentum requires a momentum"),
        ({"lr_scale": {"weight": 0.0}}, r"optim\.lr_scale must be above 0, got 0\.0 for 'weight': name .* freeze"),
        ({"lr_scale": {"(": 1.0}}, r"optim\.lr_scale: '\(' is no regular expression"),
        ({"lr_scale": {"visual": 0.1}}, r"optim\.lr_scale: 'visual' is found in no parameter name"),
        ({"image_layer_decay": 1.5}, r"optim\.image_layer_decay must be above 0 and at most 1, got 1\.5"),
        ({"name": "lion", "beta2": 0.98}, r"set it back to 0\.999, and give lion its own in optim\.options"),
        ({"beta2": 1.5}, r"optim\.beta1 and optim\.beta2 are 0 or more and below 1, .* got 0\.9, 1\.5 and 1e-08"),
        ({"weight_decay": {"(": 0.1}}, r"optim\.weight_decay: '\(' is no regular expression"),
        ({"weight_decay": {".*": -0.1}}, r"optim\.weight_decay must be 0 or more, got -0\.1 for '\.\*'"),
        ({"lr": float("nan")}, r"optim\.lr must be above 0, got nan"),
        ({"clip_norm": -1.0}, r"optim\.clip_norm must be 0, for no clipping, or more; got -1\.0"),
        ({"schedule": "cosine", "cooldown": 5}, r"optim\.cooldown=5 is for the schedules rsqrt and constant: cosine"),
        ({"schedule": "constant", "timescale": 5}, r"optim\.timescale=5 is for the schedule rsqrt, not constant"),
    ],
)
def test_a_mistake_is_one_sentence(settings, told):
    with pytest.raises(ValueError, match=told):
        make_optimizer(nn.Linear(2, 2), OptimConfig(**settings))


def test_options_reach_the_optimizer():
    optimizer = make_optimizer(nn.Linear(2, 2), OptimConfig(name="lion", options={"betas": [0.5, 0.6]}))
    assert all(group["betas"] == (0.5, 0.6) for group in optimizer.param_groups)
    assert make_optimizer(nn.Linear(2, 2), OptimConfig(options={"amsgrad": True})).defaults["amsgrad"]
