"StructureFlow: parity with the published networks, layer tables, what flows where, what the hole may not influence"
import copy
import dataclasses
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

GOLDEN = Path(__file__).parent/'golden'
sys.path.insert(0, str(GOLDEN))
from fill import fill as fill_state, sine  # noqa: E402

from inpaint_lib.core import InputError, LayerRow, compare_table, conv_macs, count_params, set_seed  # noqa: E402
from inpaint_lib.data.structure import rtv_smooth  # noqa: E402
from inpaint_lib.features import VGGFeatures, vgg_shapes  # noqa: E402
from inpaint_lib.papers import structure_flow as sf  # noqa: E402
from inpaint_lib.training import TrainConfig, Updater  # noqa: E402

NETWORKS = json.loads((GOLDEN/'structure_flow_networks.json').read_text())
MAKE = dict(StructureGen=(sf.StructureGen, 7), FlowGen=(sf.FlowGen, 7), MultiDiscriminator=(sf.MultiDiscriminator, 3))
PARAMS = dict(StructureGen=36_057_411, FlowGen=56_473_475, MultiDiscriminator=1_196_544)


def published(name, **kw):
    "A network with the portable weights, in the mode of its golden run"
    with torch.device('meta'): net = MAKE[name][0](**kw)
    net.load_state_dict(fill_state({k: s for k, s, _ in NETWORKS[name]['state_dict']}), assign=True)
    (mode, run), = NETWORKS[name]['runs'].items()
    return net.train(mode == 'hash_train1'), run


def gaps(name, net, run):
    "Largest difference at the sampled positions, per output"
    with torch.no_grad(): out = net(sine((1, MAKE[name][1], 128, 128), 0., 1.))
    want = run.get('outputs') or [run[k] for k in ('output', 'image', 'flow') if k in run]
    pairs = list(zip([out] if torch.is_tensor(out) else out, want, strict=True))
    assert all(list(x.shape) == g['shape'] for x, g in pairs)
    return [(x.flatten()[g['idx']] - torch.tensor(g['values'], dtype=x.dtype)).abs().max().item() for x, g in pairs]


def random_vgg(layers=('relu1_1', 'relu2_1', 'relu2_2', 'relu3_1')):
    rng = torch.Generator().manual_seed(0)
    state = {k: torch.randn(s, generator=rng)*math.sqrt(2/math.prod(s[1:])) if len(s) > 1 else torch.zeros(s)
             for k, s in vgg_shapes().items() if int(k.split('.')[1]) <= 10}
    return VGGFeatures(layers=layers, weights=state)


def batch_of(n=2, size=48, dtype=torch.float32):
    mask = torch.zeros(n, 1, size, size, dtype=dtype); mask[:, :, 12:34, 14:30] = 1
    return dict(image=sine((n, 3, size, size), .5, .45, .013).to(dtype), mask=mask, epoch=torch.zeros(n, dtype=torch.long),
                index=torch.arange(n))


LAYERS = dict(content_layers=('relu1_1', 'relu2_1'), style_layers=('relu2_2',))


def config(**kw): return sf.StructureFlowConfig(**{**dict(width=.0625, vgg_weights='none', iterations=2), **kw})


def recipes():
    set_seed(0); c = config()
    return dict(structure=sf.StructureRecipe(c), flow=sf.FlowRecipe(c), joint=sf.JointRecipe(c))


# parity with the published networks

@pytest.mark.parametrize('name', MAKE)
def test_networks_equal_the_published_ones(name):
    net, run = published(name)
    assert max(gaps(name, net, run)) < 1e-9
    if name == 'MultiDiscriminator':               # the test can fail: another average at the border
        net, run = published(name); net.down = nn.AvgPool2d(3, 2, 1)
        fine, coarse = gaps(name, net, run)
        assert fine < 1e-9 and coarse > 1e-3


@pytest.mark.parametrize('name', MAKE)
def test_documented_tables(name):
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torchinfo import summary
    make, in_ch = MAKE[name]
    size = lambda s: tuple(s) if s and isinstance(s[0], int) else tuple(s[0]) if s else ()
    with FakeTensorMode():
        net = make()
        info = summary(net, input_data=[torch.zeros(1, in_ch, 256, 256)], depth=3, verbose=0)
        macs = conv_macs(net, (1, in_ch, 256, 256))
    rows = [LayerRow(i.depth, i.class_name, size(i.output_size), count_params(i.module)) for i in info.summary_list if i.depth <= 3]
    table = json.loads((GOLDEN/'tables'/f'000_{name}.json').read_text())
    assert compare_table(rows, table) == [] and count_params(net) == PARAMS[name]
    assert len(table) == dict(StructureGen=52, FlowGen=21, MultiDiscriminator=13)[name]
    assert round(macs/1e9, 3) == dict(StructureGen=139.796, FlowGen=115.306, MultiDiscriminator=4.677)[name]
    names = {k: list(v.shape) for k, v in net.state_dict().items()}
    assert names == {k: s for k, s, _ in NETWORKS[name]['state_dict']}
    assert sum(k.endswith('weight_orig') for k in names) == dict(StructureGen=9, FlowGen=0, MultiDiscriminator=16)[name]


