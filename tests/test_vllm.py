"""vLLM beside the reference engine, where `make vllm` has made an environment for it.

All of it is slow: starting vLLM alone takes most of a minute. What needs no vLLM is tested in the notebooks
(4_model/30_whole_table, 4_model/31_vllm, 6_evidence/20_vllm_engine, a_cli/10_serving)."""
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
import torch
from conftest import BIN, ROOT
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(ROOT/"benchmarks"))
import agreement
from agreement import both, setting

from pispiral.codes.registry import code
from pispiral.evidence.evaluate import evaluate
from pispiral.evidence.vllm_engine import TIES, stop_engine
from pispiral.model.load import load_model, set_code
from pispiral.model.vllm import vllm_environ, vllm_python
from pispiral.tasks.niah import niah_item
from pispiral.tasks.shortqa import shortqa_item

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


def check(found):
    for name, rows in found.items():
        wrong = [r for r in rows if not r["same"] and r["gap"] > TIES["float32"]]
        assert not wrong, (name, wrong)


def test_the_committed_table_is_of_forty_items_and_names_every_difference():
    "Made by benchmarks/agreement.py: per code and length, how many answers were equal in every token."
    text = (ROOT/"benchmarks"/"agreement.md").read_text(encoding="utf-8")
    table = [line for line in text.split("\n") if line.startswith("| ") and "items" not in line]
    rows = [line.strip("| ").split(" | ") for line in table]
    asked, equal = (sum(int(row[i]) for row in rows) for i in (2, 3))
    assert {(row[0], row[1]) for row in rows} == {(c, f"{n:,}") for c in agreement.NAMES for n in agreement.ITEMS}
    assert asked >= 40 and text.count("the two engines part") == asked - equal
    assert f"Needles at {agreement.FAR:,} tokens" in text
    assert "rope found 0 of 3" in text and "hybrid found 2 of 3" in text


@pytest.mark.slow
def test_short_greedy_answers_are_the_references(small):
    model, tok = small
    items = [niah_item(tok, n, d, seed=s) for s, (n, d) in enumerate(((384, .5), (700, .2), (1024, .8)))]
    check(both(model, tok, items + [shortqa_item(tok, 512, seed=0)], agreement.codes()))


@pytest.mark.slow
def test_greedy_answers_up_to_16k_are_the_references(small):
    "Four codes with ten items each: what benchmarks/agreement.md shows; 40 minutes of one core."
    model, tok = small
    check(both(model, tok, agreement.needles(tok, agreement.ITEMS), agreement.codes()))


@pytest.mark.slow
def test_needles_at_12k_are_lost_by_rope_and_most_are_found_by_the_hybrid(small):
    found = agreement.far_scores(*small, agreement.codes(agreement.FAR_NAMES))
    assert found == {"rope": [0, 0, 0], "hybrid": [1, 0, 1]} # the reference engine loses the same one


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture
def server(small, tmp_path):
    "The address of `pispiral serve` with a hybrid; what was started is stopped, and nothing else."
    port = free_port()
    words = [BIN/"pispiral", "serve", agreement.MODEL, "--code", "hybrid", "--set", "target_length=16384", "--length",
             "1024", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    with open(tmp_path/"serve.log", "wb") as log:
        process = subprocess.Popen(words, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                   start_new_session=True)
    try:
        for _ in range(600):
            assert process.poll() is None, (tmp_path/"serve.log").read_text(encoding="utf-8")[-2000:]
            try: urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
            except OSError: time.sleep(1)
            else: break
        yield f"http://127.0.0.1:{port}/v1/completions"
        process.terminate()
        process.wait(60)
    finally:
        if process.poll() is None: os.killpg(process.pid, signal.SIGKILL)


def completion(url, prompt):
    "Ask greedily for 16 tokens; (token ids, text)."
    asked = dict(model=agreement.MODEL, prompt=prompt, temperature=0, max_tokens=16, return_token_ids=True)
    request = urllib.request.Request(url, json.dumps(asked).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as answer: [said] = json.load(answer)["choices"]
    return said["token_ids"], said["text"]


@pytest.mark.slow
def test_the_server_says_what_transformers_generate_says(small, server):
    "Token ids and text in; the code's positions, not the model's, are what it refuses beyond."
    model, tok = small
    set_code(model, code("hybrid", target_length=16384))
    for prompt in (niah_item(tok, 700, .4, seed=11).ids.tolist(), "The capital of France is"):
        ids = prompt if isinstance(prompt, list) else tok(prompt)["input_ids"]
        out = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
                             max_new_tokens=16, do_sample=False, pad_token_id=tok.eos_token_id)[0, len(ids):].tolist()
        assert completion(server, prompt) == (out, tok.decode(out, skip_special_tokens=True))
    with pytest.raises(urllib.error.HTTPError, match="400"): completion(server, list(range(2000)))


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


def tensor_model(folder, tok):
    "A random Llama whose heads two workers can share; SmolLM2's 9 and 3 they cannot."
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, vocab_size=len(tok), max_position_embeddings=8192,
                         eos_token_id=tok.eos_token_id)
    LlamaForCausalLM(config).save_pretrained(folder)
    tok.save_pretrained(folder)
    return load_model(str(folder), dtype="float32", device="cpu")[0]


@pytest.mark.slow
def test_two_workers_give_the_records_of_one(small, tmp_path, monkeypatch):
    "On this machine, by vLLM's own means: each has half of the heads."
    tok = small[1]
    model, told = tensor_model(tmp_path/"model", tok), []
    items = [niah_item(tok, n, .5, seed=n) for n in (300, 420)]
    settings = {name: setting(name, c) for name, c in agreement.codes(("rope", "hybrid")).items()}
    for jobs in ("1", "2"):
        monkeypatch.setenv("PISPIRAL_JOBS", jobs)
        with torch.inference_mode():
            records = evaluate(model, tok, [(name, it) for name in settings for it in items], settings, tmp_path/jobs)
        told.append([{k: v for k, v in r.items() if k != "seconds"} for r in records])
        stop_engine()
    assert told[0] == told[1] and {r["engine"] for r in told[0]} == {"vllm"}
