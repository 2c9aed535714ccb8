"""The attractor against scipy's filter, torch's associative scan, a plain loop and a copy.

The same filter over 65,536 tokens of 576 channels: `scipy.signal.lfilter` in complex arithmetic (complex64, which is
float32's, and complex128) and a copy of all that goes in and comes out; over 8,192 tokens, the recurrence written
down and torch's associative scan. For decoding, one step at a time, the peer is that loop again.
"""
from functools import partial

import torch
from scipy.signal import lfilter
from timing import side_by_side
from torch._higher_order_ops.associative_scan import associative_scan

from pispiral.codes.phase import phase
from pispiral.memory.attractor import AttractorState, scan
from pispiral.memory.scan import recurrent, unit_vectors


def filter_pole(state):
    "Return the complex number by which the filter multiplies its output at each token: α e^(−2πi·frac(π))."
    return complex(torch.exp(state.log_alpha))*complex(torch.tensor(-2j*torch.pi*float(phase(1, "pi"))).exp())


def associative(x, pole):
    "Return the filter of x [tokens, channels] as a scan of the affine maps y → pole·y + x."
    def combine(first, then): return first[0]*then[0], then[0]*first[1] + then[1]
    return associative_scan(combine, (torch.full_like(x, pole), x), 0, combine_mode="generic")[1]


def loop(h, e, alpha):
    "Return the state after C ← αC + e ⊗ h for each token, as one would write it down."
    state = torch.zeros(h.shape[0], e.shape[2], h.shape[2])
    for t in range(h.shape[1]): state = alpha*state + e[:, t, :, None]*h[:, t, None]
    return state


def chunked_cases(repeats, h, e, state):
    "Time the chunked form over the whole text against scipy's filter and a copy."
    y = scan(h, e, state.log_alpha)[0]
    pole, moved = filter_pole(state), 4*(h.numel() + e.numel() + y.numel())
    def filtered(kind): return partial(lfilter, [1], [1, -pole], h[0].numpy().astype(kind), axis=0)
    peers = dict(lfilter=filtered("complex128"), lfilter_complex64=filtered("complex64"),
                 copy=lambda: (h.clone(), e.clone(), y.clone()))
    for peer, theirs in peers.items():
        yield side_by_side("attractor_chunked", lambda: scan(h, e, state.log_alpha), peer, theirs, repeats,
                           length=h.shape[1], work=dict(bytes=moved))


def short_cases(repeats, h, e, state):
    "Time the chunked form over a text that a Python loop can still read."
    x, pole = h[0].to(torch.complex64), filter_pole(state)
    peers = dict(torch_loop=lambda: loop(h, e, state.alpha), associative_scan=lambda: associative(x, pole))
    for peer, theirs in peers.items():
        yield side_by_side("attractor_chunked", lambda: scan(h, e, state.log_alpha), peer, theirs, repeats,
                           length=h.shape[1])


def attractor_cases(repeats, length=65536, d=576):
    "Yield the rows of the attractor: chunked, and one token at a time."
    torch.manual_seed(0)
    h, e, state = torch.randn(1, length, d), unit_vectors(torch.arange(length)[None]), AttractorState(d, N=length)
    def first(n): return h[:, :n], e[:, :n]
    with torch.inference_mode():
        yield from chunked_cases(repeats, h, e, state)
        yield from short_cases(min(repeats, 3), *first(8192), state)
        few, few_codes = first(512)
        yield side_by_side("attractor_recurrent", lambda: recurrent(few, few_codes, state.log_alpha), "torch_loop",
                           lambda: loop(few, few_codes, state.alpha), repeats, length=few.shape[1])