def test_tiny_networks_are_small():
    assert count_params(sf.StructureGen(.125)) + count_params(sf.FlowGen(.125)) < 1_500_000


def test_start_is_glorots_also_below_spectral_norm():
    set_seed(0); S = sf.StructureGen(.5)
    for conv in (S.down_sample[1][1].conv, S.up_sample[0][0].model[0].model[0].conv):
        w = conv._parameters.get('weight_orig', conv._parameters.get('weight'))
        fan = w[0].numel() + w[:, 0].numel()
        assert w.std().item() == pytest.approx(math.sqrt(2*2/fan), rel=.02) and conv.bias.count_nonzero() == 0


# networks

def test_samplings_share_their_start():
    set_seed(0); states = {}
    for s in sf.SAMPLINGS: set_seed(0); states[s] = sf.FlowGen(.0625, sampling=s).conv_column.state_dict()
    assert all(torch.equal(v, states[s][k]) for s in sf.SAMPLINGS for k, v in states['gaussian'].items())
    x = torch.rand(1, 7, 48, 64)
    image, flow = sf.FlowGen(.0625, sampling='none')(x)
    assert image.shape == (1, 3, 48, 64) and flow.shape == (1, 2, 12, 16) and not flow.any()


@pytest.mark.parametrize('make,bad', [(sf.StructureGen, (1, 7, 20, 32)), (sf.StructureGen, (1, 7, 8, 8)), (sf.FlowGen, (1, 7, 32, 32)),
                                      (sf.FlowGen, (1, 7, 56, 64)), (sf.MultiDiscriminator, (1, 3, 15, 64))])
def test_sizes_that_do_not_fit(make, bad):
    with pytest.raises(InputError, match=rf'{make.__name__}: {bad[2]}x{bad[3]} pixels; expected'): make(.05)(torch.zeros(bad))


@pytest.mark.parametrize('make,size', [(sf.StructureGen, 16), (sf.FlowGen, 48)])
def test_smallest_sizes(make, size):
    out = make(.05)(torch.rand(1, 7, size, size + 16))
    assert (out if torch.is_tensor(out) else out[0]).shape == (1, 3, size, size + 16)


def test_unknown_words():
    for call, word in ((lambda: sf.Conv2dBlock(3, 3, 3, norm='batch'), 'batch'), (lambda: sf.Conv2dBlock(3, 3, 3, act='gelu'), 'gelu'),
                       (lambda: sf.Conv2dBlock(3, 3, 3, pad='wrap'), 'wrap'), (lambda: sf.FlowGen(.1, sampling='nearest'), 'nearest')):
        with pytest.raises(InputError, match=f"'{word}'; expected one of"): call()


def test_layer_norm_by_hand():
    x = torch.arange(8.).view(1, 2, 2, 2); norm = sf.LayerNorm(2, eps=0.)
    norm.weight.data[1] = 3; norm.bias.data[0] = 1
    y = (x - x.mean())/x.std(unbiased=False)
    assert torch.allclose(norm(x), torch.cat([y[:, :1] + 1, 3*y[:, 1:]], 1), atol=1e-6)


# losses and config

def test_map_loss_is_a_mean_of_means():
    maps = [torch.tensor([[[[1., 0], [1, 0]]]]), torch.tensor([[[[3.]]]])]
    assert sf.map_loss(maps, True) == 2.25 and sf.map_loss(maps, False) == 4.75 and sf.map_loss(maps, True, for_D=False) == 2.25


@pytest.mark.parametrize('wrong', [dict(width=0), dict(width='1'), dict(lambda_adv=-1), dict(lambda_style=math.nan), dict(sampling='cubic'),
                                   dict(guide='hed'), dict(betas=(0,)), dict(betas=(0, 1.)), dict(iterations=0), dict(iterations=True),
                                   dict(composite_structure=1), dict(vgg_normalize='no'), dict(sigma=math.inf), dict(lr=True)])
