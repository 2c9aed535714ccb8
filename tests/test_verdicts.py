"""Every gate reaches its verdicts at the cost that it states, and no hostile record set reaches one."""
import json
import random
import shlex
from functools import lru_cache

import numpy as np
import pytest

from conftest import ROOT
from made_runs import PROFILE, answers, streams, table, write_run
from pispiral.evidence.contrasts import planned_contrasts
from pispiral.evidence.records import Log, write_json, write_log
from pispiral.lab import deciding
from pispiral.lab.deciding import Asker, ask_settings, decide_open, log_phase, open_gates
from pispiral.lab.made_answers import record_of
from pispiral.lab.profiles import load_profile
from pispiral.verdict.examples import EXAMPLE_PROFILE, example_items, judge
from pispiral.verdict.gates import evaluate_gates, gate_scope, judge_gate, load_gates
from pispiral.verdict.pairs import load_records
from pispiral.verdict.registry import filled_gate

GATES = load_gates(ROOT/"nbs"/"profiles"/"gates.yaml")
SHIPPED = ("smoke", "demo", "kaggle", "full")


# ---- what each shipped profile can decide draw by draw

@lru_cache
def shipped(name):
    "A shipped profile, and the same as a run records it."
    profile = load_profile(name)
    return profile, profile.model_dump()


def scoped(name):
    "Each gate that a profile can decide, with what it asks."
    nested = shipped(name)[1]
    filled = [filled_gate(g, nested) for g in GATES]
    return [(g, s) for g in filled if not ((s := gate_scope(g, nested)).why or s.dear)]


ASKED = {f"{name} {g.id}": (name, g, s) for name in SHIPPED for g, s in scoped(name) if s.ask}
HOW = {}  # settings of an Ask, made once


def made(name, ask, phase, right, seeds):
    "Records of some rounds of an Ask; right(method, length, seed) says which answers are right."
    at = (name, phase, ask.methods)
    if at not in HOW: HOW[at] = {m: record_of(s) for m, s in ask_settings(ask, shipped(name)[0], phase).items()}
    out = []
    for seed in seeds:
        depth = ask.depths[seed % len(ask.depths)] if ask.task == "niah" else None
        for n in ask.lengths:
            value = f"{10**6 + seed}{n:07d}"
            for m in ask.methods:
                hit = int(right(m, n, seed))
                key = f"{m} {seed} {n} {phase} {ask.task}"
                question = dict(task=ask.task, length=n, seed=seed, haystack=ask.haystack, depth=depth,
                                expected=[value], prompt_hash=f"{seed} {n} {ask.task}", needle_at=3)
                out.append(HOW[at][m] | question | dict(key=key, answer=value if hit else "none", score=hit))
    return out


def first_side(ask):
    "The methods that a claim is about: of a contrast the first, else all but the baseline."
    if ask.codes and len(ask.methods) == 2: return {ask.methods[0]}
    return {m for m in ask.methods if m not in ("rope", "rope_ntk")} or {*ask.methods}


def truths(gate, ask):
    "What the methods are said to be: {name: right(method, length, seed)}."
    first = first_side(ask)
    if len(ask.methods) == 1:  # there is nothing to tie with: right at every second length, or never at one depth
        swings = lambda m, n, s: sorted(ask.lengths).index(n) % 2 == 0
        blind = lambda m, n, s: s % len(ask.depths) > 0 and ask.task == "niah"
        ties = swings if len(ask.lengths) > 1 else blind
        return {"wins": lambda m, n, s: 1, "ties": ties, "losses": lambda m, n, s: 0}
    losses = lambda m, n, s: m not in first
    if gate.rule == "attractor_share": losses = lambda m, n, s: m == "attractor"  # the memory's gain, not the code's
    return {"wins": lambda m, n, s: m in first, "ties": lambda m, n, s: 1, "losses": losses}


def expected(gate):
    "The verdict on each truth. Ties of one method: right at every second length, or never at one depth."
    kind = gate.rule if gate.rule != "contrast" else gate.thresholds["claim"]
    told = {"hybrid_short": "PPF", "short_guard": "PPF", "equivalent": "FPF", "ranking": "PFP", "significance": "PFP"}
    return dict(zip(("wins", "ties", "losses"), ({"P": "pass", "F": "fail"}[c] for c in told.get(kind, "PFF"))))


