"""Kernels around the products: against the readable modules, at sizes that fill a tile and sizes that do not."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cascade_nodes.cascade_core.engine.kernels import (
    attention,
    depthwise,
    modulation,
    resident,
    response,
    vqgan,
)
from cascade_nodes.cascade_core.engine.kernels.launch import compile_ahead, launch
from cascade_nodes.cascade_core.engine.kernels.rows import RowTile
from cascade_nodes.cascade_core.errors import CascadeError
from cascade_nodes.cascade_core.networks import layers, stage_a

EPS = 1e-6
SCALE = 1024.0  # of the residual stream in fp16
HALF_STEP = {torch.float32: 5e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}  # relative
dtypes = pytest.mark.parametrize("dtype", HALF_STEP, ids=str)
halves = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_near(value: Tensor, expected: Tensor, dtype: torch.dtype, roundings: int = 1) -> None:
    """Each number within the roundings it went through; near zero, within float32's of the largest."""
    torch.testing.assert_close(
        value.double(),
        expected.double(),
        rtol=roundings * HALF_STEP[dtype],
        atol=2e-6 * float(expected.abs().max()),
    )


def tokens(image: Tensor) -> Tensor:
    return image.permute(0, 2, 3, 1).flatten(1, 2).contiguous()  # (B, C, H, W) -> (B, H · W, C)


