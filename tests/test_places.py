"""Other people's machines: their locale, their folders, their file system, and letters that few fonts have."""
import ast
import errno
import fcntl
import json
import os
import re
import subprocess
import sys
import unicodedata
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path

import pytest
import typst
from pypdf import PdfReader

from conftest import ROOT
from pispiral.base.text import UNSHOWN, visible
from pispiral.evidence.records import Log, read_log, write_json, write_log
from pispiral.lab import runner
from pispiral.lab.profiles import load_profile
from pispiral.publish.formats import Table, to_csv, to_html, to_latex, to_markdown, to_typst
from pispiral.publish.kit import pack_kit, verify_kit
from pispiral.publish.paper import make_paper
from pispiral.publish.report import report_html
from pispiral.publish.results import open_results

GATES = ROOT/"nbs"/"profiles"/"gates.yaml"
# a line's end for `str.splitlines`, none for JSON Lines; then half a character, and letters that few fonts have
ODD = ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\r", "\ud83d", "北京", "λόγος", "🙂",
       "مرحبا"]


# --- machine text ---

def calls(tree):
    "Yield (line, name or attribute that is called, is it an attribute, names of keywords, node)."
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, (ast.Name, ast.Attribute)):
            name = getattr(node.func, "id", None) or node.func.attr
            yield node.lineno, name, isinstance(node.func, ast.Attribute), {k.arg for k in node.keywords}, node


def mode_of(node, at):
    "The mode that a file is opened with, as far as it is written there."
    given = [k.value for k in node.keywords if k.arg == "mode"] + node.args[at:at + 1]
    return given[0].value if given and isinstance(given[0], ast.Constant) else "r"


def lets_the_locale_decide(name, attribute, keywords, node):
    "Whether a call opens a text file, or reads what a program prints, without saying how it is encoded."
    if "encoding" in keywords: return False
    if name in ("run", "Popen", "check_output"): return bool(keywords & {"text", "universal_newlines"})
    if attribute and name == "read_text": return not node.args # a positional one is the encoding
    if attribute and name == "write_text": return len(node.args) < 2
    if attribute and name == "makefile": return True
    if name == "NamedTemporaryFile": return "b" not in mode_of(node, 0) and bool(node.args or keywords & {"mode"})
    if name == "open" and not attribute: return "b" not in mode_of(node, 1)
    return False


@pytest.mark.parametrize("code, wrong", [
    ("open(p)", True), ("open(p, 'w')", True), ("open(p, 'rb')", False), ("open(p, mode='ab')", False),
    ("open(p, encoding='utf-8')", False), ("p.read_text()", True), ("p.read_text('utf-8')", False),
    ("p.write_text(t)", True), ("write_text(p, t)", False), ("subprocess.run(c, text=True)", True),
    ("subprocess.run(c, capture_output=True)", False), ("s.makefile('rw')", True)])
def test_what_counts_as_left_to_the_locale(code, wrong):
    ((_, *call),) = [c for c in calls(ast.parse(code))]
    assert lets_the_locale_decide(*call) == wrong


def sources():
    "Paths of all Python that is shipped or run beside it."
    folders = [(ROOT/"pispiral").rglob("*.py"), (ROOT/"benchmarks").glob("*.py")]
    return [*(p for found in folders for p in sorted(found)), ROOT/"tests"/"drift.py"]


def test_no_text_is_left_to_the_locale():
    found = [f"{p.relative_to(ROOT)}:{line}" for p in sources()
             for line, *call in calls(ast.parse(p.read_text("utf-8"))) if lets_the_locale_decide(*call)]
    assert not found, "name the encoding: " + ", ".join(found)


def test_no_machine_text_is_split_at_other_ends_than_newlines():
    found = [f"{p.relative_to(ROOT)}:{line}" for p in sources()
             for line, name, *_ in calls(ast.parse(p.read_text("utf-8"))) if name == "splitlines"]
    assert not found, "split at '\\n': " + ", ".join(found)


def odd_run(folder):
    "A run whose answers, reasons and names hold every odd text."
    profile = dict(name="smoke", model="models/北京-chat", native_length=512, modes=["rope"])
    write_json(folder/"run.json", dict(run_id=folder.name, profile=profile))
    write_log(folder/"phase_03"/"items.jsonl", [
        dict(key=str(i), task="niah", mode="rope", haystack=f"prose {odd}", length=512, depth=.5, seed=i, score=i % 2,
             model="models/北京-chat", expected=[f"a{odd}b"], answer=f"one{odd}two") for i, odd in enumerate(ODD)])
    why = [dict(what=f"needle {odd}", why=f"it says {odd}") for odd in ODD]
    write_json(folder/"phase_03"/"result.json", dict(phase=3, status="done", seconds=1., not_run=why))
    return open_results(folder, GATES, finished=(3,))


