"Context Encoder: layer counts, losses by hand, what flows where, filling pictures of any size"
import math
import warnings

import pytest
import torch
from torch import nn

from inpaint_lib.core import InputError, count_params, set_seed
from inpaint_lib.papers import context_encoder as ce
from inpaint_lib.training import TrainConfig, Updater

TINY = dict(width=.0625, bottleneck=12)
META = torch.device('meta')


def hole(h=128, w=128, *boxes, n=1, dtype=torch.float32):
    m = torch.zeros(n, 1, h, w, dtype=dtype)
    for t, b, l, r in boxes: m[..., t:b, l:r] = 1
    return m


def batch(n=2, region='center', dtype=torch.float64):
    set_seed(1)
    box = (36, 92, 36, 92) if region == 'center' else (20, 80, 50, 121)
    return dict(image=torch.rand(n, 3, 128, 128, dtype=dtype), mask=hole(128, 128, box, n=n, dtype=dtype),
                epoch=torch.zeros(n, dtype=torch.long), index=torch.arange(n))


def recipe(**kw):
    set_seed(0)
    return ce.ContextEncoderRecipe(ce.ContextEncoderConfig(**TINY | kw)).double()


class Linear(nn.Module):
    "A critic whose logit is the weighted sum of its input"
    def __init__(self, size, slope): super().__init__(); self.w = nn.Parameter(torch.full((3, size, size), slope, dtype=torch.float64))
    def forward(self, x): return (x*self.w).sum((1, 2, 3))[:, None, None, None]


# networks

@pytest.mark.parametrize('make,count', [
    (lambda: ce.ContextEncoder(), 71_124_544), (lambda: ce.ContextEncoder(bias=True), 71_130_531),
    (lambda: ce.ContextEncoder(region='random'), 71_190_208), (lambda: ce.ContextEncoder(region='random', bias=True), 71_196_259),
    (lambda: ce.ContextEncoder(bottleneck=100, bias=True), 7_221_231),
    (lambda: ce.Discriminator(), 2_765_568), (lambda: ce.Discriminator(bias=True), 2_766_529),
    (lambda: ce.Discriminator(128), 2_831_232), (lambda: ce.Discriminator(128, bias=True), 2_832_257),
    (lambda: ce.ChannelwiseLinear(256, 6), 331_776)])
def test_parameters(make, count):
    with META: assert count_params(make()) == count


def test_random_region_networks_row_by_row():
    "One layer of 64 maps more than the centre's: before the last of G, after the first of D"
    def rows(net, x):
        out = []
        for m in net.main:
            x = m(x)
            if isinstance(m, nn.modules.conv._ConvNd): out.append((type(m).__name__, *x.shape[1:3], count_params(m)))
            if isinstance(m, nn.BatchNorm2d): out[-1] += (m.num_features,)
        return out
    conv = [(64, 64, 3136), (64, 32, 65600, 64), (128, 16, 131200, 128), (256, 8, 524544, 256), (512, 4, 2097664, 512)]
    up = [(512, 4, 32768512, 512), (256, 8, 2097408, 256), (128, 16, 524416, 128), (64, 32, 131136, 64), (64, 64, 65600, 64), (3, 128, 3075)]
    named = lambda kind, part: [(kind, *r) for r in part]
    with META:
        G, D, x = ce.ContextEncoder(region='random', bias=True), ce.Discriminator(128, bias=True), torch.zeros(2, 3, 128, 128)
        assert rows(G, x) == named('Conv2d', [*conv, (4000, 1, 32772000, 4000)]) + named('ConvTranspose2d', up)
        assert rows(D, x) == named('Conv2d', [*conv, (1, 1, 8193)])