def asked_run(folder, name, gate, parts, truth):
    "A run that has asked so many rounds of each part; {(Ask, rounds)}."
    nested, logs = shipped(name)[1], {}
    for ask, rounds in parts:
        right = truth if callable(truth) else truths(gate, ask)[truth]
        logs.setdefault(log_phase(ask, gate.phase), []).extend(made(name, ask, gate.phase, right, range(rounds)))
    write_json(folder/"run.json", {"profile": nested})
    for phase, rows in logs.items(): write_log(folder/f"phase_{phase:02d}"/"items.jsonl", rows)
    if gate.rule == "hybrid_short":  # the phase proves what is claimed to be equal
        short = nested["needles"]["short_lengths"] if gate.phase == 2 else nested["large"]["medium"]["short_lengths"]
        proof = dict(lengths=[n for n in short if n not in parts[0][0].lengths], max_abs_diff=0., items=9, K=10**9)
        equal = dict(hybrid_equals_rope=dict(ok=True, detail="equal", values=proof))
        write_json(folder/f"phase_{gate.phase:02d}"/"result.json", dict(phase=gate.phase, checks=equal))
    return judge_gate(load_records(folder), gate)


@pytest.mark.parametrize("case", ASKED)
def test_wins_ties_and_losses_decide_within_the_cost_that_is_stated(tmp_path, case):
    name, gate, scope = ASKED[case]
    wanted, found = expected(gate), {}
    for truth in wanted:
        all_of = gate.rule == "significance" and truth == "ties"  # that none differs takes all of them
        parts = [(ask, ask.rounds(draws)) for ask, draws in (scope.parts if all_of else scope.needed)]
        result = asked_run(tmp_path/truth, name, gate, parts, truth)
        found[truth] = result.verdict
        assert result.verdict == wanted[truth], result.reason
    assert {"pass", "fail"} <= set(found.values())
    print(f"{case}: {found}, {scope.draws} draws, {scope.rounds} rounds, {scope.tokens:,} tokens of "
          f"{shipped(name)[1]['decide']['tokens']:,}")


NOISE = .07  # of the answers are not what they should be
MOST = 800  # answers of a record set, here


def noisy(right):
    def flipped(m, n, s): return right(m, n, s) != (random.Random(f"noise {m} {n} {s}").random() < NOISE)
    return flipped


@pytest.mark.parametrize("case", ASKED)
def test_noise_is_decided_within_the_budget_or_the_run_says_what_it_takes(tmp_path, case):
    name, gate, scope = ASKED[case]
    truth = "ties" if expected(gate)["ties"] == "pass" else "wins"
    budget, times, result = shipped(name)[1]["decide"]["tokens"], 1, None
    right = noisy(lambda m, n, s: truths(gate, by_method(scope, m))[truth](m, n, s))
    fits = lambda: 2*times*scope.tokens <= budget and more_answers(scope, times)
    while result is None or result.verdict == "inconclusive" and fits():
        times = times if result is None else 2*times
        parts = [(ask, times*ask.rounds(draws)) for ask, draws in scope.needed]
        result = asked_run(tmp_path/str(times), name, gate, parts, right)
    if result.verdict == "inconclusive":
        assert result.needs and result.command.startswith("pispiral run --run-id"), result
        print(f"{case}: open after {times*scope.draws} draws; {result.needs}; in all {result.draws}")
    else:
        print(f"{case}: {result.verdict} after {times*scope.draws} draws")
        assert result.verdict == "pass" or truth == "ties", result.reason


def more_answers(scope, times):
    return 2*times*sum(ask.rounds(draws)*len(ask.methods)*len(ask.lengths) for ask, draws in scope.needed) <= MOST


def by_method(scope, m): return next(ask for ask, _ in scope.parts if m in ask.methods)


# ---- gates that a phase decides by itself

