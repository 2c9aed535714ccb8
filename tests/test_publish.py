"""The paper's numbers against the records, the report in a browser, the commands and their errors."""
import json
import math
import re
import shutil
import subprocess
from itertools import chain
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from pypdf import PdfReader
from scipy.stats import binomtest
from typer.testing import CliRunner

from pispiral.evidence.contrasts import planned_contrasts
from pispiral.evidence.records import SCHEMA, read_log, write_json, write_log
from pispiral.base.files import write_text
from pispiral.cli.publish import app
from pispiral.publish.formats import to_typst
from pispiral.publish.paper import make_paper
from pispiral.publish.report import save_report
from pispiral.publish.figures.run import drawn_figures
from pispiral.publish.results import main_rows, open_results, variants
from pispiral.publish.tables.run import run_tables
from pispiral.verdict.betting import bounded_rate, paired_gain
from pispiral.verdict.stats import flat_slope, mean_ci, wilson

ROOT = Path(__file__).parents[1]
REFERENCE, GATES = ROOT/"runs"/"reference", ROOT/"nbs"/"profiles"/"gates.yaml"


def tokens(text):
    "Numbers in a text, without separators of thousands and trailing zeros."
    plain = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text)
    return {f"{float(t):g}" for t in re.findall(r"\d+(?:\.\d+)?", plain)}


def pdf_text(path):
    "The PDF's own text and tables; what stands inside pictures is left out."
    reader = PdfReader(path)
    for page in reader.pages: page["/Resources"].get_object().pop("/XObject", None)
    return "\n".join(page.extract_text() for page in reader.pages), len(reader.pages)


def paper_of(run, tmp, figures="none"):
    made = make_paper(open_results(run, GATES), ROOT/"paper", figures, tmp)
    return made, *pdf_text(made)


@pytest.fixture(scope="module")
def reference_paper(tmp_path_factory):
    return paper_of(REFERENCE, tmp_path_factory.mktemp("paper"), ROOT/"figures"/"reference")


