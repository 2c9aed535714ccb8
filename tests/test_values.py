"A value means what it says, in a profile, on the command line and in a notebook's parameters, or is refused in a line."
import json
import math
import re
from functools import cache

import pytest
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from papermill.cli import _resolve_type

from pispiral.base.values import read_yaml, write_yaml
from pispiral.codes.registry import CODES
from pispiral.evidence.history import migrate_profile, value_at
from pispiral.evidence.records import write_log
from pispiral.lab.opening import check_run, chosen_name
from pispiral.lab.phase import open_phase, overrides_of, parameters_in
from pispiral.lab.places import checked_name, profile_names
from pispiral.lab.profiles import load_profile, make_profile, overridden, parse_settings, profile_data
from pispiral.lab.runner import begin_phase
from pispiral.lab.sections import Profile
from pispiral.memory.config import AttractorConfig
from pispiral.publish.kit import reproduce_script
from pispiral.tasks.niah import niah_item
from pispiral.training.loop import TrainConfig
from pispiral.verdict.compare import compare_all
from pispiral.verdict.pairs import load_records, main_items


def set_on(*words, profile="smoke"):
    "The profile that `--set` words give."
    return load_profile(profile, parse_settings(words))


def refused(make):
    "The one line in which something is refused."
    with pytest.raises(ValueError) as e: make()
    assert str(e.value).strip() and len(str(e.value).splitlines()) == 1, str(e.value)
    return str(e.value)


# ---- what is typed in

@pytest.mark.parametrize("word, path, value", [
    ("seed=010", "seed", 10), ("seed=0o10", "seed", 8), ("seed=0x1F", "seed", 31), ("seed=+5", "seed", 5),
    ("needles.seeds=1e3", "needles.seeds", 1000), ("code.target_length=1e6", "code.target_length", 10**6),
    ("code.target_length=1048576.0", "code.target_length", 2**20), ("window=null", "window", None),
    ("machine=no", "machine", "no"), ("machine=2020-01-13", "machine", "2020-01-13"),
    ("machine=1:30", "machine", "1:30"),
    ("machine='007'", "machine", "007"), ("needles.minutes=1e-1", "needles.minutes", .1),
    ("ablations.irrationals=[1/7, pi]", "ablations.irrationals", ["1/7", "pi"]),
    ("large.medium.code.hybrid_K=2e3", "large.medium.code.hybrid_K", 2000)])
def test_a_word_is_what_it_says(word, path, value):
    found = value_at(set_on(word).model_dump(), path)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("word, took", [
    ("window=yes", "text"), ("window=on", "text"), ("window=true", "true or false"), ("window=64.5", "a number"),
    ("window='64'", "text"), ("window=None", "text"), ("window=", "no value"), ("window=#64", "no value"),
    ("seed=1_000", "text"), ("seed=1:30", "text"), ("seed=0b11", "text"), ("seed=null", "nothing"),
    ("seed=.inf", "a number"), ("seed=[1]", "a list"), ("needles.minutes=yes", "text"),
    ("needles.minutes=true", "true or false"),
    ("needles.minutes=1e999", "beyond"), ("needles.depths=[true]", "true or false"), ("needles.depths=['0.2']", "text"),
    ("needles.methods=rope", "text"), ("needles.methods=[rope, 7]", "a whole number"), ("model=007", "a whole number"),
    ("machine=1e6", "a number"), ("machine=null", "nothing"), ("candidate=true", "true or false"),
    ("code.irrational=1", "a whole number"), ("code.hybrid_K=true", "true or false"), ("code.hybrid_K='9'", "text"),
    ("methods.mine={code: rope, window: yes}", "text"),
    ("methods.mine={code: {name: hybrid, K: true}}", "true or false"), ("needles={seeds: 1, seeds: 2}", "twice"),
    ("code.logit_scale=999999999999999999", "too many digits"), ("seed=!!int 'x'", "as !!int"), ("seed=*x", "alias")])
def test_a_word_of_another_kind_is_refused_and_says_what_it_was_taken_for(word, took):
    assert took in refused(lambda: set_on(word))


