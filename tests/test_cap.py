"""A cap on memory holds wherever memory is looked at, weights leave room for texts, and what is let go is freed."""
import ast
from unittest.mock import patch

import pytest
import torch

from conftest import ROOT
from pispiral.evidence.ram import memory_parts
from pispiral.evidence.profiling import Shape
from pispiral.lab.phases.large import config_of, large_spans, load_large, weights_room
from pispiral.lab.profiles import load_profile
from pispiral.model import load
from pispiral.model.offload import free_memory
from pispiral.verdict.pairs import pair_key

GIB = 2**30
EXPORTED = sorted((ROOT/"pispiral").rglob("*.py"))
PHASES = sorted((ROOT/"nbs"/"phases").glob("*.ipynb"))


def card(gib, capability=(8, 0), held=0):
    "A card of so many GiB, of which this process holds some."
    one = dict(is_available=lambda: True, device_count=lambda: 1, mem_get_info=lambda d: ((gib - held)*GIB, gib*GIB),
               memory_allocated=lambda d: held*GIB, memory_reserved=lambda d: held*GIB, empty_cache=lambda: None,
               get_device_capability=lambda d: capability, get_arch_list=lambda: ["sm_75", "sm_80", "sm_90"])
    return patch.multiple(torch.cuda, **one)


def calls(path):
    "Every call in a module, or in the code cells of a notebook: (name, names of its keywords)."
    if path.suffix == ".py": trees = [ast.parse(path.read_text(encoding="utf-8"))]
    else:
        import nbformat
        trees = [ast.parse(c.source) for c in nbformat.read(path, 4).cells if c.cell_type == "code"]
    for node in (n for tree in trees for n in ast.walk(tree) if isinstance(n, ast.Call)):
        yield getattr(node.func, "id", getattr(node.func, "attr", "")), {k.arg for k in node.keywords}


def test_questions_are_never_asked_without_the_cap():
    asked = [(path.name, more) for path in (*EXPORTED, *PHASES) if path.stem not in ("loop", "kaggle")
             for name, more in calls(path) if name == "evaluate" and more]  # a marker's takes no keyword
    assert len(asked) >= 9
    assert [name for name, more in asked if "cap_gib" not in more] == []


def test_a_cards_memory_is_looked_at_in_one_place():
    looks = {path.stem for path in EXPORTED for name, _ in calls(path) if name in ("mem_get_info", "memory_reserved")}
    assert looks == {"offload"}


@pytest.mark.parametrize("name", ["kaggle", "full"])
def test_weights_leave_room_for_the_longest_text_under_the_cap(name):
    p = load_profile(name)
    heavy, shape = p.large.heavy, Shape.of(config_of(p.large.heavy.model))
    for gib in (16, 80):
        with card(gib):
            room, free = weights_room(p, "heavy"), free_memory("cuda", p.memory_cap_gib)
            texts = [memory_parts(shape, n, "bfloat16", p.chunk, w).text for n, w in large_spans(p, "heavy")]
            assert free <= p.memory_cap_gib*GIB and room < free
            assert room + min(texts) <= free and room + max(t for t in texts if t <= free - room) <= free
    wanted = {}
    with card(80), patch.object(load, "model_config", lambda n: (n, config_of(n))), \
            patch.object(load, "read_tokenizer", lambda *a: None), \
            patch.object(load, "read_weights", lambda *a: wanted.update(options=a[5]) or 1/0):
        with pytest.raises(ZeroDivisionError): load_large(p, "heavy")
    where = wanted["options"]["device_map"]
    assert heavy.offload == "cpu" and {*where.values()} - {0} and sum(v == 0 for v in where.values()) > 5


def test_an_answer_in_half_chunks_is_a_pair():
    record = dict(model="m", task="niah", length=512, seed=0, expected=["1"], chunk=2048)
    assert pair_key(record) == pair_key({**record, "chunk": 1024}) != pair_key({**record, "length": 513})


def test_float16_that_overflows_falls_back_or_says_what_it_needs(tmp_path):
    from asking import save_tiny
    from safetensors.torch import load_file, save_file
    folder = save_tiny(tmp_path/"loud")
    [file] = folder.glob("*.safetensors")
    weights = load_file(file)
    name = "model.layers.0.mlp.down_proj.weight"
    save_file({**weights, name: weights[name]*1e9}, file, metadata={"format": "pt"})
    with patch.object(load, "best_dtype", lambda device: "float16"):
        model, tok = load.load_model(str(folder), device="cpu")
        assert model.dtype == torch.float32 and model.loaded_as["dtype"] == "float32"
        assert load.overflowing(model.half(), tok) == 0
        with pytest.raises(ValueError, match="no room: it takes"):
            load.load_model(str(folder), device="cpu", cap_gib=.01)
    with pytest.raises(ValueError, match="dtype='float16': model .* overflows in float16, first in layer 0: it needs"):
        load.load_model(str(folder), device="cpu", dtype="float16")
    quiet, _ = load.load_model(str(save_tiny(tmp_path/"quiet")), device="cpu", dtype="float16")
    assert quiet.dtype == torch.float16
