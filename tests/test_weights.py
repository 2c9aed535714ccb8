"Whatever a folder is called, a record says which weights answered, and answers of others are never taken for theirs."
import json

import torch
from asking import ask, grid, save_tiny
from safetensors.torch import load_file, save_file

from pispiral.evidence.evaluate import evaluate
from pispiral.evidence.records import read_log
from pispiral.model.load import load_model
from pispiral.verdict.pairs import PAIR, pair_key

SMALL = dict(length=256, depths=(.5,), seeds=1)


def overwrite(folder, change):
    "Write a model's weights over in place: the same file, the same size."
    path = folder/"model.safetensors"
    tensors = {k: change(v) for k, v in load_file(path).items()}
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata={"format": "pt"})


def test_weights_written_over_in_place_are_asked_anew(tmp_path):
    model, out = save_tiny(tmp_path/"model"), tmp_path/"out"
    first = ask(model, out, **SMALL)
    assert len({r["key"] for r in ask(model, out, **SMALL)} | {r["key"] for r in first}) == len(first)
    overwrite(model, lambda v: -v)
    second = ask(model, out, **SMALL)
    assert not {r["key"] for r in first} & {r["key"] for r in second}
    assert len(read_log(out/"items.jsonl")) == 2*len(first)
    assert not {pair_key(r) for r in first} & {pair_key(r) for r in second}
    assert "weights" in PAIR


def test_a_changed_configuration_is_another_model(tmp_path):
    model, out = save_tiny(tmp_path/"model"), tmp_path/"out"
    first = ask(model, out, **SMALL)
    config = json.loads((model/"config.json").read_text())
    (model/"config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-2}))
    assert not {r["key"] for r in first} & {r["key"] for r in ask(model, out, **SMALL)}
    (model/"config.json").write_text(json.dumps({**config, "transformers_version": "0", "_name_or_path": "elsewhere"}))
    assert {r["key"] for r in first} == {r["key"] for r in ask(model, out, **SMALL)}


def test_a_checkpoint_saved_in_4_bits_is_recorded_so(tmp_path):
    folder = save_tiny(tmp_path/"model", width=64)
    small, tok = load_model(str(folder), dtype="float32", device="cpu", quantize="nf4")
    small.save_pretrained(tmp_path/"small")
    tok.save_pretrained(tmp_path/"small")
    stored = ask(tmp_path/"small", tmp_path/"out", **SMALL)
    assert {r["quantize"] for r in stored} == {"nf4"}
    assert {r["quantize"] for r in ask(folder, tmp_path/"plain", **SMALL)} == {None}


def test_an_adapter_put_on_in_memory_is_another_model(tmp_path):
    loaded, tok = load_model(str(save_tiny(tmp_path/"model")), dtype="float32", device="cpu")
    questions, settings = grid(tok, **SMALL)
    with torch.inference_mode():
        first = evaluate(loaded, tok, questions, settings, tmp_path/"out")
        loaded.model.layers[0].self_attn.q_proj.weight.mul_(2)
        second = evaluate(loaded, tok, questions, settings, tmp_path/"out")
    assert not {r["weights"] for r in first} & {r["weights"] for r in second}


def test_records_that_name_no_weights_pair_as_before():
    old = dict(model="m", task="niah", seed=0, dtype="float32")
    assert pair_key(old) == pair_key({**old, "weights": None})
    assert len({pair_key({**old, "weights": w}) for w in (None, "a", "b")}) == 3
