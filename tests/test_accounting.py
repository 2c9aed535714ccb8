"What a profile's cells are said to need, beside what accelerate and torch count on models without weights."
import weakref
from unittest.mock import patch

import pytest
import torch
from accelerate.utils import CustomDtype, compute_module_sizes
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pispiral.evidence.ram import memory_parts
from pispiral.lab.profiles import load_profile
from pispiral.lab.true_scale import empty_model, model_name, true_shape, wanted_cells
from pispiral.model import attention
from pispiral.model.attention import install_attention
from pispiral.model.cache import new_cache
from pispiral.codes.registry import code, make_code

ASKED = (torch.ops.aten.item.default, torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)
NEAR = .15  # of what is counted


class Live(TorchDispatchMode):
    "The bytes of tensors on the meta device that are alive, and the most that ever were."
    def __init__(self):
        super().__init__()
        self.held, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in ASKED: return 0  # whether something is amiss: nothing is
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.device.type == "meta": self.note(t.untyped_storage())
        return out

    def note(self, storage):
        if storage._cdata in self.held: return
        self.held[storage._cdata] = storage.nbytes()
        weakref.finalize(storage, self.held.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.held.values()))


def attended(query, key, value, *args, **kwargs):
    "What a fused kernel of a card leaves: no scores, only what is asked for."
    return torch.empty_like(query)


def counted_text(name, dtype, length, chunk, window, sinks):
    "The most bytes beside the weights while the last chunk of a text is read, as torch counts them."
    model = empty_model(name, dtype)
    install_attention(model, make_code(code("rope"), model.config), window, sinks, "sdpa")
    heads, dim, live = model.config.num_key_value_heads, model.model.layers[0].self_attn.head_dim, Live()
    nothing = lambda *args, **kwargs: None
    known = dict(check_goes_on=nothing, text_starts=nothing, causal_lower_right=nothing)  # nothing is amiss
    with torch.inference_mode(), live, patch.multiple(attention, **known), \
            patch("torch.nn.functional.scaled_dot_product_attention", attended):
        cache, before = new_cache(model, length, chunk), max(0, length - chunk)
        while before > cache.get_seq_length():
            n = min(chunk if window else before, before - cache.get_seq_length())
            for i in range(len(cache.layers)):
                k = torch.empty(1, heads, n, dim, dtype=model.dtype, device="meta")
                cache.update(k, k, i)
                del k
        live.peak = sum(live.held.values())
        ids = torch.zeros(1, min(chunk, length), dtype=torch.int64, device="meta")
        model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return live.peak


def counted_weights(name, dtype, quantize):
    "The bytes of all weights, as accelerate counts them."
    model = empty_model(name, dtype)
    if not quantize: return compute_module_sizes(model)[""]
    around = {n: model.dtype for n, p in model.named_parameters() if ".layers." not in n or p.dim() < 2}
    return compute_module_sizes(model, dtype=CustomDtype.INT4, special_dtypes=around)[""]


def cells_of(p):
    "The profile's cells, each kind once; those of windows read a few chunks."
    for which, dtype in (("small", p.dtype), ("medium", p.large.medium.dtype), ("heavy", p.large.heavy.dtype)):
        dtype = "bfloat16" if dtype in (None, "auto") else dtype
        found = {(c.length, c.window, c.sinks) for c in wanted_cells(p) if c.which == which and c.copies == 1
                 and not (c.kv or c.losses or c.memory)}
        for length, window, sinks in sorted(found, key=str):
            yield which, dtype, min(length, window + 12*p.chunk) if window else length, window, sinks


def off_by(p, cells):
    "How far predictions are from what is counted, where they are further than allowed."
    off = {}
    for which, dtype, length, window, sinks in cells:
        model, quantize = model_name(p, which), getattr(getattr(p.large, which, None), "quantize", None)
        m = memory_parts(true_shape(model), length, dtype, p.chunk, window, sinks, quantize)
        counted = counted_weights(model, dtype, quantize) + counted_text(model, dtype, length, p.chunk, window, sinks)
        off[which, length, window, sinks] = m.total/counted - 1
    return {cell: f"{share:+.1%}" for cell, share in off.items() if not -NEAR <= share <= NEAR}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kaggle", "full"])
def test_memory_of_every_cell_is_predicted_as_accelerate_and_torch_count_it(name):
    p = load_profile(name)
    cells = list(dict.fromkeys(cells_of(p)))
    assert len(cells) > 20 and not off_by(p, cells)


def test_memory_is_predicted_as_accelerate_and_torch_count_it():
    p = load_profile("full")
    mine = [c for c in dict.fromkeys(cells_of(p)) if c[0] == "small"]
    ends = {(window is None, sinks): (which, dtype, length, window, sinks) for which, dtype, length, window, sinks in
            sorted(mine, key=lambda c: c[2])}  # the longest of each kind
    assert len(ends) > 1 and not off_by(p, ends.values())


def test_rows_of_queries_see_the_sinks_as_all_at_once_do():
    B, H, L, N, S, D, window = 1, 4, 300, 420, 4, 16, 121
    make = lambda *shape, seed: torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    query, key, value = make(B, H, L, D, seed=0), make(B, 2, N, D, seed=1), make(B, 2, N, D, seed=2)
    scores, sink_value = make(B, H, L, S, seed=3), make(B, 2, S, D, seed=4)
    see = attention.visible(L, N, window, None, "cpu")
    both = [f(query, key, value, see, None, scores, sink_value)
            for f in (attention.attend_with_sinks, attention.attend_by_rows)]
    assert torch.allclose(*both, atol=1e-5)