def test_state_dict_has_the_layout_of_the_ports():
    with META: G, D = ce.ContextEncoder(), ce.Discriminator()
    weights = lambda net: {k: tuple(v.shape) for k, v in net.state_dict().items() if v.dim() > 1}
    assert weights(G) == {
        'main.0.weight': (64, 3, 4, 4), 'main.2.weight': (64, 64, 4, 4), 'main.5.weight': (128, 64, 4, 4),
        'main.8.weight': (256, 128, 4, 4), 'main.11.weight': (512, 256, 4, 4), 'main.14.weight': (4000, 512, 4, 4),
        'main.17.weight': (4000, 512, 4, 4), 'main.20.weight': (512, 256, 4, 4), 'main.23.weight': (256, 128, 4, 4),
        'main.26.weight': (128, 64, 4, 4), 'main.29.weight': (64, 3, 4, 4)}
    assert weights(D) == {'main.0.weight': (64, 3, 4, 4), 'main.2.weight': (128, 64, 4, 4), 'main.5.weight': (256, 128, 4, 4),
                          'main.8.weight': (512, 256, 4, 4), 'main.11.weight': (1, 512, 4, 4)}
    assert (len(G.state_dict()), len(D.state_dict())) == (56, 20)
    assert G.state_dict()['main.15.running_mean'].shape == (4000,) and 'main.3.bias' in D.state_dict()


@pytest.mark.parametrize('region,side', [('center', 64), ('random', 128)])
def test_shapes_and_range(region, side):
    G, D = ce.ContextEncoder(.0625, bottleneck=12, region=region), ce.Discriminator(side, .0625)
    y = G(torch.randn(2, 3, 128, 128)*5)
    assert y.shape == (2, 3, side, side) and y.abs().max() <= 1 and D(y).shape == (2, 1, 1, 1)
    assert (D.main[0](y.detach()).shape[-1], type(D.main[-1])) == (side//2, nn.Conv2d)        # logits: no sigmoid


def test_initial_weights():
    set_seed(0)
    G = ce.ContextEncoder(.5, bottleneck=100)
    assert abs(G.main[14].weight.std() - .02) < 1e-3 and abs(G.main[29].weight.std() - .02) < 2e-3
    assert abs(G.main[15].weight.mean() - 1) < .01 and .01 < G.main[15].weight.std() < .03 and (G.main[15].bias == 0).all()
    assert (ce.ContextEncoder(.05, bottleneck=4, bias=True).main[0].bias == 0).all()


def test_channelwise_linear_is_a_block_diagonal_dense_layer_with_a_gradient():
    set_seed(0)
    layer, x = ce.ChannelwiseLinear(3, 4).double(), torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.allclose(layer(x).flatten(1), x.flatten(1) @ torch.block_diag(*layer.weight).T)
    assert torch.autograd.gradcheck(layer, x)
    for wrong in (torch.rand(1, 2, 4, 4), torch.rand(1, 3, 2, 8)):
        with pytest.raises(InputError, match=r'expected \(B,3,4,4\)'): layer(wrong.double())


@pytest.mark.parametrize('call,message', [
    (lambda: ce.ContextEncoder(region='left'), 'expected center or random'), (lambda: ce.ContextEncoder(bottleneck=0), 'bottleneck 0'),
    (lambda: ce.ContextEncoder(bottleneck=2.5), 'bottleneck 2.5; expected 1 or more, a whole number'), (lambda: ce.ContextEncoder(bottleneck=True), 'bottleneck True'),
    (lambda: ce.ContextEncoder(width=0), 'width 0'), (lambda: ce.Discriminator(32), 'expected 64 or 128'),
    (lambda: ce.ContextEncoder(**TINY)(torch.zeros(2, 3, 64, 64)), r'expected \(B,3,128,128\)'),
    (lambda: ce.ContextEncoder(**TINY)(torch.zeros(2, 4, 128, 128)), r'expected \(B,3,128,128\)'),
    (lambda: ce.Discriminator(64, .0625)(torch.zeros(2, 3, 128, 128)), r'expected \(B,3,64,64\)'),
    (lambda: ce.overlap_weights(8, 4), 'expected 0 to 3'), (lambda: ce.overlap_weights(8, -1), 'overlap -1'), (lambda: ce.overlap_weights(8, 1.5), 'overlap 1.5 of 8 pixels; expected 0 to 3, a whole number'),
    (lambda: ce.center_crop(torch.zeros(1, 3, 8, 20), 9), '8x20'),
    (lambda: ce.paste_center(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 9, 9)), 'expected 9 or more'),
    (lambda: ce.network_input(torch.zeros(1, 3, 8, 8), torch.zeros(1, 1, 8, 8), 'grey'), 'permuted, imagenet'),
    (lambda: ce.fill_windows(None, torch.zeros(1, 3, 8, 8), torch.zeros(1, 1, 8, 8), core=200), 'expected 1 to 128')])
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message): call()


