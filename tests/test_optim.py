"""SGD, LARS, LARC, groups of parameters and learning rates."""

from __future__ import annotations

import copy
import dataclasses
import io
import math

import pytest
import torch
from torch import nn

from pcl_fast.config import OptimConfig
from pcl_fast.optim import (
    LARC,
    LARS,
    Group,
    build_optimizer,
    learning_rate,
    load_optimizer,
    norms_and_biases_apart,
    one_group,
    set_rate,
)

replace = dataclasses.replace
CPU = torch.device("cpu")
SGD_RECIPE = OptimConfig(lr=0.3, weight_decay=0.02, milestones=())
LARS_RECIPE = replace(SGD_RECIPE, optimizer="lars", trust=0.05)
LARC_RECIPE = replace(LARS_RECIPE, optimizer="larc")
RECIPES = pytest.mark.parametrize("recipe", [SGD_RECIPE, LARS_RECIPE, LARC_RECIPE], ids=["sgd", "lars", "larc"])


def network() -> nn.Module:
    """Weights of several shapes, one of them in channels_last, and norms."""
    parts = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(20, 7), nn.BatchNorm1d(7)
    module = nn.Sequential(*parts).to(memory_format=torch.channels_last)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


def draw_gradients(module: nn.Module, scale: float = 1.0) -> None:
    for parameter in module.parameters():
        parameter.grad = torch.randn_like(parameter) * scale


def copy_gradients(source: nn.Module, to: nn.Module) -> None:
    for parameter, given in zip(to.parameters(), source.parameters(), strict=True):
        parameter.grad = given.grad.to(parameter.dtype, copy=True)