def test_nothing_is_set_twice():
    assert "seed is set twice" in refused(lambda: set_on("seed=1", "seed=2"))


def test_a_file_is_read_as_the_command_line_is(tmp_path, monkeypatch):
    folder = tmp_path/"nbs"/"profiles"
    folder.mkdir(parents=True)
    (tmp_path/"settings.ini").touch()
    monkeypatch.setenv("PISPIRAL_ROOT", str(tmp_path))
    text = (ROOT/"nbs"/"profiles"/"smoke.yaml").read_text(encoding="utf-8")
    def loaded(change): return (folder/"smoke.yaml").write_text(change, encoding="utf-8") and load_profile("smoke")
    assert loaded(text + "\nseed: 010\nwindow: 1e3\n").seed == 10
    named = loaded(text.replace("methods:\n", "methods:\n  007: {code: yarn}\n  no: {code: alibi}\n", 1)
                   .replace("methods: [rope, pi_spiral, hybrid]\n  core", "methods: [rope, no, '007']\n  core", 1))
    assert named.needles.methods == ["rope", "no", "007"]
    assert "text" in refused(lambda: loaded(text + "\nwindow: yes\n"))
    assert "'seed' twice" in refused(lambda: loaded(text + "\nseed: 1\nseed: 2\n"))
    assert "line" in refused(lambda: loaded(text + "\nseed: [1\n"))
    assert "YAML 1.1" in refused(lambda: loaded("%YAML 1.1\n---\n" + text))


@pytest.mark.parametrize("name", ["007", "no", "1e6", "true", "null", "0x10"])
def test_a_runs_name_stays_text(name, runs):
    assert checked_name(chosen_name(name, "smoke", {})) == name
    assert check_run(load_profile("smoke"), name) == (runs/name).resolve()
    (runs/name).mkdir(parents=True)
    told, sub = begin_phase(0, "smoke", runs/name)
    assert told["run_id"] == read_yaml((sub/"params.yaml").read_text(), "")["run_id"] == name
    assert parameters_in(0, dict(told))["run_id"] == name
    assert f"'{name}-again'" in reproduce_script(dict(run_id=name, profile=dict(name="smoke", methods={})), {})


def test_no_name_at_all_is_none(cli, runs):
    for name in ("", " ", "a/b"): assert "run_id=" in cli.here("run", "--plan", "--run-id", name, expect=2)[1]


# ---- what papermill makes of it

@pytest.mark.parametrize("name, word, kind", [
    ("run_id", "007", "a whole number"), ("run_id", "1e6", "a number"), ("run_id", "False", "true or false"),
    ("run_id", "nan", "a number"), ("model", "7", "a whole number"), ("profile", "1", "a whole number"),
    ("pos", "True", "true or false"), ("plugin", "0", "a whole number")])
def test_a_name_that_papermill_made_a_number_of(name, word, kind, runs):
    said = refused(lambda: open_phase(3, {name: _resolve_type(word)}))
    assert f"-r {name}" in said and kind in said and not runs.exists()


@pytest.mark.parametrize("namespace, took", [
    (dict(window="64"), "text"), (dict(window=True), "true or false"), (dict(window=_resolve_type("6.5")), "a number"),
    (dict(max_hours=math.nan), "max_hours"), (dict(max_hours=True), "true or false"),
    (dict(irrational=1), "a whole number"), (dict(inject_layers=-1), "inject_layers"),
    (dict(hybrid_K=_resolve_type("inf")), "a number"), (dict(run_id=""), "run_id")])
def test_a_parameter_of_another_kind(namespace, took, runs):
    assert took in refused(lambda: open_phase(3, namespace)) and not runs.exists()


def test_parameters_that_papermill_reads_right():
    given = {k: _resolve_type(v) for k, v in dict(window="0100", hybrid_K="1e3", irrational="1/7").items()}
    found = load_profile("smoke", overrides_of(parameters_in(3, given)))
    assert (found.window, found.code["hybrid_K"], found.code["irrational"]) == (100, 1000, "1/7")


# ---- ranges