# geometry

def test_hole_colours_bit_for_bit():
    x, m = torch.rand(1, 3, 128, 128), hole(128, 128, (36, 92, 36, 92))
    x[..., 50, 50] = math.nan
    for name, rgb in (('permuted', (117, 104, 123)), ('imagenet', (123, 117, 104))):
        y = ce.network_input(x, m, name)
        assert torch.allclose(y[0, :, 50, 50], torch.tensor(rgb)/255*2 - 1, atol=1e-7)
        assert torch.equal(y[..., :36, :], x[..., :36, :]*2 - 1)


def test_center_geometry():
    x = torch.arange(128*128.).view(1, 1, 128, 128)
    region = ce.center_crop(x, 64)
    assert region[0, 0, 0, 0] == x[0, 0, 32, 32] and region[0, 0, -1, -1] == x[0, 0, 95, 95]
    y = ce.paste_center(x, region + 1)
    assert torch.equal(ce.center_crop(y, 64), region + 1) and (y != x).sum() == 64*64 and y is not x
    for overlap, side in ((4, 56), (7, 50), (0, 64)):
        m = ce.center_hole(x, overlap)
        assert m.sum() == side**2 and torch.equal(m, m.flip(-1)) and torch.equal(m, m.mT)


def test_overlap_weights():
    w = ce.overlap_weights(64, 4, 3.)
    assert w.shape == (1, 1, 64, 64) and w[0, 0, 3, 30] == w[0, 0, 30, 60] == 3 and w[0, 0, 4, 4] == w[0, 0, 59, 59] == 1
    assert (ce.overlap_weights(64, 0) == 1).all()


# recipe

@pytest.mark.parametrize('wrong,message', [
    (dict(region='x'), 'region'), (dict(fill='x'), 'fill'), (dict(rec_on='x'), 'rec_on'), (dict(overlap=-1), 'overlap'),
    (dict(overlap=32), 'expected 0 to 31'), (dict(overlap=4.), 'overlap 4.0; expected 0 to 31, a whole number'), (dict(overlap='4'), 'overlap 4'),
    (dict(bottleneck=100.), 'bottleneck 100.0; expected 1 or more, a whole number'), (dict(bottleneck=0), 'bottleneck 0'), (dict(bottleneck=None), 'bottleneck None'),
    (dict(lambda_rec=0, lambda_adv=0), 'lambda_rec and lambda_adv are 0; expected one above 0'), (dict(lambda_rec=-1), 'lambda_rec'), (dict(band_weight=math.nan), 'band_weight')])
def test_config_refuses(wrong, message):
    with pytest.raises(InputError, match=message): ce.ContextEncoderConfig(**wrong)


def test_names_and_rates():
    center, random = recipe(), recipe(region='random')
    assert (center.name, random.name) == ('context_encoder.center', 'context_encoder') and center.method == random.method == 'context_encoder'
    assert ce.ContextEncoderRecipe.name == 'context_encoder'
    assert [o.param_groups[0]['lr'] for o in center.optimizers()] == [2e-3, pytest.approx(2e-4)]
    assert center.optimizers()[1].param_groups[0]['betas'] == (.5, .999) and center.update == 'alternating'


def test_config_takes_one_loss_alone_and_whole_numbers_of_numpy():
    import numpy as np
    ce.ContextEncoderConfig(lambda_rec=0), ce.ContextEncoderConfig(lambda_adv=0, overlap=np.int64(0), bottleneck=np.int64(1))