def test_config_refuses(wrong):
    with pytest.raises(InputError, match=f'{next(iter(wrong))}.*expected'): sf.StructureFlowConfig(**wrong)


def test_config_is_plain():
    c = dataclasses.asdict(sf.StructureFlowConfig())
    assert json.loads(json.dumps(c)) and sf.StructureFlowConfig(**c) == sf.StructureFlowConfig()
    assert (c['lambda_l1_structure'], c['lambda_l1'], c['lambda_correctness'], c['lambda_style'], c['lambda_perc']) == (4, 5, .25, 250, .1)


def test_guides():
    b = batch_of(1); own = torch.rand(1, 3, 48, 48)
    assert torch.equal(sf.guide_of(config(), b | dict(structure=own)), own)
    assert torch.equal(sf.guide_of(config(), b), rtv_smooth(b['image'], iterations=2).clamp(0, 1))
    edges = sf.guide_of(config(guide='canny'), b | dict(structure=own))
    assert torch.equal(edges[:, 0], edges[:, 2]) and set(edges.unique().tolist()) <= {0., 1.}


def test_vgg_and_config_must_agree():
    for recipe in (sf.FlowRecipe, sf.JointRecipe):
        for kw in (dict(config=config(vgg_weights='auto')), dict(config=config(), vgg=random_vgg())):
            with pytest.raises(InputError, match='VGG network is given'): recipe(**kw)
    assert sf.FlowRecipe(config()).deviations == ['no correctness loss: vgg_weights=none']
    assert sf.JointRecipe(config()).deviations == ['no correctness, perceptual, style loss: vgg_weights=none']
    still = sf.FlowRecipe(config(sampling='none', vgg_weights='auto', guide='canny'), vgg=random_vgg())
    assert still.vgg is None and still.deviations == ['sampling=none', 'guide=canny']
    assert 'no style loss: vgg_weights=none' in sf.JointRecipe(config(lambda_perc=0, correctness_layers=())).deviations


# recipes

def test_only_the_generator_learns_from_its_terms():
    b, vgg = batch_of(), random_vgg()
    recipe = sf.JointRecipe(config(vgg_weights='auto', **LAYERS), vgg=vgg).train()
    frozen = copy.deepcopy(recipe.structure_generator.state_dict())
    out = recipe(b); terms = recipe.g_terms(b, out)
    assert list(terms) == ['g_adv', 'l1', 'correctness', 'perceptual', 'style']
    sum(terms.values()).backward()
    assert all(p.grad is not None for p in recipe.G.parameters())
    assert all(p.grad is None for net in (vgg, recipe.structure_generator) for p in net.parameters())
    assert all(torch.equal(v, frozen[k]) for k, v in recipe.structure_generator.state_dict().items())
    assert not recipe.structure_generator.training and recipe.G.training


@pytest.mark.parametrize('composed', [True, False])
def test_joint_guide(composed):
    b = batch_of(); recipe = sf.JointRecipe(config(composite_structure=composed)); out = recipe(b)
    raw = sf.completed(recipe.structure_generator, b['image'], out['structure'], b['mask'])
    hole = (b['mask'] > 0).expand_as(raw)
    assert torch.equal(out['guide'][hole], raw[hole])
    assert torch.equal(out['guide'][~hole], (out['structure'] if composed else raw)[~hole])


def test_hole_of_the_picture_is_not_seen_by_the_networks():
    "Structure given: what lies in the hole of the picture may change, and no output does"
    b = batch_of(); own = torch.rand(2, 3, 48, 48)
    other = dict(b, image=torch.where(b['mask'] > 0, .3, b['image']))
    for name, recipe in recipes().items():
        recipe.eval()
        assert torch.equal(*(recipe(x | dict(structure=own))['pred'] for x in (b, other))), name


@pytest.mark.parametrize('name', ['structure', 'flow', 'joint'])
def test_updates_lower_the_loss(name):
    b, recipe = batch_of() | dict(structure=torch.full((2, 3, 48, 48), .25)), recipes()[name]
    recipe.config.lr = 2e-3
    update = Updater(recipe, TrainConfig(device='cpu')); l1 = [update.update([[b]])['l1'] for _ in range(6)]
    assert l1[-1] < l1[0]


