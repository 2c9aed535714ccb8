"Unit tests of the position codes, as the experiments guide names them."
import mpmath
import pytest
import torch
from transformers import LlamaConfig

from pispiral.codes.hybrid import HybridPositionalEncoding
from pispiral.codes.registry import CODES, code, make_code
from pispiral.codes.phase import IRRATIONALS, PiSpiralPositional, phase, xi

CONFIG = LlamaConfig(hidden_size=576, num_attention_heads=9, num_key_value_heads=3, head_dim=64,
                     max_position_embeddings=8192, rope_parameters={"rope_type": "default", "rope_theta": 1e5})


def table(pos, n, **kw):
    return make_code(code(pos=pos, **kw), CONFIG)(torch.empty(0), n[None])


@pytest.mark.parametrize("irrational", IRRATIONALS)
def test_pi_spiral_shape(irrational):
    e = PiSpiralPositional(irrational, n_harmonics=2)(torch.arange(12).view(3, 4))
    assert e.shape == (3, 4, 4) and e.dtype == torch.float32
    assert torch.allclose(e.view(3, 4, 2, 2).norm(dim=-1), torch.ones(3, 4, 2), atol=1e-6)


@pytest.mark.parametrize("irrational", IRRATIONALS)
def test_deterministic(irrational):
    n = torch.randint(0, 2**40, (100,), generator=torch.Generator().manual_seed(0))
    assert torch.equal(PiSpiralPositional(irrational)(n), PiSpiralPositional(irrational)(n))


@pytest.mark.parametrize("irrational", [i for i in IRRATIONALS if i != "prng"])
def test_exact_phase(irrational):
    with mpmath.workprec(240):
        for n in (1, 113, 10**6, 2**40 - 1):
            off = abs(mpmath.mpf(float(phase(n, irrational))) - mpmath.frac(n*xi(irrational, 240)))
            assert min(off, 1 - off) <= n*mpmath.mpf(2)**-64 + mpmath.mpf(2)**-53


@pytest.mark.parametrize("pos", CODES)
def test_every_code_is_finite_and_repeatable(pos):
    n = torch.tensor([0, 1, 2047, 2048, 2049, 16383, 10**6])
    for a, b in zip(table(pos, n), table(pos, n)):
        assert a.shape[-1] == 64 and a.dtype == torch.float32 and torch.isfinite(a).all() and torch.equal(a, b)


@pytest.mark.parametrize("blend", ["phase", "vector"])
def test_hybrid_encoding(blend):
    made = make_code(code(pos="hybrid", hybrid_K=2048, blend=blend), CONFIG)
    assert isinstance(made, HybridPositionalEncoding)
    n = torch.arange(8192)
    hybrid, rope = table("hybrid", n, blend=blend), table("rope", n)
    for h, r in zip(hybrid, rope):
        assert torch.equal(h[:, :2049], r[:, :2049]) and not torch.allclose(h[:, 4096:], r[:, 4096:], atol=1e-2)


def test_unknown_names_are_refused():
    for kw in (dict(pos="hybird"), dict(pos="pi_spiral", irrational="tau"), dict(hybridK=3),
               dict(pos="hybrid", hybrid_K=20000)):
        with pytest.raises(ValueError) as e:
            code(**kw)
        assert "\n" not in str(e.value)
