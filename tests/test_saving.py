"What is saved is what answered; a folder that would give another model is refused, by the name of what is wrong."
import json
import shutil

import pytest
import torch
from asking import save_tiny
from safetensors.torch import load_file, save_file

from pispiral.evidence.settings import memory_name
from pispiral.memory.beside import keyed_memory
from pispiral.model.load import load_model, resolve, set_memory
from pispiral.tasks.assets import AssetError

IDS = torch.arange(5, 60)[None]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    "A saved tiny model of three layers."
    return save_tiny(tmp_path_factory.mktemp("saved")/"model", layers=3, width=64)


def load(folder, **kw):
    return load_model(str(folder), dtype="float32", device="cpu", **kw)


def logits(model):
    with torch.inference_mode(): return model(IDS).logits


def save(model, tok, folder):
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    return folder


def test_an_adapter_of_peft_is_not_saved_as_a_plain_model(saved, tmp_path):
    peft = pytest.importorskip("peft")
    model, tok = load(saved)
    plain = logits(model)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, model)
    answered = logits(model)
    assert not torch.allclose(plain, answered)
    with pytest.raises(ValueError, match=r"self_attn\.q_proj\..* is no part of a plain model: merge"):
        save(model, tok, tmp_path)
    assert torch.equal(logits(set_memory(model, None)), answered)  # taking no memory off leaves it alone


def test_an_adapter_of_transformers_is_not_saved_as_a_plain_model(saved, tmp_path):
    peft = pytest.importorskip("peft")
    model, tok = load(saved)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="is no part of a plain model"): save(model, tok, tmp_path)


def test_a_merged_adapter_comes_back(saved, tmp_path):
    peft = pytest.importorskip("peft")
    model, tok = load(saved)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config)
    wrapped.save_pretrained(tmp_path/"adapter")
    with pytest.raises(ValueError, match="holds an adapter of .* and no model: merge it"): load(tmp_path/"adapter")
    merged = wrapped.merge_and_unload()
    again, _ = load(save(merged, tok, tmp_path/"merged"))
    assert torch.equal(logits(again), logits(merged))


KEYED = dict(layers=(1, 2), features=64, value_size=8)


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_a_memory_comes_back_with_its_model(saved, tmp_path, quantize):
    how = dict(pos="hybrid", hybrid_K=16, target_length=1024, quantize=quantize, memory=KEYED)
    model, tok = load(saved, **how)
    with torch.no_grad():
        for p in keyed_memory(model).parameters(): p.normal_(0, .1)
    again, _ = load(save(model, tok, tmp_path))
    assert torch.equal(logits(again), logits(model)) and keyed_memory(again).cfg == keyed_memory(model).cfg
    theirs = keyed_memory(again).state_dict()
    assert all(torch.equal(theirs[k], t) for k, t in keyed_memory(model).state_dict().items())
    bare, _ = load(tmp_path, memory=False)
    assert torch.equal(logits(bare), logits(set_memory(model, None))) and keyed_memory(bare) is None


def test_a_memory_of_another_tokenizer_is_refused(saved, tmp_path):
    model, tok = load(saved, memory=dict(KEYED, tokenizer="0123456789abcdef"))
    with pytest.raises(ValueError, match="trained with another tokenizer: 0123456789abcdef there"):
        load(save(model, tok, tmp_path))


def changed(saved, folder, change):
    "A copy of a model with other tensors."
    shutil.copytree(saved, folder)
    tensors = load_file(folder/"model.safetensors")
    change(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder/"model.safetensors", metadata={"format": "pt"})
    return folder


QUERIES = "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize("change, said", [
    (lambda t: t.pop(f"{QUERIES}.weight"), f"1 are missing, and would be random: {QUERIES}"),
    (lambda t: t.update({f"{QUERIES}.base_layer.weight": t.pop(f"{QUERIES}.weight")}), "1 are missing, and would be"),
    (lambda t: t.update({"model.layers.1.memory.weight": torch.zeros(2)}), "1 are of another model, or of"),
    (lambda t: t.update({"model.norm.weight": torch.zeros(2)}), r"1 have another shape: .*norm.* \(2,\), not \(64,\)")])
