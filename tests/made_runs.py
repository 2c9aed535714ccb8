"""Runs whose truth is known: records as a run writes them, right at given rates, with what grows and what swings."""
import csv

import numpy as np

from pispiral.evidence.contrasts import arm, planned_contrasts
from pispiral.evidence.records import write_json, write_log
from pispiral.verdict.examples import example_items

SHORT, LONG, NATIVE, K = [512, 1024, 2048, 4096], [12288, 16384, 24576, 32768, 65536], 8192, 4096
PROFILE = dict(
    name="demo", native_length=NATIVE, candidate="hybrid", code=dict(hybrid_K=K, target_length=65536),
    methods=dict(attractor=dict(code="rope", window=1024, memory="some"),
                 pi_spiral_single=dict(code=dict(name="pi_spiral", spiral="single"))),
    needles=dict(methods=["rope", "hybrid", "rope_ntk", "attractor"], short_lengths=SHORT, long_lengths=LONG,
                 core_depths=[.5, .9, .1]),
    sanity=dict(methods=["rope", "pi_spiral", "pi_spiral_single", "hybrid"], question_length=512),
    streams=dict(lengths=[64000, 128000, 256000, 512000, 1000000]), spans=dict(lengths=[2048, 4096, 8192]),
    large=dict(medium=dict(methods=["rope", "hybrid", "rope_ntk"], short_lengths=[512], long_lengths=[12288],
                           depths=[.5], questions=400),
               heavy=dict(length=4096, window=2048, depths=[.1, .5, .9], stream_lengths=[2048, 4096, 8192])),
    ablations=dict(lengths=[512], long_lengths=[12288], seeds=3, long_seeds=3, K=[K, 1024], depths=[.5]),
    drift=dict(length=16384, methods=["rope", "pi_spiral", "hybrid"]),
    repeats=dict(methods=["rope", "rope_ntk", "pi_spiral", "hybrid"], lengths=[1024], seeds=3))
CHECKS = {1: ["unit_tests", "shapes", "determinism", "incremental_matches_recompute", "constant_state"],
          4: ["stable_4bit"], 8: ["failures_collected"], 9: ["tables", "figures", "kit"], 10: ["decision_written"]}


def scores(n, rate):
    "n scores of which a share is right, evenly spread."
    return [int((i*37) % 100 < 100*rate) for i in range(n)]


def answers(mode, length, n, rate=1., **more):
    "A method's answers to n draws at a length."
    return example_items(mode, length, scores(n, rate), **{"hybrid_K": K, **more})


def arm_answers(code, length, n, rate):
    "A code's answers to n draws, under a name of its own."
    return example_items(f"arm {sorted(map(str, code.values()))}", length, scores(n, rate),
                         more=dict(config=code), depths=(.5,))


def table(path, rows):
    "A CSV table from dicts."
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as f:
        out = csv.DictWriter(f, list(rows[0]))
        out.writeheader()
        out.writerows(rows)


def contrast_rate(code, where, prng):
    "How often one side of a contrast is right."
    if code.get("irrational") == "prng": return prng
    if where == "short" or code["pos"] == "pi_spiral": return 1.
    if code["pos"] == "hybrid" and code["spiral"] == "harmonic": return 1.
    return .2 if code["pos"] in ("hybrid", "yarn") else 0.


def ablations(n, prng):
    "Phase 6: both sides of each planned contrast, and RoPE."
    sides = {}
    for c in planned_contrasts(PROFILE):
        for code in (c.a, c.b): sides[c.where, str(code)] = code
    rows = [r for (where, _), code in sides.items()
            for r in arm_answers(code, 512 if where == "short" else 12288, n, contrast_rate(code, where, prng))]
    return rows + arm_answers(arm(PROFILE, "rope").record(), 12288, n, 0.)


