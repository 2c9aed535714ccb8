"""vLLM beside the reference engine, where `make vllm` has made an environment for it.

All of it is slow: starting vLLM alone takes most of a minute. What needs no vLLM is tested in the notebooks
(4_model/30_whole_table, 4_model/31_vllm, 6_evidence/20_vllm_engine, a_cli/10_serving)."""
import json
import subprocess

import pytest
import torch

from pispiral.codes.registry import code
from pispiral.evidence.evaluate import all_cells, answer_cell, evaluate
from pispiral.evidence.executors import answered
from pispiral.evidence.settings import Setting
from pispiral.evidence.vllm_engine import ENGINE, TIES, compared, crew_for_engine, stop_engine
from pispiral.model.load import load_model, set_code
from pispiral.model.vllm import vllm_environ, vllm_python
from pispiral.tasks.niah import niah_item
from pispiral.tasks.shortqa import shortqa_item

CODES = {"rope": code("rope"), "yarn": code("yarn"), "pi_spiral": code("pi_spiral"), "hybrid": code("hybrid")}
FAR = {"rope": CODES["rope"], "hybrid": CODES["hybrid"]}


@pytest.fixture(scope="module")
def small():
    "SmolLM2 in fp32 with its tokenizer, and vLLM's process until the last test is done."
    try: vllm_python()
    except ValueError as e: pytest.skip(str(e))
    yield load_model(dtype="float32", device="cpu")
    stop_engine()


LENGTHS = """
import json, sys
from vllm.engine.arg_utils import EngineArgs
def asked(how):
    try: return EngineArgs(model=sys.argv[1], **how).create_model_config().max_model_len
    except Exception as e: return str(e)
print("\\n" + json.dumps([asked(how) for how in json.loads(sys.argv[2])]))
"""
REFUSED = [dict(max_model_len=2**20 + 1), *(dict(hf_overrides=dict(pispiral=p)) for p in (
    "self_extend", "dca", "alibi", dict(pos="rope", memory=True), dict(pos="rope", window=512))),
    dict(hf_overrides=dict(max_position_embeddings=16384))]
SAID = ["1048577", "self_extend", "dca", "alibi", "memory", "window=512", "--max-model-len"]


@pytest.mark.slow
def test_vllm_itself_learns_lengths_and_refusals_from_a_saved_folder(small, tmp_path):
    "The plugin is found by its entry point; a config without a code is served as if it were not there."
    model, tok = small
    set_code(model, code("hybrid", target_length=16384)).save_pretrained(tmp_path)
    tok.save_pretrained(tmp_path)
    wanted = [dict(), dict(max_model_len=20000), dict(hf_overrides=dict(pispiral=None)), *REFUSED]
    out = subprocess.run([vllm_python(), "-c", LENGTHS, tmp_path, json.dumps(wanted)], capture_output=True, text=True,
                         env=vllm_environ(VLLM_LOGGING_LEVEL="ERROR", HF_HUB_OFFLINE="1"))
    told = json.loads(out.stdout.strip().splitlines()[-1])
    assert told[:3] == [16384, 20000, 8192]
    assert [said in text for said, text in zip(SAID, told[3:])] == [True]*len(SAID), told[3:]


def setting(name, code, engine=ENGINE):
    return Setting("smollm2-135m-instruct", name, code, None, "float32", "cpu", 512, backend=engine or "sdpa",
                   engine=engine)


def both(small, items, codes):
    "Ask both engines; {code: (rows of `compared`, vLLM's answers as text)}."
    model, tok = small
    todo = {f"{name}-{i}": (name, it) for name in codes for i, it in enumerate(items)}
    how, out = {name: setting(name, c) for name, c in codes.items()}, {}
    crew = crew_for_engine(model, todo, how)
    for cell in all_cells(model, tok, todo, how, True, {}, None):
        name = cell.how["setting"].method
        theirs = {a.key: a.ids for a in answered(crew, [cell], lambda tokens: None)}
        plain = cell._replace(how={**cell.how, "setting": setting(name, codes[name], None)})
        ours = {a.key: a.ids for a in answer_cell(model, plain, lambda tokens: None)}
        out[name] = compared(model, cell, ours, theirs), [tok.decode(theirs[k]) for k in cell.keys]
    return out


def check(found):
    for name, (rows, _) in found.items():
        wrong = [r for r in rows if not r["same"] and r["gap"] > TIES["float32"]]
        assert not wrong, (name, wrong)


@pytest.mark.slow
def test_short_greedy_answers_are_the_references(small):
    tok = small[1]
    items = [niah_item(tok, n, d, seed=s) for s, (n, d) in enumerate(((384, .5), (700, .2), (1024, .8)))]
    check(both(small, items + [shortqa_item(tok, 512, seed=0)], CODES))


@pytest.mark.slow
def test_greedy_answers_up_to_16k_are_the_references(small):
    "Four codes with eleven items each."
    tok, lengths = small[1], (1024, 1536, 2048, 2500, 3000, 4096, 6000, 8192, 12288, 16384)
    items = [niah_item(tok, n, (.1, .5, .9)[s % 3], seed=s) for s, n in enumerate(lengths)]
    check(both(small, items + [shortqa_item(tok, 1024, seed=1)], CODES))


@pytest.mark.slow
def test_needles_at_12k_are_lost_by_rope_and_found_by_the_hybrid(small):
    items = [niah_item(small[1], 12288, .5, seed=s) for s in range(3)]
    found = {name: [all(e in text for e in it.expected) for it, text in zip(items, texts)]
             for name, (_, texts) in both(small, items, FAR).items()}
    assert found == {"rope": [False]*3, "hybrid": [True]*3}


@pytest.mark.slow
def test_records_name_the_engine_and_the_canary_is_kept(small, tmp_path):
    "A method with a window is asked of the reference engine in the same call."
    model, tok = small
    it = niah_item(tok, 600, .5, seed=3)
    how = dict(hybrid=setting("hybrid", code("hybrid")),
               window=setting("window", code("rope"), None)._replace(window=256, sinks=4))
    with torch.inference_mode(): records = evaluate(model, tok, [("hybrid", it), ("window", it)], how, tmp_path)
    assert [r.get("engine") for r in records] == ["vllm", None]
    assert records[0]["attn_backend"] == "vllm" and records[0]["score"] == 1
    noted = json.loads((tmp_path/"engine.json").read_text())
    assert noted["version"].startswith("vllm") and [row["same"] for row in noted["canary"]["hybrid"]] == [True]
