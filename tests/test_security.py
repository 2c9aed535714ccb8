"Nothing that is typed in becomes code, a path or a traceback, and no secret is written down."
import ast
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import ROOT
from pispiral.evidence.records import scrub
from pispiral.lab.opening import check_run, run_name
from pispiral.lab.phase import overrides_of, parameters_in
from pispiral.lab.profiles import leaves, load_profile, parse_settings, profile_keys
from pispiral.lab.sections import Profile
from pispiral.model.load import checkpoint, load_model, resolve

SECRET = "hf_0123456789abcdefghij-not-a-real-token"


# ---- what is typed in

FIELDS = ([f for f in profile_keys() if f != "name"]
          + ["methods.mine", "methods.window.window", "needles", "code", "large.medium"])
GOOD = {f: v for p in ("smoke", "demo", "kaggle", "full")
        for f, v in leaves(load_profile(p).model_dump()) if f != "name"}
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.integers(-3, 20000), st.floats(), st.text(max_size=40),
                    st.sampled_from(["rope", "hybrid", "attractor", "pi_spirall", "../../etc", "~nobody/x", "a/b",
                                     "nul\0", "x"*300]))
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4)
                      | st.dictionaries(st.text(max_size=5), inner, max_size=2), max_leaves=6)
names = st.sampled_from(FIELDS) | st.sampled_from([f + "s" for f in FIELDS]) | st.text(max_size=12)
overrides = st.lists(st.one_of(st.tuples(names, values), st.sampled_from(sorted(GOOD)).map(lambda f: (f, GOOD[f])),
                               st.tuples(st.sampled_from(FIELDS), values)), max_size=3).map(dict)


def one_line(error):
    "A refusal is a ValueError whose text is one line that says something."
    assert isinstance(error, ValueError), repr(error)
    assert str(error).strip() and len(str(error).splitlines()) == 1 and "Traceback" not in str(error), str(error)


def chosen(profile, change, run_id=None, pos=None):
    "What a command does with its words before it writes anything."
    found = load_profile(profile, change, pos)
    check_run(found, run_id or run_name(profile, change, pos))
    resolve(found.model)
    return found


def fuzz_profile(change, texts, runs):
    try: assert isinstance(chosen("smoke", change), Profile)
    except Exception as e: one_line(e)
    words = [f"{k}={yaml.safe_dump(v, default_flow_style=True, width=10**6)}" for k, v in change.items()] + texts
    try: parse_settings(words)
    except Exception as e: one_line(e)
    assert not runs.exists()


def fuzz_parameters(namespace, runs):
    try:
        plain = parameters_in(3, namespace)
        chosen(plain.get("profile", "smoke"), overrides_of(plain), plain.get("run_id"), plain.get("pos"))
    except Exception as e: one_line(e)
    assert not runs.exists()


parameters = st.dictionaries(st.sampled_from(["profile", "run_id", "pos", "hybrid_K", "window", "model", "max_hours",
                                              "irrational", "hybridK", "attractor"]), values, max_size=4)
few = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
many = settings(few, max_examples=10_000)


@pytest.fixture(autouse=True)
def nothing_yet(runs): assert not runs.exists()


def test_few_fuzzed_profiles(runs):
    few(given(overrides, st.lists(st.text(max_size=30), max_size=2))(lambda c, t: fuzz_profile(c, t, runs)))()


def test_few_fuzzed_parameter_sets(runs): few(given(parameters)(lambda p: fuzz_parameters(p, runs)))()


@pytest.mark.slow
def test_ten_thousand_fuzzed_profiles(runs):
    many(given(overrides, st.lists(st.text(max_size=30), max_size=2))(lambda c, t: fuzz_profile(c, t, runs)))()


@pytest.mark.slow
def test_ten_thousand_fuzzed_parameter_sets(runs): many(given(parameters)(lambda p: fuzz_parameters(p, runs)))()


@pytest.mark.parametrize("word", ["needles.methods=" + "["*5000, "seed=" + "9"*5000, "machine={2020-13-45: x}",
                                  "machine=!!python/object:os.system x", "machine=!!timestamp 2020-01-13",
                                  "needles.methods={[1]: 2}", "machine=\0", "=", "code.hybrid_K"])
def test_words_that_are_no_settings(runs, word):
    with pytest.raises(ValueError) as e: load_profile("smoke", parse_settings([word]))
    one_line(e.value)


# ---- code

def test_parameters_stay_values():
    from papermill.parameterize import parameterize_notebook
    from papermill.iorw import load_notebook_node
    book = load_notebook_node(str(ROOT/"nbs"/"phases"/"phase_03_core.ipynb"))

    def same(a, b):
        if isinstance(a, float) and math.isnan(a): return isinstance(b, float) and math.isnan(b)
        if isinstance(a, (list, dict)): return type(a) is type(b) and len(a) == len(b) and all(
            same(x, y) for x, y in zip(*((a.values(), b.values()) if isinstance(a, dict) else (a, b))))
        return type(a) is type(b) and a == b

    @few
    @given(values)
    def translated(value):
        (cell,) = [c for c in parameterize_notebook(book, dict(model=value)).cells
                   if "injected-parameters" in c.metadata.get("tags", [])]
        body = ast.parse(cell.source).body # one assignment and nothing else
        assert len(body) == 1 and isinstance(body[0], ast.Assign) and body[0].targets[0].id == "model"
        calls = [ast.unparse(n) for n in ast.walk(body[0]) if isinstance(n, ast.Call)]
        assert all(re.fullmatch(r"float\('(nan|inf|-inf)'\)", c) for c in calls)
        scope = {}
        exec(cell.source, scope)
        assert same(value, scope["model"])
    translated()