def test_odd_text_comes_through_kit_report_and_paper(tmp_path):
    res = odd_run(tmp_path/"odd")
    assert [r["answer"] for r in read_log(tmp_path/"odd"/"phase_03"/"items.jsonl")] == [f"one{o}two" for o in ODD]
    kit = pack_kit(res, tmp_path/"kit.zip", GATES.parent, tmp_path/"none", tmp_path/"none", dict(name="smoke"))
    files, tables, problems = verify_kit(kit)
    assert files and tables and problems == []
    page = report_html(res, tmp_path/"none")
    assert all(f"one{odd}two" in page for odd in ("北京", "λόγος", "🙂", "مرحبا"))
    text = "".join(p.extract_text() for p in PdfReader(make_paper(res, ROOT/"paper", tmp_path/"none", tmp_path)).pages)
    plain = "".join(text.split())
    assert "λόγος" in plain and "⟨U+5317U+4EAC⟩" in plain and "⟨U+1F642⟩" in plain and "⟨U+2028⟩" in plain
    assert json.loads((tmp_path/"values.json").read_text("utf-8"))["not_run"][10]["what"] == ["needle 北京"]


@pytest.mark.parametrize("odd", ODD)
def test_odd_text_comes_through_every_format(odd):
    table = Table("t", f"title {odd}", ("key", "other"), rows=tuple(((f"k{odd}{i}", "x"), ()) for i in range(2)))
    said = [form(table) for form in (to_csv, to_latex, to_markdown, to_html)]
    assert all("k" in s for s in said) and typst.compile(to_typst(table).encode())[:5] == b"%PDF-"


# --- fonts ---

def glyphs(pdf):
    "Glyph numbers of a PDF's text, page by page; 0 is the empty box."
    string = rb"\((?:\\.|[^\\)])*\)|<[0-9A-Fa-f]+>"
    plain = {b"n": b"\n", b"r": b"\r", b"t": b"\t", b"b": b"\b", b"f": b"\f"}
    def unescaped(m): return bytes([int(m[1], 8)]) if m[1].isdigit() else plain.get(m[1], m[1])
    for page in PdfReader(BytesIO(pdf)).pages:
        out = b""
        for shown in re.findall(rb"BT(.*?)ET", page.get_contents().get_data(), re.S):
            for s in re.findall(string, shown, re.S):
                out += bytes.fromhex(s[1:-1].decode()) if s[:1] == b"<" else re.sub(
                    rb"\\([0-7]{3}|.)", unescaped, s[1:-1], flags=re.S)
        yield [out[i:i + 2] for i in range(0, len(out), 2)]


def typeset(text):
    "A PDF of one word a paragraph, in the paper's font."
    words = ", ".join(json.dumps(w, ensure_ascii=False) for w in text.split())
    source = f'#set page(height: auto)\n#set text(font: "Libertinus Serif")\n#for w in ({words},) {{ par(text(w)) }}'
    return typst.compile(source.encode(), ignore_system_fonts=True)


def test_typst_has_every_letter_that_is_shown():
    drawn = [c for c in map(chr, range(0x21, 0x10000)) if not UNSHOWN.match(c) and not c.isspace()]
    assert len(drawn) > 2500 and all(unicodedata.category(c) not in ("Cc", "Cf", "Cn", "Co", "Cs") for c in drawn)
    assert not any(b"\0\0" in page for page in glyphs(typeset(" ".join(drawn))))
    assert any(b"\0\0" in page for page in glyphs(typeset("北"))) # so a box is recognised as one
    assert not any(b"\0\0" in page for page in glyphs(typeset(visible("".join(ODD).replace("\ud83d", "")))))


# --- a locale of plain ASCII ---

def test_commands_in_a_locale_of_plain_ascii(tmp_path):
    program = """
import locale, sys
from pispiral.cli.main import app
assert locale.getpreferredencoding(False).upper() in ("ANSI_X3.4-1968", "US-ASCII", "ASCII")
for words in (["--help"], ["status", "reference"], ["run", "--profile", "smoke", "--plan"], ["decide", "reference"],
              ["report", "million", "--out", sys.argv[1]]):
    try: app(words)
    except SystemExit as e: assert not e.code, (words, e.code)
"""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONIOENCODING", "LANG", "LC_CTYPE", "PISPIRAL_RUNS")}
    done = subprocess.run([sys.executable, "-c", program, tmp_path], cwd=ROOT, capture_output=True,
                          env={**env, "LC_ALL": "C", "PYTHONUTF8": "0"})
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    done.stdout.decode("ascii")
    assert "…" in (tmp_path/"million"/"report.html").read_text("utf-8")