def test_weights_that_do_not_fit_are_refused(saved, tmp_path, change, said):
    with pytest.raises((ValueError, AssetError), match=said) as e: load(changed(saved, tmp_path/"bad", change))
    assert "\n" not in str(e.value) and "bad" in str(e.value)


def test_an_adapter_beside_a_model_is_not_taken_along(saved, tmp_path):
    peft = pytest.importorskip("peft")
    model, tok = load(saved)
    shutil.copytree(saved, tmp_path/"both")
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path/"both")
    with pytest.raises(ValueError, match="comes with an adapter: merge"): load(tmp_path/"both")


def test_truncated_weights_are_told_in_one_line(saved, tmp_path):
    shutil.copytree(saved, tmp_path/"cut")
    whole = (tmp_path/"cut"/"model.safetensors").read_bytes()
    for n in (len(whole)//2, 100, 4, 0):
        (tmp_path/"cut"/"model.safetensors").write_bytes(whole[:n])
        with pytest.raises(ValueError, match="model.safetensors in cut is cut short.*: fetch or copy") as e:
            load(tmp_path/"cut")
        assert "\n" not in str(e.value)


@pytest.mark.parametrize("file, text, said", [
    ("config.json", '{"model_type": ', "the config of model .* is no JSON"),
    ("config.json", "[]", "the config of model"),
    ("config.json", '{"model_type": "nothing"}', "does not know this architecture"),
    ("tokenizer.json", '{"version": ', "the tokenizer of model .* cannot be had")])
def test_a_damaged_file_is_told_in_one_line(saved, tmp_path, file, text, said):
    shutil.copytree(saved, tmp_path/"model")
    (tmp_path/"model"/file).write_text(text)
    with pytest.raises((ValueError, AssetError), match=said) as e: load(tmp_path/"model")
    assert "\n" not in str(e.value)


def test_what_lies_below_a_model_does_not_hide_it(saved, tmp_path):
    shutil.copytree(saved, tmp_path/"model")
    for below in ("checkpoint-500", "checkpoint-1000", "onnx", "a/b"):
        (tmp_path/"model"/below).mkdir(parents=True)
        (tmp_path/"model"/below/"config.json").write_text("{}")
    assert resolve(str(tmp_path/"model")) == resolve(str(tmp_path)) == str(tmp_path/"model")
    assert resolve(str(tmp_path/"model"/"onnx")) == str(tmp_path/"model"/"onnx")
    assert torch.equal(logits(load(tmp_path/"model")[0]), logits(load(saved)[0]))


def test_a_memory_with_a_wrong_key_is_told_in_one_line(saved, tmp_path):
    model, tok = load(saved, memory=KEYED)
    save(model, tok, tmp_path)
    about = json.loads((tmp_path/"memory.json").read_text())
    for keys in ({**about["config"], "layrs": 3}, {**about["config"], "N": "x"}, {}, [1], None):
        (tmp_path/"memory.json").write_text(json.dumps({**about, "config": keys}))
        with pytest.raises(ValueError, match="the memory in") as e: set_memory(model, str(tmp_path))
        assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match="did you mean 'layers'") as e: set_memory(model, dict(layrs=3))
    assert "\n" not in str(e.value)


def test_a_memory_is_named_by_all_that_decides_what_it_says(saved, tmp_path):
    model, tok = load(saved, memory=KEYED)
    name, about = memory_name(save(model, tok, tmp_path)), json.loads((tmp_path/"memory.json").read_text())
    (tmp_path/"memory.json").write_text(json.dumps({**about, "config": {**about["config"], "strength": 10.}}))
    assert memory_name(tmp_path) != name
    for text in ("{", "[]", "{}", '{"config": 1, "base": {}}'):
        (tmp_path/"memory.json").write_text(text)
        with pytest.raises(ValueError, match="is damaged and is not used") as e: memory_name(tmp_path)
        assert "\n" not in str(e.value)