def spoilt(folder):
    "A made-up run in which everything that a phase finds by itself is bad."
    write_run(folder, n=3, spectrum="line", rising=.2)
    for path in folder.glob("phase_*/result.json"):
        found = json.loads(path.read_text(encoding="utf-8"))
        for check in found["checks"].values(): check["ok"] = False
        write_json(path, found)
    slow = [dict(r, speed=500 - 60*i) for i, r in enumerate(streams(.2)) if not r["mode"].startswith("control")]
    control = [r for r in streams(.2) if "control" in r["mode"]]
    for p in (2, 3, 5): table(folder/f"phase_{p:02d}"/"system.csv", slow + control)
    same = dict(cosine_sim_pi_spiral=.6, cosine_sim_rope=.5, cosine_sim_rope_ntk=.6)
    table(folder/"phase_07"/"positional_diag.csv", [dict(offset=o, **same) for o in (1000, 5000)])
    write_log(folder/"phase_07"/"metrics.jsonl", wavy(.3))
    eighth = folder/"phase_08"/"items.jsonl"
    rows = [json.loads(line) for line in eighth.read_text(encoding="utf-8").splitlines()]
    write_log(eighth, [dict(r, seed=5000) for r in rows])
    return folder


def wavy(high, modes=("pi_spiral", "hybrid", "rope"), **more):
    "Log-perplexity with a wave, over 48 positions."
    loss = lambda m, i: 3 - .01*i + .001*np.cos(i**2) + high*np.sin(i)*(m != "rope")
    return [dict(task="perplexity", mode=m, length=512*(i + 1), ppl=float(np.exp(loss(m, i))), **more)
            for m in modes for i in range(48)]


def test_gates_that_a_phase_decides_pass_and_fail(tmp_path):
    good = {g.id: g.verdict for g in evaluate_gates(write_run(tmp_path/"good", n=3), GATES)}
    bad = {g.id: g for g in evaluate_gates(spoilt(tmp_path/"bad"), GATES)}
    elsewhere = {"3.gain_over_best_rival", "6.pi_on_learned"}
    alone = {g.id for name in SHIPPED for g, s in scoped(name) if s.ask is None} - elsewhere
    assert len(alone) > 15 # two need other records: 12_rules_gain, test_care and 26_learned, 32_made_answers judge them
    assert {g: good[g] for g in alone} == dict.fromkeys(alone, "pass")
    assert {g: bad[g].verdict for g in alone} == dict.fromkeys(alone, "fail"), [bad[g].reason for g in alone]


# ---- hostile records: each fault of the audit

LONG = (12288, 16384)


def gained(n, hybrid=1, rope=0, lengths=LONG):
    "Draws at long lengths that hybrid has right, and RoPE has not."
    rows = [o for L in lengths for m, s in (("hybrid", hybrid), ("rope", rope)) for o in example_items(m, L, [s]*n)]
    return [dict(o, prompt_hash=f"{o['seed']} {o['length']}") for o in rows]


def found(rows, gate="3.gain_over_rope", **run): return judge(gate, items={int(gate[0]): rows}, **run)


FEW = gained(3)  # six draws: one too few
def later(mark, **more):
    "The few draws again as if they were later ones."
    return [dict(o, key=mark + o["key"], seed=o["seed"] + 50, prompt_hash=mark + o["prompt_hash"], **more) for o in FEW]


AGAIN = {  # name: what is added to six wins, to look like more
    "known by identity": (later("i", same_as="other"), "by identity"),
    "the same prompt under another seed": ([dict(o, key="s" + o["key"], seed=o["seed"] + 50) for o in FEW], "copies"),
    "the same question without a prompt's hash": (later("h"), None),
    "the same key twice": (FEW, None),
    "a repeated seed": ([dict(o, key="r" + o["key"], prompt_hash="r" + o["prompt_hash"], expected=["9999999"], answer=(
        "9999999" if o["score"] else "no")) for o in FEW], "copies"),
    "4-bit weights": ([dict(o, key="q" + o["key"], quantize="nf4") for o in FEW], "another setting"),
    "weights kept elsewhere": ([dict(o, key="o" + o["key"], offload="disk") for o in FEW], "another setting"),
    "another backend": ([dict(o, key="b" + o["key"], attn_backend="flex") for o in FEW], "another setting"),
    "another dtype": ([dict(o, key="d" + o["key"], dtype="float32") for o in FEW], "another setting"),
    "another chunk": ([dict(o, key="c" + o["key"], chunk=64) for o in FEW], None),
    "other weights": ([dict(o, key="w" + o["key"], weights="other") for o in FEW], "another setting"),
    "new draws of other weights": ([dict(o, weights="other") for o in gained(6) if o["seed"] > 3], "another setting"),
    "another K": (later("k", config=dict(FEW[0]["config"], hybrid_K=4096)), None),
    "a baseline behind a window": ([dict(o, key="v" + o["key"], window=1024*(o["mode"] == "rope") or None)
                                    for o in gained(9) if o["seed"] > 2], None),
    "another model": ([o for o in later("m", model="medium") if o["seed"] < 52], "another setting"),
    "within the native length": (gained(9, lengths=(4096, 8192)), None),
}