# --- a folder with a space ---

def stub(path, says):
    "A program that writes down how it was called."
    path.write_text(f"#!/bin/sh\nprintf '%s\\n' \"$0|$PISPIRAL_RUNS|$PYTHONUTF8|$*\" >> '{says}'\n", encoding="utf-8")
    path.chmod(0o755)


def test_make_in_a_folder_with_a_space(tmp_path):
    clone, said = tmp_path/"a b"/"clone", tmp_path/"said"
    (clone/".venv"/"bin").mkdir(parents=True)
    (clone/"Makefile").write_bytes((ROOT/"Makefile").read_bytes())
    for name in ("pyproject.toml", "requirements.lock"): (clone/name).touch()
    for name in ("python", "pispiral", "ruff", "nbdev_test", "jupyter", "nbdev_clean"):
        stub(clone/".venv"/"bin"/name, said)
    stub(python := tmp_path/"a b"/"python3", said)
    env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0"}
    for target in ("test", "readme", "demo"):
        done = subprocess.run(["make", f"PYTHON={python}", target], cwd=clone, env=env, capture_output=True)
        assert done.returncode == 0, done.stderr.decode()
    lines = said.read_text("utf-8").split("\n")
    assert lines[0].startswith(f"{python}|") and all(line.split("|")[2] == "1" for line in lines if line)
    (tested,) = [line for line in lines if "nbdev_test|" in line]
    assert tested.split("|")[1] == f"{clone}/.cache/test-runs"


def test_kaleido_in_a_folder_with_a_space(tmp_path):
    (tmp_path/"a b").mkdir()
    for package in ("kaleido", "plotly"): (tmp_path/"a b"/package).symlink_to(Path(find_spec(package).origin).parent)
    program = ("import kaleido, plotly.graph_objects as go; from pispiral.publish.stills import as_image; "
               "assert 'a b' in kaleido.__file__; print(as_image(go.Figure(go.Scatter(y=[1, 2])))[1:4])")
    paths = os.pathsep.join([str(tmp_path/"a b"), str(ROOT)])
    env = {**os.environ, "PYTHONPATH": paths, "LC_ALL": "C", "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, env=env, timeout=200)
    assert done.stdout == b"b'PNG'\n", done.stderr.decode()[-2000:]


# --- a file system without locks ---

def refuse(number):
    "A `flock` that answers with an error."
    def flock(*_): raise OSError(number, os.strerror(number))
    return flock


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_run_goes_on_without_flock(runs, monkeypatch, number):
    monkeypatch.setattr(fcntl, "flock", refuse(number))
    def held(*_):
        with pytest.raises(ValueError, match="runs/mine is being worked on .* delete mine/.lock.held"):
            runner.run(load_profile("smoke"), "mine", [3])
    with monkeypatch.context() as m:
        m.setattr(runner, "run_group", held)
        runner.run(load_profile("smoke"), "mine", [3])
    assert sorted(p.name for p in (runs/"mine").iterdir()) == [".lock", "environment.txt", "run.json"]


def test_a_dead_owner_holds_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", refuse(errno.ENOSYS))
    program = f"""
import errno, fcntl, os
def flock(*_): raise OSError(errno.ENOSYS, "no")
fcntl.flock = flock
from pispiral.evidence.records import Log
log = Log({str(tmp_path/"items.jsonl")!r})
log.append(dict(key="a"))
os.kill(os.getpid(), 9)
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT)
    assert (tmp_path/".items.jsonl.held").exists()
    with Log(tmp_path/"items.jsonl", patience=10) as log: log.append(dict(key="b"))
    assert [r["key"] for r in read_log(tmp_path/"items.jsonl")] == ["a", "b"]


def test_a_lock_that_fails_names_its_file_and_leaves_nothing(runs, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", refuse(errno.EIO))
    with pytest.raises(OSError) as error: runner.run(load_profile("smoke"), "mine", [3])
    assert error.value.filename == str(runs/"mine"/".lock") and not (runs/"mine").exists()


def test_a_run_that_cannot_begin_leaves_nothing(runs):
    "It is refused when it is opened, after the lock was taken."
    profile = load_profile("smoke", {"native_length": 65536}) # beyond the config: below it a profile may say its own
    with pytest.raises(ValueError, match="native_length"): runner.run(profile, "mine", [3])
    assert not (runs/"mine").exists()