def test_deviations():
    of = lambda **kw: recipe(**kw).deviations
    shapes = 'random regions: smooth noise, one per picture (paper: PASCAL objects; code: one per batch)'
    composite = 'D sees the composite; only the hole is compared (the code compares {})'
    assert of() == [] and of(region='random') == [shapes]
    assert of(rec_on='hole') == [composite.format('all 64x64')]
    assert of(region='random', rec_on='hole') == [shapes, composite.format('the whole picture')]
    assert ce.ContextEncoderRecipe.deviations == ()                                            # the class's are not touched


@pytest.mark.parametrize('rec_on', ['output', 'hole'])
@pytest.mark.parametrize('region', ['center', 'random'])
def test_gradients_by_hand(region, rec_on):
    "d/dp of .999 mean(W (p-t)^2) + .001 softplus(-s), with a linear critic s = sum(a p)"
    r, b, slope = recipe(region=region, rec_on=rec_on), batch(region=region), 2e-4
    size = 64 if region == 'center' else 128
    r.D = Linear(size, slope)
    out = r(b); p = out['region'].detach().requires_grad_()
    terms = r.g_terms(b, out | dict(region=p)); sum(terms.values()).backward()
    t, m = ce.center_crop(b['image'], size)*2 - 1, ce.center_crop(b['mask'], size)
    W = torch.ones(1, 1, size, size).double()
    if region == 'center': W[..., :4, :] = W[..., -4:, :] = W[..., :4] = W[..., -4:] = 10
    seen = p.detach() if rec_on == 'output' else torch.where(m > 0, p.detach(), t)
    where = m if rec_on == 'hole' else torch.ones_like(m)
    s = (seen*slope).sum((1, 2, 3))[:, None, None, None]
    rec = .999*W*where*2*(p.detach() - t)/p.numel()
    adv = -.001*(1 - s.sigmoid())*slope*where/len(p)
    assert torch.allclose(p.grad, rec + adv, rtol=1e-9, atol=1e-16) and adv.abs().max() > 0
    assert torch.isclose(terms['g_adv'], .001*torch.nn.functional.softplus(-s).mean())


def test_d_terms_judge_truth_and_prediction_in_batches_of_their_own():
    r, b = recipe(), batch()
    out = r(b); seen = []
    r.D.register_forward_hook(lambda m, args, y: seen.append(args[0].detach()))
    d = r.d_terms(b, {k: v.detach() for k, v in out.items()})
    assert len(seen) == 2 and torch.equal(seen[0], ce.center_crop(b['image'], 64)*2 - 1) and torch.equal(seen[1], out['region'].detach())
    assert abs(d['d_adv'].item() - 2*math.log(2)) < .5
    hole_only = recipe(rec_on='hole', region='random'); b = batch(region='random'); out = hole_only(b); fake = []
    hole_only.D.register_forward_hook(lambda m, args, y: fake.append(args[0].detach()))
    hole_only.g_terms(b, out)
    known = (b['mask'] == 0).expand_as(fake[0])
    assert torch.equal(fake[0][known], (b['image']*2 - 1)[known]) and torch.equal(fake[0][~known], out['region'].detach()[~known])


@pytest.mark.parametrize('region', ['center', 'random'])
def test_outputs_know_nothing_of_the_hole(region):
    r, b = recipe(region=region).eval(), batch(region=region)
    other = b | dict(image=torch.where(b['mask'] > 0, torch.full_like(b['image'], .5), b['image']))
    a, c = r(b), r(other)
    assert torch.equal(a['region'], c['region']) and a['pred'].shape == a['comp'].shape == b['image'].shape
    known = (b['mask'] == 0).expand_as(b['image'])
    assert torch.equal(a['comp'][known], b['image'][known]) and torch.equal(a['comp'][~known], a['pred'][~known])
    assert 0 <= a['pred'].min() and a['pred'].max() <= 1 and set(r.metrics(b, a)) == {'psnr_hole'}
    if region == 'center': assert torch.equal(a['pred'][..., :32, :], b['image'][..., :32, :])