def randomised(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Every parameter normal, and a value of `dtype`; in float64, for the expected result."""
    for i, parameter in enumerate(module.parameters()):
        parameter.data = normal(*parameter.shape, dtype=dtype, seed=100 + i).double()
    return module.requires_grad_(False).double()


def taps(convolution: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    weight: Tensor = convolution.get_parameter("weight")
    return weight.reshape(len(weight), 9).T.contiguous().to(dtype), convolution.get_parameter("bias").to(
        dtype
    )


@dtypes
@pytest.mark.parametrize(
    "size",
    [(2, 5, 7, 48), (1, 4, 4, 64), (2, 1, 9, 20), (1, 6, 3, 320), (1, 3, 2, 1280), (1, 2, 2, 37)],
    ids=str,
)
def test_depthwise_norm(size, dtype):
    batch, height, width, channels = size
    block = randomised(layers.ResBlock(channels), dtype)
    x = normal(batch, channels, height, width, dtype=dtype)
    weight, bias = taps(block.get_submodule("depthwise"), dtype)
    out = torch.empty_like(tokens(x))
    depthwise.depthwise_norm(tokens(x), weight, bias, height, width, EPS, out)
    expected = block.get_submodule("norm")(block.get_submodule("depthwise")(x.double()))
    assert_near(out, tokens(expected), dtype)


def response_norm(activated: Tensor, gamma: Tensor) -> Tensor:
    """The published norm of (B, N, K), in float64."""
    norm = layers.GlobalResponseNorm(len(gamma)).requires_grad_(False).double()
    norm.gamma.data = gamma.double().view(1, 1, 1, -1)
    return norm(activated.double()[:, None])[:, 0]


@dtypes
@pytest.mark.parametrize("size", [(2, 35, 200), (1, 64, 256), (3, 1, 40), (1, 300, 520)], ids=str)
def test_response_norm_in_three_launches(size, dtype):
    batch, n, k = size
    h, gamma = normal(*size, dtype=dtype), normal(k, dtype=dtype, seed=1)
    activated = F.gelu(h.double())
    partial, scale = torch.full((batch, response.response_chunks(n, k), k), torch.nan), torch.empty(batch, k)
    response.gelu_response(h, partial)
    assert_near(h, activated, dtype)
    assert_near(partial.sum(1), activated.square().sum(1), torch.float32)
    response.response_scale(partial, gamma, scale)
    response.apply_response(h, scale)
    assert_near(h, response_norm(activated, gamma), dtype, roundings=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("h_scale", [1.0, SCALE])
def test_response_norm_of_a_fraction(h_scale, dtype):
    """The fraction is a power of two, as in fp16, so that no bit changes where none goes under."""
    gamma, images = normal(96, seed=1), normal(2, 40, 96, dtype=dtype)

    def in_three_launches(h: Tensor, h_scale: float, x_scale: float) -> Tensor:
        partial, scale = torch.empty(2, response.response_chunks(40, 96), 96), torch.empty(2, 96)
        response.gelu_response(h, partial, h_scale)
        return response.apply_response(h, response.response_scale(partial, gamma, scale, h_scale, x_scale))

    def in_one_launch(h: Tensor, h_scale: float, x_scale: float) -> Tensor:
        workspace = resident.response_workspace(2, 96, torch.device("cpu"))
        return resident.gelu_response_norm(h, gamma, workspace, h_scale, x_scale)

    for norm in (in_three_launches, in_one_launch):
        if norm is in_three_launches or dtype != torch.float32:
            fraction = norm(images / h_scale, h_scale, SCALE)
            assert torch.equal(fraction * SCALE, norm(images.clone(), 1.0, 1.0))


def test_attention_as_a_fraction():
    qkv = normal(1, 20, 96, dtype=torch.bfloat16)
    key, value = normal(1, 5, 64, dtype=torch.bfloat16, seed=1).chunk(2, dim=-1)
    whole, fraction = qkv.new_empty(1, 20, 32), qkv.new_empty(1, 20, 32)
    attention.attention(qkv, key, value, 2, whole)
    attention.attention(qkv, key, value, 2, fraction, x_scale=SCALE)
    assert torch.equal(fraction * SCALE, whole)


def test_partial_sums_stay_few():
    """One program of `response_scale` has to add them up."""
    for n, k in ((576, 8192), (16384, 1280), (4096, 2560), (1024, 5120), (256, 5120), (9216, 8192)):
        assert response.response_chunks(n, k) * k <= 1.5 * response.PROGRAMS * response.BLOCK_K


@halves
@pytest.mark.parametrize("size", [(2, 70, 128), (1, 64, 64), (3, 5, 20), (2, 300, 80), (1, 64, 96)], ids=str)
def test_response_norm_in_one_launch(size, dtype):
    """One stripe of channels: the interpreter runs programs one after another, so that none may wait for others."""
    batch, _, k = size
    gamma, workspace = normal(k, seed=1).abs(), resident.response_workspace(batch, k, torch.device("cpu"))
    for number in (1, 2):
        h = normal(*size, dtype=dtype, seed=number)
        expected = response_norm(F.gelu(h.double()).to(dtype), gamma)  # it norms what it holds, as rounded
        assert resident.fits(h)
        resident.gelu_response_norm(h, gamma, workspace)
        assert_near(h, expected, dtype, roundings=3)  # a GELU may have been rounded the other way
        assert workspace[1].tolist() == [number * resident.ROUND.value] * batch


@halves
@pytest.mark.parametrize("size", [(2, 70, 128), (1, 300, 64), (3, 5, 20), (1, 64, 96)], ids=str)
def test_response_norm_in_one_launch_in_e4m3(size, dtype):
    """All rows of an image over one power of two, a bound that no value exceeds and at most twice too large."""
    batch, n, k = size
    h, gamma = normal(*size, dtype=dtype), normal(k, seed=1).abs()
    h[0] *= 30
    before = h.clone()
    workspace = resident.response_workspace(batch, k, torch.device("cpu"))
    out8, row_scale = torch.empty(size, dtype=torch.float8_e4m3fn), torch.empty(batch * n)
    resident.gelu_response_norm(h, gamma, workspace, out8=out8, row_scale=row_scale)
    assert torch.equal(h, before)
    expected = response_norm(F.gelu(h.double()).to(dtype), gamma)
    scale = row_scale.double().view(batch, n, 1)
    step = expected.abs() / 16 + scale / 1024
    assert (
        (out8.double() * scale - expected).abs() <= step * 1.01 + 3 * HALF_STEP[dtype] * expected.abs()
    ).all()
    assert torch.equal(scale, scale[:, :1].expand_as(scale))
    assert torch.equal(scale.log2(), scale.log2().round())
    peaks = expected.abs().amax(dim=(1, 2))
    assert (peaks <= 448.1 * scale[:, 0, 0]).all()
    assert (peaks >= 448 / 4 * 0.99 * scale[:, 0, 0]).all()


@dtypes
def test_what_is_not_attended_in_16_bits(dtype):
    """Attention's rows in e4m3 over a bound of the values."""
    qkv, key, value = normal(2, 33, 96, dtype=dtype), *(normal(2, 7, 32, dtype=dtype, seed=i) for i in (1, 2))
    expected = attention.attention(
        qkv, key, value, 2, qkv.new_empty(2, 33, 32), block_m=32, block_n=32
    ).double()
    peak = torch.maximum(qkv.abs().amax(), value.abs().amax()).float().view(1)
    out8, row_scale = torch.empty(2, 33, 32, dtype=torch.float8_e4m3fn), torch.empty(66)
    attention.attention(
        qkv, key, value, 2, out8, block_m=32, block_n=32, row_scale=row_scale, peak=peak, x_scale=2.0
    )
    scale = row_scale.double().view(2, 33, 1)
    assert torch.equal(row_scale, torch.full_like(row_scale, 2 ** float((peak / 896).log2().ceil())))
    step = expected.abs() / 32 + scale / 1024 + HALF_STEP[dtype] * expected.abs()
    assert ((out8.double() * scale - expected / 2).abs() <= step).all()


H100 = 132  # multiprocessors


@pytest.mark.parametrize(
    "size",
    [(2, 576, 8192), (2, 1024, 5120), (2, 256, 5120), (1, 1024, 5120), (2, 600, 6144)],
    ids=str,
)
def test_what_waits_for_each_other_fits_the_device(size):
    batch, n, k = size
    plan = resident.plan(*size, H100)
    assert plan is not None
    programs = batch * -(-k // plan.channels)
    threads = -(-programs // H100) * 32 * plan.num_warps  # on the fullest multiprocessor
    assert threads * plan.registers <= resident.REGISTERS
    assert threads <= resident.THREADS
    tiles, rest_tiles = plan.tiles(n)
    assert tiles * resident.ROWS >= n
    assert rest_tiles * plan.rest_rows() >= n or not plan.rest
    assert 64 * plan.num_warps * plan.data_registers(n) >= n * plan.channels  # two values to a register


def test_stripes_leave_few_multiprocessors_idle():
    """The sizes are those of most blocks of Stage C and Stage B, with guidance."""
    for batch, n, k in ((2, 576, 8192), (2, 1024, 5120)):
        plan = resident.plan(batch, n, k, H100)
        assert plan is not None
        assert batch * k / plan.channels == 128


@pytest.mark.parametrize("size", [(2, 1024, 8192), (8, 576, 8192), (2, 16384, 1280)], ids=str)
def test_what_does_not_fit_is_known(size):
    assert resident.plan(*size, H100) is None


@dtypes
@pytest.mark.parametrize("size", [(2, 3, 5, 48), (1, 4, 4, 256)], ids=str)
def test_modulate(size, dtype):
    batch, height, width, channels = size
    block = randomised(layers.TimestepBlock(channels, 8, conds=()), torch.float32)
    embedding = normal(1, 8).double()
    scale_shift = block.get_submodule("mapper")(embedding).float()[0]  # (2C,)
    x = normal(batch, channels, height, width, dtype=dtype)
    expected = tokens(block(x.double(), embedding.expand(batch, -1)))
    h = modulation.modulate(tokens(x), scale_shift)
    assert_near(h, expected, dtype)


@dtypes
@pytest.mark.parametrize("size", [(2, 7, 48), (1, 33, 256), (2, 3, 1280), (2, 3, 37), (1, 5, 576)], ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
def test_modulate_norm(size, dtype, with_bias):
    channels = size[-1]
    x, scale_shift = normal(*size, dtype=dtype), normal(2 * channels, dtype=dtype, seed=1)
    bias = normal(channels, seed=2) if with_bias else None
    out = torch.empty_like(x)
    scale, shift = scale_shift.double().chunk(2)
    expected = torch.addcmul(shift, x.double(), 1 + scale)
    modulation.modulate_norm(x, scale_shift, bias, out, EPS)
    assert_near(out, F.layer_norm(expected, (channels,), eps=EPS), dtype)
    assert_near(x, expected if bias is None else expected + bias, dtype)


@pytest.mark.parametrize("channels", [48, 320, 784])
def test_a_normed_row_fits_the_scale_of_all(channels):
    """784: its longest row is the largest number of e4m3 over the scale."""
    x = normal(1, 3, channels)
    x[0, 1] = 0
    x[0, 1, 5] = 1  # the longest there is
    out, scale = torch.empty_like(x, dtype=torch.float8_e4m3fn), torch.empty(3)
    tile = RowTile(4, channels // 16, 16, 4)
    modulation.modulate_norm(x.clone(), torch.zeros(2 * channels), None, out, EPS, scale, tile)
    expected = F.layer_norm(x, (channels,), eps=EPS)
    error = (out.float() * scale[:, None] - expected).abs()
    assert (error <= expected.abs() / 16 + scale[:, None] / 1024).all()
    assert torch.equal(scale.log2(), scale.log2().round())
    assert len(set(scale.tolist())) == 1


def test_which_rows_are_held_in_parts():
    """By widths of the published networks: of Stage B, and the last of Stage C."""
    parts = {
        channels: depthwise.norm_tile(channels).parts for channels in (320, 576, 640, 1152, 1280, 1536, 2048)
    }
    assert parts == {320: 5, 576: 9, 640: 5, 1152: 9, 1280: 5, 1536: 3, 2048: 1}
    for in_e4m3, count in ((False, 1), (True, 8)):
        assert modulation.norm_tile(1280, in_e4m3).parts == 5
        assert modulation.norm_tile(2048, in_e4m3).parts == count


@dtypes
@pytest.mark.parametrize("size", [(2, 7, 48), (1, 33, 256), (1, 2, 2048)], ids=str)
def test_norm(size, dtype):
    x = 3 + normal(*size, dtype=dtype)
    out = modulation.norm(x, torch.empty_like(x), EPS)
    assert_near(out, F.layer_norm(x.double(), size[-1:], eps=EPS), dtype)


@dtypes
@pytest.mark.parametrize("self_attn", [True, False])
@pytest.mark.parametrize("tma", [True, False])
@pytest.mark.parametrize(
    "size", [(2, 2, 64, 70, 13), (1, 1, 16, 64, 64), (2, 3, 32, 5, 4), (1, 2, 128, 33, 1)], ids=str
)
def test_attention(size, dtype, self_attn, tma):
    batch, heads, width, n, cached = size
    channels = heads * width
    qkv = normal(batch, n, 3 * channels, dtype=dtype)
    key, value = normal(batch, cached, 2 * channels, dtype=dtype, seed=1).chunk(2, dim=-1)  # rows lie apart
    out = qkv.new_empty(batch, n, channels)
    attention.attention(qkv, key, value, heads, out, self_attn, block_m=32, block_n=32, tma=tma)

    module = layers.Attention(channels, heads).double()
    q, self_key, self_value = qkv.double().chunk(3, dim=-1)
    keys, values = key.double(), value.double()
    if self_attn:
        keys, values = torch.cat([self_key, keys], dim=1), torch.cat([self_value, values], dim=1)
    module.to_q, module.to_k, module.to_v = nn.Identity(), Fixed(keys), Fixed(values)
    module.out_proj = nn.Identity()
    expected = module(q, keys)
    # Weights are rounded before they meet the values: an error of the mean, not of each number.
    torch.testing.assert_close(
        out.double(), expected, rtol=2 * HALF_STEP[dtype], atol=HALF_STEP[dtype] * float(values.abs().max())
    )


class Fixed(nn.Module):
    """A projection whose result is known."""

    def __init__(self, result: Tensor):
        super().__init__()
        self.result = result

    def forward(self, _: Tensor) -> Tensor:
        return self.result


@dtypes
@pytest.mark.parametrize("size", [(2, 24, 5, 9), (1, 64, 8, 8), (1, 192, 1, 3)], ids=str)
def test_residual_block_of_stage_a(size, dtype):
    """All of its kernels in turn; the products are PyTorch's, so that roundings add up."""
    batch, channels, height, width = size
    block = randomised(stage_a.MixingResidualBlock(channels, 2 * channels), dtype)
    for layer in (block.get_submodule("channelwise.0"), block.get_submodule("channelwise.2")):
        layer.get_parameter("weight").div_(channels)
    image = normal(batch, channels, height, width, dtype=dtype)
    expected = tokens(block(image.double()))

    x, gammas = tokens(image), block.get_parameter("gammas").to(dtype)
    h = vqgan.norm_modulate(x, gammas[0], gammas[1], torch.empty_like(x))
    weight, bias = taps(block.get_submodule("depthwise.1"), dtype)
    first, second = block.get_submodule("channelwise.0"), block.get_submodule("channelwise.2")
    next_bias, normal_x = second.get_parameter("bias") * gammas[5], torch.empty_like(x)
    for around, part, out in zip(h, x, normal_x, strict=True):
        depthwise.depthwise_gate_norm(
            around, weight, bias, gammas[2], part, next_bias, gammas[3], gammas[4], out, 0, height, width, EPS
        )
    h = F.linear(normal_x.double(), first.get_parameter("weight"), first.get_parameter("bias")).to(dtype)
    assert_near(vqgan.gelu(h.clone()), F.gelu(h.double()), dtype)
    x = (x + gammas[5] * F.linear(vqgan.gelu(h).double(), second.get_parameter("weight"))).to(dtype)
    assert float((x.double() - expected).norm() / expected.norm()) < 2 * HALF_STEP[dtype]


class CountedKernel:
    """In a kernel's place: how often it is compiled and run."""

    def __init__(self):
        self.compiled = self.run = 0

    def warmup(self, *arguments, grid, **options):
        self.compiled += 1

    def __getitem__(self, grid):
        def run(*arguments, **options):
            self.run += 1

        return run


def test_what_is_alike_is_compiled_ahead_once_and_nothing_is_computed():
    kernel, x = CountedKernel(), normal(2, 8, 32)
    out = torch.full_like(x, 7.0)

    def forward() -> None:
        for value in (x, x.clone(), x.half(), x.flatten()[1:]):
            for _ in range(2):
                launch(kernel, (1,))(value, 3, num_warps=4)
        launch(kernel, (1,))(x, 4, num_warps=4)
        launch(kernel, (1,))(x, 4, num_warps=8)
        modulation.norm(x, out, EPS)

    compile_ahead(forward)
    assert (kernel.compiled, kernel.run) == (5, 0)  # float32, float16, unaligned; another number; other warps
    assert out.eq(7.0).all()
    launch(kernel, (1,))(x, 3)
    assert (kernel.compiled, kernel.run) == (5, 1)
    assert not modulation.norm(x, out, EPS).eq(7.0).any()


def test_compiling_ahead_ends_with_an_error_too():
    kernel = CountedKernel()

    def forward() -> None:
        launch(kernel, (1,))(1)
        raise CascadeError("no")

    for _ in range(2):  # the compiler's own mode would refuse to be entered twice
        with pytest.raises(CascadeError):
            compile_ahead(forward)
    launch(kernel, (1,))(1)
    assert (kernel.compiled, kernel.run) == (2, 1)