def fields(schema, definitions, path=""):
    "Yield (dotted path, schema) of every number and list in a JSON schema."
    if "$ref" in schema: schema = definitions[schema["$ref"].rpartition("/")[2]]
    for option in schema.get("anyOf", ()): yield from fields(option, definitions, path)
    for name, inner in schema.get("properties", {}).items():
        yield from fields(inner, definitions, f"{path}.{name}".strip("."))
    if isinstance(more := schema.get("additionalProperties"), dict): yield from fields(more, definitions, f"{path}.*")
    if "items" in schema: yield from fields(schema["items"], definitions, f"{path}[]")
    if schema.get("type") in ("integer", "number", "array", "string"): yield path, schema


def numbers_of(model):
    schema = model.model_json_schema()
    return [(path, s) for path, s in fields(schema, schema.get("$defs", {}))]


def test_every_number_of_a_profile_has_its_range():
    found = dict(numbers_of(Profile))
    assert len(found) > 100
    for path, s in found.items():
        if s["type"] in ("integer", "number"):
            assert {"minimum", "exclusiveMinimum"} & set(s) and {"maximum", "exclusiveMaximum"} & set(s), path
        if s["type"] == "string": assert s.get("minLength"), path


RANGED = [p for p, s in numbers_of(Profile) if s["type"] in ("integer", "number") and "*" not in p]


@pytest.mark.parametrize("path", RANGED)
def test_a_number_out_of_its_range_is_refused(path):
    place, is_list = path.removesuffix("[]"), path.endswith("[]")
    for value in (-1, -.5, math.nan, math.inf, -math.inf, 10**16, 10**400, True, "1"):
        with pytest.raises(ValueError): make_profile(overridden(smoke(), {place: [value] if is_list else value}))


def test_every_default_and_every_shipped_value_is_in_its_range():
    for name in profile_names():
        found = load_profile(name)
        assert make_profile(found.model_dump()) == found
        assert make_profile(read_yaml(write_yaml(found.model_dump()), name)) == found
    for entry in CODES.entries.values(): assert entry.params(**entry.params().model_dump()) == entry.params()


def test_what_committed_runs_were_asked_is_in_its_range():
    for path in (ROOT/"runs").glob("*/run.json"):
        Profile(**migrate_profile(json.loads(path.read_text(encoding="utf-8"))["profile"]))


@pytest.mark.parametrize("word", [
    "seed=-1", "seed=4294967296", "repeats.lengths=[-1]", "large.heavy.depths=[7]", "nano.lengths=[-5]",
    "large.medium.depths=[-3]", "needles.minutes=.inf", "needles.minutes=0", "needles.minutes=.nan",
    "needles.methods=[]",
    "needles.core=[]", "needles.depths=[]", "needles.methods=[rope, rope]", "needles.depths=[.2, .2]",
    "ablations.K=[]", "memory.inject_layers=-1", "code.seed=-1", "max_hours=0", "memory_cap_gib=-.5", "model=''",
    "methods.mine={sinks: 4}",
    "streams.window=0", "chunk=0", "drift.methods=[]", "large.medium.code.hybrid_K=-1"])
def test_a_plan_refuses_what_is_out_of_range(cli, runs, word):
    said = cli.here("run", "--profile", "smoke", "--plan", "--set", word, expect=2)[1]
    assert word.partition("=")[0].split(".")[-1] in said and said.startswith("pispiral: ") and not runs.exists()


@pytest.mark.parametrize("make", [
    lambda: AttractorConfig(alpha=math.nan), lambda: AttractorConfig(alpha=1.5),
    lambda: AttractorConfig(n_harmonics=True), lambda: AttractorConfig(c=math.inf),
    lambda: AttractorConfig(layers=("1",)), lambda: TrainConfig(lr=math.nan), lambda: TrainConfig(steps="5"),
    lambda: TrainConfig(seed=-1), lambda: TrainConfig(batch=2.5)])
def test_settings_of_models_are_checked_alike(make):
    with pytest.raises(ValueError): make()


@pytest.mark.parametrize("words", [["--minutes", "nan"], ["--minutes", "0"], ["--minutes", "inf"], ["--seed", "-1"],
                                   ["--kind", "sums"], ["--alpha-policy", "fast"], ["--inject-layers", "0"]])