def parameters_and_momentum(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Copies."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    momentum = [optimizer.state[parameter]["momentum_buffer"] for parameter in parameters]
    return [tensor.detach().clone() for tensor in (*parameters, *momentum)]


def assert_same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    """Bit for bit."""
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


# --- LARS -----------------------------------------------------------------------------------------------------------


class LarsOnPaper:
    """Algorithm 1 of You et al. 2017 for one layer, number by number: v is its momentum."""

    def __init__(self, weight: torch.Tensor, *, momentum: float, decay: float, trust: float, adapt: bool = True):
        self.weight = weight.detach().double().flatten().tolist()
        self.v = [0.0] * len(self.weight)
        self.momentum, self.decay, self.trust, self.adapt = momentum, decay, trust, adapt

    def step(self, gradient: torch.Tensor, lr: float) -> None:
        gradient = gradient.double().flatten().tolist()
        of_weight, of_gradient = (math.sqrt(math.fsum(x * x for x in values)) for values in (self.weight, gradient))
        local = 1.0
        if self.adapt and of_weight > 0 and of_gradient > 0:
            local = self.trust * of_weight / (of_gradient + self.decay * of_weight)
        for i, (w, g) in enumerate(zip(self.weight, gradient, strict=True)):
            self.v[i] = self.momentum * self.v[i] + lr * local * (g + self.decay * w)
            self.weight[i] = w - self.v[i]


class LarcOnPaper(LarsOnPaper):
    """What apex's LARC does before SGD's step, with clip=False, and that step."""

    def step(self, gradient: torch.Tensor, lr: float) -> None:
        gradient = gradient.double().flatten().tolist()
        of_weight, of_gradient = (math.sqrt(math.fsum(x * x for x in values)) for values in (self.weight, gradient))
        if not self.adapt:
            gradient = [g + self.decay * w for w, g in zip(self.weight, gradient, strict=True)]
        elif of_weight != 0 and of_gradient != 0:
            local = self.trust * of_weight / (of_gradient + self.decay * of_weight + 1e-8)
            gradient = [local * (g + self.decay * w) for w, g in zip(self.weight, gradient, strict=True)]
        for i, g in enumerate(gradient):
            self.v[i] = self.momentum * self.v[i] + g
            self.weight[i] -= lr * self.v[i]


def groups_of(module: nn.Sequential) -> list[Group]:
    """Some adapt, some decay, some both, some are slower."""
    conv, linear = module[0], module[4]
    norms = [*module[1].parameters(), *module[5].parameters()]
    return [
        Group([conv.weight]),
        Group([conv.bias, linear.bias], decay=False),
        Group([linear.weight], lr_scale=0.125),
        Group(norms, decay=False, adapt=False),
    ]


# The rates are such that float32, in which they lie on the device, holds them exactly.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 3e-6)])
@pytest.mark.parametrize("momentum", [0.9, 0.0])
@pytest.mark.parametrize(
    ("base", "on_paper"), [(LARS_RECIPE, LarsOnPaper), (LARC_RECIPE, LarcOnPaper)], ids=["lars", "larc"]
)
def test_the_rule_is_the_authors(base, on_paper, dtype, tolerance, momentum):
    module = network().to(dtype)
    with torch.no_grad():
        module[4].bias.zero_()  # a layer that adapts to weights of length 0
    groups, recipe = groups_of(module), replace(base, momentum=momentum)
    expected = [
        on_paper(parameter, momentum=momentum, decay=0.02 * group.decay, trust=recipe.trust, adapt=group.adapt)
        for group in groups
        for parameter in group.parameters
    ]
    parameters = [parameter for group in groups for parameter in group.parameters]
    scales = [group.lr_scale for group in groups for _ in group.parameters]
    optimizer = build_optimizer(groups, recipe, CPU)
    for number, lr in enumerate((0.5, 0.5, 2.0, 0.125, 0.0)):
        draw_gradients(module, scale=10.0 ** (number - 2))
        if number == 2:
            module[0].weight.grad.zero_()  # and one to gradients of length 0
        for layer, parameter, scale in zip(expected, parameters, scales, strict=True):
            layer.step(parameter.grad, lr * scale)
        set_rate(optimizer, lr)
        optimizer.step()
    for layer, parameter in zip(expected, parameters, strict=True):
        found = parameter.detach().double().flatten()
        torch.testing.assert_close(
            found, torch.tensor(layer.weight, dtype=torch.float64), rtol=tolerance, atol=tolerance
        )


def test_lars_takes_plain_parameters_and_numbers():
    module = network().double()
    conv = module[0].weight
    paper = LarsOnPaper(conv, momentum=0.8, decay=0.1, trust=0.02)
    optimizer = LARS(module.parameters(), 0.7, momentum=0.8, weight_decay=0.1, trust=0.02)
    for _ in range(2):
        draw_gradients(module)
        paper.step(conv.grad, 0.7)
        optimizer.step()
    torch.testing.assert_close(conv.detach().flatten(), torch.tensor(paper.weight, dtype=torch.float64))


def test_larc_takes_the_steps_of_lars_until_the_rate_changes():
    """Then all of its momentum has the new rate."""
    ours, theirs = network().double(), network().double()
    theirs.load_state_dict(ours.state_dict())
    options = {"momentum": 0.9, "weight_decay": 0.1, "trust": 0.02}
    larc, lars = LARC(ours.parameters(), 0.5, **options), LARS(theirs.parameters(), 0.5, **options)
    for number in range(4):
        if number == 3:
            for optimizer in (larc, lars):
                for group in optimizer.param_groups:
                    group["lr"] = 0.0
        before = [parameter.detach().clone() for parameter in (*ours.parameters(), *theirs.parameters())]
        draw_gradients(ours)
        copy_gradients(ours, theirs)
        larc.step()
        lars.step()
        if number < 3:
            for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
    moved = [not torch.equal(a, b) for a, b in zip(before, (*ours.parameters(), *theirs.parameters()), strict=True)]
    count = len(moved) // 2
    assert (any(moved[:count]), all(moved[count:])) == (False, True)


@RECIPES
def test_parameters_without_a_gradient_stay(recipe):
    module = network()
    optimizer = build_optimizer(groups_of(module), recipe, CPU)
    draw_gradients(module)
    module[0].weight.grad = module[1].weight.grad = None  # a whole group, and one of several
    before = [parameter.detach().clone() for parameter in module.parameters()]
    optimizer.step()
    moved = [not torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True)]
    assert moved == [parameter.grad is not None for parameter in module.parameters()]


# --- steps that are skipped or scaled -----------------------------------------------------------------------------


@RECIPES
def test_a_skipped_step_leaves_no_trace(recipe):
    """Neither a later one nor the first, at which momentum is still what it began as."""
    module = network()
    optimizer = build_optimizer(groups_of(module), recipe, CPU)
    for skipped in (True, False, True):
        draw_gradients(module)
        if skipped:
            module[0].weight.grad[0, 1, 2, 0] = torch.nan
        before = parameters_and_momentum(optimizer)
        optimizer.found_inf = torch.tensor(float(skipped))
        optimizer.step()
        after = parameters_and_momentum(optimizer)
        if skipped:
            assert_same(before, after)
        else:
            assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@RECIPES