def test_recipe_refuses():
    r, b = recipe().train(), batch()
    for wrong, message in ((b | dict(image=b['image'][..., :64, :64]), '128,128'), (b | dict(mask=b['mask'].roll(1, -1)), 'overlap=4'),
                           ({k: v[:1] for k, v in b.items()}, 'two or more')):
        with pytest.raises(InputError, match=message): r(wrong)
    seven = recipe(overlap=7)
    with pytest.raises(InputError, match='middle 50 pixels'): seven(b)
    seven(b | dict(mask=hole(128, 128, (39, 89, 39, 89), n=2, dtype=torch.float64)))
    assert r.eval()({k: v[:1] for k, v in b.items()})['pred'].shape == (1, 3, 128, 128)


@pytest.mark.parametrize('kw', [dict(), dict(region='random'), dict(lambda_adv=0), dict(region='random', rec_on='hole')])
def test_training_reduces_the_reconstruction(kw):
    r = recipe(lr=5e-3, **kw).float()
    b = batch(n=4, region=kw.get('region', 'center'), dtype=torch.float32)
    up = Updater(r, TrainConfig(steps=8, batch_size=4, device='cpu'))
    values = [up.update([[dict(b)]]) for _ in range(8)]
    assert values[-1]['rec'] < values[0]['rec'] and ('d_adv' in values[0]) == (kw.get('lambda_adv') != 0)
    assert all(math.isfinite(v) for v in values[-1].values())


def test_bfloat16():
    r, b = recipe(region='random').float(), batch(region='random', dtype=torch.float32)
    with torch.autocast('cpu', torch.bfloat16):
        out = r(b); g, d = r.g_terms(b, out), r.d_terms(b, {k: v.detach() for k, v in out.items()})
    assert all(v.dtype == torch.float32 and v.isfinite() for v in (g | d).values()) and out['comp'].dtype == torch.float32
    exact = r.g_terms(b, r(b))
    assert abs(g['rec']/exact['rec'] - 1) < .02


# windows

HOLES = {
    'several': ((300, 280), [(5, 40, 10, 30), (100, 160, 50, 90), (250, 270, 200, 260)]),
    'borders and corners': ((200, 260), [(0, 20, 0, 30), (180, 200, 0, 9), (0, 5, 250, 260), (90, 140, 250, 260), (190, 200, 240, 260)]),
    'larger than 128': ((320, 340), [(20, 300, 30, 310)]),
    'flat': ((20, 300), [(5, 15, 10, 30), (0, 20, 100, 150), (0, 4, 294, 300)]),
    'tiny': ((7, 5), [(2, 4, 1, 3)]),
    'all': ((150, 40), [(0, 150, 0, 40)]),
    'odd': ((129, 127), [(128, 129, 126, 127), (0, 1, 0, 127)]),
}


def blend(x, m):
    "A stand-in network: depends on every pixel it gets, gives (0,1)"
    return (.2 + .3*x.roll(5, -1) + .2*x.mean((1, 2, 3), keepdim=True) + .1*m).clamp(0, 1)


@pytest.mark.parametrize('inward', [True, False])
@pytest.mark.parametrize('name', HOLES)
def test_windows_fill_every_hole_pixel_and_nothing_else(name, inward):
    (h, w), boxes = HOLES[name]; m = hole(h, w, *boxes); set_seed(0)
    x = torch.rand(1, 3, h, w); known = (m == 0).expand_as(x)
    shapes = set()
    def predict(a, b):
        shapes.add((tuple(a.shape[1:]), tuple(b.shape[1:]))); assert a.isfinite().all() and set(b.unique().tolist()) <= {0, 1}
        assert (a[b.expand_as(a) > 0] == 0).all()                    # what is not known yet is empty
        return blend(a, b)
    a = ce.fill_windows(predict, x, m, inward=inward)
    b = ce.fill_windows(predict, torch.where(m > 0, math.nan, x), m, inward=inward)
    assert shapes == {((3, 128, 128), (1, 128, 128))}
    assert torch.equal(a['comp'][known], x[known]) and (a['comp'][~known] >= .2).all()
    assert torch.equal(a['comp'][~known], b['comp'][~known]) and torch.equal(a['pred'][~known], a['comp'][~known])
    assert a['comp'].isfinite().all() and a['pred'].isfinite().all()