@pytest.mark.parametrize("name", AGAIN)
def test_what_is_no_draw_of_its_own_is_not_counted(name):
    more, why = AGAIN[name]
    rows = [dict(o, prompt_hash=None) for o in FEW + more] if name.endswith("hash") else FEW + more
    result = found(rows)
    assert (result.verdict, result.evidence["n"]) == ("inconclusive", 6), result.reason
    said = why and why.replace("copies", "copies of a question") + " not counted"
    assert why is None or said in result.reason, result.reason
    assert found(gained(4)).verdict == "pass"  # two more of their own would do


def test_a_copy_in_each_pair_is_no_pair():
    rows = [dict(o, same_as="its copy") if o["mode"] == "rope" else o for o in gained(20)]
    copied = found(rows)
    assert copied.verdict == "not run" and "by identity not counted" in copied.reason
    every = found([dict(o, seed=7, key=f"x{i}", depth=.5) for i, o in enumerate(gained(20))])  # one seed, called twenty
    assert every.verdict == "inconclusive" and every.evidence["n"] == 2


def test_depths_of_one_haystack_are_one_draw():
    at = lambda o, d: dict(o, key=f"{o['key']} {d}", depth=d, prompt_hash=f"{o['prompt_hash']} {d}")
    rows = [at(o, d) for o in FEW for d in (.1, .5, .9)]
    assert (found(rows).verdict, found(rows).evidence["n"]) == ("inconclusive", 6)


def test_a_weak_half_does_not_hide_behind_a_mixture():
    "Of two backends, weights or dtypes only one is judged; which one does not depend on the scores."
    for field, other in (("attn_backend", "flex"), ("dtype", "float32"), ("weights", "b"), ("quantize", "nf4")):
        lost = [dict(o, key="l" + o["key"], seed=o["seed"] + 90, prompt_hash="l" + o["prompt_hash"], **{field: other})
                for o in gained(12, hybrid=0)]
        mixed = found(gained(9) + lost)
        assert mixed.evidence["n"] in (18, 24) and "in another setting not counted" in mixed.reason
        assert mixed.verdict == ("pass" if field == "quantize" else "fail")  # phase 3's own weights are not quantised


def spirals_short(n, **rope):
    "Three methods that are always right at short lengths; what more RoPE's records say."
    which = {"pi_spiral": "harmonic", "pi_spiral_single": "single", "rope": "harmonic"}
    return [o for m, spiral in which.items() for L in (512, 2048)
            for o in example_items(m, L, [1]*n, more=rope if m == "rope" else {}, spiral=spiral)]


def test_a_windowed_baseline_is_another_method_at_short_lengths_too():
    methods = dict(pi_spiral_single=dict(code=dict(name="pi_spiral", spiral="single")))
    profile = dict(EXAMPLE_PROFILE, methods=methods)
    assert found(spirals_short(180), "2.pi_spiral_short", profile=profile).verdict == "pass"
    assert found(spirals_short(180, window=64), "2.pi_spiral_short", profile=profile).verdict == "not run"


