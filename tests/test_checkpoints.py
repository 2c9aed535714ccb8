"`load_model(pos='rope')` of any checkpoint is what plain transformers computes for it, or is refused by name."
import random

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedTokenizerFast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from pispiral import load_model
from pispiral.codes.registry import CODES, code_with
from pispiral.evidence import evaluate
from pispiral.evidence.evaluate import ask_prompts
from pispiral.evidence.streams import described
from pispiral.memory.keyed_config import KeyedConfig
from pispiral.model.cache import new_cache
from pispiral.model.decode import answers
from pispiral.model.load import set_code, set_memory

ORIGINAL, LENGTH, VOCAB = 64, 150, 61
TYPES = ("default", *ROPE_INIT_FUNCTIONS)


def rope_of(kind, half, partial, rng):
    "Rope parameters of a type for `half` pairs, some of them drawn."
    more = dict(linear=dict(factor=4.), dynamic=dict(factor=4.), proportional=dict(factor=rng.choice((1., 4.))),
                yarn=dict(factor=4., original_max_position_embeddings=ORIGINAL,
                          **rng.choice(({}, dict(attention_factor=1.3), dict(beta_fast=8., truncate=False)))),
                longrope=dict(factor=4., short_factor=[1.]*half, long_factor=[1. + 3*i/half for i in range(half)],
                              original_max_position_embeddings=ORIGINAL),
                llama3=dict(factor=4., low_freq_factor=1., high_freq_factor=4.,
                            original_max_position_embeddings=ORIGINAL))
    part = dict(partial_rotary_factor=partial) if partial else {}
    return dict(rope_type=kind, rope_theta=rng.choice((1e3, 1e4)), **more.get(kind, {}), **part)


def config_of(seed, kind):
    "One of ten random configs with a rope type, and what a refusal must name."
    rng = random.Random(seed)
    family, more, partial = [("llama", {}, None), ("llama", dict(head_dim=32), None), # Gemma's heads are wider than d/H
                             ("llama", {}, .5), ("qwen2", {}, None),
                             ("qwen2", dict(use_sliding_window=True, sliding_window=24, max_window_layers=1), None),
                             ("mistral", dict(sliding_window=24), None), ("mistral", dict(sliding_window=None), None),
                             ("qwen3", dict(head_dim=24, use_sliding_window=True, sliding_window=40, layer_types=[
                                 "sliding_attention", "full_attention", "sliding_attention"]), None),
                             ("phi3", dict(pad_token_id=0), rng.choice((.5, 1.))),
                             ("gpt_neox", {}, .25)][seed]
    heads = rng.choice((2, 4))
    width = 16*heads
    half = int((more.get("head_dim") or 16)*(partial or 1))//2
    grown = ORIGINAL*4 if kind in ("yarn", "longrope", "llama3") else ORIGINAL
    rope = rope_of(kind, half, partial, rng)
    said = family if family in ("phi3", "gpt_neox") else f"rope_type={kind!r}"
    return AutoConfig.for_model(
        family, vocab_size=VOCAB, hidden_size=width, intermediate_size=2*width, num_hidden_layers=3,
        num_attention_heads=heads, max_position_embeddings=grown, rope_parameters=rope, initializer_range=.1,
        **({} if family == "gpt_neox" else dict(num_key_value_heads=rng.choice((1, heads)))), **more), said


def saved(config, folder):
    "A folder with random weights of a config and a tokenizer, and the plain model."
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({str(i): i for i in range(VOCAB)}, unk_token="0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0").save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def ours(folder, **kw):
    return load_model(str(folder), **{"pos": "rope", "dtype": "float32", "device": "cpu", **kw})[0]


IDS = torch.randint(1, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(1))


def in_chunks(model, size, make=DynamicCache):
    cache = make()
    return torch.cat([model(part, past_key_values=cache).logits for part in IDS.split(size, 1)], 1)


def padded(model, pads=11):
    keep = torch.ones_like(IDS)
    keep[0, :pads] = 0
    logits = model(IDS, attention_mask=keep, position_ids=(keep.cumsum(1) - 1).clamp_min(0)).logits
    return torch.cat((logits[0, pads:], logits[1]))


def packed(model):
    places = torch.cat([torch.arange(n) for n in (40, 1, LENGTH - 41)])
    return model(IDS, position_ids=torch.stack((places, torch.arange(LENGTH))), use_cache=False).logits


def masked(model):
    see = torch.ones(LENGTH, LENGTH).tril().bool()
    see[90:, :70] = False
    return model(IDS, attention_mask=see.expand(2, 1, -1, -1)).logits


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("seed", range(10))
def test_rope_is_plain_transformers_or_refused(tmp_path, seed, kind):
    try:
        config, said = config_of(seed, kind)
        plain = saved(config, tmp_path)
    except Exception as e: pytest.skip(f"plain transformers cannot have it: {e}")
    try: model = ours(tmp_path)
    except ValueError as e:
        assert said in str(e) and "\n" not in str(e)
        assert kind in ("dynamic", "longrope") or seed in (2, 8, 9) # what can be had is not refused
        return
    with torch.inference_mode():
        want, near = plain(IDS).logits, dict(atol=1e-5, rtol=0)
        torch.testing.assert_close(model(IDS).logits, want, **near)
        torch.testing.assert_close(in_chunks(model, 37), want, **near)
        torch.testing.assert_close(in_chunks(model, 13, lambda: new_cache(model)), want, **near)
        for way in (padded, packed, masked): torch.testing.assert_close(way(model), way(plain), **near)


