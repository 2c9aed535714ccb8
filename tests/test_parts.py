"Self-Extend and DCA on models of four layers, against dense attention written down from the papers."
import math

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, rotate_half

from pispiral.codes.registry import code, make_code
from pispiral.memory.attach import attach
from pispiral.memory.config import AttractorConfig
from pispiral.model.attention import install_attention
from pispiral.model.cache import new_cache
from pispiral.model.decode import answers

LENGTH, VOCAB = 150, 61
SHAPE = dict(vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=64, initializer_range=.1)
IDS = torch.randint(1, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(1))
NEAR = dict(atol=1e-5, rtol=0)
CODES = {"self_extend": dict(pos="self_extend", neighbour_window=24, group_size=5),
         "self_extend-small": dict(pos="self_extend", neighbour_window=3, group_size=7),
         "dca": dict(pos="dca", chunk_size=40, local_window=16),
         "dca-small": dict(pos="dca", chunk_size=7, local_window=3),
         "defaults-self_extend": dict(pos="self_extend", target_length=200), "defaults-dca": dict(pos="dca"),
         "log_n": dict(pos="self_extend", neighbour_window=24, group_size=5, logit="log_n", logit_from=30),
         "root": dict(pos="dca", chunk_size=40, logit_from=30)}
every = pytest.mark.parametrize("kw", CODES.values(), ids=CODES)
two = pytest.mark.parametrize("kw", [CODES["self_extend"], CODES["dca"]], ids=["self_extend", "dca"])


def plain(kind="llama"):
    torch.manual_seed(0)
    cls, cfg = {"llama": (LlamaForCausalLM, LlamaConfig), "qwen2": (Qwen2ForCausalLM, Qwen2Config)}[kind]
    return cls(cfg(**SHAPE)).eval()


def ours(kw, kind="llama", **more):
    model = plain(kind)
    return install_attention(model, make_code(code(**kw), model.config), **more)


def rotated(x, position, config):
    "[H, n, D] heads as transformers rotates them."
    cos, sin = LlamaRotaryEmbedding(config)(x[None], position[None])
    return x*cos + rotate_half(x)*sin


