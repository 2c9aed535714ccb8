"""Do the statistics keep what they promise? Experiments with a known truth: some hundred, or 10,000 (slow)."""
import numpy as np
import pytest

from pispiral.verdict.stats import (exact_bounds, flat_slope, holm, mcnemar_exact, mean_ci, non_inferior_power,
                                    oscillation, paired_bootstrap, paired_t, wilson)

TIMES = [300, pytest.param(10_000, marks=pytest.mark.slow)]


def up_to(rate, times):
    "The largest share that a true rate may show by chance in `times` experiments (3 standard errors)."
    return rate + 3*(rate*(1 - rate)/times)**.5


def draws(seed, times, p_gain, p_loss, n):
    "Gains and losses in each of many experiments of n pairs."
    return np.random.default_rng(seed).multinomial(n, [p_gain, p_loss, 1 - p_gain - p_loss], size=times)[:, :2].tolist()


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("p_gain, p_loss, n, margin", [(0, .01, 400, .01), (0, .1, 60, .1), (.05, .15, 100, .1),
                                                       (.2, .3, 200, .1)])
def test_non_inferiority_passes_falsely_at_most_one_time_in_twenty(times, p_gain, p_loss, n, margin):
    passes = np.mean([exact_bounds(g, l, n, .05)[0] > -margin for g, l in draws(0, times, p_gain, p_loss, n)])
    print(f"false passes {passes:.4f} of {times} at n={n}, p_gain={p_gain}, p_loss={p_loss}")
    assert passes <= up_to(.05, times) and non_inferior_power(n, p_gain, p_loss, margin) <= .05


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("p_gain, p_loss, n, margin", [(0, 0, 368, .01), (0, .002, 1000, .01), (.02, .02, 400, .1),
                                                       (.3, .1, 60, .1)])
def test_non_inferiority_has_the_power_that_is_computed(times, p_gain, p_loss, n, margin):
    power = non_inferior_power(n, p_gain, p_loss, margin)
    passes = np.mean([exact_bounds(g, l, n, .05)[0] > -margin for g, l in draws(1, times, p_gain, p_loss, n)])
    print(f"power {power:.4f}, simulated {passes:.4f} of {times} at n={n}, p_gain={p_gain}, p_loss={p_loss}")
    assert abs(passes - power) <= 4*(max(power*(1 - power), 1e-9)/times)**.5 + 1e-9


def covers(seed, times, make):
    "Share of experiments whose interval holds the truth; `make(rng)` gives (truth, low, high)."
    rng = np.random.default_rng(seed)
    return np.mean([low <= truth <= high for truth, low, high in (make(rng) for _ in range(times))])


INTERVALS = {
    "mean of three seeds": lambda g: (.6, *mean_ci(g.normal(.6, .1, 3))[1:]),
    "paired t, six texts": lambda g: (.2, *paired_t(g.normal(.2, 1, 6), np.zeros(6))[2:4]),
    "paired bootstrap, 80 scores": lambda g: (.1, *paired_bootstrap(.1 + g.normal(0, .3, 80), np.zeros(80))[1:]),
    "slope of eight lengths": lambda g: (.1, *flat_slope(np.arange(8), 1 + .1*np.arange(8) + g.normal(0, .05, 8))[2:4]),
}


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("name", INTERVALS)
def test_intervals_cover_the_truth_nineteen_times_in_twenty(times, name):
    if "bootstrap" in name: times //= 5  # ten thousand resamples in each experiment
    share, slack = covers(2, times, INTERVALS[name]), 3*(.05*.95/times)**.5 if times < 2000 else 0
    print(f"coverage {share:.4f} of {times}: {name}")
    assert .93 - slack <= share <= .97 + slack


