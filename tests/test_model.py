"The model that `load_model` gives, used as any transformers model is used."
import pytest
import torch
from transformers import AutoModelForCausalLM

from pispiral import load_model
from pispiral.codes.registry import CODES, code, code_with
from pispiral.lab.trained import packaged_memory
from pispiral.model.decode import answers
from pispiral.model.load import resolve, set_code, set_memory
from pispiral.tasks.niah import niah_item

PROMPTS = ["The grass is green. The sky is blue. The sun is", "One, two, three, four, five, six, seven, eight, nine,"]


@pytest.fixture(scope="module")
def loaded():
    return load_model("smollm2-135m-instruct", pos="rope", dtype="float32")


def test_rope_is_the_untouched_model(loaded):
    model, tok = loaded
    set_code(model, code("rope"))
    plain = AutoModelForCausalLM.from_pretrained(resolve("smollm2-135m-instruct"), dtype=torch.float32).eval()
    ids = tok(PROMPTS[0]*20, return_tensors="pt").input_ids
    with torch.inference_mode():
        assert torch.allclose(model(ids).logits, plain(ids).logits, atol=1e-3)
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False),
                       plain.generate(ids, max_new_tokens=8, do_sample=False))


@pytest.mark.parametrize("pos", [p for p in CODES if p != "rope"] + ["rope"])
def test_generate_with_padding_equals_generate_alone(loaded, pos):
    model, tok = loaded
    set_code(model, code_with(pos, hybrid_K=8, target_length=16384))
    tok.padding_side = "left"
    batch = tok(PROMPTS, return_tensors="pt", padding=True)
    together = model.generate(**batch, max_new_tokens=4, do_sample=False)[:, batch.input_ids.shape[1]:]
    for prompt, got in zip(PROMPTS, together):
        one = tok(prompt, return_tensors="pt")
        alone = model.generate(**one, max_new_tokens=4, do_sample=False)[0, one.input_ids.shape[1]:]
        assert torch.equal(alone, got[:len(alone)])


def test_a_shipped_memory_carries_a_number_out_of_sight():
    packaged = packaged_memory("smollm2-135m-instruct")
    if packaged is None: pytest.skip("no memory is packaged")
    model, tok = load_model(window=256, sinks=4, dtype="float32", memory=packaged.name)
    items = [niah_item(tok, 1024, .3, seed=s, haystack="repeat") for s in range(100, 104)]

    def found():
        with torch.inference_mode():
            said = dict(answers(model, [i.ids for i in items], [16]*len(items), {tok.eos_token_id}))
        return [items[i].expected[0] in tok.decode(out) for i, out in said.items()]

    assert sum(found()) >= 3
    set_memory(model, None)
    assert sum(found()) == 0
