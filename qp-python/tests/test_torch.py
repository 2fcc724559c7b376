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
    args = (torch.randn(3, 256), quantized.packed, quantized.scales, quantized.spec, 64, 256)
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


def test_embeddings_are_looked_up():
    table = torch.randn(100, 256)
    matrix = qp.Quantizer.named("tcq_4").encode(table.numpy())
    embedding = qpt.Embedding(matrix, torch.bfloat16)
    tokens = torch.tensor([[5, 99], [0, 5]])
    y = embedding(tokens)
    wanted = torch.from_numpy(matrix.decode())[tokens].to(torch.bfloat16)
    assert y.dtype == torch.bfloat16 and (y == wanted).all()
    assert embedding.float()(tokens).dtype == torch.float32
    compiled = torch.compile(embedding, fullgraph=True, backend="aot_eager")
    assert (compiled(tokens) == embedding(tokens)).all()
    with pytest.raises(IndexError, match="row 100"):
        embedding(torch.tensor([100]))


def test_layers_are_saved_with_their_quantizer(tmp_path):
    from qpalette import _registry

    quantized = qpt.Linear.of(layer(), qp.Quantizer.named("nuq_4"))
    torch.save(quantized, tmp_path / "layer.pt")
    _registry._known.pop(quantized.spec)
    again = torch.load(tmp_path / "layer.pt", weights_only=False)
    x = torch.randn(2, 256)
    assert again.spec == quantized.spec and (again(x) == quantized(x)).all()


def test_conversions_leave_scales_alone():
    quantized = qpt.Linear.of(layer(), qp.Quantizer.named("nuq_4"))
    scales = quantized.scales.clone()
    for changed in [quantized.half(), quantized.float(), quantized.to(torch.bfloat16)]:
        assert changed.scales.dtype == torch.bfloat16 and (changed.scales == scales).all()
    assert quantized.bias.dtype == torch.bfloat16
    assert (quantized.matrix().decode() == qpt.Linear.of(layer(), qp.Quantizer.named("nuq_4")).matrix().decode()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["nuq_4", "tcq_2.5"])
def test_the_launches_of_a_gpu_give_the_same_bits(name, dtype):
    """On the interpreter: kernels, scratch and order of the launches are those of a GPU."""
    from qpalette import _cuda

    # Rows that are no whole tiles.
    linear = torch.nn.Linear(320, 72, bias=False)
    quantized = qpt.Linear.of(linear, qp.Quantizer.named(name))
    for shape in [(1, 320), (3, 320), (2, 6, 320)]:
        x = torch.randn(shape).to(dtype)
        arguments = (x, quantized.packed, quantized.scales, quantized.spec, 72, 320)
        y = _cuda.run(None, 0, *arguments)
        assert y.dtype == dtype and y.shape == (*shape[:-1], 72)
        assert (y == torch.ops.qp.linear(*arguments)).all(), shape
    assert _cuda.run(None, 0, x[:, :0], *arguments[1:]).shape == (2, 0, 72)
    with pytest.raises(ValueError, match="words of 32 bits"):
        _cuda.run(None, 0, x, quantized.packed[1:], *arguments[2:])
    with pytest.raises(ValueError, match="3 scales for 72 rows"):
        _cuda.run(None, 0, x, quantized.packed, quantized.scales[:3], *arguments[3:])


@pytest.mark.parametrize("name", ["nuq_4", "fast_3"])
def test_the_launches_of_a_share_give_the_same_bits(name):
    from qpalette import _cuda

    quantized = qpt.Linear.of(torch.nn.Linear(320, 72, bias=False), qp.Quantizer.named(name))
    matrix = quantized.packed, quantized.spec, 72, 320
    for shape in [(1, 320), (3, 320), (2, 6, 320), (0, 320)]:
        x = torch.randn(shape)
        largest = torch.ops.qp.largest(x, *matrix)
        assert (_cuda.largest_of(None, 0, x, *matrix[1:]) == largest).all() and largest.shape == shape[:-1]
        given = 1.25 * largest
        totals, scales = torch.ops.qp.totals(x, given, *matrix)
        assert totals.shape == (*shape[:-1], 72, 2)
        on_device = _cuda.totals_of(None, 0, x, given, *matrix)
        assert (on_device[0] == totals).all() and (on_device[1] == scales).all()
    torch.library.opcheck(torch.ops.qp.largest.default, (x, *matrix), test_utils=("test_schema", "test_faketensor"))
    arguments = (x, given, *matrix)
    torch.library.opcheck(torch.ops.qp.totals.default, arguments, test_utils=("test_schema", "test_faketensor"))


def _rank(rank, parts, x, wanted, file):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=len(parts))
    part, columns, bias = parts[rank]
    with torch.no_grad():
        y = qpt.SharedLinear(part, bias)(x[..., columns[0] : columns[1]])
    assert (y == wanted).all()
    dist.destroy_process_group()


def test_ranks_sum_to_the_whole(tmp_path):
    whole = qpt.Linear.of(torch.nn.Linear(1536, 64), qp.Quantizer.named("fast_3"))
    x = torch.randn(2, 3, 1536)
    parts = [(whole.matrix().cut(columns=c), c, whole.bias) for c in [(0, 1024), (1024, 1536)]]
    with torch.no_grad():
        arguments = (parts, x, whole(x), tmp_path / "meet")
    torch.multiprocessing.spawn(_rank, arguments, nprocs=2)


def test_the_look_ups_of_a_gpu_give_the_same_bits():
    from qpalette import _cuda

    embedding = qpt.Embedding(qp.Quantizer.named("tcq_3").encode(torch.randn(70, 256).numpy()))
    tokens = torch.tensor([[5, 69, 0]])
    arguments = (tokens, embedding.packed, embedding.scales, embedding.spec, 70, 256, torch.float32)
    assert (_cuda.look_up(None, 0, *arguments) == embedding(tokens)).all()


def test_what_is_no_quantizer_is_said():
    with pytest.raises(ValueError, match="make the layer, or load the model, first"):
        torch.ops.qp.linear(torch.zeros(1, 4), torch.zeros(1), torch.zeros(1), "0" * 64, 4, 4)
