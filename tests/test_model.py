"The model that `load_model` gives, used as any transformers model is used."
import pytest
import torch
from transformers import AutoModelForCausalLM

from pispiral import load_model
from pispiral.encoding.positions import POSITIONS, code_config
from pispiral.model.loading import resolve, set_code

PROMPTS = ["The grass is green. The sky is blue. The sun is", "One, two, three, four, five, six, seven, eight, nine,"]


@pytest.fixture(scope="module")
def loaded():
    return load_model("smollm2-135m-instruct", pos="rope", dtype="float32")


def test_rope_is_the_untouched_model(loaded):
    model, tok = loaded
    set_code(model, code_config(pos="rope"))
    plain = AutoModelForCausalLM.from_pretrained(resolve("smollm2-135m-instruct"), dtype=torch.float32).eval()
    ids = tok(PROMPTS[0]*20, return_tensors="pt").input_ids
    with torch.inference_mode():
        assert torch.allclose(model(ids).logits, plain(ids).logits, atol=1e-3)
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False),
                       plain.generate(ids, max_new_tokens=8, do_sample=False))


@pytest.mark.parametrize("pos", [p for p in POSITIONS if p != "rope"] + ["rope"])
def test_generate_with_padding_equals_generate_alone(loaded, pos):
    model, tok = loaded
    set_code(model, code_config(pos=pos, hybrid_K=8, target_length=16384))
    tok.padding_side = "left"
    batch = tok(PROMPTS, return_tensors="pt", padding=True)
    together = model.generate(**batch, max_new_tokens=4, do_sample=False)[:, batch.input_ids.shape[1]:]
    for prompt, got in zip(PROMPTS, together):
        one = tok(prompt, return_tensors="pt")
        alone = model.generate(**one, max_new_tokens=4, do_sample=False)[0, one.input_ids.shape[1]:]
        assert torch.equal(alone, got[:len(alone)])
