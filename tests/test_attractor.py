"The attractor: one recurrence in every form, the same numbers at a hundred thousand tokens, and errors in one line."
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.signal import lfilter

from pispiral.memory.attractor import ALPHA_POLICIES, AttractorState, scan
from pispiral.memory.scan import ROTATIONS, final_state, recurrent, unit_vectors

N = 100_000
ALPHAS = {"1": 0., "exp(-pi/N)": -math.pi/N, "0.99": math.log(0.99)}


def filtered(h, log_alpha, harmonic=1, start=0, state=None):
    "y by scipy in complex128, for h [L, d] at positions start, start + 1, … written with π."
    omega = 2*math.pi*math.pi*harmonic
    pole = math.exp(log_alpha)*np.exp(-1j*omega)
    before = np.zeros(h.shape[1], complex) if state is None else state[0] + 1j*state[1]
    zi = math.exp(log_alpha)*np.exp(-1j*omega*start)*before[None]
    return lfilter([1], [1, -pole], h.astype(complex), axis=0, zi=zi)[0]


def off(y, want):
    "Largest error of y [L, 2, d] relative to the largest |want| [L, d]."
    y = y.double().numpy()
    return np.abs(y[:, 0] + 1j*y[:, 1] - want).max()/np.abs(want).max()


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_every_form_agrees(data):
    draw = lambda lo, hi: data.draw(st.integers(lo, hi))
    B, L, d, H = draw(1, 3), draw(1, 150), draw(1, 9), draw(1, 3)
    irrational, chunk = data.draw(st.sampled_from(ROTATIONS)), data.draw(st.sampled_from((None, 1, 5, 64)))
    log_alpha, start = data.draw(st.sampled_from((0., -1e-3, -0.3, -30.))), draw(0, 2**20)
    cut = draw(0, L)
    g = torch.Generator().manual_seed(draw(0, 2**20))
    h = torch.randn(B, L, d, generator=g, dtype=torch.float64)
    e = unit_vectors(start + torch.arange(L), irrational, H).expand(draw(0, 1)*(B - 1) + 1, L, 2*H)
    state = torch.randn(B, 2*H, d, generator=g, dtype=torch.float64)
    want, last = recurrent(h, e, log_alpha, state)
    y, C = scan(h, e, log_alpha, state, chunk)
    assert torch.allclose(y, want, rtol=1e-10, atol=1e-10) and torch.allclose(C, last, rtol=1e-10, atol=1e-10)
    assert torch.allclose(final_state(h, e, log_alpha, state), last, rtol=1e-10, atol=1e-10)
    before, C = scan(h[:, :cut], e[:, :cut], log_alpha, state, chunk)
    after, C = scan(h[:, cut:], e[:, cut:], log_alpha, C, chunk)
    assert torch.allclose(torch.cat((before, after), 1), want, rtol=1e-10, atol=1e-10)
    assert torch.allclose(C, last, rtol=1e-10, atol=1e-10)
    single = scan(h.float(), e, log_alpha, state.float(), chunk)[0]
    assert single.dtype == torch.float32 and (single - want).abs().max() <= 2e-6*want.abs().max()
    if irrational == "pi":
        for b in range(B):
            for j in range(H):
                rows = slice(2*j, 2*j + 2)
                assert off(want[b, :, rows], filtered(h[b].numpy(), log_alpha, j + 1, start, state[b, rows])) < 1e-6


@pytest.mark.parametrize("log_alpha", ALPHAS.values(), ids=ALPHAS)
def test_a_hundred_thousand_tokens(log_alpha):
    h, e = torch.randn(1, N, 2, generator=torch.Generator().manual_seed(0)), unit_vectors(torch.arange(N))[None]
    want = filtered(h[0].numpy(), log_alpha)

    def by(form, size):
        state, ys = None, []
        for a in range(0, N, size):
            y, state = form(h[:, a:a + size], e[:, a:a + size], log_alpha, state)
            ys.append(y)
        return torch.cat(ys, 1)
    forms = ((scan, N), (scan, 512), *([(recurrent, 512)] if log_alpha == -math.pi/N else []))
    for form, size in forms: assert off(by(form, size)[0], want) <= 1e-5, (form.__name__, size)
    last = scan(h, e, log_alpha)[1]
    assert (final_state(h, e, log_alpha) - last).abs().max() <= 1e-5*last.abs().max()


def test_token_by_token_calls():
    n, state, ys = 5_000, None, []
    h, e = torch.randn(1, n, 2, generator=torch.Generator().manual_seed(0)), unit_vectors(torch.arange(n))[None]
    for x, unit in zip(h.split(1, 1), e.split(1, 1)):
        y, state = recurrent(x, unit, -math.pi/N, state)
        ys.append(y)
    assert off(torch.cat(ys, 1)[0], filtered(h[0].numpy(), -math.pi/N)) <= 1e-5