def test_windows_of_a_batch_are_those_of_its_pictures():
    set_seed(0)
    x, m = torch.rand(3, 3, 200, 180), torch.zeros(3, 1, 200, 180)
    m[0, :, 30:190, 20:170] = 1; m[1, :, :9, :9] = 1                       # the third has no hole
    whole = ce.fill_windows(blend, x, m, at_once=2)
    for n in range(3):
        one = ce.fill_windows(blend, x[n:n+1], m[n:n+1], at_once=50)
        assert torch.allclose(one['comp'], whole['comp'][n:n+1], atol=1e-6)
    assert torch.equal(whole['comp'][2], x[2]) and torch.equal(whole['pred'][2], x[2])


def test_filled_pixels_are_known_to_later_windows():
    x, m, seen = torch.zeros(1, 3, 256, 256), hole(256, 256, (28, 228, 28, 228)), []
    def predict(a, b): seen.append(b.mean((1, 2, 3))); return torch.ones_like(a)
    ce.fill_windows(predict, x, m, core=50, at_once=1000)
    assert len(seen) > 3 and max(seen[-1]) < .6 and len(seen[0]) == 4          # the corners go first
    assert sum(map(len, seen)) == 16


def test_a_hole_that_fits_takes_one_window_centred_on_it():
    x, m, seen = torch.rand(1, 3, 300, 300), hole(300, 300, (110, 160, 100, 164)), []
    def predict(a, b): seen.append((a, b)); return a
    ce.fill_windows(predict, x, m)
    (a, b), = seen
    assert torch.equal(b[0, 0, 39:89, 32:96], torch.ones(50, 64)) and b.sum() == 50*64
    known = (b == 0).expand_as(a)
    assert torch.equal(a[known], x[..., 71:199, 68:196][known])


def test_many_small_holes_share_windows():
    set_seed(0)
    m = (torch.rand(1, 1, 256, 256) < .02).float(); calls = []
    def predict(a, b): calls.append(len(a)); return a
    ce.fill_windows(predict, torch.rand(1, 3, 256, 256), m)
    assert 9 <= sum(calls) < 60 and m.sum() > 1000


BAD = [(lambda x, m: (x[0], m), r'image of torch.float32 \(3, 40, 50\); expected floats \(B,3,H,W\)'),
       (lambda x, m: (x[:, :1], m), r'\(1, 1, 40, 50\)'), (lambda x, m: ((x*255).byte(), m), 'image of torch.uint8'),
       (lambda x, m: (x, m[..., 1:]), r'mask of shape \(1, 1, 40, 49\); expected \(1, 1, 40, 50\)'),
       (lambda x, m: (x, m[0]), r'mask of shape \(1, 40, 50\)'), (lambda x, m: (x, m.repeat(1, 3, 1, 1)), r'mask of shape \(1, 3'),
       (lambda x, m: (x.repeat(2, 1, 1, 1), m), r'expected \(2, 1, 40, 50\)'),
       (lambda x, m: (x, m/2), 'mask has values from 0 to 0.5; expected 0'), (lambda x, m: (x, m*255), 'from 0 to 255'),
       (lambda x, m: (x, m*math.nan), 'mask has values from nan')]


@pytest.mark.parametrize('make, message', BAD, ids=[str(n) for n in range(len(BAD))])
def test_windows_and_fill_refuse(nets, make, message):
    x, m = make(torch.rand(1, 3, 40, 50), hole(40, 50, (10, 20, 10, 20)))
    for call in (lambda: ce.fill_windows(blend, x, m), lambda: ce.fill(nets['center'], x, m), lambda: ce.fill(nets['random'], x, m)):
        with pytest.raises(InputError, match=message) as e: call()
        assert '\n' not in str(e.value)