def self_extend(q, k, W, G, config):
    "Logits [H, n, n] of the paper's algorithm 1: the scores of neighbours, those of groups, and a mask that chooses."
    p = torch.arange(q.shape[1])
    neighbours = rotated(q, p, config) @ rotated(k, p, config).mT
    grouped = rotated(q, p//G + W - W//G, config) @ rotated(k, p//G, config).mT
    return torch.where(p[:, None] - p < W, neighbours, grouped)


def dca(q, k, s, w, config):
    "Logits [H, n, n] of the paper's section 3: intra-, successive- and inter-chunk positions."
    p = torch.arange(q.shape[1])
    k = rotated(k, p % s, config)
    intra = rotated(q, p % s, config) @ k.mT
    successive = rotated(q, torch.where(p % s < w, s + p % s, s + w - 1), config) @ k.mT
    inter = rotated(q, torch.full_like(p, s + w - 1), config) @ k.mT
    apart = p[:, None]//s - p//s
    return torch.where(apart == 0, intra, torch.where(apart == 1, successive, inter))


def grown(q, k, params):
    "Queries times ln n/ln K, or queries and keys times √(1 + c·ln(n/K)), beyond K."
    if (K := params.logit_from) is None: return q, k
    over = (torch.arange(q.shape[1])[:, None]/K).clamp(min=1).log()
    if params.logit == "log_n": return q*(1 + over/math.log(K)), k
    return [t*(1 + params.logit_scale*over).sqrt() for t in (q, k)]


def dense(model, ids, kw):
    "Logits [n, vocabulary] of one text, each attention weight by itself, without a cache."
    config, made = model.config, make_code(code(**kw), model.config)
    logits = (lambda q, k: self_extend(q, k, made.W, made.G, config)) if kw["pos"] == "self_extend" else \
             (lambda q, k: dca(q, k, made.s, made.w, config))
    h = model.model.embed_tokens(ids)
    for layer in model.model.layers:
        x, at = layer.input_layernorm(h), layer.self_attn
        q, k, v = (f(x).view(len(ids), -1, at.head_dim).transpose(0, 1) for f in (at.q_proj, at.k_proj, at.v_proj))
        k, v = (t.repeat_interleave(len(q)//len(t), 0) for t in (k, v))
        q, k = grown(q, k, made.code.params)
        weights = (logits(q, k)*at.scaling).masked_fill(torch.ones(len(ids), len(ids)).triu(1).bool(), float("-inf"))
        h = h + at.o_proj((weights.softmax(-1) @ v).transpose(0, 1).flatten(1))
        h = h + layer.mlp(layer.post_attention_layernorm(h))
    return model.lm_head(model.model.norm(h))


def in_parts(model, ids, sizes, cache):
    return torch.cat([model(part, past_key_values=cache).logits for part in ids.split(sizes, 1)], 1)


def left_padded(ids, pads):
    keep = torch.ones_like(ids)
    keep[0, :pads] = 0
    return dict(input_ids=ids, attention_mask=keep, position_ids=(keep.cumsum(1) - 1).clamp_min(0))


@pytest.mark.parametrize("kw, kind", [*((kw, "llama") for kw in CODES.values()), (CODES["self_extend"], "qwen2"),
                                      (CODES["dca"], "qwen2")])
def test_dense_reference_at_every_position(kw, kind):
    model = ours(kw, kind)
    with torch.inference_mode():
        want = torch.stack([dense(model, row, kw) for row in IDS])
        torch.testing.assert_close(model(IDS).logits, want, **NEAR)
        torch.testing.assert_close(in_parts(model, IDS, 37, DynamicCache()), want, **NEAR)
        torch.testing.assert_close(in_parts(model, IDS, [130] + [1]*20, new_cache(model)), want, **NEAR)
        out = model(**left_padded(IDS, 11)).logits
        torch.testing.assert_close(out[0, 11:], dense(model, IDS[0, 11:], kw), **NEAR)
        torch.testing.assert_close(out[1], want[1], **NEAR)
        packed = torch.cat([torch.arange(n) for n in (60, 1, LENGTH - 61)])
        out = model(IDS, position_ids=torch.stack((packed, torch.arange(LENGTH))), use_cache=False).logits
        for a, b in ((0, 60), (60, 61), (61, LENGTH)):
            torch.testing.assert_close(out[0, a:b], dense(model, IDS[0, a:b], kw), **NEAR)
    torch.testing.assert_close(model(IDS).logits, want, **NEAR) # with a gradient


@every
def test_rope_bit_for_bit_within_the_first_part(kw):
    model = ours(kw)
    n = model.model.rotary_emb.whole
    rope = ours(dict(pos="rope", **{k: v for k, v in kw.items() if k.startswith("logit")}))
    ids, keep = IDS[:, :n], torch.ones(2, n, dtype=torch.long)
    keep[0, :n//3] = 0
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, rope(ids).logits)
        for make in (DynamicCache, None):
            caches = [make() if make else new_cache(m, room=n) for m in (model, rope)]
            assert torch.equal(*(in_parts(m, ids, max(n//3, 1), c) for m, c in zip((model, rope), caches)))
        assert torch.equal(*(m(ids, attention_mask=keep).logits for m in (model, rope)))
        assert not torch.allclose(model(IDS).logits[:, -1], rope(IDS).logits[:, -1], **NEAR)
    assert torch.equal(model(ids).logits, rope(ids).logits)


@two
def test_padding_in_a_cache_and_beams(kw):
    model = ours(kw)
    how = dict(do_sample=False, max_new_tokens=12, eos_token_id=None, pad_token_id=0)
    ids = IDS[:, :60]
    keep = torch.ones_like(ids)
    keep[0, :9] = 0
    got = model.generate(ids, attention_mask=keep, **how)
    for b, pads in enumerate((9, 0)):
        alone = model.generate(ids[b:b+1, pads:], **how)
        assert torch.equal(got[b, pads:], alone[0])
        so_far = alone[:, :-1] # and every token is the dense reference's
        assert torch.equal(dense(model, so_far[0], kw)[59 - pads:].argmax(-1), alone[0, 60 - pads:])
    for more in (dict(num_beams=3), dict(num_beams=2, cache_implementation="static"), dict(prompt_lookup_num_tokens=3)):
        want = model.generate(ids[1:], **{**how, **more, "use_cache": "prompt_lookup_num_tokens" in more,
                                          "cache_implementation": None})
        assert torch.equal(model.generate(ids[1:], **how, **more), want)
        if "cache_implementation" not in more:
            assert torch.equal(model.generate(ids[1:], past_key_values=new_cache(model), **how, **more), want)


@two
def test_prompts_that_share_a_beginning(kw):
    model = ours(kw)
    rng = torch.Generator().manual_seed(2)
    tails = [torch.randint(1, VOCAB, (n,), generator=rng) for n in (50, 7, 90, 33)]
    prompts = [torch.cat((IDS[0, :80], t)).numpy() for t in tails]
    with torch.inference_mode():
        shared = dict(answers(model, prompts, [12]*4, chunk=16))
        alone = {i: dict(answers(model, [p], [12], chunk=300))[0] for i, p in enumerate(prompts)}
    assert shared == alone
    for i, p in enumerate(prompts):
        whole = torch.cat((torch.from_numpy(p), torch.tensor(alone[i])))
        assert dense(model, whole[:-1], kw)[len(p) - 1:].argmax(-1).tolist() == alone[i]


@two
def test_a_memory_reads_beside_them(kw):
    model = attach(ours(kw), AttractorConfig(inject_layers=2))
    with torch.inference_mode():
        want = torch.stack([dense(model, row, kw) for row in IDS]) # untrained, it adds nothing
        torch.testing.assert_close(in_parts(model, IDS, 37, new_cache(model)), want, **NEAR)


@two
def test_a_hole_in_the_padding_counts_no_tokens(kw):
    model, keep = ours(kw), torch.ones(1, LENGTH, dtype=torch.long)
    keep[0, 50:63] = 0
    places, cache = (keep.cumsum(1) - 1).clamp_min(0), new_cache(model)
    with torch.inference_mode():
        want = dense(model, IDS[0][keep[0].bool()], kw)
        out = model(IDS[:1], attention_mask=keep, position_ids=places).logits
        torch.testing.assert_close(out[0][keep[0].bool()], want, **NEAR)
        parts = [model(IDS[:1, a:b], attention_mask=keep[:, :b], position_ids=places[:, a:b],
                       past_key_values=cache).logits for a, b in ((0, 40), (40, 70), (70, LENGTH))]
        torch.testing.assert_close(torch.cat(parts, 1)[0][keep[0].bool()], want, **NEAR)


@two
def test_what_cannot_be_had_is_refused_in_one_line(kw):
    model, many = ours(kw), torch.ones(1, 1, LENGTH, LENGTH).tril().bool()
    jump = torch.cat((torch.arange(30), torch.arange(40, 160)))[None]
    cache = DynamicCache()
    with torch.no_grad(): model(IDS[:1, :30], past_key_values=cache)
    for said, ask in (("window=16 hides keys that", lambda: ours(kw, window=16)),
                      (f"attn_backend='flex' cannot compute {kw['pos']}: allowed: auto, sdpa",
                       lambda: ours(kw, backend="flex")),
                      (f"attn_backend='flash2' cannot compute {kw['pos']}", lambda: ours(kw, backend="flash2")),
                      ("says itself which keys are seen", lambda: model(IDS[:1], attention_mask=many)),
                      ("output_attentions=True is not to be had", lambda: model(IDS[:1], output_attentions=True)),
                      ("counts tokens", lambda: model(IDS[:1], position_ids=jump)),
                      ("counts tokens",
                       lambda: model(IDS[:1, :9], position_ids=jump[:, 60:69], past_key_values=cache))):
        with pytest.raises(ValueError) as e: ask()
        assert said in str(e.value) and kw["pos"] in str(e.value) and "\n" not in str(e.value)


def test_other_codes_get_their_backend_back():
    model = ours(dict(pos="rope"), backend="flex")
    made = [make_code(code(p), model.config) for p in ("self_extend", "rope")]
    assert [install_attention(model, m).model.layers[0].self_attn.backend for m in made] == ["sdpa", "flex"]


def test_dynamic_ntk_keeps_its_cache_right():
    model, rng = ours(dict(pos="dynamic_ntk", target_length=512)), torch.Generator().manual_seed(3)
    start = torch.randint(1, VOCAB, (250,), generator=rng) # the base changes after 256 tokens
    prompts = [torch.cat((start, torch.randint(1, VOCAB, (n,), generator=rng))).numpy() for n in (40, 3, 21)]
    with torch.inference_mode():
        shared = dict(answers(model, prompts, [9]*3, chunk=16))
        assert shared == {i: dict(answers(model, [p], [9], chunk=400))[0] for i, p in enumerate(prompts)}
    how = dict(do_sample=False, max_new_tokens=9, eos_token_id=None, pad_token_id=0, num_beams=2)
    ids = torch.from_numpy(prompts[1])[None]
    want = model.generate(ids, use_cache=False, **how)
    assert torch.equal(model.generate(ids, **how), want)
    assert torch.equal(model.generate(ids, past_key_values=new_cache(model), **how), want)
    keep = torch.ones(2, 300, dtype=torch.long)
    other = torch.randint(1, VOCAB, (300,), generator=rng)
    both = torch.stack([torch.nn.functional.pad(ids[0], (300 - len(ids[0]), 0)), other])
    keep[0, :300 - len(ids[0])] = 0
    got = model.generate(both, attention_mask=keep, **{**how, "num_beams": 1})
    assert torch.equal(got[0, 300 - len(ids[0]):], model.generate(ids, **{**how, "num_beams": 1})[0])