def test_a_needle_within_the_window_shows_nothing(tmp_path):
    heavy = dict(length=4096, window=2048, depths=[.1, .5, .9])
    near = dict(EXAMPLE_PROFILE, large=dict(heavy=dict(heavy, length=1024)))
    rows = [dict(o, window=2048) for i, d in enumerate((.1, .5, .9))
            for o in example_items("hybrid", 1024, [1]*9, depths=(d,), first=100*i)]
    write_json(tmp_path/"run.json", {"profile": near})
    write_log(tmp_path/"phase_05"/"items.jsonl", rows)
    gate = next(g for g in GATES if g.id == "5.stable_retrieval")
    result = judge_gate(load_records(tmp_path), gate)
    assert result.verdict == "out of scope" and "lie within the heavy model's window of 2048" in result.reason
    far = dict(EXAMPLE_PROFILE, large=dict(heavy=heavy))
    inside = found(rows, "5.stable_retrieval", profile=far)  # the profile asks farther than was asked
    assert inside.verdict == "not run" and "27 within the window not counted" in inside.reason
    deep = [dict(o, window=2048, length=4096) for o in rows]
    lost = [dict(o, key="p" + o["key"], task="passkey", depth=None, score=0, answer="no") for o in deep[:9]]
    assert found(deep, "5.stable_retrieval", profile=far).verdict == "pass"
    assert found(deep + lost, "5.stable_retrieval", profile=far).verdict == "fail"  # a passkey that is lost counts
    keys = dict(EXAMPLE_PROFILE, large=dict(heavy=dict(heavy, infinitebench=dict(lengths=[4096], tasks=["passkey"]))))
    lacking = found(deep, "5.stable_retrieval", profile=keys)
    assert lacking.verdict == "inconclusive" and "no passkey" in lacking.reason  # where it is asked


def test_an_answer_that_names_everything_fails_its_control():
    everything = " ".join(o["expected"][0] for o in gained(20))
    for n in (4, 9, 20):  # with as few draws as the gate itself needs, too
        leak = found([dict(o, answer=everything) if o["mode"] == "hybrid" else o for o in gained(n)])
        assert leak.verdict == "fail" and "the control did not fail" in leak.reason
    silent = found([{k: v for k, v in o.items() if k != "answer"} for o in gained(9)])
    assert silent.verdict == "inconclusive" and "no control can be made" in silent.reason
    heavy = [o for i, d in enumerate((.1, .5)) for o in example_items("hybrid", 4096, [1]*9, depths=(d,), first=100*i)]
    values = " ".join(o["expected"][0] for o in heavy)
    assert found([dict(o, answer=values) for o in heavy], "5.stable_retrieval").verdict == "fail"


def test_near_copies_are_no_differences():
    asked = dict(seeds=3, lengths=[512], long_seeds=3, long_lengths=[12288], K=[2048], depths=[.5])
    profile = dict(EXAMPLE_PROFILE, ablations=asked)
    plan = {c.name: c for c in planned_contrasts(profile)}
    copies = ("sqrt2", "phi", "random", "1/7", " e ")  # of one code, within 0.1 percent
    assert not [n for n in plan if any(x in n for x in copies)]
    near = plan["hybrid against hybrid_yarn"]
    assert near.claim == "equivalent" and plan["pi_spiral against yarn"].claim == "equivalent"
    sides = [o for side, s in ((near.a, 1), (near.b, 0))
             for o in example_items(str(side["spiral"]), 12288, [s]*40, more=dict(config=side))]
    rows = [dict(o, key=f"k{i}") for i, o in enumerate(sides)]
    assert found(rows, "6.significance", profile=profile).verdict == "inconclusive"  # no planned difference was asked
    spiral = lambda x: dict(config=dict(plan["pi_spiral against hash, short"].a, irrational=x))
    irrationals = [dict(o, key=f"{x} {o['key']}") for x, s in (("pi", 1), ("e", 0), ("sqrt2", 0))
                   for o in example_items(x, 512, [s]*40, more=spiral(x))]
    assert found(irrationals, "6.significance", profile=profile).verdict in ("inconclusive", "not run")
    assert found(irrationals, "6.ranking", profile=profile).verdict in ("inconclusive", "not run")


