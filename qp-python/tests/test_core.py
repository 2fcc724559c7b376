"""The package without PyTorch."""

import copy
import json
import pickle
from pathlib import Path

import numpy as np
import pytest

import qpalette as qp

MODEL = Path(__file__).parents[2] / "models" / "kjv-llama"
SPEC = """quantizer two {
    window 2  vector 1  step 2  block 2 x 32
    values i8  unit 1/2
    table t[4] = [-3, -1, 1, 3]
    decode w { t[w] }
    scale row  rotate hadamard(seed = 0)
}"""


def matrix(rows=64, columns=256, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def test_the_palette():
    names = [q.name for q in qp.palette()]
    assert "tcq_3" in names and len(names) == len(set(names))
    q = qp.Quantizer.named("tcq_3")
    assert q.bits == 3 and q.trained and 0.01 < q.distortion < 0.02
    assert q in qp.palette() and len({q, qp.Quantizer(q.text)}) == 1
    assert "tcq_3" in repr(q) and "<pre>" in q._repr_html_()


def test_specs_from_text_and_file(tmp_path):
    q = qp.Quantizer(SPEC)
    assert (q.name, q.bits, q.block, q.distortion) == ("two", 2, (2, 32), None)
    file = tmp_path / "two.qspec"
    file.write_text(SPEC + SPEC.replace("two", "three"))
    assert qp.Quantizer(file, "two") == q
    with pytest.raises(ValueError, match="two, three"):
        qp.Quantizer(file)
    with pytest.raises(ValueError, match="no `four`"):
        qp.Quantizer(file, name="four")
    assert qp.check(SPEC) == []


def test_formats_are_made_and_read():
    weights, x = matrix(), matrix(3, 256, 1)
    for name, most in [("q4_k", 0.0065), ("nf4", 0.008), ("gptq_int4_g128", 0.011)]:
        made = qp.Format.named(name).encode(weights)
        decoded = made.decode()
        error = ((decoded - weights) ** 2).sum() / (weights**2).sum()
        assert error == pytest.approx(made.error, rel=1e-4) and error < most
        assert np.abs(made.linear(x) - x @ decoded.T).max() < 0.01
        assert made.nbytes == sum(len(t) for t in made.tensors.values())
        again = qp.StoredMatrix.from_tensors(made.format, *made.shape, made.tensors, made.layout)
        assert (again.decode() == decoded).all() and again.error is None
    own = qp.Format("""quantizer own {
        bits 3  values i8  decode w { [w] }
        field s : f16 per 1 x 64 = (max(w) - min(w)) / 7
        field m : f16 per 1 x 64 = min(w)
        weight e { s * e + m }
    }""")
    made = own.encode(weights)
    assert (own.name, own.bits, own.unmade, made.layout) == ("own", 3.5, None, "plain") and made.error < 0.04
    assert "q4_k" in qp.formats() and qp.Format.named("q4_k") == qp.Format.named("q4_k")
    iq = qp.Format.named("iq2_xxs")
    assert "no formula" in iq.unmade
    with pytest.raises(ValueError, match="cannot be made"):
        iq.encode(weights)
    with pytest.raises(ValueError, match="no whole number"):
        qp.Format.named("q4_k").encode(weights[:, :100])
    with pytest.raises(ValueError, match="is no format"):
        qp.Format.named("tcq_3")
    with pytest.raises(qp.SpecError, match="did you mean `q4_k`"):
        qp.Format.named("q4_kk")
    with pytest.raises(ValueError, match="has 9216 bytes, not 3"):
        qp.StoredMatrix.from_tensors(qp.Format.named("q4_k"), 64, 256, {"block": [1, 2, 3]})
    with pytest.raises(ValueError, match="needs a tensor `block`"):
        qp.StoredMatrix.from_tensors(qp.Format.named("q4_k"), 64, 256, {})


def test_errors_say_where():
    with pytest.raises(qp.SpecError) as caught:
        qp.Quantizer(SPEC.replace("step 2", "step 9"))
    [first, *_] = caught.value.diagnostics
    assert first.severity == "error" and first.line == 2
    begin, end = first.span
    assert SPEC.replace("step 2", "step 9").encode()[begin:end]
    assert first.message in str(caught.value)
    with pytest.raises(qp.SpecError, match="tcq_3"):
        qp.Quantizer.named("tcq_33")


def test_matrices():
    w, q = matrix(), qp.Quantizer.named("tcq_4")
    packed = q.encode(w)
    assert packed.shape == w.shape and packed.quantizer == q
    assert packed.nbytes == 4 * packed.words.size + 2 * packed.scales.size == q.packed_bytes(*w.shape)
    decoded = packed.decode()
    error = ((decoded - w) ** 2).mean() / (w**2).mean()
    assert 0.5 * q.distortion < error < 1.5 * q.distortion
    again = qp.PackedMatrix.from_parts(q, *packed.shape, packed.words, packed.scales)
    assert (again.decode() == decoded).all()
    x = matrix(5, 256, seed=1)
    y = packed.linear(x)
    assert y.shape == (5, 64)
    exact = x.astype(np.float64) @ decoded.T.astype(np.float64)
    assert np.abs(y - exact).max() < 2e-3 * np.abs(exact).max()
    assert (packed.linear(x[2:3]) == y[2:3]).all(), "the bits of a token do not depend on the batch"


def test_products_of_formats_that_transform_activations_and_results():
    exl3, rng = qp.Format.named("exl3_mul1_3"), np.random.default_rng(3)
    factors = lambda: rng.uniform(0.5, 1.5, 128).astype(np.float16).view(np.uint8)  # noqa: E731
    tensors = {"trellis": rng.integers(0, 256, 8 * 8 * 48 * 2), "suh": factors(), "svh": factors()}
    stored, x = qp.StoredMatrix.from_tensors(exl3, 128, 128, tensors), matrix(3, 128, 1)
    wanted = x @ stored.decode().T
    assert np.abs(stored.linear(x) - wanted).max() < 0.01 * np.abs(wanted).max()


def test_matrices_are_cut_and_stacked():
    w, q = matrix(96, 1536), qp.Quantizer.named("tcq_3")
    packed = q.encode(w)
    assert 0 < packed.error < 0.1
    whole = packed.decode()
    rows, columns = q.cuts
    assert (packed.rows([95, 0]) == whole[[95, 0]]).all()
    with pytest.raises(IndexError):
        packed.rows([96])
    part = packed.cut(rows=(rows, 96), columns=(columns, 1536))
    assert part.shape == (96 - rows, 1536 - columns) and (part.decode() == whole[rows:, columns:]).all()
    upper, lower = packed.cut(rows=(0, rows)), packed.cut(rows=(rows, 96))
    again = qp.PackedMatrix.stack([upper, lower])
    assert again.quantizer == q and (again.decode() == whole).all()
    with pytest.raises(ValueError, match="multiples of"):
        packed.cut(rows=(1, 96))
    with pytest.raises(ValueError, match="rotation is in blocks"):
        qp.Quantizer(SPEC).encode(w).cut(columns=(0, 256))
    with pytest.raises(ValueError, match="cannot lie below"):
        qp.PackedMatrix.stack([upper, qp.Quantizer.named("nuq_4").encode(w)])


def test_shares_of_the_columns_sum_to_the_whole():
    """What ranks do that have a share each: round by the largest magnitude of all, add integers."""
    x = matrix(3, 1536, seed=1)
    x[1] *= 100
    for name in ["tcq_3", "fast_3", "nuq_4"]:
        packed = qp.Quantizer.named(name).encode(matrix(16, 1536))
        parts = [(packed.cut(columns=(a, b)), x[:, a:b]) for a, b in [(0, 1024), (1024, 1536)]]
        magnitudes = np.max([part.largest(x) for part, x in parts], axis=0)
        shares = [part.totals(x, magnitudes) for part, x in parts]
        total, scales = sum(totals for totals, _ in shares), shares[0][1]
        assert total.dtype == np.int64 and (scales == shares[1][1]).all()
        factor = scales * np.float32(packed.quantizer.total_unit)
        y = total.astype(np.float32) * packed.scales * factor[:, None]
        assert y.dtype == np.float32 and (y == packed.linear(x)).all(), name
    with pytest.raises(ValueError, match="2 magnitudes for 3 rows"):
        packed.totals(x, magnitudes[:2])


def test_pickles_and_copies():
    packed = qp.Quantizer.named("tcq_3").encode(matrix())
    again = pickle.loads(pickle.dumps(packed))
    assert again.quantizer == packed.quantizer and (again.decode() == packed.decode()).all()
    assert copy.deepcopy(packed.quantizer) == packed.quantizer


def test_sensitivities_and_plans(tmp_path):
    file, seen = tmp_path / "model.json", []
    qp.sensitivity(
        MODEL, file, sequences=1, tokens=8, levels=1, device="cpu", progress=lambda *what: seen.append(what)
    )
    assert seen and file.exists()
    plan = qp.plan(file, bits=3.25, quantizers=["nuq_*"])
    assert 2 < plan.bits <= 3.25 and plan.loss > 0
    assert "nuq_" in str(plan) and plan._repr_svg_().startswith("<svg") and "Plan(" in repr(plan)
    written = tmp_path / "plan.toml"
    plan.write(written)
    assert written.read_text() == plan.toml and "[layers]" in plan.toml
    with pytest.raises(ValueError, match="no budget"):
        qp.plan(file)
    with pytest.raises(ValueError, match="bits"):
        qp.plan(file, bits=-1)
    with pytest.raises(ValueError, match="at least 1 sequence"):
        qp.sensitivity(MODEL, file, sequences=0)

    class Enough(Exception):
        pass

    def progress(*_):
        raise Enough

    with pytest.raises(Enough):
        qp.sensitivity(MODEL, file, sequences=1, tokens=4, levels=1, device="cpu", progress=progress)


def test_a_mixed_installation_is_refused():
    from qpalette import _versions

    with pytest.raises(ImportError, match="installation is mixed"):
        _versions.native("1.0.0", "0.9.0")
    with pytest.raises(ImportError, match="nothing-of-that-name 1.0 or later"):
        _versions.need("qpalette.x", "nothing-of-that-name", "1.0", "x")
    with pytest.raises(ImportError, match="needs numpy 999"):
        _versions.need("qpalette.x", "numpy", "999", "x")


def test_matrices_that_cannot_be():
    q = qp.Quantizer.named("tcq_3")
    broken = matrix()
    broken[3, 4] = np.nan
    with pytest.raises(ValueError, match="finite|number"):
        q.encode(broken)
    with pytest.raises(TypeError):
        q.encode(np.zeros(4))
    packed = q.encode(matrix())
    with pytest.raises(ValueError, match="256 columns"):
        packed.linear(np.zeros((1, 255), np.float32))
    with pytest.raises(ValueError, match="as many"):
        qp.PackedMatrix.from_parts(q, *packed.shape, packed.words[1:], packed.scales)


def test_kernels_are_printed():
    q = qp.Quantizer.named("tcq_2.5")
    assert "__global__" in q.emit() and "__global__" in q.emit("dequantize", target="sm_80")
    for wrong in [dict(target="sm_1"), dict(op="sing"), dict(batch=0), dict(rows=0)]:
        with pytest.raises(ValueError):
            q.emit(**wrong)
    assert "2.5" in q.explain(1024, 1024)


def test_a_model_from_quantizing_to_a_text(tmp_path):
    seen = []
    out = tmp_path / "model"
    qp.quantize(MODEL, out, spec="nuq_4", device="cpu", progress=lambda *what: seen.append(what))
    checkpoint = qp.Checkpoint(out)
    assert len(seen) == len(checkpoint) == len(checkpoint.layers)
    assert seen[-1][0] == seen[-1][1], "all weights are done at the end"
    layer = checkpoint.layers[0]
    assert layer in checkpoint and checkpoint[layer].quantizer.name == "nuq_4"
    assert any(l["name"] == layer for l in json.loads(checkpoint.manifest)["layers"])
    assert 4 <= json.loads(checkpoint.inspect())["totals"]["bits_per_weight"] < 4.2
    with pytest.raises(KeyError):
        checkpoint["nothing"]
    logits = qp.logits(out, [1, 2, 3], device="cpu")
    assert logits.shape == (3, 2048) and (qp.logits(out, [1, 2], device="cpu") == logits[:2]).all()
    text = (MODEL / "valid.txt").read_text()
    assert 10 < qp.perplexity(out, text, limit=1024, device="cpu") < 30
    said = qp.generate(out, "And it came to pass", tokens=8, device="cpu")
    assert said and said == qp.generate(out, "And it came to pass", tokens=8, device="cpu")


def test_quantizing_stops_when_python_does(tmp_path):
    class Enough(Exception):
        pass

    def progress(done, total, layer):
        raise Enough(layer)

    with pytest.raises(Enough):
        qp.quantize(MODEL, tmp_path / "model", spec="nuq_4", device="cpu", progress=progress)
    assert not (tmp_path / "model").exists()
    with pytest.raises(ValueError, match="spec= or plan="):
        qp.quantize(MODEL, tmp_path / "model")
    with pytest.raises(ValueError, match="no device"):
        qp.generate(MODEL, "a", device="tpu")
    with pytest.raises(qp.SpecError, match="nothing_3"):
        qp.quantize(MODEL, tmp_path / "model", spec="nothing_3", device="cpu")
