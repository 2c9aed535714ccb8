"A profile is proven before it is paid for: planted faults are found and named, whatever they are called."
import json
import shutil
import sys
from functools import lru_cache
from importlib import metadata

import pytest

from pispiral.lab.profiles import changed, load_profile
from pispiral.lab.found import PARTS
from pispiral.lab.rehearse import faults, rehearse
from pispiral.model.standins import stand_in

LLAMA, MEMORY = "meta-llama/Meta-Llama-3-8B-Instruct", "smollm2-135m-instruct-facts"


@lru_cache
def before(name, part):
    "What a shipped profile's rehearsal says without a planted fault."
    return frozenset(faults(rehearse(load_profile(name), parts=[part])))


def named(profile, name, part):
    "The faults of one part that the shipped profile does not have."
    return [f for f in faults(rehearse(profile, parts=[part])) if f not in before(name, part)]


WINDOWED = dict(window=1024, memory=MEMORY)
PLANTED = {  # what it is: (profile, changes, part that finds it, what it names)
    "a length beyond the card": (
        "kaggle", {"needles.long_lengths": [2**21], "code.target_length": 2**21}, "memory", "2,097,152"),
    "a length beyond the medium model's code": (
        "kaggle", {"large.medium.long_lengths": [2**20]}, "lengths", "large.medium"),
    "a far length beyond the code": ("kaggle", {"needles.far_lengths": [2**18]}, "lengths", "needles.far_lengths"),
    "all keys in sight where only windows fit": ("kaggle", {"needles.long_lengths": [131072]}, "memory", "131,072"),
    "documents beyond the card": ("full", {"documents.lengths": [131072]}, "memory", "documents"),
    "the heavy model beyond the card": ("full", {"large.heavy.length": 131072}, "memory", "large.heavy"),
    "two copies of keys beyond the card": ("full", {"needles.long_lengths": [65536, 98304, 131072, 294912]}, "memory",
                                           "self_extend"),
    "far lengths that no memory hears": (
        "full", {"needles.methods": ["rope", "hybrid", "rope_ntk", "window", "hybrid_window"]}, "windows",
        "none has a memory"),
    "the medium model's far lengths that no memory hears": (
        "kaggle", {"large.medium.methods": ["rope", "hybrid", "window"]}, "windows", "large.medium.far_lengths"),
    "a K that is left out and could be asked": ("full", {"ablations.K_beyond": [4096]}, "contrasts", "4096"),
    "a medium model in a dtype that overflows": (
        "kaggle", {"large.medium.model": "Qwen/Qwen2.5-1.5B-Instruct", "large.medium.native_length": 32768}, "dtypes",
        "overflows in float16"),
    "a dtype left to the card": ("kaggle", {"dtype": "auto"}, "dtypes", "dtype='auto' means on this card"),
    "unquantised weights without a place": (
        "kaggle", {"large.medium.reference": None}, "placement", "large.medium.reference"),
    "a stream beyond the heavy model's code": (
        "kaggle", {"large.heavy.stream_lengths": [8192, 16384, 2**18]}, "lengths", "large.heavy.stream_lengths"),
    "a stream without lengths": ("kaggle", {"streams.lengths": []}, "gates", "2.flat_memory"),
    "a stream of too few lengths": ("full", {"spans.lengths": [65536, 131072]}, "gates", "3.flat_memory"),
    "a gate that may read next to nothing": ("kaggle", {"decide.tokens": 1000}, "gates", "3.gain_over_rope"),
    "too few questions for 4 bits": ("kaggle", {"large.medium.questions": 10}, "gates", "4.stable_4bit"),
    "too few seeds": ("kaggle", {"repeats.seeds": 1}, "gates", "8.seeds"),
    "texts within the native length": ("kaggle", {"drift.length": 16384}, "gates", "7.no_ppl_oscillation"),
    "a native length contradicted": ("kaggle", {"native_length": 131072}, "native lengths", "native_length"),
    "another one": ("full", {"large.medium.native_length": 131072}, "native lengths", "large.medium.native_length"),
    "K against what the native length allows": ("kaggle", {"code.hybrid_K": 65536}, "codes", "hybrid_K=65536"),
    "K of the medium model": ("full", {"large.medium.code.hybrid_K": 8192}, "codes", "medium model"),
    "a K of the ablations": ("kaggle", {"ablations.K": [8192, 131072]}, "contrasts", "131072"),
    "weights that do not fit": ("kaggle", {"large.medium.quantize": None}, "memory", "does not fit"),
    "losses of long texts in one pass": ("kaggle", {"chunk": 65536}, "memory", "drift"),
    "fp16 that overflows": ("full", {"dtype": "float16"}, "dtypes", "overflows in float16"),
    "needles out of a window's sight": (
        "kaggle", {"large.heavy.window": 1024, "large.heavy.whole": False, "large.heavy.kv": None}, "windows",
        "window of 1,024"),
    "a task without room": ("kaggle", {"ruler.lengths": [64, 4096]}, "questions", "at 64"),
    "a session shorter than a question": ("kaggle", {"max_hours": .001}, "hours", "a session"),
    "a tokenizer that joins digits": (
        "kaggle", {"model": LLAMA, "native_length": 8192, "code.hybrid_K": 2048, "methods.remembers": WINDOWED,
                   "needles.methods": ["rope", "remembers"]}, "memories", "digits"),
    "a machine that nobody knows": ("kaggle", {"machine": "RTX 3060 12 GiB"}, "machine", "names no card"),
    "a card that torch has no kernels for": ("kaggle", {"machine": "P100 16 GiB"}, "placement", "choose another card"),
    "a profile for a card on a machine without one": (
        "kaggle", {"machine": "2 CPU cores"}, "machine", "there is no GPU"),
    "a card left idle": ("full", {"device": "cpu"}, "machine", "idle"),
    "no cap": ("full", {"memory_cap_gib": None}, "machine", "memory_cap_gib=None keeps no cap"),
    "a cap beyond the card": ("kaggle", {"memory_cap_gib": 40}, "machine", "memory_cap_gib=40"),
    "a cap too small": ("kaggle", {"memory_cap_gib": 4}, "memory", "4.0 GiB may be held"),
    "a session longer than Kaggle's": ("kaggle", {"max_hours": 20}, "machine", "max_hours=20"),
    "a dtype that the card has not": ("kaggle", {"large.medium.dtype": "bfloat16"}, "dtypes", "does not compute in bf"),
    "an engine that is not there": ("kaggle", {"engine": "vllm"}, "session", "engine=vllm"),
    "a window that holds no question": ("kaggle", {"methods.attractor.window": 32}, "narrow windows", "window=32"),
    "the medium model's window": ("full", {"large.medium.window": 16}, "narrow windows", "window=16"),
    "more tries than there is time for": ("kaggle", {"care.tries": 100}, "hours", "no setting would be chosen"),
    "nobody to be the best rival": ("kaggle", {"care.methods": ["hybrid"]}, "contrasts", "no rival of hybrid"),
    "minutes for less than a question": ("kaggle", {"ruler.minutes": .1}, "hours", "ruler.minutes=0.1 is less"),
    "more seeds than hours": ("full", {"repeats.seeds": 10**4}, "hours", "hours=8: the most of it in repeats"),
    "small models asked too far": ("kaggle", {"nano.lengths": [1024, 2**24]}, "hours", "in nano"),
    "a shape streamed too far": ("kaggle", {"cost.shape_lengths": [2**30]}, "hours", "cost.shapes"),
    "a control without room": (
        "kaggle", {"streams.control": [8192, 16384, 24576, 131072]}, "memory", "streams.control"),
    "a stream without its control": ("kaggle", {"streams.control": []}, "gates", "streams.control name fewer"),
    "blocks too long for points": ("kaggle", {"drift.block": 32768}, "gates", "leaves 1 points"),
    "offsets that are not large": ("full", {"diagnostics.collision_offsets": 500}, "gates", "collision_offsets=500"),
    "no key setting": ("kaggle", {"repeats.lengths": []}, "gates", "repeats.lengths"),
    "a plan without its guard": ("kaggle", {"guard.lengths": []}, "plan", "the guard of short context"),
    "a method misspelt": ("kaggle", {"needles.methods": ["rope", "hybird"]}, "codes", "did you mean 'hybrid'"),
    "a stream that does not rise": ("kaggle", {"streams.lengths": [16384, 8192]}, "codes", "must be rising"),
    "a memory that is not there": ("kaggle", {"methods.attractor.memory": "nobody"}, "codes", "is not a folder or a"),
    "a memory of another model": (
        "full", {"methods.remembers": WINDOWED, "needles.methods": ["rope", "remembers"]}, "memories",
        "hidden_size=576"),
}