def test_three_items_at_one_seed_are_not_three_seeds():
    modes = ("rope", "rope_ntk", "pi_spiral", "hybrid")
    rows = [o for m in modes for o in example_items(m, 2048, [1]*3)]
    assert found(rows, "8.seeds").verdict == "pass"
    one = [dict(o, seed=0) for o in rows]  # three depths of one haystack
    told = found(one, "8.seeds")
    assert told.verdict == "fail" and "0 of 4 key settings have 3 draws" in told.reason
    same = [dict(o, prompt_hash="one and the same") for o in rows]
    assert found(same, "8.seeds").verdict == "fail"
    copies = [dict(o, same_as="rope's") if o["mode"] == "hybrid" else o for o in rows]
    told = found(copies, "8.seeds")
    assert "hybrid by identity" in told.reason and "3 by identity not counted" in told.reason


def test_a_cache_that_does_not_grow_is_no_control(tmp_path):
    folder = write_run(tmp_path/"r", n=3)
    assert {g.id: g.verdict for g in evaluate_gates(folder, GATES, [3])}["3.flat_memory"] == "pass"
    flat = [dict(r, vram_mb=1000 + r["step"] % 2, speed=500) if "control" in r["mode"] else r for r in streams(0)]
    for p in (2, 3): table(folder/f"phase_{p:02d}"/"system.csv", flat)
    broken = {g.id: g for g in evaluate_gates(folder, GATES, [2, 3])}
    for gate in ("2.flat_memory", "2.stable_throughput", "3.flat_memory"):
        assert broken[gate].verdict == "fail" and "the control did not fail" in broken[gate].reason
    for p in (2, 3): table(folder/f"phase_{p:02d}"/"system.csv", [r for r in flat if "control" not in r["mode"]])
    assert {g.id: g.verdict for g in evaluate_gates(folder, GATES, [3])}["3.flat_memory"] == "inconclusive"


def curves(metrics): return judge("7.no_ppl_oscillation", metrics={7: metrics})


def test_a_curve_of_nothing_does_not_show_that_nothing_oscillates():
    assert curves(wavy(0.001)).verdict == "pass" and curves(wavy(.3)).verdict == "fail"
    zero = [dict(o, reference_ppl=o["ppl"]) for o in wavy(.3)]
    assert curves(zero).verdict == "not run"
    mostly = [dict(o, reference_ppl=o["ppl"]*(1.01 if o["length"] in (12800, 20480) else 1)) for o in wavy(.3)]
    assert curves(mostly).verdict == "inconclusive"  # two points are no curve
    assert curves([o for o in wavy(.001) if o["length"] <= 8192]).verdict == "not run"  # within the native length
    assert curves(wavy(.001, modes=("hybrid", "rope"))).verdict == "inconclusive"  # of two codes one was read
    behind = wavy(.001) + wavy(.3, window=4096)  # a window that oscillates beside a full one that does not
    assert curves(behind).verdict == "fail"


def test_a_phase_is_judged_at_its_own_lengths(tmp_path):
    "The medium model's lengths are not the small one's, in either direction."
    rates = dict(hybrid=1, rope=0, rope_ntk=0)
    medium = [o for m, r in rates.items() for o in answers(m, 12288, 9, r, model="medium")]
    write_json(tmp_path/"run.json", {"profile": PROFILE})  # its small model has five long lengths
    write_log(tmp_path/"phase_04"/"items.jsonl", medium)
    verdicts = {g.id: g for g in evaluate_gates(tmp_path, GATES, [3, 4])}
    assert verdicts["4.gain_over_rope"].verdict == "pass" and verdicts["3.gain_over_rope"].verdict == "not run"
    small = [o for m, r in (("hybrid", 1), ("rope", 0)) for o in answers(m, 12288, 9, r)]
    write_log(tmp_path/"phase_03"/"items.jsonl", small)
    open_ = {g.id: g for g in evaluate_gates(tmp_path, GATES, [3])}["3.gain_over_rope"]
    assert open_.verdict == "inconclusive" and "nothing at 16384, 24576, 32768, 65536" in open_.reason


def test_a_length_that_does_not_fit_does_not_keep_a_gate_open(tmp_path):
    needles = dict(PROFILE["needles"], long_lengths=[12288, 65536])
    write_json(tmp_path/"run.json", {"profile": dict(PROFILE, needles=needles)})
    rows = [o for m, r in (("hybrid", 1), ("rope", 0)) for o in answers(m, 12288, 9, r)]
    write_log(tmp_path/"phase_03"/"items.jsonl", rows)
    write_log(tmp_path/"phase_03"/"skipped.jsonl", [dict(key="s", length=65536, mode="rope", why="no room")])
    fits = {g.id: g for g in evaluate_gates(tmp_path, GATES, [3])}["3.gain_over_rope"]
    assert fits.verdict == "pass" and "not on this machine: 65536" in fits.reason