def test_training_is_refused_in_one_line(cli, tmp_path, words):
    said = cli.here("train", tmp_path/"new", *words, expect=2)[1]
    assert len(said.splitlines()) == 1 and words[0][2:].replace("-", "_") in said and not (tmp_path/"new").exists()


@pytest.mark.parametrize("words", [["ablations", "--confidence", "nan"], ["compare", "a", "b", "--confidence", "nan"],
                                   ["failures", "--threshold", "nan"], ["failures", "--threshold", "7"]])
def test_a_number_that_is_none_is_no_option(cli, runs, words):
    assert words[-2] in cli.here(*words, expect=2)[1]


def test_no_code_reads_values_by_itself():
    for path in (ROOT/"pispiral").rglob("*.py"):
        if path.name != "values.py": assert "import yaml" not in path.read_text(encoding="utf-8"), path


# ---- needles in words of their own, and lists that are compared

def test_a_needle_in_json_keeps_its_braces():
    from transformers import AutoTokenizer
    from pispiral.model.load import resolve
    tok = AutoTokenizer.from_pretrained(resolve("smollm2-135m-instruct"))
    item = niah_item(tok, 256, .5, 3, form='{"{k}": {"value": {v}, "more": {}}}')
    assert f'": {{"value": {item.expected[0]}, "more": {{}}}}}}' in tok.decode(item.ids)


def test_a_code_with_a_list_among_its_parameters_is_grouped_and_compared(tmp_path):
    for run, bands in (("a", [1, 2]), ("b", [1, 3])):
        rows = [dict(key=f"{run}{i}{b}", task="niah", length=512, depth=.5, seed=i, mode="mine", model="m", score=i % 2,
                     expected=[str(i)], needle_at=i, config=dict(pos="mine", bands=b))
                for i in range(4) for b in (bands, [9])]
        write_log(tmp_path/run/"phase_03"/"items.jsonl", rows)
        profile = dict(name="p", methods=dict(mine=dict(code=dict(name="mine", bands=bands))))
        (tmp_path/run/"run.json").write_text(json.dumps(dict(run_id=run, profile=profile)))
    rec = load_records(tmp_path/"a")
    assert set(rec.items.bands) == {"[1, 2]", "[9]"} and "bands" in rec.settings
    assert len(main_items(rec, 3, "mine")) == 4
    found, _, _ = compare_all(["a:mine", "b:mine"], lambda name: tmp_path/name)
    assert found[0].gain.n == 4


# ---- fuzz: never a traceback, never a value silently another

@cache
def smoke(): return profile_data("smoke")


NULLS, BOOLS = ("~", "null", "Null", "NULL"), ("true", "True", "TRUE", "false", "False", "FALSE")
NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")


def meant(word):
    "What YAML 1.2's core schema makes of a plain word of letters, digits and signs."
    if word in NULLS: return None
    if word in BOOLS: return word.lower() == "true"
    if re.fullmatch("[-+]?[0-9]+", word): return int(word) if len(word) < 400 else math.inf # too long for any reader
    if re.fullmatch("0o[0-7]+", word): return int(word[2:], 8)
    if re.fullmatch("0x[0-9a-fA-F]+", word): return int(word[2:], 16)
    if NUMBER.fullmatch(word): return float(word)
    if re.fullmatch(r"[-+]?\.(inf|Inf|INF)", word): return float(word.replace(".", ""))
    return math.nan if word in (".nan", ".NaN", ".NAN") else word


tricky = st.sampled_from([
    *NULLS, *BOOLS, "yes", "no", "on", "off", "y", "n", "None", "nan", "inf", ".inf", "-.INF", ".nan", "010", "0o10",
    "0o9", "0x10", "0b1", "1_000", "1e3", "1E3", "1e-3", "+5", "-0", "1.", ".5", "1:30", "1:30:00", "2020-01-13",
    "007", "1e6", "1e400", "1e-400", "9"*30, "9"*5000, "0"*50 + "7", "12e2", "512", "64.0"])
