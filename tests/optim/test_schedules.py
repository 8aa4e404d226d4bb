"""Schedules against torch's own at every step, plateaus against torch's too, and the lengths they are given in."""

import json
import math
import random

import pytest
import torch
from torch.optim import lr_scheduler as scheduler
from torch.optim.swa_utils import SWALR

from fastcifar.config import ScheduleConfig
from fastcifar.errors import ConfigError
from fastcifar.optim.course import Duration
from fastcifar.optim.plateau import Plateau
from fastcifar.optim.schedules import SCHEDULES, cycle_ends, in_steps, kinks, lr_table, momentum_table
from fastcifar.recipes import recipe

pytestmark = pytest.mark.filterwarnings("ignore:Detected call of")
PEAK = 0.4
CASES = {
    "constant": ({}, lambda o, n: scheduler.ConstantLR(o, factor=1.0, total_iters=n)),
    "step": ({"step_size": "2{u}", "gamma": 0.5}, lambda o, n: scheduler.StepLR(o, 2, gamma=0.5)),
    "cosine": ({"final_lr": 0.1}, lambda o, n: scheduler.CosineAnnealingLR(o, T_max=n, eta_min=0.1 * PEAK)),
    "warm-restarts": (
        {"restart_period": "2{u}", "restart_factor": 2, "final_lr": 0.05},
        lambda o, n: scheduler.CosineAnnealingWarmRestarts(o, T_0=2, T_mult=2, eta_min=0.05 * PEAK),
    ),
    "linear": (
        {"start_lr": 0.25, "final_lr": 0.75},
        lambda o, n: scheduler.LinearLR(o, start_factor=0.25, end_factor=0.75, total_iters=n),
    ),
    "polynomial": ({"power": 2.5}, lambda o, n: scheduler.PolynomialLR(o, total_iters=n, power=2.5)),
    "one-cycle": (
        {"start_lr": 0.1, "final_lr": 0.01},
        lambda o, n: scheduler.OneCycleLR(
            o, PEAK, total_steps=n, cycle_momentum=False, div_factor=10, final_div_factor=10
        ),
    ),
    "cosine alone": ({}, lambda o, n: scheduler.CosineAnnealingLR(o, T_max=n)),
    "linear alone": ({}, lambda o, n: scheduler.LinearLR(o, start_factor=1.0, end_factor=0.0, total_iters=n)),
    "polynomial alone": ({}, lambda o, n: scheduler.PolynomialLR(o, total_iters=n)),
    "one-cycle alone": ({}, lambda o, n: scheduler.OneCycleLR(o, PEAK, total_steps=n, cycle_momentum=False)),
}
"""Settings, in a unit to be filled in, and torch's scheduler over n ticks; those without settings have its defaults."""


def oracle(make, total: int, warmup: int, tick: int, peak: float = PEAK, setting: str = "lr") -> list[float]:
    """Returns the rates of torch's scheduler, stepped every `tick` steps at the start of an epoch.

    Before that the rates follow the line of the warm-up.
    """
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=peak, momentum=0.9)
    after = make(optimizer, total // tick - warmup // tick)
    rates = [optimizer.param_groups[0]["lr"] * (step + 1) / warmup for step in range(warmup)]
    for step in range(warmup, total):
        if step > warmup and step % tick == 0:
            optimizer.step()
            after.step()
        rates.append(optimizer.param_groups[0][setting])
    return rates


def table(schedule: ScheduleConfig, steps_per_epoch: int, epochs: int) -> list[float]:
    return lr_table(schedule, PEAK, steps_per_epoch, epochs)


def of_case(case: str, unit: str, **settings: str) -> ScheduleConfig:
    own = {name: value.format(u=unit) if isinstance(value, str) else value for name, value in CASES[case][0].items()}
    return ScheduleConfig(case.removesuffix(" alone"), **own, **settings)


@pytest.mark.parametrize(("steps_per_epoch", "epochs", "warmup"), [(97, 1, 3), (7, 13, 0), (7, 13, 9), (5, 20, 1)])
@pytest.mark.parametrize("case", CASES)
def test_equals_torchs_schedulers_at_every_step(case, steps_per_epoch, epochs, warmup):
    """Those that step once an epoch are compared at every epoch."""
    paces = [("st", {}, 1)] + ([("ep", {"per": "epoch"}, steps_per_epoch)] if case != "constant" else [])
    for unit, pace, tick in paces:
        expected = oracle(CASES[case][1], steps_per_epoch * epochs, warmup, tick)
        rates = table(of_case(case, unit, warmup=f"{warmup}st", **pace), steps_per_epoch, epochs)
        assert rates == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    ("milestones", "warmup", "ticks"),
    [(("6ep", "9ep", "11ep"), 0, [6, 9, 11]), (("80%", "42st"), 7, [9, 5]), (("6ep", "6ep", "99ep"), 9, [5, 5, 98])],
)
def test_milestones_are_places_in_the_run(milestones, warmup, ticks):
    schedule = ScheduleConfig("multistep", per="epoch", milestones=milestones, warmup=f"{warmup}st")
    expected = oracle(lambda o, n: scheduler.MultiStepLR(o, ticks, gamma=0.2), 7 * 13, warmup, 7)
    assert table(schedule, 7, 13) == pytest.approx(expected, rel=1e-9)


