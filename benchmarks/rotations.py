"""Tables of cosines and sines against transformers' rotary embedding, on the same shapes.

transformers multiplies in fp32, which is off by whole turns at a million tokens, and does so for every pass; ours are
exact, and the first positions' tables are kept. The rows named `_first` have nothing kept and compare the making, which
happens once in a process.
"""
from functools import partial

import torch
from timing import side_by_side
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from pispiral.codes.registry import code, make_code
from pispiral.codes.tables import KEPT

CODES = ("rope", "hybrid", "yarn", "rope_ntk", "pi_spiral")


def code_rows(name, config, n, repeats):
    "Yield the rows of one code at n positions."
    ours, peer = make_code(code(name), config), LlamaRotaryEmbedding(config)
    x, positions = torch.zeros(1), torch.arange(n)[None]
    made = dict(work=dict(bytes=2*4*64*n))  # the two tables, written
    def first():
        ours.kept.clear()
        return ours(x, positions)
    timed = partial(side_by_side, peer="transformers", theirs=lambda: peer(x, positions), repeats=repeats, length=n)
    yield timed(f"rotation_{name}", lambda: ours(x, positions), **(made if n > KEPT else {}))
    if n <= KEPT: yield timed(f"rotation_{name}_first", first, **made)


def rotation_cases(repeats, lengths=(1024, 16384, 131072)):
    "Yield each code's rows at each length."
    config = LlamaConfig(head_dim=64, max_position_embeddings=8192)
    with torch.inference_mode():
        for name in CODES:
            for n in lengths: yield from code_rows(name, config, n, repeats)