def test_extra_channels_are_pasted_window_by_window():
    x, m = torch.rand(1, 3, 300, 420), hole(300, 420, (100, 150, 50, 100), (100, 150, 300, 350))
    where = lambda a, b: torch.cat([a, torch.ones_like(b)*2, b], 1)
    out = ce.fill_windows(where, x, m, extra=2)
    assert out['extra'].shape == (1, 2, 300, 420) and out['comp'].shape == x.shape
    windows = hole(300, 420, (61, 189, 11, 139), (61, 189, 261, 389))
    assert torch.equal(out['extra'][:, :1], windows*2) and torch.equal(out['extra'][:, 1:], m)
    plain = ce.fill_windows(lambda a, b: a, x, m)
    assert set(plain) == {'pred', 'comp'} and all(torch.equal(plain[k], out[k]) for k in plain)


def test_shares_of_hole_in_a_window():
    "What the text says of random-region networks: trained with 20 to 30 %, used beyond"
    def shares(side):
        found = []
        def look(a, b): found.extend(b.mean((1, 2, 3)).tolist()); return a
        ce.fill_windows(look, torch.rand(1, 3, 500, 640), hole(500, 640, (80, 80 + side, 60, 60 + side)))
        return found
    large = shares(340)
    assert len(large) == 25 and sum(s > .3 for s in large) == 24 and .28 < min(large) < .29 and .64 < max(large) < .65
    assert shares(80) == [80**2/128**2] and shares(1) == [1/128**2]


def test_mirroring():
    assert ce._mirrored(-3, 8, 2).tolist() == [1, 1, 0, 0, 1, 1, 0, 0] and ce._mirrored(4, 3, 100).tolist() == [4, 5, 6]
    w = ce._Window(0, (0, 0, 10, 10), (64, 64), 32, False)
    x = torch.arange(64*64.).view(1, 1, 64, 64)
    assert w.start == [-11, -11] and torch.equal(w.cut(x)[0, 11:, 11:], x[0, 0, :21, :21]) and w.cut(x)[0, 10, 11] == x[0, 0, 0, 0]


# filling

@pytest.fixture(scope='module')
def nets():
    "Untrained, but with batch statistics: without them the output is 0 whatever comes in"
    set_seed(0); out = {r: ce.ContextEncoder(**TINY, region=r) for r in ('center', 'random')}
    for net in out.values():
        for m in net.modules():
            if isinstance(m, nn.BatchNorm2d): m.momentum = None
        with torch.no_grad(): net.train()(torch.rand(8, 3, 128, 128)*2 - 1 + torch.randn(8, 3, 1, 1)*.3)
        assert net.eval()(torch.rand(2, 3, 128, 128)).std() > .01
    return out


@pytest.mark.parametrize('region', ['center', 'random'])
@pytest.mark.parametrize('name', HOLES)
@pytest.mark.filterwarnings('ignore::inpaint_lib.papers.context_encoder.OutOfProtocol')
def test_fill(nets, region, name):
    (h, w), boxes = HOLES[name]; m = hole(h, w, *boxes); set_seed(0)
    x = torch.rand(1, 3, h, w); known = (m == 0).expand_as(x)
    a, b = (ce.fill(nets[region], y, m) for y in (x, torch.where(m > 0, torch.rand_like(x), x)))
    assert torch.equal(a['comp'][known], x[known]) and torch.equal(a['comp'][~known], b['comp'][~known])
    assert set(a) == {'pred', 'comp', 'input', 'features'} and torch.equal(a['features'], b['features'])
    for k, v in a.items():
        assert v.shape == (1, 1 if k == 'features' else 3, h, w) and 0 <= v.min() and v.max() <= 1 and not v.requires_grad
    assert a['features'].max() == 1 and (a['features'].std() > 0 or name == 'tiny')                # tiny: one block
    assert not torch.equal(a['comp'][~known], ce.fill(nets[region], x, m, fill='imagenet')['comp'][~known])


