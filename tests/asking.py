"A small grid that a process can be killed over: `python asking.py MODEL_FOLDER OUT`."
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from pispiral.codes.registry import code_with
from pispiral.evidence.evaluate import evaluate
from pispiral.evidence.settings import Setting
from pispiral.model.load import load_model
from pispiral.tasks.assets import model_folder
from pispiral.tasks.niah import niah_item

METHODS = ("rope", "hybrid", "pi_spiral")


def save_tiny(folder, layers=1, width=32):
    "A Llama with random weights under the real tokenizer."
    torch.manual_seed(0)
    tok = AutoTokenizer.from_pretrained(model_folder())
    config = LlamaConfig(vocab_size=len(tok), hidden_size=width, intermediate_size=width, num_hidden_layers=layers,
                         num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=256, eos_token_id=2)
    LlamaForCausalLM(config).eval().save_pretrained(folder)
    tok.save_pretrained(folder)
    return folder


def grid(tok, length=512, depths=(.2, .8), seeds=2):
    "Questions and settings."
    items = [niah_item(tok, length, d, seed=s) for d in depths for s in range(seeds)]
    settings = {m: Setting("tiny", m, code_with(m, hybrid_K=128, target_length=1024), None, "float32", "cpu", 64)
                for m in METHODS}
    return [(m, it) for m in METHODS for it in items], settings


def ask(model, out, **of):
    "Ask the grid of a saved model, as many as `out` has no answers for."
    loaded, tok = load_model(str(model), dtype="float32", device="cpu")
    questions, settings = grid(tok, **of)
    with torch.inference_mode(): return evaluate(loaded, tok, questions, settings, Path(out))


if __name__ == "__main__": ask(*sys.argv[1:3])