SIZES = {torch.float32: 1e-5, torch.bfloat16: None, torch.float16: None}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", SIZES, ids=str)
@pytest.mark.parametrize("kind", TYPES)
def test_rope_is_plain_at_every_length_in_every_dtype(tmp_path, kind, dtype):
    "Within the original length, at its end, and beyond it; a half dtype is as near to fp32 as plain transformers is."
    exact = saved(config_of(0, kind)[0], tmp_path)
    try: model = ours(tmp_path, dtype=str(dtype)[6:])
    except ValueError as e:
        assert kind in ("dynamic", "longrope") and f"rope_type={kind!r}" in str(e) and "keys in a cache" in str(e)
        return
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    for length in (1, ORIGINAL - 7, ORIGINAL, ORIGINAL + 1, LENGTH):
        with torch.inference_mode(): got, same, want = (m(IDS[:, :length]).logits for m in (model, plain, exact))
        away = 1e-5 if SIZES[dtype] else 1.5*float((same - want).abs().max()) + 1e-5
        assert float((got - want).abs().max()) <= away


def with_rope(folder, target, **rope):
    "The plain model of a folder with other rope parameters, at a length that it is to reach."
    config = AutoConfig.from_pretrained(folder)
    config.rope_parameters = {"rope_theta": config.rope_parameters["rope_theta"], **rope}
    config.max_position_embeddings = target
    return AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32).eval()


LISTS = dict(short_factor=[1. + i/9 for i in range(8)], long_factor=[1. + i for i in range(8)])
RIVALS = dict(linear=dict(), yarn=dict(), llama3=dict(low_freq_factor=1., high_freq_factor=4.), longrope=LISTS)


@pytest.mark.parametrize("target", [ORIGINAL - 4, 4*ORIGINAL])
@pytest.mark.parametrize("kind", RIVALS)
def test_a_stretch_is_transformers_own_however_it_is_read(tmp_path, kind, target):
    saved(config_of(0, "default")[0], tmp_path)
    there = {} if kind == "linear" else dict(original_max_position_embeddings=ORIGINAL)
    plain = with_rope(tmp_path, target, rope_type=kind, factor=max(target/ORIGINAL, 1.), **RIVALS[kind], **there)
    model = ours(tmp_path, pos=kind, target_length=target, **RIVALS[kind])
    ids = IDS[:, :min(target, LENGTH)]
    with torch.inference_mode():
        want, cache = plain(ids).logits, new_cache(model)
        in_parts = torch.cat([model(part, past_key_values=cache).logits for part in ids.split(17, 1)], 1)
        for got in (model(ids).logits, in_parts): torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


def test_longrope_keeps_what_a_model_came_with(tmp_path):
    plain = saved(config_of(0, "longrope")[0], tmp_path)
    for length, target in ((ORIGINAL, ORIGINAL), (LENGTH, 4*ORIGINAL)): # one list each, by the length to be reached
        with torch.inference_mode(): want = plain(IDS[:, :length]).logits
        model = ours(tmp_path, pos="longrope", own=True, target_length=target)
        with torch.inference_mode():
            torch.testing.assert_close(model(IDS[:, :length]).logits, want, atol=1e-5, rtol=0)
            if length == LENGTH: torch.testing.assert_close(in_chunks(model, 13), want, atol=1e-5, rtol=0)


def test_dynamic_ntk_is_rope_up_to_the_native_length_bit_for_bit(tmp_path):
    saved(config_of(0, "default")[0], tmp_path)
    rope, dynamic = (ours(tmp_path, pos=pos) for pos in ("rope", "dynamic_ntk"))
    with torch.inference_mode():
        assert torch.equal(rope(IDS[:, :ORIGINAL]).logits, dynamic(IDS[:, :ORIGINAL]).logits)
        assert not torch.equal(rope(IDS).logits, dynamic(IDS).logits)


def tiny(folder, kind="default", seed=5):
    "A Mistral with a window of 24 unless another config is asked for."
    return saved(config_of(seed, kind)[0], folder)


@pytest.mark.parametrize("kind", [None, "static", "hybrid"])
@pytest.mark.parametrize("seed", [0, 4, 5, 7])
def test_generate_has_plain_tokens_with_any_cache(tmp_path, seed, kind):
    plain, how = tiny(tmp_path, seed=seed), dict(do_sample=False, max_new_tokens=40, eos_token_id=None, pad_token_id=0)
    keep = torch.ones_like(IDS)
    keep[0, :9] = 0
    got = ours(tmp_path).generate(IDS, attention_mask=keep, cache_implementation=kind, **how)
    assert torch.equal(got, plain.generate(IDS, attention_mask=keep, **how))


