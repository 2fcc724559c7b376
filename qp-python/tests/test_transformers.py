"""Checkpoints in transformers, beside qp's own engine."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import qpalette as qp  # noqa: E402
import qpalette.torch as qpt  # noqa: E402
import qpalette.transformers as qph  # noqa: E402

MODEL = Path(__file__).parents[2] / "models" / "kjv-llama"
PROMPT = "And it came to pass in those days, that"
PLAN = """[layers]
"model.layers.*.*.*" = "nuq_4"
"model.layers.{0,1}.mlp.down_proj" = "tcq_3"
"model.layers.2.self_attn.o_proj" = "keep"
"""


def quantized(directory, extra=""):
    plan = directory / "plan.toml"
    plan.write_text(PLAN + extra)
    out = directory / "model"
    qp.quantize(MODEL, out, plan=plan, device="cpu")
    return out


def compare(model, checkpoint, tolerance=2e-3):
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    tokens = tokenizer(PROMPT, return_tensors="pt").input_ids
    with torch.no_grad():
        theirs = model(tokens).logits[0].float().numpy()
    ours = qp.logits(checkpoint, tokens[0].tolist(), device="cpu")
    assert np.abs(theirs - ours).max() < tolerance
    with torch.no_grad():
        greedy = model.generate(tokens, max_new_tokens=24, do_sample=False)
    said = tokenizer.decode(greedy[0, tokens.shape[1] :])
    assert said == qp.generate(checkpoint, PROMPT, tokens=24, device="cpu")


def load(checkpoint, dtype=torch.float32):
    return transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype)


def test_a_checkpoint_runs_as_in_qp(tmp_path):
    checkpoint = quantized(tmp_path)
    model = load(checkpoint)
    layers = model.model.layers
    assert layers[0].mlp.down_proj.name == "tcq_3" and layers[2].mlp.down_proj.name == "nuq_4"
    assert isinstance(layers[2].self_attn.o_proj, torch.nn.Linear)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    compare(model, checkpoint)
    half = load(checkpoint, torch.bfloat16)
    assert half.model.layers[0].mlp.down_proj.scales.dtype == torch.bfloat16
    assert (half.model.layers[0].mlp.down_proj.packed == layers[0].mlp.down_proj.packed).all()
    tokens = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        assert (half(tokens).logits - model(tokens).logits).abs().max() < 0.5
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert (compiled(tokens, use_cache=False).logits - model(tokens, use_cache=False).logits).abs().max() < 1e-4


@pytest.mark.parametrize(
    "extra",
    [
        '"model.embed_tokens" = "nuq_6"',
        '"lm_head" = "nuq_5"',
        '"lm_head" = "nuq_5"\n"model.embed_tokens" = "nuq_6"',
    ],
    ids=["embedding", "head", "both"],
)
def test_tied_layers(tmp_path, extra):
    checkpoint = quantized(tmp_path, extra)
    model = load(checkpoint)
    compare(model, checkpoint)
    # Saved again, it is the same.
    again = tmp_path / "again"
    model.save_pretrained(again)
    transformers.AutoTokenizer.from_pretrained(checkpoint).save_pretrained(again)
    compare(load(again), again)
    compare(model, again)


def test_quantized_in_python_and_saved(tmp_path):
    out = tmp_path / "out"
    config = qph.QpConfig(lambda name, _: "tcq_3" if "mlp" in name else "nuq_4")
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32, quantization_config=config)
    assert model.model.layers[3].mlp.up_proj.name == "tcq_3" and isinstance(model.lm_head, torch.nn.Linear)
    model.save_pretrained(out)
    transformers.AutoTokenizer.from_pretrained(MODEL).save_pretrained(out)
    written = json.loads((out / "config.json").read_text())
    assert written["quantization_config"] == {"quant_method": "qp"}
    assert len(qp.Checkpoint(out)) == 42
    compare(load(out), out)
    # Shards, and a model that is quantized after it was loaded.
    plain = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    qph.quantize_(plain, "nuq_3", lm_head="nuq_5")
    plain.save_pretrained(tmp_path / "shards", max_shard_size="500KB")
    transformers.AutoTokenizer.from_pretrained(MODEL).save_pretrained(tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    compare(load(tmp_path / "shards"), tmp_path / "shards")
    with pytest.raises(ValueError, match="quantized already"):
        qph.quantize_(plain, "nuq_3")


def test_what_is_wrong_is_said(tmp_path):
    checkpoint = quantized(tmp_path)
    with pytest.raises(ValueError, match="has no bits"):
        qph.QpConfig(bits=3)
    with pytest.raises(ValueError, match="say how the model is quantized"):
        transformers.AutoModelForCausalLM.from_pretrained(MODEL, quantization_config=qph.QpConfig())
    damaged = tmp_path / "damaged"
    shutil.copytree(checkpoint, damaged)
    weights = damaged / "weights-00001.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ValueError, match="changed after it was written"):
        load(damaged)
    (damaged / "qp.json").unlink()
    with pytest.raises(ValueError, match="qp.json is missing"):
        load(damaged)
    with pytest.raises(ValueError, match="no qp.json beside it"):
        qp.generate(damaged, "a", tokens=1, device="cpu")
