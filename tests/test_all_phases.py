"The whole plan in the smoke profile. First by name, so that of two workers one begins with it."
import json
import os

import nbformat

from conftest import ROOT


def contents(folder):
    "Every file of a run with what is in it, but for paper, report and kit, which a finished run makes again."
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and "published" not in p.parts}


def test_whole_plan_in_the_smoke_profile(runs, cli):
    out, err = cli("run", "--profile", "smoke")
    assert "pass gates of run 'smoke'" in out and "2.hybrid_short" in out and "IPKernelApp" not in err
    for n in range(11):
        folder = runs/"smoke"/f"phase_{n:02d}"
        book = nbformat.read(folder/"executed.ipynb", 4)
        assert all(c.execution_count for c in book.cells if c.cell_type == "code")
        assert (folder/"executed.ipynb").stat().st_size < 1_000_000
        assert json.loads((folder/"result.json").read_text(encoding="utf-8"))["status"] == "done"
    text = "".join(p.read_text(encoding="utf-8", errors="replace") for p in (runs/"smoke").rglob("*") if p.is_file())
    assert str(ROOT) not in text and str(runs) not in text and os.path.expanduser("~/") not in text
    result = json.loads((runs/"smoke"/"phase_02"/"result.json").read_text(encoding="utf-8"))
    assert result["checks"]["hybrid_equals_rope"]["ok"] is True
    heavy = json.loads((runs/"smoke"/"phase_05"/"result.json").read_text(encoding="utf-8"))
    assert {g["id"] for g in heavy["gates"] if g["verdict"] != "not run"} == {"5.bounded_memory", "5.stable_retrieval"}
    setup = json.loads((runs/"smoke"/"phase_00"/"result.json").read_text(encoding="utf-8"))
    assert setup["checks"]["numeric_canary"]["ok"] is True
    before = contents(runs/"smoke")
    (again, _), (status, _), (decision, _), _ = cli.together(
        ["run", "--profile", "smoke"], ["status", "smoke"], ["decide", "smoke"], ["validate", "smoke", "--phase", "2"])
    assert again.count("done already") == 11 and "done" in status and "Decision" in decision
    _, err = cli.here("run", "--profile", "smoke", "--set", "code.hybrid_K=1024", "--run-id", "smoke", expect=2)
    assert "code.hybrid_K: 2048 there, 1024 here" in err
    assert contents(runs/"smoke") == before
