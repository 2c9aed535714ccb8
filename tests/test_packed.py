"Questions to a model whose cache holds keys and values in 4 bits."
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pispiral.codes.registry import code
from pispiral.evidence.ram import memory_parts
from pispiral.evidence.profiling import Shape
from pispiral.evidence.settings import Setting, paired_fields
from pispiral.lab.methods import large_settings
from pispiral.lab.profiles import changed, load_profile
from pispiral.model.cache import new_cache
from pispiral.model.decode import answers
from pispiral.model.load import set_code
from pispiral.model.packed import PackedLayer
from pispiral.model.prefill import prefill


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=64, hidden_size=128, intermediate_size=128, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=512)
    return LlamaForCausalLM(config).eval()


def logits(model, ids, chunk, kv):
    set_code(model, code("rope"), kv=kv)
    with torch.inference_mode(): return prefill(model, ids, new_cache(model, len(ids), chunk), chunk)


def test_the_same_text_is_the_same_whatever_the_chunks_and_near_what_it_is_unpacked(model):
    ids = np.random.default_rng(0).integers(0, 64, 200)
    whole, packed = logits(model, ids, 64, None), logits(model, ids, 64, "nf4")
    assert torch.allclose(packed, logits(model, ids, 200, "nf4"), atol=1e-4)
    assert 0 < (packed - whole).norm()/whole.norm() < .2
    assert torch.allclose(logits(model, ids, 64, None), whole)  # and back


def test_prompts_share_what_they_begin_with(model):
    rng = np.random.default_rng(1)
    first = rng.integers(0, 64, 128)
    prompts = [np.concatenate((first, rng.integers(0, 64, 20))) for _ in range(2)]
    set_code(model, code("rope"), kv="nf4")
    with torch.inference_mode():
        ask = lambda share: dict(answers(model, prompts, [6, 6], (), 64, share))
        assert ask(True) == ask(False)
        assert all(isinstance(layer, PackedLayer) for layer in new_cache(model).layers)


def test_a_cache_in_4_bits_is_another_setting_and_takes_less(model):
    plain = Setting("m", "rope", code("rope"), None, "float32", "cpu", 64)
    assert plain.record().get("kv", 0) == 0 and plain._replace(kv="nf4").record()["kv"] == "nf4"
    assert plain.decides() != plain._replace(kv="nf4").decides() and "kv" not in paired_fields()
    shape, need = Shape.of(load_large()), {}
    for kv in (None, "nf4"): need[kv] = memory_parts(shape, 10**6, "bfloat16", kv=kv).cache
    assert .28 < need["nf4"]/need[None] < .33


def load_large():
    from pispiral.model.shapes import public_config
    return public_config("codellama-34b")


def test_a_profile_says_who_is_asked_so():
    full = load_profile("full")
    assert full.method("rope_4bit").kv == "nf4" and full.far(["rope", "rope_4bit"], 524288) == ["rope_4bit"]
    assert full.far(["rope_4bit", "window"], 2**20) == ["window"]
    heavy = large_settings(full, "heavy", ["hybrid"])["hybrid"]
    assert (heavy.kv, heavy.window) == ("nf4", None)
    for wrong, said in ((dict(kv="nf5"), "did you mean 'nf4'"), (dict(kv="nf4", window=64), "window=64")):
        with pytest.raises(ValueError, match=said): changed(full, methods=dict(packed=dict(code="rope", **wrong)))
    with pytest.raises(ValueError, match="large.heavy.kv"): changed(full, large=dict(heavy=dict(whole=False)))


def test_needles_that_leave_no_room_for_a_haystack_are_refused():
    from pispiral.model.standins import stand_in
    from pispiral.tasks.registry import make_item
    from transformers import AutoTokenizer
    tok = AutoTokenizer.from_pretrained(stand_in("qwen2.5-1.5b"))
    for n in range(330, 420, 3):
        try: item = make_item(tok, "niah_multikey_2", n, seed=0)
        except ValueError: continue
        assert item.length == n