@pytest.fixture(scope="module")
def empty_paper(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("empty")
    write_json(tmp/"run"/"run.json", dict(run_id="empty", schema=SCHEMA, profile=dict(name="smoke")))
    return paper_of(tmp/"run", tmp)


def forms(*values):
    "How a table may print numbers."
    known = [v for v in values if v is not None and math.isfinite(v)]
    return " ".join(f"{v:.1f} {v:.2f} {v:.3f} {v:.4f} {v:.4g} {v:.0f}" for v in known)


def shares(frame, *keys):
    "Means, Wilson's intervals and counts of the groups of items."
    for by in keys:
        for _, g in frame.groupby(by, dropna=False):
            ends = binomtest(round(g.score.sum()), len(g)).proportion_ci(method="wilson")
            low, high = (wilson(g.score.sum(), len(g)) if g.score.sum() % 1 else (ends.low, ends.high))
            yield forms(g.score.mean(), low, high, len(g))


def measured(run):
    "What system.csv and the records of phases 6 and 7 give by averaging."
    for path in run.glob("phase_*/system.csv"):
        rows = pd.read_csv(path)
        keys = [k for k in ("model", "mode", "device", "window") if k in rows]
        for _, g in rows.groupby(keys, dropna=False):
            last = g[g.length == g.length.max()]
            columns = [c for c in ("vram_mb", "tokens_per_sec", "state_size") if c in last]
            yield forms(*last[columns].mean(), g.length.min())
            if g.dropna(subset="vram_mb").length.nunique() > 1:
                slope = flat_slope(g.length, g.vram_mb)
                yield forms(100*slope.growth, 100*slope.growth_lower, 100*slope.growth_upper, len(g))
    seven = run/"phase_07"
    if (seven/"positional_diag.csv").exists():
        far = pd.read_csv(seven/"positional_diag.csv").query("offset >= 1024").filter(like="cosine_sim_")
        yield forms(*far.abs().max())
    if (seven/"spectral_fft.csv").exists():
        lines = pd.read_csv(seven/"spectral_fft.csv").query("freq > 0")
        yield forms(*(float(np.exp(np.log(g.magnitude.clip(lower=1e-300)**2).mean())/(g.magnitude**2).mean())
                      for _, g in lines.groupby("mode")))
    losses = [r for r in read_log(seven/"metrics.jsonl") if r.get("ppl")]
    for _, g in pd.DataFrame(losses).groupby(["mode", "window"], dropna=False) if losses else ():
        yield forms(math.exp(np.log(g.ppl).mean()), len(g))
    for _, g in pd.DataFrame(losses).assign(far=lambda d: d.window.notna()).groupby(["mode", "far"]) if losses else ():
        yield forms(math.exp(np.log(g.ppl).mean()), len(g))
    nano = pd.DataFrame(read_log(run/"phase_06"/"nano.jsonl"))
    for _, g in nano.groupby(["variant", "length"]) if len(nano) else ():
        each = g.groupby("seed").exact_match.mean()
        yield forms(*mean_ci(each), len(each))


def recorded(run):
    "Every number that a run's records hold or give by counting, averaging and intervals, worked out here."
    files = [p for kind in ("*.json", "phase_*/*.json", "phase_*/*.jsonl", "phase_*/*.csv", "phase_*/*.log")
             for p in run.glob(kind)]
    found = set(chain.from_iterable(tokens(p.read_text(encoding="utf-8")) for p in files))
    found |= {f"{round(float(t), d):g}" for t in found for d in range(4)}
    res = open_results(run, GATES)
    items = {r["key"]: r for p in sorted(run.glob("phase_*/items.jsonl")) for r in map(json.loads, p.open())}
    frame = main_rows(res.rec)
    frame = frame[frame.same.isna()] # what is known by identity is in no number but its own
    copies = sum("same_as" in r for r in items.values())
    each_of = (["model", "haystack", "task", "mode", *more] for more in ([], ["length"], ["length", "depth"]))
    said = [str(len(items) - copies), str(copies), *measured(run), *shares(frame, *each_of)]
    said += shares(frame, ["task", "mode"], ["model", "task", "mode", "length"])
    for _, g in res.rec.items.groupby(["task", "haystack", "length", "mode"], dropna=False):
        g = g[g.key.isin(frame.key)].drop_duplicates("pair")
        asked = g[g.same_as.isna()] if "same_as" in g else g
        each = asked.groupby("seed").score.mean()
        if len(each) > 1 and each.isin([0, 1]).all(): # right or wrong: Clopper and Pearson's interval
            said.append(forms(each.mean(), *binomtest(int(each.sum()), len(each)).proportion_ci(), len(each)))
        elif len(each) > 1: said.append(forms(*mean_ci(each), len(each)))
    grid = variants(res.rec)
    said += [forms(*bounded_rate(g.score, .025), len(g)) for _, g in grid.groupby(["setting", "mode", "variant"])]
    for _, g in grid.groupby(["setting", "mode"]):
        wide = g.pivot_table("score", "pair", "variant", aggfunc="first").dropna()
        said += [forms(*paired_gain(wide[x], wide[y])[:4]) for x in wide for y in wide]
    said += [f"{g.statement} {g.reason} {g.id} {g.command} {g.needs}" for g in res.gates]
    verdicts = [g.verdict for g in res.gates]
    said += [str(len(res.gates)), *(str(verdicts.count(v)) for v in set(verdicts))]
    seconds = [json.loads(p.read_text(encoding="utf-8"))["seconds"] for p in run.glob("phase_*/result.json")]
    said += [f"{sum(seconds)/60:.1f} {s:.1f}" for s in seconds]
    sums = [*(res.run.get("assets") or {}).values(), (res.run.get("commit") or {}).get("commit", "")]
    said += [h[i:j] for h in sums for i in range(64) for j in range(i + 6, 65)] # lines may break in them
    return found | tokens(" ".join(said))


def test_every_number_of_the_paper_is_in_the_records(reference_paper, empty_paper):
    _, text, pages = reference_paper
    assert pages >= 4
    of_the_source = tokens(empty_paper[1])           # what it says of any run: mathematics, years, section numbers
    allowed = recorded(REFERENCE) | of_the_source | {str(n) for n in range(pages + 1)}
    assert tokens(text) - allowed == set()
    assert len(tokens(text) - of_the_source) > 50    # and there are results in it


def test_the_papers_source_types_no_result():
    source = (ROOT/"paper"/"paper.typ").read_text(encoding="utf-8")
    source = re.sub(r"//.*", "", source[source.index("= Introduction"):source.index("#bibliography")])
    source = re.sub(r"\$[^$]*\$|\"[^\"]*\"", "", source)   # mathematics; names and file names
    assert tokens(source) <= {"64", "2.5", "3", "34", "256"}, "64-bit words, Qwen2.5, Llama 3, a 34B model, sha256"


def test_a_run_without_results_says_not_run(empty_paper):
    _, text, pages = empty_paper
    plain = " ".join(text.split())
    assert pages >= 4 and plain.count("Not run") + plain.count("not run") > 40
    assert "Unfinished" not in plain and "This run is unfinished" in plain


def test_changing_one_record_changes_the_paper(tmp_path, reference_paper):
    shutil.copytree(REFERENCE, tmp_path/"reference")
    log = tmp_path/"reference"/"phase_03"/"items.jsonl"
    rows = [json.loads(line) for line in log.open()]
    changed = next(r for r in rows if r["mode"] == "rope" and r["length"] == 12288)
    changed["score"] = 1 - changed["score"]
    log.write_text("".join(json.dumps(r) + "\n" for r in rows))
    pdf, text, _ = paper_of(tmp_path/"reference", tmp_path, ROOT/"figures"/"reference")
    assert pdf.read_bytes() != reference_paper[0].read_bytes() and text != reference_paper[1]
    again = make_paper(open_results(REFERENCE, GATES), ROOT/"paper", ROOT/"figures"/"reference", tmp_path/"again")
    assert again.read_bytes() == reference_paper[0].read_bytes()


def stand_in(folder, **change):
    "A run with one small record of each kind, invented; `change` is the number that a kind holds instead."
    n = dict(needle=1, vt=1, memory=900, cosine=.5, line=1., ppl=20., nano=.5, variant=1, weight=.9) | change
    methods = {m: dict(code=m) for m in ("rope", "hybrid", "pi_spiral")}
    profile = dict(name="demo", model="no model", native_length=512, methods=methods, code=dict(hybrid_K=128),
                   needles=dict(methods=list(methods)), ablations=dict(lengths=[512], seeds=1))
    write_json(folder/"run.json", dict(run_id="small", schema=SCHEMA, profile=profile))
    item = dict(haystack="repeat", length=512, depth=.5, seed=0, model="no model", expected=["1"])
    write_log(folder/"phase_03"/"items.jsonl", [dict(item, key="n", task="niah", mode="rope", score=n["needle"]),
                                                dict(item, key="v", task="vt", mode="rope", score=n["vt"])])
    hashed = next(c for c in planned_contrasts(profile) if c.name == "pi_spiral against hash, short")
    write_log(folder/"phase_06"/"items.jsonl", [dict(item, key=x, task="niah", mode="pi_spiral", config=side, score=s)
                                                for x, side, s in (("a", hashed.a, n["variant"]), ("b", hashed.b, 0))])
    write_log(folder/"phase_06"/"nano.jsonl", [dict(variant="attractor", seed=0, length=1024, exact_match=n["nano"])])
    write_text(folder/"phase_08"/"system.csv",
               f"step,length,vram_mb,tokens_per_sec,window,state_size,mode\n1,1024,{n['memory']},50,,,rope\n")
    write_text(folder/"phase_07"/"positional_diag.csv", "offset,convergent," + ",".join(
        f"cosine_sim_{m}" for m in ("rope", "rope_ntk", "pi_spiral", "hybrid")) + f"\n2048,0,.9,.9,{n['cosine']},.9\n")
    write_text(folder/"phase_07"/"spectral_fft.csv",
               f"mode,freq,magnitude\npi_spiral,0.1,{n['line']}\npi_spiral,0.2,.5\n")
    loss = dict(mode="hybrid", length=128, ppl=n["ppl"], window=None, model="no model")
    write_log(folder/"phase_07"/"metrics.jsonl", [loss])
    layers = [dict(layer=0, head=0, needle=.1, bins=[n["weight"], .1])]
    write_log(folder/"phase_07"/"attention.jsonl", [dict(mode="rope", depth=.5, tokens=64, needle_at=30, needle_len=4,
                                                         layers=layers)])
    res = open_results(folder, GATES)
    return ({d.name: d.figure.to_json() for d in drawn_figures(res)}, {t.name: to_typst(t) for t in run_tables(res)})


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    return stand_in(tmp_path_factory.mktemp("before")/"run")


@pytest.mark.parametrize("change, figures, tables", [
    (dict(needle=0), {"niah_length"}, {"niah", "niah_cells"}), (dict(vt=0), {"ruler_radar", "ruler_curves"}, {"ruler"}),
    (dict(memory=901), {"cost_curves"}, {"system"}), (dict(cosine=.25), {"collision"}, {"diagnostics", "gates"}),
    (dict(line=.6), {"spectrum"}, {"diagnostics", "gates"}), (dict(ppl=21.), {"drift"}, {"diagnostics"}),
    (dict(nano=.6), {"nano_reach"}, {"nano"}), (dict(variant=0), {"ablation_grid"}, {"ablations"}),
    (dict(weight=.8), {"attention"}, set())])
def test_each_record_reaches_the_figures_and_tables(tmp_path, before, change, figures, tables):
    after = stand_in(tmp_path/"run", **change)
    differ = [{k for k in old if old[k] != new[k]} for old, new in zip(before, after)]
    assert figures <= differ[0] and tables <= differ[1]
    assert differ[1] - tables <= {"gates", "seeds", "ablations"} # and what has another source stays as it is


PROBE = """<script>setTimeout(() => { const d = document.documentElement, all = s => [...document.querySelectorAll(s)];
  const lost = all('a[href^="#"]').filter(a => !document.getElementById(decodeURIComponent(a.hash.slice(1))));
  d.dataset.probe = [all('.draw').length, all('.draw[data-drawn]').length, d.scrollWidth - d.clientWidth,
                     lost.length].join(' ');
}, 8000);</script></body>"""


@pytest.mark.parametrize("width", (1200, 390))
def test_the_report_in_a_browser(tmp_path, width):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None: pytest.skip("no Chromium on this machine: the page is checked without one in 22_report")
    page = save_report(open_results(REFERENCE, GATES), ROOT/"figures"/"reference", tmp_path/"report.html")
    page.write_text(page.read_text(encoding="utf-8").replace("</body>", PROBE))
    done = subprocess.run([browser, "--headless", "--no-sandbox", "--disable-gpu",
                           f"--user-data-dir={tmp_path/'profile'}", f"--window-size={width},1600",
                           "--virtual-time-budget=30000", "--enable-logging=stderr",
                           "--dump-dom", page.as_uri()], capture_output=True, text=True, encoding="utf-8", timeout=300)
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    figures, drawn, overflow, lost = map(int, re.search(r'data-probe="([-\d ]+)"', done.stdout)[1].split())
    assert figures == drawn > 0 and overflow <= 0 and lost == 0


def pispiral(*words, expect=0):
    "A command in this process: output and error lines."
    done = CliRunner().invoke(app, list(map(str, words)))
    assert done.exit_code == expect, done.output
    return done.stdout.splitlines(), done.stderr.splitlines()


def test_publishing_from_the_command_line(cli, runs, tmp_path):
    shutil.copytree(REFERENCE, runs/"demo")
    run = json.loads((runs/"demo"/"run.json").read_text(encoding="utf-8"))
    write_json(runs/"demo"/"run.json", {**run, "run_id": "demo"})
    out, err = cli("report", "demo")                 # one as a process of its own
    assert out.strip().endswith("published/report.html") and err == ""
    names = [Path(p).name for p in pispiral("figures", "demo")[0]]
    assert {Path(n).suffix for n in names} == {".html", ".json", ".png", ".pdf"}
    assert all("-" in Path(n).stem.partition("__")[2] for n in names)      # every name says a setting
    assert all("K-2048" in n and "smollm2" in n for n in names if n.startswith(("niah", "ruler")))
    (runs/"demo"/"phase_10"/"result.json").unlink()
    _, err = pispiral("kit", "demo", expect=2)
    assert len(err) == 2 and "phases 10 are missing" in err[1] and "--partial" in err[1]
    _, err = pispiral("tables", "demo", "--out", tmp_path)
    assert "unfinished: phases 10 (decision) are missing" in err[0]
    assert "did you mean 'demo'?" in pispiral("paper", "dmeo", expect=2)[1][0]
    write_json(runs/"demo"/"run.json", {**run, "schema": SCHEMA + 1})
    _, err = pispiral("tables", "demo", expect=2)
    assert f"has records of schema {SCHEMA + 1}" in err[0] and len(err) == 1


PLUGIN = """import plotly.graph_objects as go
from pispiral import register_figure, register_table
from pispiral.publish.formats import Cell, Table


@register_figure("answers_of_a_phase", caption="How many questions each phase asked", section="needles")
def answers_of_a_phase(results):
    counts = results.rec.items.file.value_counts()
    yield dict(run=results.name), go.Figure(go.Bar(x=counts.index, y=counts)), "items.jsonl"


@register_figure("my_mistake")
def my_mistake(results):
    yield {}, go.Figure(), results.no_such_thing


@register_table("questions")
def questions(results):
    counts = results.rec.items.task.value_counts()
    rows = [((task,), [Cell(str(n))]) for task, n in counts.items()]
    return Table("questions", "Questions of each task", ("task",), ("n",), rows)


@register_table("my_other_mistake")
def my_other_mistake(results):
    return 1/0
"""
MISTAKES = ("figure 'my_mistake' is left out: AttributeError: 'Results' object has no attribute 'no_such_thing'",
            "table 'my_other_mistake' is left out: ZeroDivisionError: division by zero")


def test_a_users_figure_and_table_are_one_file(cli, runs, tmp_path):
    "It is in figures, tables, report and paper; what fails is named in one line and takes nothing with it."
    few = shutil.ignore_patterns("phase_0[3-9]") # few figures are quickly drawn
    shutil.copytree(REFERENCE, runs/"reference", ignore=few)
    (tmp_path/"mine.py").write_text(PLUGIN)
    assert len(PLUGIN.splitlines()) <= 30

    commands = [["figures", "reference"], ["tables", "reference", "--out", tmp_path/"tables"],
                ["report", "reference", "--out", tmp_path], ["paper", "reference", "--out", tmp_path]]
    said = cli.together(*(["--plugin", tmp_path/"mine.py", *words] for words in commands))
    outs, errs = zip(*said)
    (paths, *_), errs = outs, [[line for line in err.splitlines() if "is unfinished" not in line] for err in errs]
    assert "answers_of_a_phase__run-reference.png" in paths and errs[0] == [MISTAKES[0]]
    assert (tmp_path/"tables"/"questions.md").read_text(encoding="utf-8").startswith("**Questions of each task**")
    assert "ZeroDivisionError" in (tmp_path/"tables"/"my_other_mistake.md").read_text() and errs[1] == [MISTAKES[1]]
    page = (tmp_path/"reference"/"report.html").read_text(encoding="utf-8")
    for said in ("How many questions each phase asked (run reference).", "Questions of each task",
                 "figure &#x27;my_mistake&#x27;"):
        assert said in page, said
    text, _ = pdf_text(tmp_path/"paper.pdf")
    plain = " ".join(text.replace("\xad", "").split())
    for said in ("How many questions each phase asked", "Questions of each task", "no_such_thing", "division by zero"):
        assert said in plain, said
    assert set(errs[3]) == set(MISTAKES)
    placed = json.loads((tmp_path/"values.json").read_text(encoding="utf-8"))["figures"]
    assert [f["section"] for f in placed if f["name"] == "answers_of_a_phase"] == ["needles"]