def test_a_models_own_window_is_no_setting(tmp_path):
    tiny(tmp_path)
    model = ours(tmp_path)
    assert described(model, {}, 32)["window"] is None
    assert described(set_code(model, code_with("rope"), 20), {}, 32)["window"] == 20


@pytest.mark.parametrize("how", [dict(num_beams=3), dict(num_beams=3, cache_implementation="static"),
                                 dict(prompt_lookup_num_tokens=3)])
def test_beams_and_guesses_of_a_window(tmp_path, how):
    tiny(tmp_path, seed=0)
    how |= dict(do_sample=False, max_new_tokens=40, eos_token_id=None, pad_token_id=0)
    for kw in (dict(window=24), dict(window=24, sinks=2)):
        model = ours(tmp_path, **kw)
        without = model.generate(IDS[:1], **{**how, "use_cache": False, "cache_implementation": None} if
                                 "num_beams" in how else dict(how, prompt_lookup_num_tokens=None))
        assert torch.equal(model.generate(IDS[:1], **how), without)
        if "cache_implementation" in how: continue
        assert torch.equal(model.generate(IDS[:1], past_key_values=new_cache(model), **how), without)


@pytest.mark.parametrize("kind", ["yarn", "llama3", "longrope", "linear", "dynamic"])
def test_a_stretch_replaces_a_stretch(tmp_path, kind):
    tiny(tmp_path/"plain", seed=6)
    tiny(tmp_path/"came", kind, seed=6)
    config = AutoConfig.from_pretrained(tmp_path/"came")
    config.rope_parameters["rope_theta"] = AutoConfig.from_pretrained(tmp_path/"plain").rope_parameters["rope_theta"]
    config.save_pretrained(tmp_path/"came")
    stretching = [p for p in CODES if "factor" in CODES[p].params.model_fields]
    for pos in [p for p in stretching if kind not in ("dynamic", "longrope") or p != "hybrid"]:
        how = code_with(pos, target_length=512, hybrid_K=16).params.model_dump()
        mine, want = (ours(tmp_path/name, pos=pos, **how).model.rotary_emb for name in ("came", "plain"))
        assert pos == "hybrid" or torch.equal(mine.words_at(300), want.words_at(300))
        assert pos == "hybrid" or mine.attention_scaling == want.attention_scaling
        assert (mine.wanted, mine.harmonics) == (want.wanted, want.harmonics)


def broken(model, layer, after):
    "Let a layer give NaN from its n-th pass on."
    passes = []
    def overflow(module, args, out):
        passes.append(1)
        return out*float("nan") if len(passes) > after else None
    return model.model.layers[layer].mlp.register_forward_hook(overflow)


@pytest.mark.parametrize("after", [0, 2, 4, 6])
def test_nan_is_a_failed_item_with_layer_and_dtype(tmp_path, after):
    tiny(tmp_path, seed=0)
    model = ours(tmp_path)
    for span in (dict(), dict(window=24, sinks=2)):
        set_code(model, code_with("rope"), **span)
        hook = broken(model, 1, after)
        prompts = [IDS[0, :90].numpy(), IDS[1, :90].numpy()]
        with torch.inference_mode(): told = list(ask_prompts(model, prompts, [9, 9], (), 32, True, None))
        hook.remove()
        assert sum(out is None for _, out, _, _ in told) >= 1
        for _, out, _, why in told:
            assert (out is None) == (why is not None)
            assert why is None or why.startswith("failed: logits are not finite after")
            assert why is None or why.endswith("first in layer 1, in float32")


def test_nan_after_memory_ran_out_is_a_failed_item(monkeypatch):
    def overflow(*args): raise FloatingPointError("logits are not finite after 9 tokens: first in layer 1, in float16")
    monkeypatch.setattr(evaluate, "answers", overflow)
    assert evaluate.ask_in_half_chunks(None, [1], 9, (), 512)[::2] == (
        None, "failed: logits are not finite after 9 tokens: first in layer 1, in float16")


def test_nan_under_a_memory_is_a_failed_item(tmp_path):
    tiny(tmp_path, seed=0)
    model = set_memory(ours(tmp_path), KeyedConfig(layers=(2,)))
    hook = broken(model, 0, 3)
    with torch.inference_mode(), pytest.raises(FloatingPointError, match="first in layer 0, in float32"):
        list(answers(model, [IDS[0, :90].numpy()], [9], chunk=32))
    hook.remove()


def test_what_has_one_text_refuses_several(tmp_path):
    tiny(tmp_path, seed=0)
    model, places = ours(tmp_path), torch.cat((torch.arange(70), torch.arange(80)))[None]
    cache = new_cache(model)
    with torch.inference_mode():
        model(IDS[:, :70], position_ids=places[:, :70], past_key_values=cache)
        with pytest.raises(ValueError, match="position_ids go back while the cache holds 70 tokens"):
            model(IDS[:, 70:], position_ids=places[:, 70:], past_key_values=cache)
        set_memory(model, KeyedConfig(layers=(1,)))
        with pytest.raises(ValueError, match="would share one memory"): model(IDS, position_ids=places)
        assert model(IDS, position_ids=places.sort().values*2 + torch.arange(LENGTH)).logits.isfinite().all()