@pytest.mark.parametrize("name", ["kaggle", "full"])
def test_a_shipped_profile_is_ready_in_short(name):
    assert not [f for part, asked in PARTS.items() if not asked.long for f in before(name, part)]


@pytest.mark.parametrize("case", PLANTED)
def test_a_planted_fault_is_found_and_named(case):
    name, changes, part, what = PLANTED[case]
    try: found = [f"{f.what} {f.why}" for f in named(changed(load_profile(name), **changes), name, part)]
    except ValueError as e: found = [str(e)]  # it is not even read: `pispiral rehearse` says so in its table
    assert any(what in f for f in found), found


@pytest.mark.parametrize("module", ["bitsandbytes", "typst", "kaleido", "accelerate", "datasets"])
def test_a_missing_package_is_named(monkeypatch, module):
    before("kaggle", "packages")
    monkeypatch.setitem(sys.modules, module, None)
    profile = changed(load_profile("kaggle"), documents=dict(source="published"))
    assert any(f.what == module and "is not installed" in f.why for f in named(profile, "kaggle", "packages"))


@pytest.mark.parametrize("wheel", ["typst", "bitsandbytes", "rouge-score"])
def test_a_wheel_that_a_session_does_not_bring_is_named(monkeypatch, wheel):
    from pispiral.lab import rehearsed_packages
    kept = [name for name in rehearsed_packages.not_on_kaggle() if name != wheel]
    monkeypatch.setattr(rehearsed_packages, "not_on_kaggle", lambda: kept)
    found = faults(rehearse(load_profile("kaggle"), parts=["session"]))
    assert found and all(wheel in f.why for f in found), found