@pytest.mark.parametrize('name', ['structure', 'flow', 'joint'])
def test_losses_on_the_hole(name):
    "rec_on='hole': outside the hole losses and critic see the truth, so only the hole pulls on the network"
    b = batch_of(); stage = dict(structure=sf.StructureRecipe, flow=sf.FlowRecipe, joint=sf.JointRecipe)[name]
    recipe = stage(config(rec_on='hole')); out = recipe(b)
    outside, known = (b['mask'] == 0).expand(2, 3, -1, -1), out['structure'] if name == 'structure' else b['image']
    assert torch.equal(out['raw'][outside], (2*known - 1)[outside]) and 'rec_on' in recipe.deviations[0]
    assert torch.allclose(out['raw'][~outside], (2*out['pred'] - 1)[~outside], atol=1e-6)
    with pytest.raises(InputError, match='rec_on.*expected'): config(rec_on='mask')


def test_order_of_the_critic_is_fake_real():
    recipe, b, seen = recipes()['flow'], batch_of(), []
    out = recipe(b); recipe.D.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    d = recipe.d_terms(b, {k: v.detach() for k, v in out.items()})
    assert torch.equal(seen[0], out['raw']) and torch.equal(seen[1], 2*b['image'] - 1) and list(d) == ['d_adv']


def test_correctness_is_about_the_masked_picture():
    "A flow can't be right about what is not known: features of the hole's own content are not among the sources"
    b, vgg = batch_of(), random_vgg(('relu3_1',))
    recipe = sf.FlowRecipe(config(vgg_weights='auto', **LAYERS), vgg=vgg); out = recipe(b)
    truth = 2*b['image'] - 1
    target, source = (vgg(x)['relu3_1'] for x in (truth, truth*(1 - b['mask'])))
    by_hand = .25*sf.sampling_correctness_loss(target, source, out['flow'], b['mask'], sample=recipe.sample)
    assert torch.allclose(recipe.g_terms(b, out)['correctness'], by_hand)


def test_pictures_and_metrics():
    b = batch_of()
    for name, recipe in recipes().items():
        out = recipe.eval()(b); row, found = recipe.pictures(b, out), recipe.metrics(b, out)
        assert all(v.shape == (2, 3, 48, 48) for v in row.values()) and math.isfinite(found['psnr_hole'])
        assert ('structure out' in row) == (name == 'structure') and ('flow' in found) == (name != 'structure')


# inference

@pytest.mark.parametrize('kw', [{}, dict(protocol='damaged'), dict(composite_structure=False), dict(complete=True), dict(structure=True)])
def test_nothing_below_the_mask_has_influence(kw):
    set_seed(0); S, G, b = sf.StructureGen(.0625).eval(), sf.FlowGen(.0625).eval(), batch_of(2, 64)
    image, mask = b['image'], b['mask']
    spoilt = lambda x, v: torch.where(mask > 0, v, x)
    one, two = ({k: torch.full_like(image, .4) if v is True else v for k, v in kw.items()} for _ in range(2))
    if 'structure' in kw: two['structure'] = spoilt(two['structure'], math.nan)
    a, c = both = [sf.fill(S, G, x, mask, **k) for x, k in ((image, one), (spoilt(image, math.nan), two))]
    for k in a:
        if k != 'comp': assert torch.equal(a[k], c[k]), k
        assert a[k].shape == image.shape and a[k].min() >= 0 and a[k].max() <= 1
    known = (mask == 0).expand_as(image)
    assert all(torch.equal(o['comp'][known], image[known]) for o in both)


def test_complete_needs_no_structure_network():
    set_seed(0); G, b = sf.FlowGen(.0625).eval(), batch_of(1, 64)
    drawn = [torch.full((1, 3, 64, 64), v) for v in (.1, .9)]
    a, c = (sf.fill(None, G, b['image'], b['mask'], complete=d) for d in drawn)
    hole = (b['mask'] > 0).expand(1, 3, -1, -1)
    assert torch.allclose(a['structure out'][hole], torch.tensor(.1)) and not torch.equal(a['comp'], c['comp'])
    assert torch.equal(a['structure out'][~hole], c['structure out'][~hole])


def test_fill_refuses():
    G, b = sf.FlowGen(.05).eval(), batch_of(1, 64); good = dict(S=None, G=G, image=b['image'], mask=b['mask'], complete=b['image'])
    for change, word in ((dict(complete=None), 'complete'), (dict(protocol='truth'), 'truth'), (dict(mask=b['mask'][..., :32]), 'mask'),
                         (dict(complete=b['image'][..., :32]), 'structure'), (dict(protocol='whole'), 'whole')):
        with pytest.raises(InputError, match=word): sf.fill(**{**good, **change})


def test_whole_picture_known():
    G, b = sf.FlowGen(.05).eval(), batch_of(1, 64)
    out = sf.fill(None, G, b['image'], 0*b['mask'], complete=b['image'])
    assert torch.equal(out['comp'], b['image'])