def streams(rising):
    "system.csv: behind a window, and a cache that grows."
    row = dict(window=1024, state_size=64, device="cpu", mode="window", speed_from="cpu time")
    rows = [row | dict(step=i, length=L, vram_mb=1000*(1 + rising*i) + i % 2, speed=500 - i % 2)
            for i, L in enumerate((64000, 128000, 256000, 512000, 1000000))]
    return rows + [row | dict(step=i, length=1024*(i + 1), window="", mode="control: unbounded cache",
                              vram_mb=1000 + 100*i, speed=500 - 80*i) for i in range(4)]


def diagnostics(sub, spectrum):
    "Phase 7's tables and losses."
    similar = dict(cosine_sim_pi_spiral=.1, cosine_sim_rope=.5, cosine_sim_rope_ntk=.6)
    table(sub/"positional_diag.csv", [dict(offset=o, **similar) for o in (1000, 5000, 10**6)])
    line = [1e-9]*100 + [1.] + [1e-9]*155
    power = np.random.default_rng(0).exponential(size=256) if spectrum == "flat" else line
    table(sub/"spectral_fft.csv", [dict(mode="pi_spiral", freq=(i + 1)/512, magnitude=float(v)**.5)
                                     for i, v in enumerate(power)])
    write_log(sub/"metrics.jsonl", [dict(task="perplexity", mode=m, length=512*(i + 1),
                                         ppl=float(np.exp(3 - .01*i + .001*np.cos(i**2))))
                                    for m in ("pi_spiral", "hybrid", "rope") for i in range(32)])


def write_run(folder, n=40, short=1., single=1., spiral=1., hybrid=1., rope=0., prng=.5, both=1., phases=range(1, 11),
              spectrum="flat", rising=0., profile=PROFILE):
    "A run whose truth is given: shares of right answers, and what grows."
    each = 100 if n > 5 else n
    lengths = [(m, L, r) for L in SHORT for m, r in (("rope", 1.), ("hybrid", short))]
    lengths += [(m, L, r) for L in LONG for m, r in (("rope", rope), ("rope_ntk", rope), ("hybrid", hybrid))]
    memory = dict(window=1024, attractor=True, checkpoint="some@1", alpha_policy="learned")
    core = [r for m, L, rate in lengths for r in answers(m, L, n, rate)]
    core += [r for L in LONG for r in answers("attractor", L, n, both, more=memory)]
    sanity = [r for m, rate in (("rope", 1.), ("pi_spiral", spiral), ("pi_spiral_single", single)) for L in SHORT
              for r in answers(m, L, each, rate, depths=(.3,), spiral="single" if "single" in m else "harmonic")]
    sanity = [dict(r, key=r["key"] + "s", haystack="prose") for r in sanity]
    medium = [r for m, L, rate in (("rope", 512, 1.), ("hybrid", 512, short), ("rope", 12288, rope),
                                   ("rope_ntk", 12288, rope), ("hybrid", 12288, hybrid))
              for r in answers(m, L, n, rate, model="medium")]
    heavy = [r for i, d in enumerate((.1, .5, .9))
             for r in answers("hybrid", 4096, max(n, 2), hybrid, model="heavy", depths=(d,), first=1000*i)]
    again = [r for m in ("rope", "rope_ntk", "pi_spiral", "hybrid")
             for r in answers(m, 1024, max(3, n), 1., first=5000)]
    logs = {2: sanity, 3: core, 4: medium, 5: heavy, 6: ablations(80 if n > 5 else n, prng), 8: again}
    proof = lambda L: dict(ok=True, detail="equal", values=dict(lengths=L, max_abs_diff=0., items=9, K=K))
    write_json(folder/"run.json", {"profile": profile})
    for p in phases:
        sub = folder/f"phase_{p:02d}"
        checks = {c: dict(ok=True, detail="as planned", values={}) for c in CHECKS.get(p, [])}
        if p in (2, 4): checks["hybrid_equals_rope"] = proof(SHORT if p == 2 else [512])
        write_json(sub/"result.json", dict(phase=p, status="done", checks=checks, not_run=[], native_length=NATIVE))
        if p in logs: write_log(sub/"items.jsonl", logs[p])
        if p in (2, 3, 5): table(sub/"system.csv", streams(rising))
        if p == 7: diagnostics(sub, spectrum)
    return folder
