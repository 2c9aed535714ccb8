"Bring your own: a code, a task, a gate, a figure and a table, each in one file from outside, through a run."
import json

import pytest
from conftest import ROOT

from pispiral.evidence.records import read_log

CODE = '''
from pydantic import Field
from pispiral import CodeParams, PositionCode, register_code
from pispiral.codes.rope import inverse_frequencies

class Still(CodeParams):
    still: float = Field(.25, ge=0, lt=1, description="share of the pairs, the slowest, that do not rotate")

@register_code("still_rope", params=Still, source="a test")
def still_rope(params, model_config):
    "RoPE whose slowest pairs stand still."
    frequencies = inverse_frequencies(model_config)
    frequencies[round(len(frequencies)*(1 - params.still)):] = 0
    return PositionCode(frequencies)
'''
TASK = '''
from pispiral import Item, register_task
from pispiral.tasks.haystacks import haystack
from pispiral.tasks.tokens import assemble, item_rng

@register_task("password", source="a test")
def password(tok, length, depth, seed):
    "Ask for a password that stands somewhere in real prose."
    word = "".join(item_rng("password", seed, length).choice(list("abcdefgh"), 6))
    fields = assemble(tok, "Remember the password.\\n", haystack("prose", tok, seed), f"The password is {word}.", depth,
                      "\\nWhat is the password?", "The password is", length, max_new=8)
    return Item(task="password", seed=seed, expected=(word,), **fields)
'''
GATE = '''
from pispiral import register_gate
from pispiral.verdict.findings import finding

@register_gate("3.was_asked", statement="{candidate} is asked for passwords.", source="a test",
               candidate="{candidate}", at_least=2)
def was_asked(rec, phase, *, candidate, at_least):
    "Count the passwords that the candidate was asked for."
    rows = rec.items[(rec.items.task == "password") & (rec.items["mode"] == candidate)]
    verdict = "pass" if len(rows) >= at_least else "fail"
    detail = f"{candidate} was asked for {len(rows)}"
    return finding(verdict, detail, dict(n=len(rows)), sorted(set(rows.file)))
'''
FIGURE = '''
import plotly.graph_objects as go
from pispiral import register_figure

@register_figure("seconds_an_item", caption="Seconds that a cell took, by context length")
def seconds_an_item(results):
    "Draw the time of each cell against its length."
    for model, part in results.rec.metrics.groupby("model"):
        yield dict(model=model), go.Figure(go.Scatter(x=part.length, y=part.runtime, mode="markers")), "metrics.jsonl"
'''
FILES = dict(code=CODE, task=TASK, gate=GATE, figure=FIGURE)
SHORT = ["needles.short_lengths=[192]", "needles.depths=[.5]", "needles.core_depths=[.5]", "sanity.depths=[.5]",
         "ruler.tasks=[]", "infinitebench.tasks=[]", "spans.lengths=[]", "tasks.lengths=[256]", "tasks.seeds=2"]


@pytest.fixture
def plugins(tmp_path):
    "The words that name four files outside the repository."
    for name, text in FILES.items(): (tmp_path/f"my_{name}.py").write_text(text)
    return [w for name in FILES for w in ("--plugin", tmp_path/f"my_{name}.py")]


def test_each_is_one_small_file():
    for name, text in FILES.items(): assert len(text.strip().splitlines()) <= 30, name


def test_a_candidate_of_ones_own_whose_records_are_read_without_it(runs, cli, plugins):
    sets = [w for s in SHORT for w in ("--set", s)]
    out, _ = cli("run", *plugins, "--profile", "smoke", "--phases", "3", "--pos", "still_rope", *sets,
                 "--set", "code.still=.5", "--run-id", "mine")
    assert "3.was_asked" in out and "still_rope was asked for 2" in out
    run = json.loads((runs/"mine"/"run.json").read_text(encoding="utf-8"))
    assert set(run["plugins"]) == {f"my_{name}.py" for name in FILES} and run["profile"]["candidate"] == "still_rope"
    items = read_log(runs/"mine"/"phase_03"/"items.jsonl")
    own = [r for r in items if r["mode"] == "still_rope"]
    assert {r["task"] for r in own} == {"niah", "password"} and {r["config"]["still"] for r in own} == {.5}
    assert {r["mode"] for r in items} == {"rope", "still_rope"}
    (drawn, _), _, _ = cli.together(*([name, "mine", *plugins] for name in ("figures", "tables", "report")))
    assert "seconds_an_item" in drawn and (runs.parent/"figures"/"mine").is_dir() or (runs/"figures"/"mine").is_dir()
    tables = {p.name: p.read_text(encoding="utf-8") for p in (runs/"mine"/"published"/"tables").iterdir()}
    assert "still_rope" in tables["niah.md"]
    assert "password" in tables["tasks.md"] and "3.was_asked" in tables["gates.md"]
    page = (runs/"mine"/"published"/"report.html").read_text(encoding="utf-8")
    assert "Seconds that a cell took" in page and "still_rope is asked for passwords" in page
    _, err = cli.here("status", "mine", "--plugin", "nowhere.py", expect=2)
    assert "plugin='nowhere.py' is not a file" in err
    out, _ = cli.here("validate", "mine", "--phase", "3") # the records are read without the plugins, in this process
    assert "3.gain_over_rope" in out and "3.was_asked" not in out
    _, err = cli.here("run", "--profile", "smoke", "--run-id", "mine", expect=2)
    assert "plugin my_code.py" in err and "belongs to another configuration" in err


@pytest.mark.slow
def test_the_whole_plan_with_ones_own_candidate(runs, cli, plugins):
    cli("run", *plugins, "--profile", "smoke", "--pos", "still_rope", "--run-id", "mine")
    gates = json.loads((runs/"mine"/"phase_10"/"result.json").read_text(encoding="utf-8"))["gates"]
    assert {g["candidate"] for g in gates} == {"still_rope"}
    values = json.loads((runs/"mine"/"published"/"values.json").read_text(encoding="utf-8"))
    assert "still_rope" in json.dumps(values)
    assert (runs/"mine"/"published"/"paper.pdf").read_bytes()[:4] == b"%PDF"
    assert ROOT not in runs.parents