def report_4s_one_cycle(optimizer, _):
    return scheduler.OneCycleLR(optimizer, max_lr=0.01, steps_per_epoch=128, epochs=200)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("r4_scheduler_linear_as_written", lambda o, _: scheduler.LinearLR(o)),
        ("r4_scheduler_polynomial_as_written", lambda o, _: scheduler.PolynomialLR(o)),
        ("r4_scheduler_one_cycle_as_written", report_4s_one_cycle),
        ("r4_epochs_100_as_written", lambda o, _: scheduler.CosineAnnealingLR(o, T_max=200)),
        ("r4_epochs_300_as_written", lambda o, _: scheduler.CosineAnnealingLR(o, T_max=200)),
        ("r4_epochs_400_as_written", lambda o, _: scheduler.CosineAnnealingLR(o, T_max=200)),
    ],
)
def test_a_reports_mistaken_schedules_are_torchs_stepped_once_an_epoch(name, make):
    config = recipe(name)
    rates = lr_table(config.schedule, config.optim.peak_lr(128), 3, config.epochs)
    assert rates == pytest.approx(oracle(make, 3 * config.epochs, 0, 3, 0.1), rel=1e-9, abs=1e-12)


def test_momentum_is_cycled_as_by_torch():
    config = recipe("r4_scheduler_one_cycle_as_written")
    expected = oracle(report_4s_one_cycle, 600, 0, 3, setting="momentum")
    assert momentum_table(config.schedule, 3, 200) == pytest.approx(expected, rel=1e-12)
    expected = oracle(lambda o, n: scheduler.OneCycleLR(o, PEAK, total_steps=n), 91, 0, 1, setting="momentum")
    assert momentum_table(ScheduleConfig("one-cycle"), 7, 13) == pytest.approx(expected, rel=1e-12)
    assert momentum_table(ScheduleConfig("one-cycle", cycle_momentum=False), 7, 13) is None


@pytest.mark.parametrize(("start", "epochs"), [(75, 100), (5, 9)])
def test_swalr_equals_torchs_after_a_cosine(start, epochs):
    """It is stepped in place of the cosine from the epoch `start` on, as its documentation has it."""
    optimizer = torch.optim.SGD([torch.zeros(1)], PEAK)
    cosine, averaging = scheduler.CosineAnnealingLR(optimizer, epochs), SWALR(optimizer, swa_lr=0.3 * PEAK)
    expected = []
    for epoch in range(epochs):
        expected.append(optimizer.param_groups[0]["lr"])
        (averaging if epoch >= start else cosine).step()
    schedule = ScheduleConfig("swalr", warmup="0%", per="epoch", horizon=f"{start}ep", final_lr=0.3)
    assert table(schedule, 4, epochs)[::4] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", ["cosine", "linear", "polynomial", "one-cycle", "swa"])
def test_the_end_is_held_after_the_horizon(name):
    for per in ("step", "epoch"):
        schedule = ScheduleConfig(name, horizon="60%", per=per)
        rates = table(schedule, 7, 20)
        assert rates[84:] == pytest.approx([PEAK * schedule.resolved.final_lr] * 56, rel=1e-9, abs=1e-15)
        assert rates[70] > rates[84]


