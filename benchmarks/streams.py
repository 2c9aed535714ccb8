"""Reading real text behind a window, against transformers' own sliding-window model.

The same weights, window, chunks and tokens. The logits after the last token must agree before any time counts. Once the
window is full the speed no longer depends on the length, so `stream_256k` reads a part of its text, and states which.
"""
import torch
from timing import side_by_side
from transformers import AutoConfig, MistralConfig, MistralForCausalLM
from transformers.cache_utils import DynamicCache

from pispiral.evidence.profiling import Shape, reading_work
from pispiral.evidence.streams import stream_ids
from pispiral.model.load import load_model
from pispiral.model.cache import new_cache
from pispiral.model.prefill import prefill
from pispiral.tasks.assets import model_folder

# (tokens read, tokens of the text)
STREAMS = dict(stream_1k=(1024, 1024), stream_4k=(4096, 4096), stream_256k=(8192, 262_144))


def sliding_model(model, window):
    "Return transformers' sliding-window model with a Llama model's weights."
    config = AutoConfig.from_pretrained(model_folder()).to_dict()
    keep = {k: v for k, v in config.items() if k not in ("model_type", "architectures", "layer_types")}
    peer = MistralForCausalLM(MistralConfig(**keep, sliding_window=window)).to(model.dtype).eval()
    peer.load_state_dict(model.state_dict())
    return peer


def sliding_prefill(peer, ids, chunk):
    "Read ids chunk by chunk with transformers' sliding-window cache; the logits after the last."
    cache = DynamicCache(config=peer.config)
    for part in ids[None].split(chunk, 1):
        out = peer(part, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    return out[0, -1].float()


def check_logits(window, ids, chunk, allowed=1e-4):
    "RuntimeError unless both read the same logits in float32, where rounding hides no difference."
    model, _ = load_model(window=window, dtype="float32")
    theirs = sliding_prefill(sliding_model(model, window), ids, chunk)
    off = float((prefill(model, ids, new_cache(model, chunk=chunk), chunk) - theirs).norm()/theirs.norm())
    if off > allowed:
        raise RuntimeError(f"the windowed stream's logits are off transformers' by {off:.1e}, allowed {allowed:g}")


def stream_cases(repeats, window=1024, streams=STREAMS, chunk=512, dtype="auto"):
    "Yield a row a stream."
    model, tok = load_model(window=window, dtype=dtype)
    text = torch.from_numpy(stream_ids(tok, max(n for n, _ in streams.values()))[0]).long()
    with torch.inference_mode(): check_logits(window, text[:4*window], chunk)
    peer, shape = sliding_model(model, window), Shape.of(model.config)
    for case, (n, of) in streams.items():
        ids = text[:n]
        with torch.inference_mode():
            row = side_by_side(case, lambda: prefill(model, ids, new_cache(model, chunk=chunk), chunk),
                               "transformers", lambda: sliding_prefill(peer, ids, chunk), min(repeats, 3),
                               length=n, of=of, window=window, work=dict(flops=sum(reading_work(shape, 0, n, window))))
        yield {**row, "tokens_per_second": round(n/row["ours"]), "their_tokens_per_second": round(n/row["theirs"])}