# ---- the command that settles a gate

class MadeUp(Asker):
    "Answers by rates instead of a model."
    def __init__(self, folder, name, rate):
        super().__init__(folder, shipped(name)[0])
        self.name, self.rate, self.next = name, rate, 1000

    def seconds(self, one): return 1.

    def ask(self, one, rounds):
        right = lambda m, n, s: random.Random(f"{m} {n} {s}").random() < self.rate(one.ask, m)
        rows = made(self.name, one.ask, one.gate.phase, right, range(self.next, self.next + rounds))
        self.next += rounds
        with Log(self.folder/f"phase_{log_phase(one.ask, one.gate.phase):02d}"/"items.jsonl") as log:
            for r in rows: log.append(r)
        return len(rows)


SETTLED = {  # gate: (profile, rounds of the look, share that the claim's side and the other have right)
    "3.gain_over_rope": ("demo", 2, .9, .05),
    "5.stable_retrieval": ("demo", 3, 1., 1.),
    "6.harmonic_is_yarn": ("full", 3, 1., 1.),
    "6.pi_vs_prng": ("kaggle", 4, .8, .2),
    "6.ranking": ("full", 3, 1., 1.),
    "2.pi_spiral_short": ("demo", 5, 1., 1.),
}


def settled(folder, gate, name, look, high, low):
    "A look at a gate, its verdict, and that of the run which its command asks for."
    profile, nested = shipped(name)
    filled = filled_gate(next(g for g in GATES if g.id == gate), nested)
    scope = gate_scope(filled, nested)
    rate = lambda ask, m: high if m in first_side(ask) else low
    right = lambda m, n, s: random.Random(f"{m} {n} {s}").random() < rate(by_method(scope, m), m)
    before = asked_run(folder, name, filled, [(scope.ask, look)], right)
    words = shlex.split(before.command)
    wanted = words[words.index("--gates") + 1].split(",")
    assert words[:2] == ["pispiral", "run"] and "--until-decided" in words
    assert words[words.index("--run-id") + 1] == folder.name
    assert ("--profile" in words) == (name != "demo") and name in (*words, "demo")
    asker = MadeUp(folder, name, rate)
    came, open_ = decide_open(folder, profile, [g for g in GATES if g.id in wanted], None, asker)
    [after] = open_gates(folder, profile, [g for g in GATES if g.id in wanted])[1]
    return before, after, open_, came//len(scope.ask.methods), scope


@pytest.fixture
def seldom_looks(monkeypatch): monkeypatch.setattr(deciding, "BATCH", 10_000.)  # seconds between two looks


@pytest.mark.usefixtures("seldom_looks")
@pytest.mark.parametrize("gate", [pytest.param(g, marks=pytest.mark.slow) if g == "6.ranking" else g for g in SETTLED])
def test_the_command_that_settles_a_gate_does(tmp_path, gate):
    name, look, high, low = SETTLED[gate]
    before, after, open_, asked, scope = settled(tmp_path/"made", gate, name, look, high, low)
    assert before.verdict == "inconclusive" and not open_ and after.verdict in ("pass", "fail"), after.reason
    said = before.draws or sum(draws for _, draws in scope.needed)
    print(f"{gate} ({name}): {before.verdict} with {before.draws} draws in all, {after.verdict} after {asked} more")
    assert asked <= (3 if high < 1 else 1.5)*max(said, scope.tokens/scope.ask.tokens) + 10, (asked, said)


@pytest.mark.usefixtures("seldom_looks")
def test_a_family_without_a_difference_is_decided_and_not_asked_for_ever(tmp_path):
    before, after, open_, asked, scope = settled(tmp_path/"made", "6.significance", "demo", 2, 1., 1.)
    assert (before.verdict, after.verdict, open_) == ("inconclusive", "fail", [])
    assert asked <= sum(draws for _, draws in scope.parts) + 10*len(scope.parts)
