"Layers: spectral norm against torch's old function and the SVD, residual block, TensorFlow's padding, initialisation"
import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from inpaint_lib.core import InputError
from inpaint_lib.layers import ResnetBlock, SameConv2d, channels, init_weights, maybe_spectral_norm, spectral_norm

MAKERS = {'conv': lambda: nn.Conv2d(4, 6, 3, dilation=2), 'transposed': lambda: nn.ConvTranspose2d(4, 6, 4, 2, 1),
          'no bias': lambda: nn.Conv2d(4, 6, 4, 2, 1, bias=False)}


def pair(make):
    torch.manual_seed(0); a = torch.nn.utils.spectral_norm(make())
    torch.manual_seed(0); return a, spectral_norm(make())


@pytest.mark.parametrize('name', MAKERS)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_equals_the_old_function_bit_for_bit(name, dtype):
    old, ours = (m.to(dtype) for m in pair(MAKERS[name]))
    assert list(old.state_dict()) == list(ours.state_dict())
    for train in (True, True, False, True):
        old.train(train); ours.train(train)
        z = torch.randn(2, 4, 8, 8, dtype=dtype)
        assert torch.equal(old(z), ours(z))
    assert all(torch.equal(a, b) for a, b in zip(old.state_dict().values(), ours.state_dict().values()))


def test_gradients_of_two_forwards_in_one_graph():
    old, ours = pair(MAKERS['conv'])
    a, b = torch.randn(2, 1, 4, 8, 8)
    for m in (old, ours): (m(a).relu().sum() - m(b).relu().sum()).backward()      # D(real) - D(fake)
    assert torch.equal(old.weight_orig.grad, ours.weight_orig.grad) and ours.weight_orig.grad.abs().sum() > 0


def test_state_dicts_travel_both_ways():
    old, ours = pair(MAKERS['transposed'])
    ours(torch.randn(1, 4, 8, 8))
    old.load_state_dict(ours.state_dict()); ours.load_state_dict(old.state_dict())
    z = torch.randn(1, 4, 8, 8)
    assert torch.equal(old.eval()(z), ours.eval()(z))


def test_sigma_goes_to_one():
    c = spectral_norm(nn.Conv2d(8, 16, 4, 2, 1))
    for _ in range(300): c(torch.randn(1, 8, 4, 4))
    assert abs(torch.linalg.svdvals(c.weight.flatten(1))[0] - 1) < 1e-3
    t = spectral_norm(nn.ConvTranspose2d(8, 16, 4, 2, 1))
    for _ in range(300): t(torch.randn(1, 8, 4, 4))
    assert abs(torch.linalg.svdvals(t.weight.movedim(1, 0).flatten(1))[0] - 1) < 1e-3


def test_linear_stack_is_1_lipschitz():
    torch.manual_seed(0)
    net = nn.Sequential(spectral_norm(nn.Linear(8, 16)), nn.LeakyReLU(.2), spectral_norm(nn.Linear(16, 4)))
    for _ in range(200): net(torch.randn(1, 8))
    x, y = torch.randn(2, 100, 8)
    assert ((net.eval()(x) - net(y)).norm(dim=1) <= (x - y).norm(dim=1)*1.001).all()


def test_copy_after_a_training_forward():
    c = spectral_norm(nn.Conv2d(3, 4, 3)); x = torch.randn(1, 3, 8, 8)
    c(x).sum().backward()
    d = copy.deepcopy(c)
    assert torch.equal(c.eval()(x), d.eval()(x)) and d.weight_orig is not c.weight_orig


def test_autocast_keeps_the_vectors_in_full_precision():
    a, b = pair(MAKERS['conv'])[1], pair(MAKERS['conv'])[1]
    x = torch.randn(1, 4, 8, 8)
    with torch.autocast('cpu', torch.bfloat16): y = a(x)
    b(x)
    assert y.dtype == torch.bfloat16 and torch.equal(a.weight_u, b.weight_u) and torch.equal(a.weight, b.weight)


def test_spectral_norm_refuses():
    with pytest.raises(InputError, match='ReLU has no weight matrix; expected'): spectral_norm(nn.ReLU())
    with pytest.raises(InputError, match='no weight matrix'): spectral_norm(nn.InstanceNorm2d(3, affine=True))
    with pytest.raises(InputError, match='spectral norm already'): spectral_norm(spectral_norm(nn.Linear(2, 2)))


def test_maybe():
    assert 'weight' in dict(maybe_spectral_norm(nn.Linear(2, 2), False).named_parameters())
    assert 'weight_orig' in dict(maybe_spectral_norm(nn.Linear(2, 2), True).named_parameters())


@pytest.mark.parametrize('sn', [True, False])
@pytest.mark.parametrize('dilation', [1, 2])
def test_resnet_block(sn, dilation):
    torch.manual_seed(0)
    block, x = ResnetBlock(8, dilation, use_spectral_norm=sn), torch.randn(2, 8, 9, 11, requires_grad=True)
    y = block(x)
    assert y.shape == x.shape and torch.equal(y, x + block.conv_block(x)) is (not sn)     # SN takes a power step
    y.square().sum().backward()
    assert x.grad.abs().sum() > 0 and all(p.grad is not None for p in block.parameters())
    weight = 'weight_orig' if sn else 'weight'
    assert f'conv_block.1.{weight}' in block.state_dict() and f'conv_block.5.{weight}' in block.state_dict()
    assert ('conv_block.1.bias' in block.state_dict()) is (not sn)