def test_gradients_are_unscaled_first(recipe):
    """Before their norms are taken. By a power of two, so that not a bit may differ."""
    scaled, plain = network(), network()
    plain.load_state_dict(scaled.state_dict())
    optimizer, other = (build_optimizer(groups_of(module), recipe, CPU) for module in (scaled, plain))
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1024.0), torch.tensor(0.0)
    for _ in range(3):
        draw_gradients(plain)
        copy_gradients(plain, scaled)
        for parameter in scaled.parameters():
            parameter.grad *= 1024
        optimizer.step()
        other.step()
    assert_same(parameters_and_momentum(optimizer), parameters_and_momentum(other))


@RECIPES
def test_a_gradient_scaler_asks_it_not_to_wait(recipe, monkeypatch):
    """It unscales, and skips what is not finite, without looking at the flag on the host."""
    module = network()
    optimizer = build_optimizer(groups_of(module), recipe, CPU)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    expected = copy.deepcopy(module)
    other = build_optimizer(groups_of(expected), recipe, CPU)
    monkeypatch.setattr(scaler, "_maybe_opt_step", None)
    for poison in (False, True):
        scaler.scale(torch.zeros(()))
        draw_gradients(expected)
        copy_gradients(expected, module)
        for parameter in module.parameters():
            parameter.grad *= scaler.get_scale()
        if poison:
            module[4].weight.grad[0, 0] = torch.inf
        else:
            other.step()
        scaler.step(optimizer)
        scaler.update()
    assert_same(parameters_and_momentum(optimizer), parameters_and_momentum(other))
    assert scaler.get_scale() == 512


# --- optimisers by recipe -----------------------------------------------------------------------------------------


