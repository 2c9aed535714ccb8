"The whole plan in the smoke profile. First by name, so that of two workers one begins with it."
import json
import os

import nbformat

from conftest import ROOT


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
    out, _ = cli("run", "--profile", "smoke")
    assert out.count("done already") == 11
    assert "done" in cli("status", "smoke")[0] and "Decision" in cli("decide", "smoke")[0]
    cli("validate", "smoke", "--phase", "2")
