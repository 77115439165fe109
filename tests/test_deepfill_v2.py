"Gated convolution, the documented networks, the critic, the losses, the recipe, fill"
import copy
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from inpaint_lib.core import InputError, count_params, set_seed
from inpaint_lib.data.masks import composite, fill_hole, sample_bin_mask
from inpaint_lib.layers import SameConv2d
from inpaint_lib.papers import deepfill_v2 as v2
from inpaint_lib.papers.deepfill_v1 import COARSE, XCONV, PlainConv
from inpaint_lib.papers.partial_conv import PartialConv2d
from inpaint_lib.training import TrainConfig, Updater, load_checkpoint, save_checkpoint

ROOT = Path(__file__).resolve().parent.parent
TABLE = json.loads((ROOT/'tests'/'golden'/'tables'/'deepfill_v2.json').read_text())
W = .0625


def toy(n=2, size=32, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    mask = torch.stack([torch.from_numpy(sample_bin_mask(3, i, size=size)) for i in range(n)])[:, None].to(dtype)
    image = F.interpolate(torch.rand(n, 3, 5, 5, generator=g, dtype=dtype), size=(size, size), mode='bilinear')
    return dict(image=image, mask=mask, epoch=torch.zeros(n, dtype=torch.long), index=torch.arange(n))


@pytest.mark.parametrize('kw', [{}, dict(stride=2), dict(dilation=3), dict(up=True), dict(kernel_size=5), dict(padding='symmetric', stride=2)])
@pytest.mark.parametrize('act', [F.elu, F.relu, None])
def test_gated_convolution_is_its_formula(kw, act):
    set_seed(0); x = torch.randn(2, 3, 12, 14).double()
    layer = v2.GatedConv2d(3, 4, act=act, **kw).double()
    kw = dict(kw); up = kw.pop('up', False); k = kw.pop('kernel_size', 3)
    f, g = (SameConv2d(3, 4, k, kw.get('stride', 1), kw.get('dilation', 1), padding=kw.get('padding', 'same')).double() for _ in range(2))
    for conv, part in ((f, slice(4)), (g, slice(4, 8))):
        conv.weight.data, conv.bias.data = layer.conv.weight.data[part], layer.conv.bias.data[part]
    z = x.repeat_interleave(2, 2).repeat_interleave(2, 3) if up else x
    want = (f(z) if act is None else act(f(z)))*torch.sigmoid(g(z))
    assert torch.allclose(layer(x), want, atol=1e-12) and torch.allclose(layer.gates(x), torch.sigmoid(g(z)), atol=1e-12)
    assert layer(x).shape == want.shape and list(layer.state_dict()) == ['conv.weight', 'conv.bias']


def test_gradient_of_a_gated_convolution():
    set_seed(0); layer = v2.GatedConv2d(2, 2, stride=2).double()
    assert torch.autograd.gradcheck(layer, (torch.randn(1, 2, 5, 6).double().requires_grad_(),))


@pytest.mark.parametrize('gate', v2.GATES)
@pytest.mark.parametrize('kw', [{}, dict(stride=2), dict(dilation=2), dict(up=True)])
def test_light_gates(gate, kw):
    i, o, k = 6, 5, 3
    extra = dict(full=k*k*i*o + o, separable=k*k*i + i*o + o, pointwise=i*o + o, single=k*k*i + 1)[gate]
    layer, x = v2.GatedConv2d(i, o, k, gate=gate, **kw), torch.rand(2, i, 8, 12)
    assert count_params(layer) == k*k*i*o + o + extra
    assert layer(x).shape == PlainConv(i, o, k, **kw)(x).shape and layer(x).isfinite().all()
    assert layer.gates(x).shape[1] == (1 if gate == 'single' else o)


def test_partial_block_is_partial_convolution_with_same_padding():
    set_seed(1); x, valid = torch.randn(2, 3, 9, 12).double(), (torch.rand(2, 1, 9, 12) > .8).double()
    for k, d in ((3, 1), (3, 4), (5, 1)):
        block = v2.PartialBlock(3, 4, k, dilation=d).double(); nn.init.normal_(block.conv.bias)
        ref = PartialConv2d(3, 4, k, padding=d*(k//2), dilation=d).double(); ref.load_state_dict(block.conv.state_dict())
        (y, new), (want, new_ref) = block(x, valid), ref(x, valid)
        assert torch.allclose(y, F.elu(want)) and torch.equal(new, new_ref)
    block = v2.PartialBlock(3, 4, 3, stride=2, act=None).double(); y, new = block(x, torch.ones_like(valid))
    same = SameConv2d(3, 4, 3, 2).double(); same.weight.data, same.bias.data = block.conv.weight.data, block.conv.bias.data
    assert torch.allclose(y[..., 1:-1, 1:-1], same(x)[..., 1:-1, 1:-1]) and new.min() == 1 and y.shape == same(x).shape
    y, new = v2.PartialBlock(3, 4, up=True).double()(x, valid)
    assert y.shape[-2:] == new.shape[-2:] == (18, 24)


def test_partial_network_hides_the_hole_in_the_first_stage_only():
    set_seed(0); b = toy(1); image, mask = 2*b['image'] - 1, b['mask']
    G = v2.DeepFillV2Generator(W, conv='partial', in_ch=6).double()
    assert G.coarse.masked and not any(c.masked for c in (G.refine.xconv, G.refine.pmconv, G.refine.pmconv_after, G.refine.allconv))
    outs = [G(v2.network_input(image, mask, s), mask) for s in (torch.zeros_like(mask), mask)]
    assert torch.equal(outs[0][0], outs[1][0])                # a sketch in the hole is not seen
    gated = v2.keep_signal(v2.DeepFillV2Generator(W, in_ch=6)).double()
    outs = [gated(v2.network_input(image, mask, s), mask)[0] for s in (torch.zeros_like(mask), mask)]
    assert not torch.allclose(*outs)


def test_rows_and_totals_of_the_networks():
    "Without a forward: channels, kernels, strides, dilations, parameters of every row (the notebook runs the sizes, too)"
    G, D = v2.DeepFillV2Generator(), v2.SNPatchDiscriminator()
    blocks = {n.split('.')[-1]: m for n, m in G.named_modules() if isinstance(m, (v2.GatedConv2d, PlainConv))}
    assert set(blocks) == {r['name'] for r in TABLE['rows'] if r['net'] == 'G'}
    for r in TABLE['rows']:
        conv = blocks[r['name']].conv if r['net'] == 'G' else getattr(D.convs, r['name'])
        found = (conv.kernel_size[0], conv.stride[0], conv.dilation[0], conv.in_channels, conv.out_channels, count_params(conv))
        assert found == tuple(r[k] for k in ('kernel', 'stride', 'dilation', 'in_ch', 'conv_ch', 'params')), r['name']
    assert [n for n, m in blocks.items() if isinstance(m, PlainConv)] == ['conv17', 'allconv17']
    assert [n for n, m in blocks.items() if m.act is F.relu] == ['pmconv6']
    assert (count_params(G), count_params(D)) == (4_052_478, 5_946_816)
    assert (count_params(v2.DeepFillV2Generator(in_ch=6)), count_params(v2.SNPatchDiscriminator(5))) == (4_053_678, 5_948_416)


@pytest.mark.parametrize('kw', [{}, dict(conv='partial'), dict(conv='vanilla'), dict(gate='single'), dict(in_ch=6), dict(padding='symmetric'),
                                dict(padding='reflect'), dict(attention=dict(fuse=False))])
def test_generator_runs_trains_and_stays_in_range(kw):
    set_seed(0); b = toy(size=72 if kw.get('padding') == 'reflect' else 40); image, mask = 2*b['image'] - 1, b['mask']
    G = v2.keep_signal(v2.DeepFillV2Generator(W, **kw)).double()
    coarse, refined = G(v2.network_input(image, mask, mask if G.in_ch == 6 else None), mask)
    assert coarse.shape == refined.shape == image.shape and max(coarse.abs().max(), refined.abs().max()) < 1
    (refined**2).mean().backward()                            # through the composite into the first stage
    still = [n for n, p in G.named_parameters() if p.grad is None or p.dim() > 1 and p.grad.abs().max() == 0]
    assert not still, still


def test_skip_adds_the_masked_picture_and_nothing_in_the_hole():
    set_seed(0); b = toy(1); image, mask = 2*b['image'] - 1, b['mask']
    plain, skip = (v2.DeepFillV2Generator(W, skip=s).double() for s in (False, True))
    skip.load_state_dict(plain.state_dict())
    x = v2.network_input(image, mask)
    a, b = (g(x, mask) for g in (plain, skip))
    assert torch.allclose(b[0] - a[0], x[:, :3]) and torch.allclose((a[1] - b[1])*mask, torch.zeros(()).double(), atol=1e-12)


def test_start_is_glorot_uniform():
    for net in (v2.DeepFillV2Generator(.25), v2.DeepFillV2Generator(.25, conv='partial'), v2.SNPatchDiscriminator(4, .25)):
        for n, p in net.named_parameters():
            if p.dim() == 1: assert (p == 0).all(), n
            else:
                bound = math.sqrt(6/((p.shape[0] + p.shape[1])*p[0, 0].numel()))
                assert .95*bound < p.abs().max() <= bound or p.numel() < 200, n


@pytest.mark.parametrize('gate', v2.GATES)
def test_keep_signal_changes_features_alone(gate):
    set_seed(0); G = v2.DeepFillV2Generator(.25, gate=gate); before = {k: v.clone() for k, v in G.state_dict().items()}
    assert v2.keep_signal(G) is G
    for name, m in G.named_modules():
        if isinstance(m, v2.GatedConv2d):
            new, old = m.conv.weight, before[f'{name}.conv.weight']
            factor = 6**.5 if gate == 'full' else 2.
            assert torch.allclose(new[:m.out_ch], old[:m.out_ch]*factor) and torch.equal(new[m.out_ch:], old[m.out_ch:])
    touched = {k for k, v in G.state_dict().items() if not torch.equal(v, before[k])}
    assert touched == {f'{n}.conv.weight' for n, m in G.named_modules() if isinstance(m, v2.GatedConv2d)}


def test_gain_of_a_recipe_is_keep_signal():
    def start(**kw): set_seed(0); return v2.DeepFillV2Recipe(v2.DeepFillV2Config(width=W, **kw))
    plain, kept = start(), start(gain=3.)
    assert all(torch.equal(a, b) for a, b in zip(v2.keep_signal(plain.G, 3.).parameters(), kept.G.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(plain.D.parameters(), kept.D.parameters())) and kept.deviations == ['gain=3.0']
    for conv in ('vanilla', 'partial'):
        a, b = (start(conv=conv, gain=g).G for g in (1., 3.))
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))


@pytest.mark.parametrize('gain', [1., 6**.5])
def test_gain_means_the_same_for_all_gates(gain):
    "A fresh gated layer hands on gain/sqrt(6) of its signal"
    def handed_on(gate):
        set_seed(0); G = v2.DeepFillV2Recipe(v2.DeepFillV2Config(width=.5, gate=gate, gain=gain)).G
        layer, x = G.coarse.conv5, torch.randn(4, 48, 24, 24)
        layer.act = None
        return (layer(x).std()/x.std()).item()
    assert all(abs(handed_on(gate)/(gain/6**.5) - 1) < .15 for gate in v2.GATES)


def test_critic():
    set_seed(0); D = v2.SNPatchDiscriminator(4, .125).train()
    for size, want in ((256, 4), (64, 1), (96, 2), (40, 1)): assert D(torch.rand(1, 4, size, size)).shape == (1, 32, want, want)
    for _ in range(60): D(torch.rand(1, 4, 32, 32))
    D.eval(); D(torch.rand(1, 4, 32, 32))
    norms = [torch.linalg.matrix_norm(c.weight.flatten(1), 2).item() for c in D.convs]
    assert all(abs(n - 1) < .02 for n in norms)
    x = torch.rand(2, 4, 64, 64); y = D(x)
    assert torch.allclose(y, torch.cat([D(x[:1]), D(x[1:])]), atol=1e-6) and (y < 0).any()      # leaky: below 0 too


def test_hinge_by_hand():
    s = torch.tensor([2., 0., -3., 1.], dtype=torch.float64)
    assert v2.critic_loss(s) == .75 and v2.critic_loss(torch.tensor([1., 1, -1, -1])) == 0 and v2.critic_loss(torch.zeros(4)) == 1


def test_sketch_channel_and_input():
    edge, mask = torch.tensor([[[[.5, .6, .61, 1.]]]]), torch.tensor([[[[1., 1, 1, 0]]]])
    assert v2.sketch_channel(edge, mask).flatten().tolist() == [0, 0, 1, 0]
    assert v2.sketch_channel(edge, mask, .5).flatten().tolist() == [0, 1, 1, 0]
    x = v2.network_input(torch.full((1, 3, 1, 4), math.nan).where(mask > 0, torch.tensor(.3)), mask, edge)
    assert torch.equal(x[0, :, 0, 0], torch.tensor([0., 0, 0, .5, 1, 1])) and torch.equal(x[0, 3:, 0, 3], torch.tensor([1., 1, 0]))


@pytest.mark.parametrize('kw,word', [(dict(conv='open'), "no conv 'open'"), (dict(gate='half'), "no gate 'half'"), (dict(in_ch=4), 'in_ch 4'),
                                     (dict(gate='single', conv='vanilla'), "expected conv 'gated'"), (dict(padding='none'), 'padding'),
                                     (dict(conv='partial', padding='reflect'), "expected 'same'"), (dict(width=0), 'width 0')])
def test_refused_networks(kw, word):
    with pytest.raises(InputError, match=word): v2.DeepFillV2Generator(**{'width': W} | kw)


@pytest.mark.parametrize('kw,word', [(dict(lambda_l1=-1.), 'lambda_l1'), (dict(lambda_adv=math.nan), 'lambda_adv'), (dict(width=-1), 'width'),
                                     (dict(lambda_l1=0, lambda_adv=0), 'no loss term'), (dict(sketch_threshold=1.), 'sketch_threshold'),
                                     (dict(sketch_sigma=0.), 'sketch_sigma'), (dict(gain=0.), 'gain'), (dict(gain=math.inf), 'gain'), (dict(conv='x'), 'conv'), (dict(gate='x'), 'gate'),
                                     *[({k: v}, k) for k in ('width', 'gain', 'lambda_l1', 'lambda_adv', 'sketch_threshold', 'sketch_sigma', 'lr', 'd2g')
                                       for v in ('a', None, True, math.nan, -1.)],
                                     (dict(skip='no'), 'skip'), (dict(sketch=1), 'sketch'), (dict(seed=.5), 'seed'), (dict(seed=True), 'seed'), (dict(gate=[]), 'no gate'),
                                     *[(dict(betas=b), 'betas') for b in ((.5, 1.), (-.1, .9), (.5,), .5, ('a', .9), (True, .9), None)]])
def test_refused_configs(kw, word):
    with pytest.raises(InputError, match=word): v2.DeepFillV2Config(**kw)


@pytest.mark.parametrize('size', [30, 8, 44])
def test_refused_sizes(size):
    b = toy(1, size)
    with pytest.raises(InputError, match=f'{size}x{size}'): v2.fill(v2.DeepFillV2Generator(W).double(), b['image'], b['mask'])


@pytest.mark.parametrize('sketch', [False, True])
def test_recipe_terms_by_hand(sketch):
    set_seed(0); b = toy()
    r = v2.DeepFillV2Recipe(v2.DeepFillV2Config(width=W, sketch=sketch, lambda_l1=2., lambda_adv=.5)).double().eval()
    out = r(b); image, mask = 2*b['image'] - 1, b['mask']
    z = composite(out['refined'], image, mask); about = torch.cat([out['sketch'], mask], 1) if sketch else mask
    fake, real = (r.D(torch.cat([x, about], 1)) for x in (z, image))
    d, g = r.d_terms(b, out), r.g_terms(b, out)
    assert torch.isclose(d['d_hinge'], (F.relu(1 - real).mean() + F.relu(1 + fake).mean())/2)
    assert torch.isclose(g['g_adv'], -.5*fake.mean()) and torch.isclose(g['l1_coarse'], 2*(out['coarse'] - image).abs().mean())
    assert torch.isclose(g['l1_refined'], 2*(out['refined'] - image).abs().mean()) and len(g) == 3
    assert torch.equal(out['comp'][(mask == 0).expand_as(image)], b['image'][(mask == 0).expand_as(image)])
    assert (r.name, r.method, r.update, r.separate_batches) == ('deepfill_v2' + '.sketch'*sketch, 'deepfill_v2', 'alternating', True)
    assert list(r.pictures(b, out)) == ['image', 'masked', 'coarse', 'pred', 'comp', *['sketch']*sketch]


def test_sketch_comes_from_the_batch_or_from_canny():
    b = toy(); r = v2.DeepFillV2Recipe(v2.DeepFillV2Config(width=W, sketch=True)).double()
    own = torch.rand_like(b['mask'])
    assert torch.equal(r(b | dict(edge=own))['sketch'], (own > .6)*b['mask'])
    lines = v2.edge_maps(v2.rgb_to_gray(b['image']), 2.)
    assert torch.equal(r(b)['sketch'], (lines*b['mask']).to(b['mask']))
    assert 'sketch' not in v2.DeepFillV2Recipe(v2.DeepFillV2Config(width=W)).double()(b | dict(edge=own))


def test_without_a_critic():
    r = v2.DeepFillV2Recipe(v2.DeepFillV2Config(width=W, lambda_adv=0.)).double()
    b = toy(); assert r.D is None and list(r.g_terms(b, r(b))) == ['l1_coarse', 'l1_refined'] and 'no critic' in r.deviations[0]
    assert v2.DeepFillV2Recipe(v2.DeepFillV2Config(width=W)).deviations == []
    assert v2.DeepFillV2Recipe(v2.DeepFillV2Config(width=W, conv='vanilla', skip=True)).deviations == ['conv=vanilla', 'skip=True']


def test_checkpoint_goes_on_bit_for_bit(tmp_path):
    config, run = v2.DeepFillV2Config(width=W), TrainConfig(steps=4, device='cpu')
    def fresh(): set_seed(0); return Updater(v2.DeepFillV2Recipe(config), run)
    draws = lambda k: [[toy(dtype=torch.float32, seed=2*k + i)] for i in range(2)]     # D's batch, G's batch
    through = fresh()
    for k in range(4): through.update(draws(k))
    first = fresh()
    for k in range(2): first.update(draws(k))
    save_checkpoint(first, tmp_path/'c.pt'); second = fresh(); load_checkpoint(second, tmp_path/'c.pt')
    for k in range(2, 4): second.update(draws(k))
    assert all(torch.equal(a, b) for a, b in zip(through.recipe.state_dict().values(), second.recipe.state_dict().values()))


@pytest.mark.parametrize('size', [32, 64])
def test_bf16_is_near_fp32(size):
    def step(precision):
        set_seed(0); up = Updater(v2.DeepFillV2Recipe(v2.DeepFillV2Config(width=.125)), TrainConfig(steps=1, device='cpu', precision=precision))
        return up.update([[toy(size=size, dtype=torch.float32)], [toy(size=size, dtype=torch.float32)]])
    a, b = step('fp32'), step('bf16')
    assert all(abs(a[k] - b[k]) < .02*max(1, abs(a[k])) for k in ('d_hinge', 'g_adv', 'l1_coarse', 'l1_refined'))


@pytest.mark.parametrize('hw', [(32, 32), (16, 32), (32, 128), (8, 8)])
def test_bf16_gradients_of_tiny_maps_are_defined(hw):
    "PyTorch's CPU kernel leaves them undefined for maps of one pixel: 15 of 200 passes were NaN at 32 pixels"
    set_seed(0); D = v2.SNPatchDiscriminator(4, .25)
    for _ in range(60):
        D.zero_grad()
        with torch.autocast('cpu', dtype=torch.bfloat16): D(torch.rand(2, 4, *hw)).float().mean().backward()
        assert all(p.grad.isfinite().all() for p in D.parameters())


def test_tiny_maps_under_autocast_are_float32():
    set_seed(0); D = v2.SNPatchDiscriminator(4, .25).eval(); seen = []
    for conv in D.convs: conv.register_forward_hook(lambda m, args, out: seen.append(out.dtype))
    with torch.autocast('cpu', dtype=torch.bfloat16): D(torch.rand(1, 4, 32, 32))
    assert seen == [torch.bfloat16]*5 + [torch.float32]
    x = torch.rand(1, 4, 32, 32); want = x
    for conv in D.convs: want = F.leaky_relu(conv(want), .2)
    assert torch.equal(D(x), want) and D.double()(x.double()).dtype == torch.float64


def test_refused_verdicts_and_inputs():
    for s in (torch.zeros(3), torch.zeros(1, 256, 4, 4), torch.tensor(1.), torch.zeros(0)):
        with pytest.raises(InputError, match='even batch'): v2.critic_loss(s)
    for shape in ((1, 5, 64, 64), (4, 64, 64)):
        with pytest.raises(InputError, match=r'expected \(B,4,H,W\)'): v2.SNPatchDiscriminator(4, W)(torch.zeros(shape))
    z = torch.zeros
    for wrong in ((z(1, 3, 16, 16), z(1, 1, 16, 24)), (z(1, 4, 16, 16), z(1, 1, 16, 16)), (z(2, 3, 16, 16), z(1, 1, 16, 16)),
                  (z(1, 3, 16, 16), z(1, 1, 16, 16), z(1, 1, 8, 8)), (z(3, 16, 16), z(1, 16, 16))):
        with pytest.raises(InputError, match='of one size'): v2.network_input(*wrong)


@pytest.mark.parametrize('in_ch', [5, 6])
def test_fill_sees_nothing_below_the_mask(in_ch):
    set_seed(0); b = toy(2, dtype=torch.float32); image, mask = b['image'], b['mask']
    G = v2.keep_signal(v2.DeepFillV2Generator(.125, in_ch=in_ch)).eval()
    a = v2.fill(G, image, mask); assert a['pred'].std() > 1e-4               # an answer that could show an influence
    for x in (torch.where(mask > 0, torch.rand_like(image), image), fill_hole(image, mask, math.nan)):
        c = v2.fill(G, x, mask)
        assert all(torch.equal(a[k], c[k]) for k in a)
    assert {k: v.shape[1] for k, v in a.items()} == dict(pred=3, comp=3, coarse=3, offsets=3, **{'attention arrows': 3}, **{f'gate {n}': 1 for n in ('conv1', 'conv5', 'allconv14')})
    assert all(v.shape[-2:] == image.shape[-2:] and 0 <= v.min() and v.max() <= 1 for v in a.values())
    assert not any(m._forward_hooks for m in G.modules())


def test_fill_takes_a_sketch():
    set_seed(0); b = toy(1, dtype=torch.float32); G = v2.keep_signal(v2.DeepFillV2Generator(.125, in_ch=6)).eval()
    none, zeros, lines = (v2.fill(G, b['image'], b['mask'], sketch=s)['pred'] for s in (None, torch.zeros_like(b['mask']), b['mask']))
    outside = v2.fill(G, b['image'], b['mask'], sketch=1 - b['mask'])['pred']
    assert torch.equal(none, zeros) and torch.equal(none, outside) and not torch.equal(none, lines)
    with pytest.raises(InputError, match='without a sketch channel'): v2.fill(v2.DeepFillV2Generator(W), b['image'], b['mask'], sketch=b['mask'])
    with pytest.raises(InputError, match='as the mask'): v2.fill(G, b['image'], b['mask'], sketch=b['mask'][..., :16])


def test_ungated_networks_have_no_gates_to_show():
    b = toy(1, dtype=torch.float32)
    for conv in ('partial', 'vanilla'): assert set(v2.fill(v2.DeepFillV2Generator(W, conv=conv), b['image'], b['mask'])) == {'pred', 'comp', 'coarse', 'offsets', 'attention arrows'}


def test_gates_of_chosen_layers():
    b = toy(1, dtype=torch.float32); G = copy.deepcopy(v2.DeepFillV2Generator(.125)); x = v2.network_input(b['image'], b['mask'])
    seen, hooks = v2.watch_gates(G, ('coarse.conv3', 'refine.xconv.xconv5', 'coarse.conv17'), mean=False)
    with torch.no_grad(): G(x, b['mask'])
    assert {k: tuple(v.shape[1:]) for k, v in seen.items()} == {'coarse.conv3': (6, 16, 16), 'refine.xconv.xconv5': (12, 8, 8)}
    for h in hooks: h.remove()
    assert [r[0] for r in COARSE[:2]] == ['conv1', 'conv2_downsample'] and XCONV[0][0] == 'xconv1'