def test_sgd_is_torch_s():
    """The fused one bit for bit; the plain one, which has no momentum before its first step, but for rounding."""
    module, fused, plain = network(), network(), network()
    for other in (fused, plain):
        other.load_state_dict(module.state_dict())
    optimizer = build_optimizer(one_group(module), SGD_RECIPE, CPU)
    options = {"momentum": SGD_RECIPE.momentum, "weight_decay": SGD_RECIPE.weight_decay}
    rate = torch.tensor(SGD_RECIPE.lr)
    torch_s = torch.optim.SGD(fused.parameters(), rate, **options, fused=True)
    unfused = torch.optim.SGD(plain.parameters(), SGD_RECIPE.lr, **options, foreach=False)
    assert type(optimizer) is torch.optim.SGD
    for lr in (SGD_RECIPE.lr, 0.1, 0.1):
        draw_gradients(module)
        copy_gradients(module, fused)
        copy_gradients(module, plain)
        set_rate(optimizer, lr)
        rate.fill_(lr)
        unfused.param_groups[0]["lr"] = lr
        for each in (optimizer, torch_s, unfused):
            each.step()
    assert_same(parameters_and_momentum(optimizer), parameters_and_momentum(torch_s))
    for ours, theirs in zip(module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_sgd_heeds_the_groups():
    """lr_scale and decay; there is nothing to adapt."""
    module, other = network(), network()
    other.load_state_dict(module.state_dict())
    optimizer = build_optimizer(groups_of(module), SGD_RECIPE, CPU)
    others = [
        torch.optim.SGD(group.parameters, 0.5 * group.lr_scale, momentum=0.9, weight_decay=0.02 * group.decay)
        for group in groups_of(other)
    ]
    set_rate(optimizer, 0.5)
    for _ in range(3):
        draw_gradients(module)
        copy_gradients(module, other)
        for each in (optimizer, *others):
            each.step()
    for ours, theirs in zip(module.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_groups_of_a_module():
    module = network()
    module[4].weight.requires_grad_(False)
    (group,) = one_group(module)
    trainable = [module[0].weight, module[0].bias, *module[1].parameters(), module[4].bias, *module[5].parameters()]
    assert [id(parameter) for parameter in group.parameters] == [id(parameter) for parameter in trainable]
    assert group[1:] == (1.0, True, True)
    weights, others = norms_and_biases_apart(module)
    assert [id(parameter) for parameter in weights.parameters] == [id(trainable[0])]
    assert [id(parameter) for parameter in others.parameters] == [id(parameter) for parameter in trainable[1:]]
    assert (weights[1:], others[1:]) == ((1.0, True, True), (1.0, False, False))


def test_groups_without_parameters_are_left_out():
    frozen = nn.Linear(2, 2).requires_grad_(False)
    assert one_group(frozen) == norms_and_biases_apart(frozen) == []
    assert [group.adapt for group in norms_and_biases_apart(nn.BatchNorm1d(2))] == [False]
    assert [group.adapt for group in norms_and_biases_apart(nn.Linear(2, 2, bias=False))] == [True]


@RECIPES
def test_rates_change_in_place_and_only_if_they_change(recipe):
    module = network()
    optimizer = build_optimizer(groups_of(module), recipe, CPU)
    rates = [group["lr"] for group in optimizer.param_groups]
    assert [rate.item() for rate in rates] == pytest.approx([0.3, 0.3, 0.0375, 0.3])
    set_rate(optimizer, 0.5)
    assert [rate.item() for rate in rates] == pytest.approx([0.5, 0.5, 0.0625, 0.5])
    versions = [rate._version for rate in rates]
    set_rate(optimizer, 0.5)
    assert [rate._version for rate in rates] == versions
    set_rate(optimizer, 0.3)
    assert [rate.item() for rate in rates] == pytest.approx([0.3, 0.3, 0.0375, 0.3])


@RECIPES
def test_a_loaded_optimiser_goes_on_as_the_saved_one(recipe):
    """With the rates where they were before: a captured step reads them there."""
    module, other = network(), network()
    optimizer, resumed = (build_optimizer(groups_of(each), recipe, CPU) for each in (module, other))
    set_rate(optimizer, 0.7)
    draw_gradients(module)
    optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    for group in state["param_groups"]:
        del group["lr_scale"]  # as in a checkpoint that is older than it
    rates = [group["lr"] for group in resumed.param_groups]
    other.load_state_dict(module.state_dict())
    load_optimizer(resumed, state)
    assert all(group["lr"] is rate for group, rate in zip(resumed.param_groups, rates, strict=True))
    assert rates[2].item() == pytest.approx(0.0375)
    draw_gradients(module)
    copy_gradients(module, other)
    for each in (optimizer, resumed):
        set_rate(each, 0.2)
        each.step()
    assert_same(parameters_and_momentum(optimizer), parameters_and_momentum(resumed))


# --- learning rates -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optim", "expected"),
    [
        (OptimConfig(lr=0.03), {0: 0.03, 119: 0.03, 120: 0.003, 159: 0.003, 160: 0.0003, 199: 0.0003}),
        (
            OptimConfig(lr=0.03, schedule="cosine"),
            {0: 0.03, 50: 0.015 * (1 + math.sqrt(0.5)), 100: 0.015, 199: 0.015 * (1 - math.cos(math.pi / 200))},
        ),
        (
            OptimConfig(lr=0.6, schedule="cosine", final_share=0.001),
            {0: 0.6, 100: (0.6 + 6e-4) / 2, 200: 6e-4},
        ),
    ],
)
def test_learning_rate_schedules(optim, expected):
    for epoch, value in expected.items():
        assert learning_rate(optim, epoch, 200) == pytest.approx(value)
        assert learning_rate(optim, epoch, 200, step=3, steps=7) == learning_rate(optim, epoch, 200)


@pytest.mark.parametrize(("batch_size", "factor"), [(256, 1), (1024, 4), (100, 100 / 256)])
def test_the_learning_rate_scales_with_the_batch_when_asked_to(batch_size, factor):
    optim = OptimConfig(lr=0.03, batch_size=batch_size)
    assert learning_rate(optim, 130, 200) == pytest.approx(0.003)
    assert learning_rate(replace(optim, scale_lr=True), 130, 200) == pytest.approx(0.003 * factor)


@pytest.mark.parametrize("schedule", ["step", "cosine"])
def test_warm_up_grows_with_every_step(schedule):
    cold = OptimConfig(lr=0.6, schedule=schedule, milestones=(2,))
    warm = replace(cold, warmup_epochs=3)
    share = [
        learning_rate(warm, epoch, 10, step=step, steps=4) / learning_rate(cold, epoch, 10, step=step, steps=4)
        for epoch in range(4)
        for step in range(4)
    ]
    assert share == pytest.approx([number / 12 for number in range(1, 13)] + [1.0] * 4)
    for epoch in range(3, 10):
        assert learning_rate(warm, epoch, 10, step=1, steps=4) == learning_rate(cold, epoch, 10)
