"""Checkpoints in vLLM, beside qp's own engine: see scripts/test-vllm. Each run of vLLM is a process of its own."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

pytest.importorskip("vllm")

import qpalette as qp  # noqa: E402

MODEL = Path(__file__).parents[2] / "models" / "kjv-llama"
PROMPTS = ["And it came to pass in those days, that", "In the beginning", "Then said Jesus unto"]
TOKENS = 24
ENVIRONMENT = {
    **os.environ,
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

RUN = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    model, ranks, dtype, tokens, prompts = json.loads(sys.argv[1])
    llm = LLM(
        model=model, dtype=dtype, tensor_parallel_size=ranks, enforce_eager=True, max_model_len=256, max_num_seqs=8, seed=0
    )
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=tokens))
    print("TEXTS" + json.dumps([o.outputs[0].text for o in outputs]))
"""

# Mixed: quantizers of merged layers alike and not, a layer of a merged one that stays, and a layer that stays.
PLAN = """[layers]
"model.layers.*.*.*" = "tcq_4"
"model.layers.0.self_attn.k_proj" = "nuq_5"
"model.layers.1.self_attn.v_proj" = "keep"
"model.layers.2.mlp.gate_proj" = "tcq_5"
"model.layers.3.mlp.down_proj" = "keep"
"""


def cuttable(directory, plan):
    """The plan with quantizers whose blocks are not interleaved, so that the columns of a small model can be cut."""
    for name in ["tcq_4", "tcq_5", "nuq_5", "nuq_6"]:
        text = qp.Quantizer.named(name).text
        assert ", interleave = 1024" in text
        spec = directory / f"{name}.qspec"
        spec.write_text(text.replace(", interleave = 1024", ""))
        plan = plan.replace(f'"{name}"', json.dumps(str(spec)))
    return plan


def quantized(directory, extra="", ranks=1):
    plan = directory / "plan.toml"
    plan.write_text(PLAN + extra if ranks == 1 else cuttable(directory, PLAN + extra))
    out = directory / "model"
    qp.quantize(MODEL, out, plan=plan, device="cpu")
    return out


def texts(directory, checkpoint, ranks=1, dtype="float32"):
    script = directory / "run.py"
    script.write_text(RUN)
    what = json.dumps([str(checkpoint), ranks, dtype, TOKENS, PROMPTS])
    done = subprocess.run([sys.executable, script, what], env=ENVIRONMENT, capture_output=True, text=True)
    found = [line for line in done.stdout.splitlines() if line.startswith("TEXTS")]
    assert found, (done.stdout + done.stderr)[-60000:]
    return json.loads(found[0][5:])


def wanted(checkpoint):
    return [qp.generate(checkpoint, prompt, tokens=TOKENS, device="cpu") for prompt in PROMPTS]


@pytest.mark.parametrize(
    "extra",
    ["", '"model.embed_tokens" = "nuq_6"', '"lm_head" = "nuq_5"\n"model.embed_tokens" = "nuq_6"'],
    ids=["plain", "embedding", "both"],
)
def test_texts_are_those_of_qp(tmp_path, extra):
    checkpoint = quantized(tmp_path, extra)
    assert texts(tmp_path, checkpoint) == wanted(checkpoint)


def test_two_ranks(tmp_path):
    checkpoint = quantized(tmp_path, '"lm_head" = "nuq_5"\n"model.embed_tokens" = "nuq_6"', ranks=2)
    assert texts(tmp_path, checkpoint, ranks=2) == wanted(checkpoint)


@pytest.mark.parametrize("ranks", [1, 2])
def test_mixtures_of_experts(tmp_path, ranks):
    """A small model of random weights, large enough that its texts are definite."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    source = tmp_path / "source"
    vocabulary = json.loads((MODEL / "config.json").read_text())["vocab_size"]
    config = Qwen3MoeConfig(
        vocab_size=vocabulary, hidden_size=128, intermediate_size=256, moe_intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, num_experts=6, num_experts_per_tok=2, norm_topk_prob=True,
        initializer_range=0.2, max_position_embeddings=256, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(1)
    Qwen3MoeForCausalLM(config).save_pretrained(source)
    for file in MODEL.glob("tokenizer*"):
        (source / file.name).write_bytes(file.read_bytes())
    plan = tmp_path / "plan.toml"
    text = (
        '[layers]\n"model.layers.*.*.*" = "tcq_4"\n"model.layers.*.mlp.experts.*.*" = "tcq_4"\n'
        '"model.layers.0.mlp.experts.*.down_proj" = "nuq_5"\n"model.layers.1.mlp.experts.3.up_proj" = "keep"\n'
    )
    plan.write_text(text if ranks == 1 else cuttable(tmp_path, text))
    out = tmp_path / "model"
    qp.quantize(source, out, plan=plan, device="cpu")
    assert texts(tmp_path, out, ranks=ranks) == wanted(out)


def test_what_cannot_be_cut_is_refused_with_the_cure(tmp_path):
    spec = tmp_path / "whole.qspec"
    spec.write_text(qp.Quantizer.named("nuq_4").text.replace("nuq_4", "whole").replace(", block = 128, interleave = 1024", ""))
    assert qp.Quantizer(spec).cuts[1] is None
    out = tmp_path / "model"
    qp.quantize(MODEL, out, spec=str(spec), device="cpu")
    with pytest.raises(AssertionError, match="whose rotation is in blocks"):
        texts(tmp_path, out, ranks=2)


def test_the_server(tmp_path):
    checkpoint = quantized(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    arguments += ["--max-model-len", "256", "--served-model-name", "kjv"]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(checkpoint), *arguments]
    log = (tmp_path / "log").open("w+")
    server = subprocess.Popen(command, env=ENVIRONMENT, stdout=log, stderr=subprocess.STDOUT)
    try:
        address = f"http://127.0.0.1:{port}"
        while True:
            assert server.poll() is None, (tmp_path / "log").read_text()[-60000:]
            try:
                urllib.request.urlopen(f"{address}/health")
                break
            except OSError:
                time.sleep(1)
        body = {"model": "kjv", "prompt": PROMPTS, "max_tokens": TOKENS, "temperature": 0}
        request = urllib.request.Request(
            f"{address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        answer = json.load(urllib.request.urlopen(request))
        assert [choice["text"] for choice in answer["choices"]] == wanted(checkpoint)
    finally:
        server.terminate()
        server.wait()