def test_activations_of_a_model_that_is_here_are_looked_at():
    names = [str(stand_in("llama-3-8b", heads=4, overflow=which)) for which in (True, False)]
    for name, why in zip(names, ["overflows in float16", None]):
        how = dict(model=name, native_length=8192, dtype="float16", code=dict(hybrid_K=2048))
        found = [f.why for f in faults(rehearse(changed(load_profile("kaggle"), **how), parts=["dtypes"]))]
        assert any(why in f for f in found) if why else not found, found


def test_a_requirement_of_the_project_that_is_not_met_is_named(monkeypatch):
    monkeypatch.setattr(metadata, "requires", lambda name: ["torch>=99", "of-nobody", "ray; extra == 'dev'"])
    found = {f.what: f.why for f in faults(rehearse(load_profile("full"), parts=["packages"]))}
    assert "is needed" in found["torch"] and "not installed" in found["of-nobody"] and "ray" not in found


def test_a_cap_that_is_forgotten_is_named(monkeypatch):
    from pispiral.model import load
    everything = lambda config, quantize, offload, dtype, device, *cap, **how: dict(device_map={"": device})
    monkeypatch.setattr(load, "weight_options", everything)
    assert any("is not kept" in f.why for f in faults(rehearse(load_profile("full"), parts=["placement"])))


def test_weights_beyond_the_hosts_memory_are_named(monkeypatch):
    from pispiral.model import load
    outside = lambda config, quantize, offload, dtype, device, *cap, **how: dict(device_map={"": "cpu"})
    monkeypatch.setattr(load, "weight_options", outside)
    assert any("do not fit its host" in f.why for f in faults(rehearse(load_profile("kaggle"), parts=["placement"])))


@pytest.mark.parametrize("template, what", [
    ("{% if messages[0].role != 'user' %}{{ raise_exception('no such role') }}{% endif %}{{ messages[0].content }}",
     "no system role"),
    ("{{ messages[-1].content }}", "no system role"),
    ("{% for m in messages %}{{ m.content*2 }}{% endfor %}", "2 times"),
    ("{% for m in messages %}{{ bos_token + m.content }}{% endfor %}", "begins a text 2 times")])
def test_a_template_that_does_not_say_what_is_said_is_named(tmp_path, template, what):
    folder = shutil.copytree(stand_in("llama-3-8b", heads=4), tmp_path/"model")
    config = folder/"tokenizer_config.json"
    said = {**json.loads(config.read_text(encoding="utf-8")), "chat_template": template}
    config.write_text(json.dumps(said), encoding="utf-8")
    profile = changed(load_profile("kaggle"), model=str(folder), native_length=8192, code=dict(hybrid_K=2048))
    assert any(what in f.why for f in named(profile, "kaggle", "chat templates"))


def test_what_a_part_raises_is_a_finding(monkeypatch):
    def broken(p, card): raise KeyError("nobody knew")
    monkeypatch.setitem(PARTS, "codes", broken)
    assert [f.why for f in faults(rehearse(load_profile("full"), parts=["codes"]))] == ["KeyError: 'nobody knew'"]


def test_a_profile_that_cannot_be_read_is_not_ready(cli):
    out, _ = cli.here("rehearse", "kaggle", "--short", "--set", "needles.short_lengths=[2000000]", expect=1)
    assert "not ready: 1 fault" in out and "2000000" in out


def test_a_memory_is_fitted_with_the_name_of_its_model():
    from inspect import signature
    from pispiral.training.keyed import train_memory
    given = dict(minutes=1., notes=dict(model="its name"))
    bound = signature(train_memory).bind("a model", "its tokenizer", "a folder", **given)
    assert bound.arguments["notes"] == dict(model="its name")
