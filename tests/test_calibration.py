"""Do the statistics keep what they promise? Experiments with a known truth: some hundred, or 10,000 (slow)."""
from functools import lru_cache

import numpy as np
import pandas as pd
import pytest
from scipy.stats import beta, binom

from pispiral.verdict.betting import (BOLD, EVEN, FRACTIONS, Counts, bounded, bounded_rate, draws_until, equivalence_of,
                                      log_capital, log_evidence, non_inferior, paired_gain, verdict_of)
from pispiral.verdict.rules.ablations import claim_verdict
from pispiral.verdict.rules.attribution import share_verdict
from pispiral.verdict.rules.curves import shape_verdict
from pispiral.verdict.stats import flat_slope, holm, mcnemar_exact, mean_ci, oscillation, paired_t, wilson

TIMES = [300, pytest.param(10_000, marks=pytest.mark.slow)]
REFUTED = np.log(20)  # of the log of the capital, at an error of 5 percent


def up_to(rate, times):
    "The largest share that a true rate may show by chance in `times` experiments (3 standard errors)."
    return rate + 3*(rate*(1 - rate)/times)**.5


# ---- bets: looked at after every draw

def played(times, n, *values, seed=0):
    "Many experiments of n draws: (value, chance) in turn, the rest 0; float [times, n]."
    u, out, low = np.random.default_rng(seed).random((times, n), np.float32), np.zeros((times, n)), 0
    for value, chance in values:
        out[(low <= u) & (u < low + chance)] = value
        low += chance
    return out


def capital(d, bar, all_in=EVEN):
    "What the bet against a mean of at most `bar` has won after each draw of each experiment, log [times, n]."
    won = None
    for fraction, part in zip(FRACTIONS, np.r_[all_in, np.full(len(FRACTIONS) - 1, (1 - all_in)/(len(FRACTIONS) - 1))]):
        with np.errstate(divide="ignore"):
            one = np.cumsum(np.log1p(np.maximum(fraction*(d - bar)/(1 + bar), -1)), axis=1) + np.log(part)
        won = one if won is None else np.logaddexp(won, one)
    return won


def above(d, bar, all_in=EVEN, alpha=.05): return capital(d, bar, all_in) >= np.log(1/alpha)
def below(d, bar, alpha=.05): return above(-d, -bar, EVEN, alpha)


def test_many_experiments_are_played_as_one_is():
    d = played(6, 50, (1., .5), (-1., .2), (.5, .1))
    for bar, all_in in ((.3, BOLD), (-.01, EVEN), (0, EVEN)):
        one_by_one = [log_capital(o, bar, all_in) for o in d]
        np.testing.assert_allclose(capital(d, bar, all_in), one_by_one, rtol=1e-9, atol=1e-9)
    for o in d:
        gain = bounded(o, .05, BOLD)
        assert (gain.lower >= .3) == bool(above(o[None], .3, BOLD)[0, -1])
        assert (gain.upper < .3) == bool(below(o[None], .3)[0, -1])


HARD, EASY = (1., .9), (1., .1)  # draws at two lengths whose gains have a mean of 0.5
CLAIMS = {  # name: (draws, what passes [times, n]); the claim is wrong, if only just
    "a gain of 30 points, none lost": (lambda t: played(t, 200, (1., .3)), lambda d: above(d, .3, BOLD)),
    "a gain of 30 points, many lost": (lambda t: played(t, 200, (1., .65), (-1., .35)), lambda d: above(d, .3, BOLD)),
    "a gain of 50 points, half at an easy length": (
        lambda t: np.stack([played(t, 100, HARD), played(t, 100, EASY, seed=1)], 2).reshape(t, 200),
        lambda d: above(d, .5, BOLD)),
    "one point worse at most": (lambda t: played(t, 800, (-1., .01)), lambda d: above(d, -.01)),
    "ten points worse at most": (lambda t: played(t, 200, (1., .2), (-1., .3)), lambda d: above(d, -.1)),
    "ten points worse at most, answers half right": (
        lambda t: played(t, 200, (.5, .2), (-.5, .4)), lambda d: above(d, -.1)),
    "equal within 5 points, 5 better": (lambda t: played(t, 400, (1., .05)), lambda d: above(d, -.05) & below(d, .05)),
    "equal within 5 points, 5 worse": (
        lambda t: played(t, 400, (1., .1), (-1., .15)), lambda d: above(d, -.05) & below(d, .05)),
    "better, and is not": (lambda t: played(t, 200, (1., .2), (-1., .2)), lambda d: above(d, 0)),
    "not better by 5 points, and is": (lambda t: played(t, 400, (1., .1), (-1., .05)), lambda d: below(d, .05)),
    "half right at each place, one is not": (lambda t: played(t, 200, (1., .5)), lambda s: above(2*s - 1, 0, BOLD)),
    "less than half right at one of three places": (
        lambda t: played(3*t, 200, (1., .5)), lambda s: below(2*s - 1, 0, .05/3).reshape(-1, 3, 200).any(1)),
    "the code carries most of the gain": (  # it stands just in the middle
        lambda t: played(t, 200, (.5, .45), (-.5, .45), seed=2), lambda lead: above(lead, 0)),
    "there is a gain to share": (lambda t: played(t, 200, (1., .35), (-1., .05)), lambda total: above(total, .3)),
}


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("name", CLAIMS)
def test_a_wrong_claim_passes_at_most_one_time_in_twenty_however_often_one_looks(times, name):
    make, passes = CLAIMS[name]
    wrong = passes(make(times)).any(axis=1).mean()
    print(f"false passes {wrong:.4f} of {times}: {name}")
    assert wrong <= up_to(.05, times)