def test_an_impulse_fades_as_alpha():
    h, e = torch.zeros(1, 3000, 1), unit_vectors(7 + torch.arange(3000))[None]
    h[0, 0] = 1
    y = scan(h, e, math.log(0.999))[0].norm(dim=2).flatten().double()
    assert torch.allclose(y, 0.999**torch.arange(3000, dtype=torch.float64), rtol=1e-5)


@pytest.mark.parametrize("irrational", ("pi", "prng", "none"))
def test_gradients(irrational):
    g = torch.Generator().manual_seed(0)
    h, state = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((2, 9, 2), (2, 4, 2)))
    e = unit_vectors(torch.arange(9), irrational, 2)[None].double()
    args = [x.requires_grad_() for x in (h, e, torch.tensor(-0.2, dtype=torch.float64), state)]
    assert torch.autograd.gradcheck(lambda *a: scan(*a, chunk=4), args)
    assert torch.autograd.gradcheck(final_state, args)


def test_gradients_over_several_blocks():
    h, e = torch.randn(1, 1100, 2, generator=torch.Generator().manual_seed(0)), unit_vectors(torch.arange(1100))[None]
    grads = []
    for form in (scan, recurrent):
        args = [x.clone().double().requires_grad_() for x in (h, torch.tensor(-1e-3))]
        y, state = form(args[0], e, args[1])
        ((y**2).sum() + state.sum()).backward()
        grads.append([x.grad for x in args])
    assert all(torch.allclose(a, b, rtol=1e-10) for a, b in zip(*grads))


def test_the_state_has_one_size():
    attractor = AttractorState(d_model=16)
    for length in (1000, 10_000, 100_000, 1_000_000):
        assert attractor(torch.randn(1, length, 16), torch.randn(1, length, 2)).shape == (1, 2, 16)


@pytest.mark.parametrize("policy", ALPHA_POLICIES)
def test_alpha(policy):
    m = AttractorState(4, 2, policy, alpha=0.9) if policy != "exp_c_over_N" else AttractorState(4, 2, c=1., N=1000)
    assert abs(m.log_alpha.item()/(-1e-3 if policy == "exp_c_over_N" else math.log(0.9)) - 1) < 1e-5
    assert len(list(m.parameters())) == (policy == "learned")
    h, e = torch.randn(1, 700, 4), unit_vectors(torch.arange(700), "pi", 2)[None]
    y, state = m.scan(h, e)
    assert y.shape == (1, 700, 4, 4) and torch.allclose(m(h, e), state, atol=1e-4)
    parts = m(h[:, 300:], e[:, 300:], m(h[:, :300], e[:, :300]))
    assert torch.allclose(parts, state, atol=1e-4)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_learned_alpha_stays_inside(sign):
    m = AttractorState(4, alpha_policy="learned", N=100)
    sgd = torch.optim.SGD(m.parameters(), lr=1e6)
    for _ in range(5):
        sgd.zero_grad()
        (sign*m(torch.ones(1, 50, 4), unit_vectors(torch.arange(50), "none")[None]).sum()).backward()
        sgd.step()
        assert 0 < m.alpha < 1 and m.rate.isfinite() and m.rate.grad.isfinite()
    m.rate.data.fill_(sign*math.inf)
    assert 0 < m.alpha < 1 and m(torch.ones(1, 9, 4), unit_vectors(torch.arange(9))[None]).isfinite().all()


def test_errors_name_both_values():
    h, e, bad = torch.ones(2, 4, 3), unit_vectors(torch.arange(4))[None], torch.ones(2, 4, 3)
    bad[1, 2, 0] = math.nan
    m = AttractorState(3)
    for call, words in (
        (lambda: scan(h, e, 0.1), "log_alpha=0.1"), (lambda: scan(h, e, math.nan), "alpha is in (0, 1]"),
        (lambda: scan(h, e[:, :3], -1.), "length 3 and h has length 4"),
        (lambda: scan(h, e.expand(3, 4, 2), -1.), "batch 3 and h has batch 2"),
        (lambda: scan(h, e, -1., torch.zeros(2, 2, 5)), "(2, 2, 5), but h and e need [B, 2H, d] = (2, 2, 3)"),
        (lambda: scan(bad, e, -300.), "h holds NaN or infinity"), (lambda: m(bad, e), "h holds NaN or infinity"),
        (lambda: m(torch.ones(2, 4, 5), e), "h has width 5, but d_model=3"),
        (lambda: m(h, unit_vectors(torch.arange(4), "pi", 2)[None]), "e has 4 components, but n_harmonics=1"),
        (lambda: AttractorState(3, alpha_policy="fixd"), "did you mean 'fixed'?"),
        (lambda: AttractorState(3, alpha_policy="fixed", alpha=0.), "alpha=0.0 must be in (0, 1]"),
        (lambda: AttractorState(3, c=-1.), "c=-1.0 must be"), (lambda: AttractorState(3, N=0), "N=0 must be"),
    ):
        with pytest.raises(ValueError) as said: call()
        assert words in str(said.value) and "\n" not in str(said.value)