def izmailov(epoch: int, horizon: int, share: float) -> float:
    """Computes the factor of the authors' `schedule`: constant until half, then linear until nine tenths."""
    way = epoch / horizon
    if way <= 0.5:
        return 1.0
    return 1.0 - (1.0 - share) * (way - 0.5) / 0.4 if way <= 0.9 else share


@pytest.mark.parametrize(("horizon", "epochs"), [(161, 225), (7, 10)])
def test_swa_is_constant_linear_constant(horizon, epochs):
    schedule = ScheduleConfig("swa", horizon=f"{horizon}ep", per="epoch", warmup="0%")
    expected = [PEAK * izmailov(epoch, horizon, 0.1) for epoch in range(epochs) for _ in range(3)]
    assert table(schedule, 3, epochs) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("per", ["step", "epoch"])
@pytest.mark.parametrize(("period", "factor"), [(1, 1), (2, 1), (3, 2), (1, 3)])
def test_cycles_end_where_torch_starts_again(per, period, factor):
    """There are 12 epochs of 7 steps, after a warm-up of two; the run's end counts where it is a cycle's."""
    given = {"warmup": "2ep", "per": per, "restart_period": f"{period}ep", "restart_factor": factor, "snapshots": True}
    torchs = scheduler.CosineAnnealingWarmRestarts(
        torch.optim.SGD([torch.zeros(1)], lr=PEAK), T_0=7 * period, T_mult=factor
    )
    ends = []
    for step in range(15, 12 * 7 + 1):
        torchs.step()
        ends += [step] if torchs.T_cur == 0 else []
    assert cycle_ends(ScheduleConfig("warm-restarts", **given), 7, 12) == ends


@pytest.mark.parametrize("steps_per_epoch", [7, 97, 391])
def test_the_end_of_the_run_ends_a_cycle_that_is_longer_by_what_was_rounded(steps_per_epoch):
    ends = cycle_ends(ScheduleConfig("warm-restarts", restart_period="20%", snapshots=True), steps_per_epoch, 60)
    assert (len(ends), ends[-1]) == (5, 60 * steps_per_epoch)


@pytest.mark.parametrize(("period", "count"), [("30ep", 0), ("1ep", 25)])
def test_too_few_or_too_many_cycles_for_snapshots(period, count):
    with pytest.raises(ConfigError, match=f"would keep {count}, expected 1 to 20; choose another --restart-period"):
        cycle_ends(ScheduleConfig("warm-restarts", warmup="0%", restart_period=period, snapshots=True), 10, 25)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"schedule": "constant", "warmup": "0%"}, []),
        ({"schedule": "cosine"}, [50]),
        ({"schedule": "cosine", "warmup": "5%", "horizon": "50%"}, [10, 100]),
        ({"schedule": "cosine", "warmup": "5%", "horizon": "400ep"}, [10]),
        ({"schedule": "step", "warmup": "5%", "step_size": "5ep"}, [10, 60, 110, 160]),
        ({"schedule": "multistep", "warmup": "5%", "per": "epoch"}, [10, 60, 120, 160]),
        ({"schedule": "warm-restarts", "restart_period": "20st", "restart_factor": 2, "warmup": "0%"}, [20, 60, 140]),
        ({"schedule": "one-cycle"}, [59]),
        ({"schedule": "swa", "warmup": "0%"}, [100, 180]),
    ],
    ids=str,
)
def test_kinks(settings, expected):
    assert kinks(ScheduleConfig(**settings), 10, 20) == expected