def test_what_is_simulated_is_what_the_rules_say():
    for seed in range(5):
        d = played(1, 60, (1., .3), (-1., .1), seed=seed)
        gain = bounded(d[0])
        assert (equivalence_of(gain, .05) == "pass") == bool((above(d, -.05) & below(d, .05))[0, -1])
        assert (claim_verdict(gain, "better", .05) == "pass") == bool(above(d, 0)[0, -1])
    both = bounded([1.]*12)
    assert share_verdict(both, bounded([.5]*12), .3) == "pass" and share_verdict(both, bounded([-.5]*12), .3) == "fail"
    assert share_verdict(bounded([0.]*12), bounded([.5]*12), .3) == "fail"


# ---- bands over lengths

@lru_cache
def band_table(n, step, alpha):
    "Lower bound of a rate after each number of draws and of right answers, [n + 1, n + 1]."
    low = np.zeros((n + 1, n + 1))
    for m in range(step, n + 1, step):
        for k in range(m + 1): low[m, k] = bounded_rate([1.]*k + [0.]*(m - k), alpha)[1]
    return low


def bands(times, rates, n, step):
    "Lower and upper ends of accuracy at each length after each `step` draws, [times, lengths, n/step]."
    right = np.cumsum(np.random.default_rng(3).random((times, len(rates), n)) < np.array(rates)[:, None], axis=2)
    seen, low = np.arange(step, n + 1, step), band_table(n, step, .05/(2*len(rates)))
    k = right[..., seen - 1]
    return low[seen, k], 1 - low[seen, seen - k]


def largest_return(low, high):
    "What is not excluded, and what is shown, of the largest rise between any two lengths, [times, looks]."
    pairs = [(i, j) for j in range(low.shape[1]) for i in range(j)]
    rise = lambda to, start: np.max([to[:, j] - start[:, i] for i, j in pairs], axis=0)
    return rise(high, low), rise(low, high)


CURVES_WRONG = {  # name: (rates, does it pass?, does it fail?)
    "no return over 30 points, one of 30": ([1, .7, 1, 1], "most"),
    "no return over 30 points, one of 31, far off": ([1, .69, .69, 1], "most"),
    "a return over 30 points, one of 30": ([.9, .6, .9, .6], "least"),
}


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("name", CURVES_WRONG)
def test_the_shape_of_a_curve_is_seldom_misjudged_however_often_one_looks(times, name):
    rates, kind = CURVES_WRONG[name]
    most, least = largest_return(*bands(times, rates, 80, 8))
    wrong = ((most < .3) if kind == "most" else (least > .3)).any(axis=1).mean()
    print(f"false {'passes' if kind == 'most' else 'fails'} {wrong:.4f} of {times}: {name}")
    assert wrong <= up_to(.05, times)


@pytest.mark.parametrize("times", TIMES)
def test_a_cliff_of_50_points_seldom_passes_as_smooth(times):
    low, high = bands(times, [1, 1, .5, .5], 80, 8)
    wrong = ((high[:, :-1] - low[:, 1:]).max(axis=1) < .5).any(axis=1).mean()
    print(f"false passes {wrong:.4f} of {times}: no drop over 50 points, one of 50")
    assert wrong <= up_to(.05, times)


def test_bands_are_those_of_the_rule():
    rates, n = [1, .7, 1, .4], 12
    low, high = bands(1, rates, n, step=n)
    curve = pd.DataFrame(dict(lower=low[0, :, -1], upper=high[0, :, -1]))
    scores = np.random.default_rng(3).random((1, 4, n)) < np.array(rates)[:, None]
    np.testing.assert_allclose(curve.lower, [bounded_rate(s.astype(float), .05/8)[1] for s in scores[0]], atol=1e-7)
    assert shape_verdict(curve, 2., .3, .5) in ("inconclusive", "fail")


# ---- families

def family_p(d):
    "Two-sided p-values of families after each draw: d [times, family, n]."
    flat = d.reshape(-1, d.shape[-1])
    best = np.maximum(np.maximum(capital(flat, 0), capital(-flat, 0)), 0).reshape(d.shape)
    return np.minimum(1, 2*np.exp(-best))