@few
@given(st.dictionaries(st.text(max_size=8), values, max_size=3), st.text(max_size=30))
def test_the_first_cell_on_kaggle_stays_data(change, text):
    from pispiral.lab.kaggle import FIRST_CELL
    source = FIRST_CELL.format(roots=(), dataset="a/b", wheels={text: text}, profile=text, run_id=text,
                               overrides=change, models={text: text})
    plain = FIRST_CELL.format(roots=(), dataset="a/b", wheels={}, profile="", run_id="", overrides={}, models={})
    kinds = (ast.Import, ast.ImportFrom, ast.Attribute, ast.stmt)
    code = lambda s: [type(n).__name__ for n in ast.walk(ast.parse(s)) if isinstance(n, kinds)]
    try: tree = code(source.replace("nan", "0").replace("inf", "0"))
    except SyntaxError as e: raise AssertionError(source) from e
    assert tree == code(plain.replace("nan", "0").replace("inf", "0"))


UNSAFE = re.compile(r"\b(import pickle|torch\.load|yaml\.(load|unsafe_load|full_load)|shell=True|"
                    r"os\.system|eval\(|exec\()")


def test_models_bring_no_code_and_no_pickles(tmp_path):
    folder = tmp_path/"model"
    shutil.copytree(resolve("smollm2-135m-instruct"), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder/"pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch pickled'\ntR.")
    with pytest.raises(OSError, match="safetensors"): load_model(str(folder))
    about = json.loads((folder/"config.json").read_text(encoding="utf-8"))
    about |= dict(model_type="its_own", auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"})
    (folder/"config.json").write_text(json.dumps(about))
    (folder/"code.py").write_text("raise SystemExit('its code ran')")
    with pytest.raises(ValueError, match="trust_remote_code"): load_model(str(folder))
    for path in (*ROOT.glob("pispiral/**/*.py"), *ROOT.glob("nbs/phases/*.ipynb")):
        text = path.read_text(encoding="utf-8")
        assert not UNSAFE.search(text.replace(".eval()", "")), path
        for call in re.findall(r"from_pretrained\(([^\n]*)", text): # what is not the package's is read without its code
            own = re.match(r"src|model_folder|folder", call)
            assert own or "trust_remote_code=False" in call or "SAFE" in call, (path, call)


# ---- paths

@pytest.mark.parametrize("run_id", ["../x", "/etc", "a/b", ".", "..", ".hidden", "a\nb", "a b", "x"*200, "", "-rf",
                                    "a\0"])
def test_a_run_stays_in_its_folder(runs, run_id):
    with pytest.raises(ValueError) as e: check_run(load_profile("smoke"), run_id)
    one_line(e.value)


@pytest.mark.parametrize("name", ["../../etc/passwd", "x/../..", "~nobody/x", "a\0b", "x"*5000, "/dev"])
def test_a_model_is_a_name_or_a_folder(name):
    with pytest.raises(ValueError) as e: resolve(name)
    one_line(e.value)
    if not Path(name).is_absolute():
        with pytest.raises(ValueError) as e: checkpoint(name)
        one_line(e.value)


# ---- secrets

def test_scrub_hides_secrets(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("SOME_API_KEY", 'quote"and\\slash')
    monkeypatch.setenv("MONKEY", "not a secret, only a monkey")
    monkeypatch.setenv("SHORT_KEY", "on")
    quoted = json.dumps("quote" + chr(34) + "and" + chr(92) + "slash")
    text = f"{SECRET} https://me:word@index.example/simple on {quoted} a monkey"
    assert scrub(text, ROOT) == '<HF_TOKEN> https://<secret>@index.example/simple on "<SOME_API_KEY>" a monkey'


def test_a_phase_that_shows_its_token_keeps_none(runs, tmp_path, monkeypatch, cli):
    root = tmp_path/"repository"
    for name in ("settings.ini", "nbs/profiles", "nbs/phases"):
        (root/name).parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (ROOT/name).is_dir() else shutil.copyfile)(ROOT/name, root/name)
    path = root/"nbs"/"phases"/"phase_00_setup.ipynb"
    book = json.loads(path.read_text(encoding="utf-8"))
    at = next(i for i, c in enumerate(book["cells"]) if "open_phase(0" in "".join(c["source"]))
    leak = ("import os, sys\nprint(os.environ['HF_TOKEN'], file=sys.stderr)\nprint(dict(os.environ))\n"
            "raise RuntimeError('401 for ' + os.environ['HF_TOKEN'])")
    cell = dict(cell_type="code", id="leak", metadata={}, source=leak, outputs=[], execution_count=None)
    book["cells"].insert(at + 1, cell)
    path.write_text(json.dumps(book))
    for name in ("HF_TOKEN", "KAGGLE_KEY"): monkeypatch.setenv(name, SECRET)
    monkeypatch.setenv("PISPIRAL_ROOT", str(root))
    out, err = cli("run", "--profile", "smoke", "--phases", "0", expect=1)
    assert "401 for <" in err and SECRET not in out + err
    kept = [p for p in runs.rglob("*") if p.is_file()]
    assert {"executed.ipynb", "stdout.log", "failed.txt"} <= {p.name for p in kept}
    for p in kept: assert SECRET not in p.read_text(encoding="utf-8", errors="replace"), p.name


def test_every_pin_has_its_sums():
    text = re.sub(r"^#.*\n", "", (ROOT/"requirements.lock").read_text(), flags=re.M).replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip()]
    assert len(lines) > 100 and all(re.match(r"[\w.-]+==\S+ .*--hash=sha256:[0-9a-f]{64}", line) for line in lines)
    assert "torch==2.13.0" in (ROOT/"Makefile").read_text() and not any(line.startswith("torch==") for line in lines)