@pytest.mark.parametrize(("epochs", "steps"), [(200, 3900), (11, 214), (10, 200), (2, 195), (1, 98)])
def test_the_warm_up_is_a_share_of_the_run_but_never_short_nor_most_of_it(epochs, steps):
    """With 390 steps an epoch it is 5%, 200 steps, or a quarter."""
    rates = table(ScheduleConfig("constant"), 390, epochs)
    assert next(step for step, rate in enumerate(rates) if rate == PEAK) == steps - 1
    assert ScheduleConfig("one-cycle").resolved.warmup == "0%"


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_in_steps_is_the_same_schedule(name):
    for per in ("step", "epoch") if "per" in ScheduleConfig(name).defaults else (None,):
        schedule = ScheduleConfig(name, per=per)
        fixed = in_steps(schedule, 13, 17)
        assert table(fixed, 13, 17) == table(schedule, 13, 17)
        lengths = fixed.warmup, fixed.step_size, fixed.restart_period, *(fixed.milestones or ())
        assert all(length.endswith("st") for length in lengths if length is not None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "cosin"}, "did you mean cosine"),
        ({"gamma": 0.5}, "the schedule cosine does not read gamma; it reads per, horizon, final_lr"),
        ({"schedule": "plateau", "per": "epoch"}, "the schedule plateau does not read per"),
        ({"snapshots": True}, "the schedule cosine does not read snapshots"),
        ({"horizon": "5 epochs"}, "write epochs as 5ep"),
        ({"schedule": "multistep", "milestones": ("5ep", "x")}, "'x' is no duration"),
        ({"final_lr": 1.5}, "final_lr is 1.5; expected 0 to 1"),
        ({"schedule": "step", "gamma": 0.0}, "gamma is 0.0; expected above 0, at most 1"),
        ({"schedule": "warm-restarts", "restart_factor": 0}, "restart_factor is 0; expected 1 to 1000"),
        ({"warmup": "10st"}, "a warm-up of 10 steps fills the whole run of 10; shorten --warmup"),
        ({"warmup": "5st", "horizon": "50%"}, "the horizon 50% is not beyond the warm-up of 5 steps; move --horizon"),
        ({"warmup": "0%", "horizon": "1st", "per": "epoch"}, "the horizon 1st is not beyond"),
        ({"schedule": "step", "step_size": "0ep"}, "step_size is 0ep; expected some length"),
        ({"schedule": "polynomial", "power": math.inf}, "power is inf; expected above 0"),
        ({"schedule": "warm-restarts", "restart_factor": 10**400}, "expected 1 to 1000"),
        ({"horizon": f"{10**308}ep"}, "ep' is no duration"),
    ],
    ids=str,
)
def test_what_makes_no_schedule_of_a_run_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        table(ScheduleConfig(**settings), 5, 2)


@pytest.mark.parametrize(("gamma", "patience", "final_lr"), [(0.1, 10, 0.0), (0.5, 0, 0.0), (0.3, 2, 0.02)])
def test_plateau_equals_torchs(gamma, patience, final_lr):
    """It is also stored, and goes on, halfway."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    theirs = scheduler.ReduceLROnPlateau(optimizer, factor=gamma, patience=patience, min_lr=final_lr)
    ours, draws = Plateau(gamma, patience, final_lr), random.Random(0)
    losses = [2.0 / (1 + epoch / 10) + 0.3 * draws.random() for epoch in range(60)] + [math.nan, math.inf] + [0.5] * 100
    factors = []
    for epoch, loss in enumerate(losses):
        if epoch in (0, 63):
            stored, ours = json.loads(json.dumps(ours.state())), Plateau(gamma, patience, final_lr)
            ours.restore(stored)
        theirs.step(loss)
        factors.append(ours.observe(loss))
        assert factors[-1] == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
    assert len(set(factors)) > 2


@pytest.mark.parametrize("function", [lr_table, cycle_ends, kinks])
def test_a_run_whose_tables_would_fill_the_memory_is_refused(function):
    arguments = (0.1, 390, 10**8) if function is lr_table else (390, 10**8)
    with pytest.raises(ConfigError, match="100000000 epochs of 390 steps are more than the 10,000,000 steps"):
        function(ScheduleConfig("warm-restarts"), *arguments)


@pytest.mark.parametrize(
    ("name", "value"),
    [("factor", math.inf), ("factor", math.nan), ("bad_epochs", math.inf), ("bad_epochs", -1.0), ("best", math.nan)],
)
def test_a_plateau_takes_over_no_numbers_that_it_cannot_have(name, value):
    with pytest.raises(ConfigError, match=f"{name} is {value}"):
        Plateau().restore({**Plateau().state(), name: value})


@pytest.mark.parametrize(("text", "steps"), [("5ep", 500), ("0.5ep", 50), ("2000st", 2000), ("0%", 0), ("12.5%", 2500)])
def test_durations(text, steps):
    assert Duration.parse(text).steps(100, 20_000) == steps


@pytest.mark.parametrize("text", ["", "5", "ep", "-1ep", "5 epochs", "5%%", "nan%", "٣ep", f"{10**308}ep"])
def test_what_is_no_duration_says_how_to_write_one(text):
    with pytest.raises(ConfigError, match="5ep"):
        Duration.parse(text)