def test_fill_center_is_the_network_on_its_own_hole(nets):
    set_seed(0); x = torch.rand(1, 3, 200, 220)
    m = hole(200, 220, (80, 110, 90, 120))                            # smaller than 56: the whole middle is blanked
    with warnings.catch_warnings():
        warnings.simplefilter('error'); out = ce.fill(nets['center'], x, m)
    window = x[..., 31:159, 41:169]
    y = (nets['center'](ce.network_input(window, ce.center_hole(window[:, :1], 4))) + 1)/2
    assert torch.allclose(out['comp'][..., 80:110, 90:120], y[..., 17:47, 17:47], atol=1e-6)
    assert torch.allclose(out['pred'][..., 63:127, 73:137][..., :10, :], y[..., :10, :], atol=1e-6)


@pytest.mark.parametrize('boxes', [[(0, 10, 100, 110)], [(80, 140, 80, 100)], [(80, 110, 80, 110), (80, 110, 140, 150)], [(60, 90, 70, 90)]])
def test_center_network_warns_out_of_protocol(nets, boxes):
    m = hole(200, 200, *boxes); x = torch.rand(1, 3, 200, 200)
    good = boxes == [(60, 90, 70, 90)]                                # the window fits and all around is known
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always'); ce.fill(nets['center'], x, m)
        ce.fill(nets['random'], x, m)
    assert [t.category for t in told] == ([] if good else [ce.OutOfProtocol])
    if told: assert '56x56' in str(told[0].message) and '\n' not in str(told[0].message) and told[0].filename == __file__


def test_features_are_the_encoders_in_every_window_and_0_elsewhere(nets):
    set_seed(0); x, m = torch.rand(1, 3, 200, 220), hole(200, 220, (80, 110, 90, 120))
    for region, inside in (('random', m), ('center', hole(200, 220, (67, 123, 77, 133)))):
        out = ce.fill(nets[region], x, m)['features']
        w = (..., slice(31, 159), slice(41, 169))
        maps = nets[region].main[:8](ce.network_input(x[w], inside[w])).abs().mean(1)[0]
        assert torch.allclose(out[w][0, 0, ::8, ::8], maps/maps.max(), atol=1e-5) and torch.equal(out[w][..., ::8, ::8], out[w][..., 7::8, 7::8])
        rest = out.clone(); rest[w] = 0
        assert (rest == 0).all()


@pytest.mark.parametrize('dtype', (torch.float64, torch.bfloat16), ids=str)
@pytest.mark.parametrize('region', ['center', 'random'])
def test_fill_takes_pictures_of_other_types(nets, region, dtype):
    set_seed(0); x, m = torch.rand(1, 3, 140, 150), hole(140, 150, (40, 90, 50, 100))
    out, plain = ce.fill(nets[region], x.to(dtype), m), ce.fill(nets[region], x, m)
    assert all(v.dtype == dtype for v in out.values())
    assert torch.equal(out['comp'][(m == 0).expand_as(x)], x.to(dtype)[(m == 0).expand_as(x)])
    assert (out['comp'].float() - plain['comp']).abs().max() < (1e-6 if dtype == torch.float64 else .05)
    assert torch.equal(ce.fill(nets[region], x, m.bool())['comp'], plain['comp'])              # a bool mask is as good
    with pytest.raises(InputError, match='overlap 40'): ce.fill(nets[region], x, m, overlap=40)


def test_fill_under_inference_mode_and_in_bfloat16(nets):
    x, m = torch.rand(1, 3, 140, 150), hole(140, 150, (20, 130, 30, 140))
    plain = ce.fill(nets['random'], x, m)
    with torch.inference_mode(): assert torch.equal(ce.fill(nets['random'], x, m)['comp'], plain['comp'])
    with torch.autocast('cpu', torch.bfloat16): low = ce.fill(nets['random'], x, m)
    assert low['comp'].dtype == torch.float32 and (low['comp'] - plain['comp']).abs().mean() < .02
