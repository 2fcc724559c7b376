#!/usr/bin/env python3
"""Makes the cases of `tests/data/conformance`: small random models of every architecture and what transformers computes.

    pip install torch==2.7.1 transformers==4.57.6 numpy
    python scripts/conformance/generate.py tests/data/conformance [CASE ...]

A case is a directory of three files. `config.json` is what transformers saves. `logits.f32` holds the logits of some of the
prompt's positions, little endian. `case.json` names the model's tensors with
shapes and the distribution of their values, which are pseudo-random numbers of the tensor's name (SplitMix64, as
`qp_runtime::check::synthetic::Random` has them), rounded to bfloat16; so no weights are stored. It also holds a prompt, the
30 greedy tokens that follow it, the positions whose logits there are, and changes of `config.json` (JSON merge patches) each of which must change these logits: a reader that ignores the key fails there.

Tests do not need this script: they read what it wrote.
"""

import json
import os
import pathlib
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy
import torch
import transformers

from cases import CASES

GREEDY = 30
ROWS = 6


def uniform(name, count):
    """`count` numbers in -1..1, the same as `Random::of(name).values(count, 1.0)`."""
    state = 7
    for byte in name.encode():
        state = (state * 0x100000001B3 + byte) % 2**64
    with numpy.errstate(over="ignore"):
        z = numpy.uint64(state) + numpy.arange(1, count + 1, dtype=numpy.uint64) * numpy.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> numpy.uint64(30))) * numpy.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> numpy.uint64(27))) * numpy.uint64(0x94D049BB133111EB)
    word = z >> numpy.uint64(32)
    return (word >> numpy.uint64(8)).astype(numpy.float32) / numpy.float32(1 << 23) - numpy.float32(1)


def distribution(name, shape, case):
    """Middle and half width of a tensor's values."""
    for part, (middle, width) in case.get("values", {}).items():
        if part in name:
            return middle, width
    if "norm" in name and name.endswith("weight"):
        return (0.1 if case.get("add_one") else 1.0), 0.3
    if len(shape) == 1:
        return 0.0, 0.3
    if "embed" in name:
        return 0.0, case.get("embedding", 1.0)
    # Products of random vectors with queries and keys are to be uneven, and so are logits.
    gain = 2.0 if any(p in name for p in ("q_proj", "k_proj", "qkv", "router", "mlp.gate.")) else 1.0
    if case["keys"].get("tie_word_embeddings", case.get("add_one")) and ("o_proj" in name or "down_proj" in name):
        # Else the last token is its own likeliest successor.
        gain = 4.0
    if "lm_head" in name:
        gain = 3.0
    inputs = shape[-2] if "experts" in name and len(shape) == 3 and case.get("transposed") else shape[-1]
    return 0.0, round(gain * (3.0 / inputs) ** 0.5, 4)


def make(name, case, out):
    torch.manual_seed(1)
    config = getattr(transformers, case["config"])(**case["keys"])
    config.architectures = [case["class"]]
    config._attn_implementation = "eager"
    text = config.get_text_config()
    text._attn_implementation = "eager"
    model = getattr(transformers, case["class"])(config).float().eval()
    tensors, state = [], {}
    tied = {"lm_head.weight"} if text.tie_word_embeddings else set()
    for tensor, value in model.state_dict().items():
        if tensor in tied or any(part in tensor for part in case.get("drop", [])):
            continue
        middle, width = distribution(tensor, value.shape, case)
        values = numpy.float32(middle) + numpy.float32(width) * uniform(tensor, value.numel())
        state[tensor] = torch.from_numpy(values).reshape(value.shape).bfloat16().float()
        tensors.append({"name": tensor, "shape": list(value.shape), "middle": middle, "width": width})
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected, unexpected
    assert set(missing) <= tied | {m for m in missing if any(part in m for part in case.get("drop", []))}, missing
    model.tie_weights()

    length = case.get("prompt", 40)
    vocab = text.vocab_size
    prompt = [int((u + 1) / 2 * (vocab - 8)) + 4 for u in uniform(f"{name} prompt", length)]
    with torch.no_grad():
        def logits(tokens):
            return model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0].float()
        of_prompt = logits(prompt)
        tokens, margin = list(prompt), float("inf")
        for _ in range(GREEDY):
            row = logits(tokens)[-1]
            top = row.topk(2).values
            margin = min(margin, float(top[0] - top[1]))
            tokens.append(int(row.argmax()))
    rows = sorted({1, length // 3, *range(length - ROWS + 2, length)})
    chosen = of_prompt[rows].contiguous().numpy()
    spread = float(chosen.std(axis=1).mean())
    print(f"{name}: {sum(t['shape'] and int(numpy.prod(t['shape'])) for t in tensors)} weights, logits' deviation "
          f"{spread:.2f}, narrowest choice {margin:.4f}, {len(set(tokens[length:]))} different tokens")

    directory = pathlib.Path(out) / name
    directory.mkdir(parents=True, exist_ok=True)
    saved = json.loads(config.to_json_string())
    saved.update(case.get("saved", {}))
    for key in case.get("unsaved", []):
        saved.pop(key, None)
    (directory / "config.json").write_text(json.dumps(saved, indent=1, sort_keys=True) + "\n")
    (directory / "logits.f32").write_bytes(chosen.astype("<f4").tobytes())
    renamed = case.get("names", lambda n: n)
    fields = {
        "prompt": prompt,
        "greedy": tokens[length:],
        "rows": rows,
        "ignoring": case.get("ignoring", []),
        "tensors": [{**t, "file": renamed(t["name"])} for t in tensors],
    }
    lines = ",\n".join(
        f' "{key}": ' + ("[\n  " + ",\n  ".join(json.dumps(t) for t in value) + "]" if key == "tensors" else json.dumps(value))
        for key, value in fields.items()
    )
    (directory / "case.json").write_text("{\n" + lines + "\n}\n")


def main():
    out, *names = sys.argv[1:]
    for name, case in CASES.items():
        if not names or name in names:
            make(name, case, out)


if __name__ == "__main__":
    main()