@pytest.mark.parametrize("times", TIMES)
def test_holm_over_bets_keeps_the_family_wise_error_however_often_one_looks(times):
    n, family = 100, 8
    d = played(times*family, n, (1., .2), (-1., .2), seed=4).reshape(times, family, n)
    d[:, 0] = played(times, n, (1., .6), seed=5)  # one difference is real
    p = family_p(d)
    real = p[:, 0]
    null = np.sort(p[:, 1:], axis=1)[:, 0]
    told = np.minimum(real, null) == null  # the smallest of all
    rejected = np.where(told, null*family < .05, (real*family < .05) & (null*(family - 1) < .05))
    wrong, seen = rejected.any(axis=1).mean(), (real*family < .05).any(axis=1).mean()
    print(f"families with a false difference {wrong:.4f} of {times}; the real one is seen in {seen:.4f}")
    assert wrong <= up_to(.05, times) and seen > .9
    one = p[0, :, -1]
    assert bool(rejected[0, -1]) == bool((holm(one)[1:] < .05).any())


# ---- against the exact test over a number of draws that is fixed beforehand

def fixed_power(n, p_gain, p_loss, bar, alpha=.05):
    "Power of the difference of Clopper and Pearson's ends of the two rates, an error of alpha/2 each."
    k = np.arange(n + 1)
    low = np.where(k == 0, 0, beta.ppf(alpha/2, np.maximum(k, 1), n - k + 1))
    high = np.where(k == n, 1, beta.ppf(1 - alpha/2, k + 1, np.maximum(n - k, 1)))
    chance, power = binom.pmf(k, n, p_gain), 0
    for g in np.flatnonzero(chance > 1e-7):
        losses = np.arange(n - g + 1)
        shown = low[g] - high[losses] >= bar
        power += chance[g]*binom.pmf(losses, n - g, p_loss/(1 - p_gain) if p_gain < 1 else 0)[shown].sum()
    return power


def fixed_draws(p_gain, p_loss, bar, power=.9):
    "How many draws that test needs."
    low = 0
    for step in (64, 16, 4, 1):
        while fixed_power(low + step, p_gain, p_loss, bar) < power: low += step
    return low + 1


def sequential_draws(times, n, p_gain, p_loss, bar, all_in):
    "Draws until the bet has won in each of many experiments, n where it has not; the share that has."
    passed = above(played(times, n, (1., p_gain), (-1., p_loss), seed=6), bar, all_in)
    return np.where(passed.any(axis=1), passed.argmax(axis=1) + 1, n), passed.any(axis=1).mean()


GAINS = ((1, 0), (.9, 0), (.8, 0), (.9, .05), (.8, .05), (.7, 0), (.6, 0), (.6, .05), (.5, 0))
MARGINS = ((0, 0), (0, .001), (0, .002), (.02, 0), (.05, .01))
RATES = [(.3, BOLD, 400, r) for r in GAINS] + [(-.01, EVEN, 4000, r) for r in MARGINS]


@pytest.mark.parametrize("times", [200, pytest.param(2000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("bar, all_in, n, rates", RATES)
def test_bets_need_no_more_draws_than_the_exact_test(times, bar, all_in, n, rates):
    fixed, (draws, share) = fixed_draws(*rates, bar), sequential_draws(times, n, *rates, bar, all_in)
    print(f"bar {bar:+.2f}, {rates[0]} won and {rates[1]} lost: {draws.mean():.1f} draws on average, {share:.3f} pass; "
          f"the exact test needs {fixed}")
    assert draws.mean() < fixed + 3*draws.std()/times**.5 and share >= .9


def test_seven_wins_where_nine_were_needed_and_356_ties_where_368_were():
    assert fixed_draws(1, 0, .3) == 9 and draws_until([1.], lambda g: verdict_of(g, .3), all_in=BOLD) == 7
    assert fixed_draws(0, 0, -.01) == 368 and draws_until([0.], lambda g: verdict_of(g, -.01)) == 356
    assert verdict_of(paired_gain([1]*7, [0]*7, all_in=BOLD), .3) == "pass"
    assert non_inferior([1]*356, [1]*356).verdict == "pass" and non_inferior([1]*355, [1]*355).needed_n == 356
    assert log_evidence(Counts.of([0.]*356), -.01) >= REFUTED > log_evidence(Counts.of([0.]*355), -.01)


# ---- intervals

def covers(seed, times, make):
    "Share of experiments whose interval holds the truth; `make(rng)` gives (truth, low, high)."
    rng = np.random.default_rng(seed)
    return np.mean([low <= truth <= high for truth, low, high in (make(rng) for _ in range(times))])


INTERVALS = {
    "mean of three seeds": lambda g: (.6, *mean_ci(g.normal(.6, .1, 3))[1:]),
    "paired t, six texts": lambda g: (.2, *paired_t(g.normal(.2, 1, 6), np.zeros(6))[2:4]),
    "slope of eight lengths": lambda g: (.1, *flat_slope(np.arange(8), 1 + .1*np.arange(8) + g.normal(0, .05, 8))[2:4]),
}


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("name", INTERVALS)
def test_intervals_cover_the_truth_nineteen_times_in_twenty(times, name):
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
        d, truth = played(times, n, (1., p_gain), (-1., p_loss), seed=7), p_gain - p_loss
        assert max(above(d, truth).any(axis=1).mean(), below(d, truth).any(axis=1).mean()) <= up_to(.05, times)


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
