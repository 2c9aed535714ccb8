"""The paper's numbers against the records, the report in a browser, the commands and their errors."""
import json
import re
import shutil
import subprocess
from itertools import chain
from pathlib import Path

import pandas as pd
import pytest
from pypdf import PdfReader
from scipy.stats import binomtest

from pispiral.evidence.records import SCHEMA, write_json
from pispiral.publish.paper import make_paper
from pispiral.publish.report import save_report
from pispiral.publish.run_tables import open_results

ROOT = Path(__file__).parents[1]
REFERENCE, GATES = ROOT/"runs"/"reference", ROOT/"nbs"/"profiles"/"pass_gates.yaml"


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


def recorded(run):
    "Every number that a run's records hold or give by counting, averaging and Wilson's interval, worked out here."
    files = [p for kind in ("*.json", "phase_*/*.json", "phase_*/*.jsonl", "phase_*/*.csv", "phase_*/*.log")
             for p in run.glob(kind)]
    found = set(chain.from_iterable(tokens(p.read_text()) for p in files))
    found |= {f"{round(float(t), d):g}" for t in found for d in range(4)}
    items = {r["key"]: r for p in sorted(run.glob("phase_*/items.jsonl")) for r in map(json.loads, p.open())}
    frame, said = pd.DataFrame(items.values()), [str(len(items))]
    for by in (["task", "mode"], ["task", "mode", "length"], ["task", "mode", "length", "depth"]):
        for _, g in frame.groupby(by, dropna=False):
            ends = binomtest(round(g.score.sum()), len(g)).proportion_ci(method="wilson")
            said += [f"{g.score.mean():.2f} {ends.low:.2f} {ends.high:.2f} {len(g)}"]
    gates = open_results(run, GATES).gates
    said += [f"{g.statement} {g.reason} {g.id} {g.command}" for g in gates]
    verdicts = [g.verdict for g in gates]
    said += [str(len(gates)), *(str(verdicts.count(v)) for v in set(verdicts))]
    seconds = [json.loads(p.read_text())["seconds"] for p in run.glob("phase_*/result.json")]
    said += [f"{sum(seconds)/60:.1f} {s:.1f}" for s in seconds]
    return found | tokens(" ".join(said))


def test_every_number_of_the_paper_is_in_the_records(reference_paper, empty_paper):
    _, text, pages = reference_paper
    assert pages >= 4
    of_the_source = tokens(empty_paper[1])           # what the text says of any run: mathematics, years, section numbers
    allowed = recorded(REFERENCE) | of_the_source | {str(n) for n in range(pages + 1)}
    assert tokens(text) - allowed == set()
    assert len(tokens(text) - of_the_source) > 50    # and there are results in it


def test_the_papers_source_types_no_result():
    source = (ROOT/"paper"/"paper.typ").read_text()
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


PROBE = """<script>setTimeout(() => { const d = document.documentElement;
  d.dataset.probe = [document.querySelectorAll('.draw').length, document.querySelectorAll('.draw[data-drawn]').length,
                     d.scrollWidth - d.clientWidth, innerWidth].join(' '); }, 8000);</script></body>"""


@pytest.mark.parametrize("width", (1200, 390))
def test_the_report_in_a_browser(tmp_path, width):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None: pytest.skip("no Chromium on this machine: the page is checked without one in 67_report")
    page = save_report(open_results(REFERENCE, GATES), ROOT/"figures"/"reference", tmp_path/"report.html")
    page.write_text(page.read_text().replace("</body>", PROBE))
    done = subprocess.run([browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path/'profile'}",
                           f"--window-size={width},1600", "--virtual-time-budget=30000", "--enable-logging=stderr",
                           "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=300)
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    figures, drawn, overflow, _ = map(int, re.search(r'data-probe="([-\d ]+)"', done.stdout)[1].split())
    assert figures == drawn > 0 and overflow <= 0


def test_publishing_from_the_command_line(cli, runs, tmp_path):
    shutil.copytree(REFERENCE, runs/"demo")
    run = json.loads((runs/"demo"/"run.json").read_text())
    write_json(runs/"demo"/"run.json", {**run, "run_id": "demo"})
    out, err = cli("report", "demo")
    assert out.strip().endswith("published/report.html") and err == ""
    out, _ = cli("figures", "demo")
    names = [Path(p).name for p in out.splitlines()]
    assert {Path(n).suffix for n in names} == {".html", ".json", ".png", ".pdf"}
    assert all("K-2048" in n and "smollm2" in n for n in names)
    (runs/"demo"/"phase_10"/"result.json").unlink()
    _, err = cli("kit", "demo", expect=2)
    assert len(err.splitlines()) == 2 and "phases 10 are missing" in err and "--partial" in err
    _, err = cli("tables", "demo", "--out", tmp_path)
    assert "unfinished: phases 10 (decision) are missing" in err
    assert "did you mean 'demo'?" in cli("paper", "dmeo", expect=2)[1]
    write_json(runs/"demo"/"run.json", {**run, "schema": SCHEMA + 1})
    _, err = cli("tables", "demo", expect=2)
    assert f"has records of schema {SCHEMA + 1}" in err and len(err.splitlines()) == 1