def test_resnet_block_written_out():
    torch.manual_seed(0)
    block, x = ResnetBlock(4, 2).double(), torch.randn(1, 4, 8, 8, dtype=torch.float64)
    F, (c1, c2) = nn.functional, (block.conv_block[1], block.conv_block[5])
    norm = lambda t: (t - t.mean((2, 3), keepdim=True))/(t.var((2, 3), keepdim=True, unbiased=False) + 1e-5).sqrt()
    h = norm(F.conv2d(F.pad(x, (2,)*4, mode='reflect'), c1.weight, c1.bias, dilation=2)).relu()
    h = norm(F.conv2d(F.pad(h, (1,)*4, mode='reflect'), c2.weight, c2.bias))
    torch.testing.assert_close(block(x), x + h)


@pytest.mark.parametrize('sn', [True, False])
def test_init_reaches_every_weight(sn):
    torch.manual_seed(0)
    net = nn.Sequential(ResnetBlock(32, 2, use_spectral_norm=sn), nn.ConvTranspose2d(32, 32, 4, 2, 1), nn.Linear(64, 64))
    assert init_weights(net) is net
    for name, p in net.named_parameters():
        if name.endswith('bias'): assert p.eq(0).all()
        else: assert abs(p.std() - .02) < .001 and abs(p.mean()) < .002, name
    init_weights(net, std=.5)
    assert all(abs(p.std() - .5) < .03 for n, p in net.named_parameters() if 'weight' in n)


def test_channels():
    assert [channels(n, w) for n, w in ((64, 1), (64, .25), (3, .01), (512, .125))] == [64, 16, 1, 64]
    for bad in (0, -1, float('nan')):
        with pytest.raises(InputError, match='expected a number above 0'): channels(64, bad)


# ---- TensorFlow's padding

def loop(x, w, stride, dilation):
    "SAME by its definition, one output place after the other; what lies outside counts 0"
    (H, W), (O, _, k, _) = x.shape[-2:], w.shape
    need = lambda n: max(0, (math.ceil(n/stride) - 1)*stride + dilation*(k - 1) + 1 - n)
    out = torch.zeros(len(x), O, math.ceil(H/stride), math.ceil(W/stride), dtype=x.dtype)
    for i in range(out.shape[2]):
        for j in range(out.shape[3]):
            for a in range(k):
                for b in range(k):
                    r, c = i*stride + a*dilation - need(H)//2, j*stride + b*dilation - need(W)//2
                    if 0 <= r < H and 0 <= c < W: out[:, :, i, j] += x[:, :, r, c] @ w[:, :, a, b].t()
    return out


@pytest.mark.parametrize('size', [(5, 6), (8, 8), (7, 4)])
@pytest.mark.parametrize('kernel_size,stride,dilation', [(3, 1, 1), (3, 2, 1), (5, 2, 1), (4, 1, 1), (4, 2, 1), (3, 1, 2), (1, 2, 1), (3, 3, 2)])
def test_same_is_tensorflows(size, kernel_size, stride, dilation):
    torch.manual_seed(0)
    conv = SameConv2d(2, 3, kernel_size, stride, dilation, bias=False).double()
    x = torch.rand(2, 2, *size, dtype=torch.float64)
    expected = loop(x, conv.weight.detach(), stride, dilation)
    assert conv(x).shape == expected.shape and torch.allclose(conv(x), expected, atol=1e-12)


@pytest.mark.parametrize('padding,mode', [('symmetric', 'constant'), ('reflect', 'reflect')])
def test_ports_pad_evenly(padding, mode):
    torch.manual_seed(0)
    conv, x = SameConv2d(2, 4, 3, 2, 2, padding=padding), torch.rand(1, 2, 9, 8)
    assert torch.allclose(conv(x), F.conv2d(F.pad(x, (2,)*4, mode=mode), conv.weight, conv.bias, 2, 0, 2), atol=1e-6)
    assert conv(x).shape == SameConv2d(2, 4, 3, 2, 2)(x).shape == (1, 4, 5, 4)


def test_same_conv_is_a_convolution_to_everyone():
    "Keys, initialisation, groups, spectral norm, copies, half precision"
    same, plain = SameConv2d(4, 6, 5, 2), nn.Conv2d(4, 6, 5)
    assert list(same.state_dict()) == list(plain.state_dict()); same.load_state_dict(plain.state_dict())
    assert init_weights(same).bias.eq(0).all() and abs(same.weight.std() - .02) < .003
    x = torch.rand(1, 4, 8, 8, requires_grad=True)
    apart = SameConv2d(4, 4, 3, 2, groups=4, bias=False)
    one = SameConv2d(1, 1, 3, 2, bias=False); one.load_state_dict({'weight': apart.weight[2:3].detach()})
    assert torch.allclose(apart(x)[:, 2:3], one(x[:, 2:3]), atol=1e-6)
    normed = spectral_norm(SameConv2d(4, 6, 5, 2))
    for _ in range(40): normed(x)
    assert abs(torch.linalg.svdvals(normed.weight.flatten(1))[0] - 1) < .01
    copy.deepcopy(normed)(x).sum().backward(); assert x.grad.abs().sum() > 0
    with torch.autocast('cpu', torch.bfloat16): assert same(x).dtype == torch.bfloat16


def test_same_conv_refuses():
    with pytest.raises(InputError, match="no padding 'valid'; expected one of same, symmetric, reflect"): SameConv2d(3, 3, padding='valid')
    with pytest.raises(InputError, match="can't reflect 4 pixels of a map of 4 x 9; expected at least 5"):
        SameConv2d(1, 1, 3, 1, 4, padding='reflect')(torch.rand(1, 1, 4, 9))
