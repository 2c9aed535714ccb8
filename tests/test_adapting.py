"The packaged model learns a code for three steps; its adapter is read again, and answers as it was trained."
import pytest
import torch

from pispiral.codes.registry import code
from pispiral.model.load import load_model
from pispiral.training.adapting import AdaptConfig, adapt, adapted_to
from pispiral.training.loop import TrainConfig


@pytest.mark.slow
def test_the_packaged_model_learns_a_code(tmp_path):
    how = TrainConfig(steps=3, lr=1e-3, warmup=1, eval_every=3)
    cfg = AdaptConfig(code=adapted_to("rope", 16_384, still=.5), target=16_384, context=192, shortest=160, held=1,
                      rank=4, train=how)
    model, tok = load_model("smollm2-135m-instruct", dtype="float32", memory=False)
    about = adapt(model, tok, tmp_path, cfg, "smollm2-135m-instruct", quiet=True)
    assert [r["step"] for r in about["curve"]] == [3] and about["curve"][0]["loss"] > 0
    size = sum(p.stat().st_size for p in tmp_path.glob("*.safetensors"))
    assert 0 < size < 1_000_000
    ids = torch.arange(500, 560)[None]
    with torch.no_grad():
        trained = model(ids).logits
        again = load_model("smollm2-135m-instruct", dtype="float32", memory=False, adapter=tmp_path)[0]
        assert again.model.rotary_emb.code == code("rope", still=.5)
        assert torch.allclose(again(ids).logits, trained, atol=.02)
