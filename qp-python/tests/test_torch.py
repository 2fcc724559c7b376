"""The operator of PyTorch."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import qpalette as qp  # noqa: E402
import qpalette.torch as qpt  # noqa: E402


def layer(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Linear(256, 64)


def test_the_operator_is_the_codec():
    linear = layer()
    quantized = qpt.Linear.of(linear, qp.Quantizer.named("tcq_4"))
    x = torch.randn(2, 3, 256)
    with torch.no_grad():
        y = quantized(x)
    packed = qp.Quantizer.named("tcq_4").encode(linear.weight.detach().numpy())
    expected = packed.linear(x.reshape(6, 256).numpy()) + linear.bias.detach().numpy()
    assert y.shape == (2, 3, 64) and (y.reshape(6, 64).numpy() == expected).all()
    near = linear(x)
    assert (y - near).norm() < 0.15 * near.norm()
    assert quantized(x.to(torch.bfloat16)).dtype == torch.bfloat16


def test_it_is_an_operator_like_others():
    quantized = qpt.Linear.of(layer(), qp.Quantizer.named("nuq_4"))
    args = (torch.randn(3, 256), quantized.words, quantized.scales, quantized.spec, 64, 256)
    torch.library.opcheck(torch.ops.qp.linear.default, args, test_utils=("test_schema", "test_faketensor"))
    with pytest.raises(Exception, match="256 columns"):
        torch.ops.qp.linear(torch.randn(1, 255), *args[1:])


def test_it_compiles_as_one_graph():
    quantized = qpt.Linear.of(layer(), qp.Quantizer.named("nuq_4"))
    compiled = torch.compile(torch.nn.Sequential(quantized, torch.nn.ReLU()), fullgraph=True, backend="aot_eager")
    for tokens in (1, 5):
        x = torch.randn(tokens, 256)
        with torch.no_grad():
            assert (compiled(x) == torch.relu(quantized(x))).all()


def test_state_and_changed_words():
    first = qpt.Linear.of(layer(0), qp.Quantizer.named("nuq_4"))
    second = qpt.Linear.of(layer(1), qp.Quantizer.named("nuq_4"))
    x = torch.randn(1, 256)
    before = first(x)
    first.load_state_dict(second.state_dict())
    assert (first(x) == second(x)).all() and not (first(x) == before).all()


def test_models_are_quantized_in_place():
    model = torch.nn.Sequential(torch.nn.Linear(128, 128), torch.nn.ReLU(), torch.nn.Linear(128, 64))
    assert qpt.quantize_(model, lambda name, _: "nuq_3" if name == "0" else None) is model
    assert isinstance(model[0], qpt.Linear) and isinstance(model[2], torch.nn.Linear)
    assert "nuq_3" in repr(model) and model(torch.randn(1, 128)).shape == (1, 64)
    qpt.quantize_(model, qp.Quantizer.named("nuq_4"))
    assert model[2].name == "nuq_4" and model[0].name == "nuq_3"