like_numbers = st.from_regex(r"[0-9][0-9_.eExo+-]{0,6}", fullmatch=True)
words = tricky | like_numbers | st.from_regex(r"[A-Za-z][A-Za-z0-9_.-]{0,8}", fullmatch=True)
NUMBERS = {"seed": int, "window": int, "needles.seeds": int, "needles.minutes": float, "max_hours": float, "sinks": int,
           "code.hybrid_K": int, "code.logit_scale": float, "large.heavy.length": int, "sanity.questions": int}
NAMES = ("machine", "large.medium.code.irrational")


def same(a, b): return a == b and all(isinstance(a, kind) == isinstance(b, kind) for kind in (bool, str))


def check_word(path, word, value, change):
    "A word is refused in one line, or it is in the profile as what it means."
    try: found = value_at(make_profile(overridden(smoke(), change())).model_dump(), path)
    except ValueError as e:
        assert str(e).strip() and len(str(e).splitlines()) == 1, (path, word, str(e))
        return
    assert same(found, value), (path, word, value, found)


def fuzz_word(path, word):
    check_word(path, word, meant(word), lambda: parse_settings([f"{path}={word}"]))
    section, _, name = path.rpartition(".") # the same inside a table
    if section: check_word(path, word, meant(word), lambda: parse_settings([f"{section}={{{name}: {word}}}"]))


def fuzz_words(path, listed):
    "The same for the words of a list."
    values = list(map(meant, listed))
    order = lambda vs: sorted(set(vs)) if path.endswith("lengths") else vs
    try: found = set_value(f"{path}=[{', '.join(listed)}]", path)
    except ValueError as e:
        assert len(str(e).splitlines()) == 1
        return
    assert len(found) == len(order(values)) and all(map(same, found, order(values))), (path, listed, found)


def set_value(word, path): return value_at(make_profile(overridden(smoke(), parse_settings([word]))).model_dump(), path)


PARAMETERS = {"window": "window", "hybrid_K": "code.hybrid_K", "irrational": "code.irrational", "model": "model",
              "inject_layers": "memory.inject_layers", "target_length": "code.target_length"}


def fuzz_papermill(name, word, raw):
    "A parameter is what papermill made of a word, or is refused; a name is what was typed."
    value = word if raw else _resolve_type(word)
    if value is None: return # papermill's None is the profile's own
    change = lambda: overrides_of(parameters_in(3, {name: value}))
    check_word(PARAMETERS.get(name), word, value, change)
    if isinstance(value, str): assert same(value, word)


def fuzz_run_id(word, raw):
    value = word if raw else _resolve_type(word)
    if value is None: return
    try: assert checked_name(chosen_name(parameters_in(3, dict(run_id=value))["run_id"], "smoke", {})) == word
    except ValueError as e: assert len(str(e).splitlines()) == 1


CASES = [(fuzz_word, st.tuples(st.sampled_from([*NUMBERS, *NAMES]), words)),
         (fuzz_words, st.tuples(st.sampled_from(["needles.short_lengths", "needles.depths", "ablations.irrationals"]),
                                st.lists(words, max_size=3))),
         (fuzz_papermill, st.tuples(st.sampled_from(list(PARAMETERS)), words, st.booleans())),
         (fuzz_run_id, st.tuples(words, st.booleans()))]
few = settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
many = settings(few, max_examples=2500)


@pytest.mark.parametrize("case", CASES, ids=[f.__name__ for f, _ in CASES])
def test_few_fuzzed_words(case): few(given(case[1])(lambda args: case[0](*args)))()


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=[f.__name__ for f, _ in CASES])
def test_ten_thousand_fuzzed_words(case): many(given(case[1])(lambda args: case[0](*args)))()


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=12) | words
nested = lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words | st.text(max_size=4), inner, max_size=3)
anything = st.recursive(scalars, nested, max_leaves=8)


def test_what_is_written_is_read_back():
    def back(value):
        for flow in (True, False):
            found = read_yaml(write_yaml(value, flow), "this")
            assert found == value and json.dumps(found) == json.dumps(value), (value, found)
    settings(few, max_examples=150)(given(anything)(back))()