@pytest.mark.parametrize("times", TIMES)
def test_wilson_covers_on_average_over_rates(times):
    rng = np.random.default_rng(3)
    p = rng.uniform(.02, .98, times)
    inside = [low <= q <= high for q, (low, high) in zip(p, (wilson(int(k), 40) for k in rng.binomial(40, p)))]
    print(f"coverage {np.mean(inside):.4f} of {times}: Wilson, 40 items, rates even in [0.02, 0.98]")
    slack = 3*(.05*.95/times)**.5 if times < 1000 else 0
    assert .93 - slack <= np.mean(inside) <= .97 + slack


@pytest.mark.parametrize("times", TIMES)
def test_bounds_of_a_gain_never_promise_too_much(times):
    for p_gain, p_loss, n in ((.1, .1, 20), (.5, .1, 20), (.02, 0, 100)):
        wrong = [(low > p_gain - p_loss, high < p_gain - p_loss) for low, high in
                 (exact_bounds(g, l, n, .05) for g, l in draws(4, times, p_gain, p_loss, n))]
        assert max(np.mean(wrong, 0)) <= up_to(.05, times)


@pytest.mark.parametrize("times", TIMES)
def test_holm_keeps_the_family_wise_error(times):
    rng, family, few = np.random.default_rng(5), 8, min(times//3, 2000)
    def wrong(ps): return (holm(ps) < .05).any()
    normal = np.mean([wrong([paired_t(*rng.normal(size=(2, 10))).p for _ in range(family)]) for _ in range(few)])
    a, b = rng.integers(0, 2, (2, times, family, 30))
    exact = np.mean([wrong([mcnemar_exact(x, y) for x, y in zip(aa, bb)]) for aa, bb in zip(a[:few], b)])
    mixed = np.mean([(holm([1e-9, *rng.uniform(size=family - 1)])[1:] < .05).any() for _ in range(times)]) # one is true
    print(f"family-wise error: t {normal:.4f}, McNemar {exact:.4f}, beside a true effect {mixed:.4f}, of {few}")
    assert max(normal, exact, mixed) <= up_to(.05, few)


CURVES = {"noise on a decay": (lambda x: 1/(1 + np.exp((x - 8)/2)), .05),
          "noise on a constant": (lambda x: 3 + 0*x, .1),
          "noise on a falling loss": (lambda x: 3 + 2/(1 + x), .1)}


@pytest.mark.parametrize("times", [60, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CURVES)
def test_oscillation_seldom_sees_what_is_not_there(times, name):
    curve, sd = CURVES[name]
    rng, x = np.random.default_rng(6), np.arange(16)
    alarms = np.mean([oscillation(x, curve(x) + rng.normal(0, sd, 16)).verdict == "fail" for _ in range(times)])
    print(f"false alarms {alarms:.4f} of {times}: {name}")
    assert alarms <= up_to(.05, times)


def test_oscillation_sees_a_wave():
    rng, x = np.random.default_rng(7), np.arange(24)
    wave = .9 - .02*x + .2*np.sin(2*np.pi*x/6)
    seen = np.mean([oscillation(x, wave + rng.normal(0, .05, 24)).verdict == "fail" for _ in range(40)])
    print(f"planted wave seen {seen:.3f} of 40")
    assert seen >= .9


@pytest.mark.parametrize("times", TIMES)
def test_flatness_seldom_sees_growth_that_is_not_there_and_sees_what_is(times):
    rng, x = np.random.default_rng(8), np.array([64, 128, 256, 512, 768, 1000])
    def grows(growth): # the gate of flat memory: fails where growth is above 2 percent for certain
        line = 1000*(1 + growth*(x - 64)/936)
        return np.mean([flat_slope(x, line + rng.normal(0, 5, 6)).growth_lower > .02 for _ in range(times)])
    flat, edge, planted = grows(0), grows(.02), grows(.1)
    print(f"flatness: alarms {flat:.4f} at no growth, {edge:.4f} at 2 percent; growth of 10 percent seen "
          f"{planted:.4f}, of {times}")
    assert flat <= edge <= up_to(.05, times) and planted >= .99
