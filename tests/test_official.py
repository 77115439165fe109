"Official checkpoints: the recorded outputs of the authors' networks, and every form their files come in"
import json
import pickle
import sys
import warnings
from pathlib import Path

import pytest
import torch

from inpaint_lib.core import InputError
from inpaint_lib.official import (IMPORTS, OFFICIAL, from_official, import_context_encoder, import_deepfill_v1,
                                  import_deepfill_v2, import_edge_connect, import_partial_conv, import_structure_flow,
                                  load_pickle, unwrap)
from inpaint_lib.papers.context_encoder import ContextEncoder
from inpaint_lib.papers.deepfill_v1 import DeepFillV1Generator
from inpaint_lib.papers.edge_connect import Discriminator, EdgeGenerator, InpaintGenerator
from inpaint_lib.papers.structure_flow import FlowGen, MultiDiscriminator, StructureGen
from inpaint_lib.training import load_weights

GOLDEN = Path(__file__).parent/'golden'
sys.path.insert(0, str(GOLDEN))
from fill import fill, fill_deepfill, sine  # noqa: E402

NETS = {'edge_generator': ('EdgeGenerator', 3), 'inpaint_generator': ('InpaintGenerator', 4),
        'edge_discriminator': ('Discriminator_in2', 2), 'inpaint_discriminator': ('Discriminator_in3', 3)}


@pytest.fixture(scope='module')
def golden(): return json.loads((GOLDEN/'edge_connect_networks.json').read_text())


def official_like(golden, name):
    "Official keys, portable values; conv1.* and features.* are one tensor, features.* wins"
    sd = fill({k: s for k, s, _ in golden[NETS[name][0]]['state_dict']})
    return sd | {k: sd[k.replace('conv1.', 'features.', 1)] for k in sd if k.startswith('conv1.')}


def gap(t, g): return float((t.double().flatten()[g['idx']] - torch.tensor(g['values'], dtype=torch.float64)).abs().max())


def largest_gap(out, run):
    if not isinstance(out, tuple): return gap(out, run['output'])
    return max(gap(f, m)/max(1, abs(m['max']), abs(m['min'])) for f, m in zip(out[1], run['features'], strict=True))


@pytest.mark.parametrize('name', NETS)
def test_recorded_outputs_in_float64(golden, name):
    key, in_ch = NETS[name]
    net = from_official('edge_connect.' + name, official_like(golden, name)).eval()
    assert sum(p.numel() for p in net.parameters()) == golden[key]['n_params']
    assert all(p.dtype == torch.float64 for p in net.parameters())
    with torch.no_grad(): out = net(sine((1, in_ch, 128, 128)))
    assert largest_gap(out, golden[key]['runs']['hash_eval']['float64']) < 1e-9


@pytest.mark.parametrize('name', ['edge_generator', 'edge_discriminator'])
def test_missing_spectral_vectors_come_from_an_svd(golden, name):
    key, in_ch = NETS[name]     # the generator has transposed convolutions, whose matrix is another
    sd = {k: v for k, v in official_like(golden, name).items() if not k.endswith('weight_v')}
    with pytest.warns(UserWarning, match='computed from an SVD'): net = from_official('edge_connect.' + name, sd).eval()
    with torch.no_grad(): out = net(sine((1, in_ch, 128, 128)))
    run = golden[key]['runs']['hash_svd_eval']['float64']
    assert largest_gap(out, run) < 1e-9
    if isinstance(out, tuple): assert gap(out[0], run['output']) < 1e-9          # the sigmoid's probabilities


def test_one_training_forward(golden):
    net = from_official('edge_connect.edge_discriminator', official_like(golden, 'edge_discriminator')).train()
    with torch.no_grad(): out = net(sine((1, 2, 128, 128)))
    assert largest_gap(out, golden['Discriminator_in2']['runs']['hash_train1']['float64']) < 1e-9


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_parameters_keep_the_files_type(dtype):
    sd = {k: v.to(dtype) for k, v in InpaintGenerator(width=1/16).state_dict().items()}
    net = from_official('edge_connect.inpaint_generator', sd)
    assert all(torch.equal(v, sd[k]) and v.dtype == dtype for k, v in net.state_dict().items())


def disguise(sd, new_names=False, prefix='', wrapper=None, alias=False):
    if alias: sd = sd | {k.replace('conv1.', 'features.'): v for k, v in sd.items() if k.startswith('conv1.')}
    new = {'weight_orig': 'parametrizations.weight.original', 'weight_u': 'parametrizations.weight.0._u',
           'weight_v': 'parametrizations.weight.0._v'}
    for a, b in new.items() if new_names else (): sd = {k.replace(a, b): v for k, v in sd.items()}
    sd = {prefix + k: v for k, v in sd.items()}
    return {'iteration': 3, wrapper: sd} if wrapper else sd


@pytest.mark.parametrize('how', [dict(), dict(new_names=True), dict(prefix='module.'), dict(prefix='module.module.'),
                                 dict(wrapper='discriminator'), dict(wrapper='state_dict'), dict(alias=True),
                                 dict(new_names=True, prefix='module.', wrapper='discriminator', alias=True)])
def test_every_disguise_of_a_discriminator(how):
    D, x = Discriminator(2, width=1/16).eval(), torch.rand(1, 2, 64, 64)
    back = from_official('edge_connect.edge_discriminator', disguise(D.state_dict(), **how)).eval()
    assert torch.equal(back(x)[0], D(x)[0]) and len(back(x)[1]) == 5


def test_only_the_alias_is_there_and_a_stored_quotient():
    D, x = Discriminator(3, width=1/16).eval(), torch.rand(1, 3, 64, 64)
    sd = {k.replace('conv1.', 'features.'): v for k, v in D.state_dict().items()}
    sd |= {k.removesuffix('_orig'): v*7 for k, v in sd.items() if k.endswith('weight_orig')}   # as PyTorch 0.4 wrote
    back = from_official('edge_connect.inpaint_discriminator', sd, use_sigmoid=False).eval()
    assert torch.equal(back(x)[0], D(x)[1][-1])


def test_generators_without_spectral_norm():
    G = EdgeGenerator(width=1/16, use_spectral_norm=False).eval()
    back, x = from_official('edge_connect.edge_generator', G.state_dict()).eval(), torch.rand(1, 3, 32, 32)
    assert torch.equal(back(x), G(x))


def test_alias_that_differs_is_refused():
    sd = disguise(Discriminator(2, width=1/16).state_dict(), alias=True)
    sd['features.0.weight_orig'] = sd['features.0.weight_orig'] + 1
    with pytest.raises(InputError, match='features.0.weight_orig and conv1.0.weight_orig'):
        from_official('edge_connect.edge_discriminator', sd)


def test_missing_and_unexpected_keys():
    sd = EdgeGenerator(width=1/16).state_dict()
    del sd['decoder.7.bias']; sd['stray.weight'] = torch.ones(1)
    with pytest.raises(InputError, match=r'1 missing \(decoder.7.bias\) and 1 unexpected \(stray.weight\)'):
        from_official('edge_connect.edge_generator', sd)
    with pytest.warns(UserWarning, match='decoder.7.bias'): net = from_official('edge_connect.edge_generator', sd, strict=False)
    assert torch.equal(net.encoder[1].weight_orig, sd['encoder.1.weight_orig'])
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        from_official('edge_connect.edge_generator', EdgeGenerator(width=1/16).state_dict(), strict=False)


@pytest.mark.parametrize('name, sd, options, message', [
    ('structure_flow.flow', {}, {}, 'known: edge_connect.edge_generator'),
    ('edge_connect.edge_generator', {'generator': {}}, {}, 'nothing'),
    ('edge_connect.edge_generator', {'discriminator': {'a': torch.ones(1)}}, {}, 'found discriminator'),
    ('edge_connect.edge_generator', [1], {}, 'found list'),
    ('edge_connect.edge_generator', {'a': torch.ones(1)}, {}, 'no encoder.1.weight'),
    ('edge_connect.edge_generator', {'encoder.1.weight': torch.ones(8, 3, 7, 7)}, {'padding': 'same'}, "no option 'padding'"),
    ('edge_connect.edge_generator', {'encoder.1.weight': torch.ones(8, 4, 7, 7)}, {}, r'expected \(8, 3, 7, 7\)'),
])
def test_bad_input(name, sd, options, message):
    with pytest.raises(InputError, match=message) as e: from_official(name, sd, **options)
    assert '\n' not in str(e.value)


def test_names_are_the_documented_ones():
    assert {f'edge_connect.{n}' for n in NETS} <= set(OFFICIAL)


class Evil:
    def __init__(self, path): self.path = str(path)
    def __reduce__(self): return open, (self.path, 'w')


def test_pickles_that_want_to_run_code_and_damaged_ones(tmp_path):
    torch.save({'generator': Evil(tmp_path/'ran')}, tmp_path/'evil.pth')
    (tmp_path/'raw.pth').write_bytes(pickle.dumps(Evil(tmp_path/'ran')))
    torch.save({'generator': torch.ones(999)}, tmp_path/'cut.pth')
    (tmp_path/'cut.pth').write_bytes((tmp_path/'cut.pth').read_bytes()[:900])
    (tmp_path/'empty.pth').write_bytes(b''); (tmp_path/'text.pth').write_text('hello, world')
    expected = {'evil': 'refused, it wants to run', 'raw': 'refused', 'cut': 'cut short', 'empty': 'not a PyTorch checkpoint', 'text': 'not a PyTorch checkpoint',
                'none': 'no such file'}
    for name, message in expected.items():
        with pytest.raises(InputError, match=message) as e: load_pickle(tmp_path/f'{name}.pth')
        assert '\n' not in str(e.value) and f'{name}.pth' in str(e.value)
    assert not (tmp_path/'ran').exists()


def test_two_official_files_into_one_of_ours(tmp_path):
    G1, G2 = EdgeGenerator(width=1/8), InpaintGenerator(width=1/8)
    torch.save({'iteration': 5, 'generator': disguise(G1.state_dict(), prefix='module.')}, tmp_path/'e.pth')
    torch.save({'iteration': 6, 'generator': G2.state_dict()}, tmp_path/'i.pth')
    import_edge_connect(tmp_path/'e.pth', tmp_path/'i.pth', tmp_path/'w.safetensors')
    nets, meta = load_weights(tmp_path/'w.safetensors')
    assert (meta['method'], meta['recipe'], meta['config']['width'], meta['steps']) == ('edge_connect', 'official', 1/8, 6)
    for net, sd in ((G1, nets['edge']), (G2, nets['inpaint'])): assert all(torch.equal(v, sd[k]) for k, v in net.state_dict().items())
    torch.save(InpaintGenerator(width=1/16).state_dict(), tmp_path/'other.pth')
    with pytest.raises(InputError, match='e.pth has width 0.125, .*other.pth has width 0.0625; expected one width'): import_edge_connect(tmp_path/'e.pth', tmp_path/'other.pth', tmp_path/'x')
    with pytest.raises(InputError, match='i.pth: edge_connect.edge_generator'): import_edge_connect(tmp_path/'i.pth', tmp_path/'e.pth', tmp_path/'x')
    assert not (tmp_path/'x').exists()


def port_shapes(name): return json.loads((GOLDEN/'keys'/f'{name}.json').read_text())['keys']


def port_like(name):
    "A port's keys and shapes, float64: small weights, batch norm statistics of a trained network's kind, mask kernels of ones"
    rng = torch.Generator().manual_seed(0)
    def value(key, shape):
        if not shape: return torch.tensor(5)
        if 'mask_conv' in key: return torch.ones(shape, dtype=torch.float64)
        x = torch.randn(shape, generator=rng, dtype=torch.float64)
        if key.endswith('running_var'): return .5 + x.abs()
        if len(shape) == 1: return 1 + .1*x if key.endswith('weight') else .1*x
        return x*(2 if name.startswith('naoto') else x[0].numel()**-.5)      # the unscaled port divides by C_in k^2 itself
    return {k: value(k, shape) for k, shape in port_shapes(name).items()}


def unscaled_conv(sd, name, x, mask, stride, padding):
    "Partial convolution with a mask as deep as the features and no factor sum(1): what the port computes"
    w, b = sd[f'{name}.conv.input_conv.weight'], sd.get(f'{name}.conv.input_conv.bias')
    total = torch.nn.functional.conv2d(mask, sd[f'{name}.conv.mask_conv.weight'], stride=stride, padding=padding)
    y = torch.nn.functional.conv2d(x*mask, w, stride=stride, padding=padding)/total.clamp(min=1)
    if b is not None: y = y + b.view(1, -1, 1, 1)
    return torch.where(total > 0, y, 0.), (total > 0).double()


def unscaled_unet(sd, image, mask):
    "The port's U-Net of seven levels, written out plainly; `mask` (B,3,H,W), 1 = known"
    act, norm = torch.nn.functional, lambda n, y: torch.nn.functional.batch_norm(
        y, *(sd[f'{n}.bn.{k}'] for k in ('running_mean', 'running_var', 'weight', 'bias')))
    x, m, skips = image, mask, [(image, mask)]
    for i in range(1, 8):
        k = 7 if i == 1 else 5 if i < 4 else 3
        x, m = unscaled_conv(sd, f'enc_{i}', x, m, 2, k//2)
        x = act.relu(norm(f'enc_{i}', x) if i > 1 else x); skips.append((x, m))
    for i in range(7, 0, -1):
        up = lambda t: act.interpolate(t, scale_factor=2, mode='nearest')
        x, m = (torch.cat([up(a), b], 1) for a, b in zip((x, m), skips[i - 1]))
        x, m = unscaled_conv(sd, f'dec_{i}', x, m, 1, 1)
        if i > 1: x = act.leaky_relu(norm(f'dec_{i}', x), .2)
    return x


def test_partial_conv_port_is_the_same_network():
    "W/(C_in k^2): the whole network of the port, with its multi-channel masks, to rounding"
    sd = port_like('naoto0804_PConvUNet')
    net = from_official('partial_conv.unet', {'n_iter': 1, 'model': sd, 'optimizer': {}}).eval()
    assert sum(p.numel() for p in net.parameters()) == 25_779_796 and next(net.parameters()).dtype == torch.float64
    image = torch.randn(1, 3, 128, 128, generator=torch.Generator().manual_seed(1)).double()
    hole = torch.zeros(1, 1, 128, 128).double(); hole[..., 30:80, 40:100] = 1
    with torch.no_grad():
        ours, theirs = net(image, hole), unscaled_unet(sd, image*(1 - hole), (1 - hole).expand(-1, 3, -1, -1))
    assert ours.std() > 1e-3 and float((ours - theirs).abs().max()/theirs.abs().max()) < 1e-9


def test_partial_conv_port_with_another_mask_kernel_is_refused():
    sd = {'enc_1.conv.input_conv.weight': torch.ones(4, 3, 7, 7), 'enc_1.conv.mask_conv.weight': torch.full((4, 3, 7, 7), .5)}
    with pytest.raises(InputError, match='enc_1.conv.mask_conv.weight is not all ones'): from_official('partial_conv.unet', sd)


@pytest.mark.parametrize('old', [True, False], ids=['2017', 'now'])
def test_context_encoder_port(old):
    "Every key of the port, with and without the counters that batch norm had not yet in 2017"
    sd = {k: v for k, v in port_like('boyuanjiang_netG').items() if not (old and 'num_batches' in k)}
    assert len(sd) == (47 if old else 56)
    net = from_official('context_encoder.generator', {'epoch': 3, 'state_dict': sd}).eval()
    assert sum(p.numel() for p in net.parameters()) == 71_124_544
    assert all(torch.equal(net.state_dict()[k], v) for k, v in sd.items())
    with torch.no_grad(): out = net(torch.rand(1, 3, 128, 128).double()*2 - 1)
    assert out.shape == (1, 3, 64, 64) and out.abs().max() <= 1


@pytest.mark.parametrize('region, bias, size', [('center', True, 64), ('random', False, 128), ('random', True, 128)])
def test_context_encoder_of_any_shape(region, bias, size):
    G, x = ContextEncoder(1/16, bottleneck=12, region=region, bias=bias).eval(), torch.rand(2, 3, 128, 128)
    back = from_official('context_encoder.generator', G.state_dict()).eval()
    assert torch.equal(back(x), G(x)) and back(x).shape[-1] == size


def test_ports_into_weights_files_that_fill(tmp_path):
    from inpaint_lib.inference import load_inpainter
    from inpaint_lib.papers.partial_conv import PConvUNet
    image, mask = torch.rand(3, 140, 150), torch.zeros(140, 150, dtype=torch.bool); mask[40:70, 50:90] = True
    torch.save({'epoch': 3, 'state_dict': ContextEncoder(1/16, bottleneck=8, region='random').state_dict()}, tmp_path/'netG.pth')
    torch.save({'n_iter': 4, 'model': {k.replace('.conv.', '.conv.input_conv.'): v for k, v in PConvUNet(1/16, n_layers=5).state_dict().items()}},
               tmp_path/'unet.pth')
    for method, make, file in (('context_encoder', import_context_encoder, 'netG.pth'), ('partial_conv', import_partial_conv, 'unet.pth')):
        meta = make(tmp_path/file, tmp_path/f'{method}.safetensors')
        assert meta['method'] == method and meta['steps'] in (3, 4)
        filled = load_inpainter(method, tmp_path/f'{method}.safetensors', 'cpu')(image, mask).image
        assert torch.equal(filled[:, ~mask], image[:, ~mask]) and not torch.equal(filled, image)
    with pytest.raises(InputError, match='netG.pth: '): import_partial_conv(tmp_path/'netG.pth', tmp_path/'x')
    assert not (tmp_path/'x').exists()


def test_unwrap_leaves_the_callers_dict_alone():
    sd = {'module.a': torch.ones(1)}
    assert list(unwrap(sd, 'generator')) == ['a'] and list(sd) == ['module.a']


# ---------------------------------------------------------------------------------------------------------------- DeepFill

RECORDS = {'nipponjo_networks_tf_generator_fuse': ('deepfill_v2.generator', {}),
           'nipponjo_networks_tf_generator': ('deepfill_v2.generator', dict(fuse=False)),
           'nipponjo_networks_tf_discriminator': ('deepfill_v2.discriminator', {}),
           'daa233_deepfillv1_generator': ('deepfill_v1.generator', {}),
           'mmagic_deepfillv1_generator': ('deepfill_v1.generator', {})}


def recorded(name): return json.loads((GOLDEN/f'{name}__hash.json').read_text())


def deepfill_like(record):
    "Published keys and shapes, hashed; the fuse kernel is a constant of the network"
    sd = fill_deepfill(dict(record['keys']), torch.float64)
    return sd | {k: torch.eye(3).double().view(1, 1, 3, 3) for k in sd if '.fuse_' in k}


def sine_and_hole():
    image = torch.sin(.01*torch.arange(3*128*128).double()).float().double().view(1, 3, 128, 128)
    mask = torch.zeros(1, 1, 128, 128).double(); mask[..., 32:96, 40:104] = 1
    return image, mask


def with_masks(image, mask): return torch.cat([image*(1 - mask), torch.ones_like(mask), mask], 1)


@pytest.mark.parametrize('name', RECORDS)
def test_recorded_deepfill(name):
    "32 values of every output; and mean and deviation, because all recorded values of the clipped v1 outputs are -1 or 1"
    record, (network, options), (image, mask) = recorded(name), RECORDS[name], sine_and_hole()
    net = from_official(network, deepfill_like(record), **options).eval()
    assert sum(p.numel() for p in net.parameters()) == record['n_parameters'] and next(net.parameters()).dtype == torch.float64
    inputs = {'deepfill_v1.generator': (image*(1 - mask), mask), 'deepfill_v2.generator': (with_masks(image, mask), mask),
              'deepfill_v2.discriminator': (torch.cat([image, mask], 1),)}[network]
    with torch.no_grad(): out = net(*inputs)
    out = out if isinstance(out, tuple) else (out,)
    for o, r in zip(out, record['outputs_float64'].values(), strict=True):
        values = torch.tensor(r['values'], dtype=torch.float64)
        assert float((o.flatten()[r['flat_indices']] - values).abs().max()) < 1e-8
        assert abs(float(o.mean()) - r['mean']) < 1e-8 and abs(float(o.std(correction=0)) - r['std']) < 1e-8


def slim(name, by):
    "A published network's keys in order -> random float64 tensors with 1/by of the channels (picture and mask channels stay)"
    rng = torch.Generator().manual_seed(0)
    def value(shape):
        shape = [n if n <= 5 else n//by for n in shape[:2]] + shape[2:]
        return torch.randn(shape, generator=rng).double()*(1.5/(shape[1]*shape[2]*shape[3])**.5 if len(shape) == 4 else .1)
    return {k['key']: torch.eye(3).view(1, 1, 3, 3) if '.fuse_' in k['key'] else value(k['shape']) for k in port_shapes(name)}


def plain_attention(f, mask):
    "Contextual attention with every second pixel, written as products of patch matrices"
    unfold, (h, w) = torch.nn.functional.unfold, (f.shape[2]//2, f.shape[3]//2)
    small = unfold(f[..., ::2, ::2], 3, padding=1)[0]
    y = (small/small.norm(dim=0).clamp(min=1e-4)).T @ small                     # keys, queries
    for a, b in ((h, w), (w, h)):                                               # diagonal neighbours; then by columns
        z = torch.nn.functional.pad(y, (1, 1, 1, 1))
        y = (z[1:-1, 1:-1] + z[:-2, :-2] + z[2:, 2:]).view(a, b, a, b).permute(1, 0, 3, 2).reshape(h*w, h*w)
    free = (unfold(mask[..., ::8, ::8], 3, padding=1)[0].sum(0) == 0).double()[:, None]
    weights = (10*y*free).softmax(0)*free
    return torch.nn.functional.fold(unfold(f, 4, padding=1, stride=2) @ weights, f.shape[2:], 4, padding=1, stride=2)/4


def plain_deepfill_v2(sd, x, mask):
    "The port with symmetric padding, written out by the official names of its layers"
    act = torch.nn.functional
    def conv(n, y, stride=1, dilation=1, f=act.elu):
        w = sd[n + '.weight']
        y = act.conv2d(y, w, sd[n + '.bias'], stride=stride, padding=dilation*(w.shape[-1]//2), dilation=dilation)
        return y if f is None else f(y.chunk(2, 1)[0])*y.chunk(2, 1)[1].sigmoid()
    def down(p, y, f=act.elu):
        for n, stride in zip(('1', '2_downsample', '3', '4_downsample', '5'), (1, 2, 1, 2, 1)): y = conv(f'{p}{n}.conv', y, stride)
        return conv(f'{p}6.conv', y, f=f)
    def wide(p, y):
        for n, dilation in ((7, 2), (8, 4), (9, 8), (10, 16)): y = conv(f'{p}{n}_atrous.conv', y, 1, dilation)
        return y
    def up(p, y):
        for n in ('11', '12', '13_upsample.conv', '14', '15_upsample.conv', '16'):
            y = conv(f'{p}{n}.conv', act.interpolate(y, scale_factor=2) if 'upsample' in n else y)
        return conv(f'{p}17.conv', y, f=None).tanh()
    coarse = up('conv', wide('conv', down('conv', x)))
    painted = coarse*mask + x[:, :3]*(1 - mask)
    copied = plain_attention(down('pmconv', painted, act.relu), mask)
    copied = conv('pmconv10.conv', conv('pmconv9.conv', copied))
    return coarse, up('allconv', torch.cat([wide('xconv', down('xconv', painted)), copied], 1))


def test_deepfill_v2_port_with_symmetric_padding():
    "Both layouts hold the same tensors in one order: the names of one, the arithmetic of the other, written out plainly"
    sd, tf_names = slim('nipponjo_networks_generator', 12), [k['key'] for k in port_shapes('nipponjo_networks_tf_generator')]
    named = dict(zip(tf_names, [v for k, v in sd.items() if '.fuse_' not in k], strict=True))
    image, mask = torch.randn(1, 3, 64, 80, generator=torch.Generator().manual_seed(1)).double(), torch.zeros(1, 1, 64, 80).double()
    mask[..., 9:31, 20:53] = 1; x = with_masks(image, mask)
    with torch.no_grad():
        ours = from_official('deepfill_v2.generator', sd)(x, mask)
        for a, b in zip(ours, plain_deepfill_v2(named, x, mask), strict=True):
            assert .05 < float(b.std()) and float((a - b).abs().max()) < 1e-10
        symmetric = from_official('deepfill_v2.generator', named, padding='symmetric')(x, mask)
        assert torch.equal(symmetric[0], ours[0]) and not torch.allclose(symmetric[1], ours[1])      # its attention is another


def rgb_and_bgr(network, sd, x):
    "(the file on exchanged colours, the file read as BGR on the colours as they are)"
    as_it_is, exchanged = (from_official(network, sd, channels=c) for c in ('rgb', 'bgr'))
    swapped = torch.cat([x[:, :3].flip(1), x[:, 3:]], 1)
    with torch.no_grad():
        if 'discriminator' in network: return as_it_is(swapped), exchanged(x), as_it_is(x)
        mask = x[:, 4:5]
        if 'v1' in network: swapped, x = swapped[:, :3], x[:, :3]
        return as_it_is(swapped, mask)[1].flip(1), exchanged(x, mask)[1], as_it_is(x, mask)[1]


@pytest.mark.parametrize('network, layout, by', [('deepfill_v2.generator', 'nipponjo_networks_tf_generator', 12),
                                                 ('deepfill_v2.generator', 'nipponjo_networks_generator', 12),
                                                 ('deepfill_v1.generator', 'daa233_deepfillv1_generator', 8),
                                                 ('deepfill_v1.generator', 'mmagic_deepfillv1_generator', 8)])
def test_bgr_files_take_rgb(network, layout, by):
    image = torch.rand(1, 3, 72, 72, generator=torch.Generator().manual_seed(2)).double()*2 - 1
    mask = torch.zeros(1, 1, 72, 72).double(); mask[..., 10:40, 20:50] = 1
    expected, found, wrong = rgb_and_bgr(network, slim(layout, by), with_masks(image, mask))
    assert float((expected - found).abs().max()) < 1e-10 and float((wrong - found).abs().max()) > 1e-3


def test_critic_of_v2_takes_one_power_step_and_other_colours():
    sd = {k: v.clone() for k, v in deepfill_like(recorded('nipponjo_networks_tf_discriminator')).items()}
    x = torch.cat(sine_and_hole(), 1)[..., :64, :64]
    expected, found, wrong = rgb_and_bgr('deepfill_v2.discriminator', {'D': sd, 'G': {}}, x)
    assert float((expected - found).abs().max()) < 1e-12 < float((wrong - found).abs().max())
    W, u = sd['conv4.conv_sn.weight'].flatten(1), sd['conv4.conv_sn.weight_u'].flatten()
    v = W.T @ u; v = v/v.norm(); conv = from_official('deepfill_v2.discriminator', sd).convs.conv4
    assert torch.allclose(conv.weight_v, v, atol=1e-14) and torch.allclose(conv.weight_u, W @ v/(W @ v).norm(), atol=1e-14)
    del sd['conv4.conv_sn.weight_u']
    with pytest.warns(UserWarning, match='1 layers missing; computed from an SVD'): from_official('deepfill_v2.discriminator', sd)


def test_options_of_deepfill_reach_the_network():
    sd = slim('nipponjo_networks_tf_generator', 12)
    image, mask = torch.randn(1, 3, 128, 128).double(), torch.zeros(1, 1, 128, 128).double(); mask[..., 58:92, 58:84] = 1     # row 59 of one step, 57 of two
    x, net = with_masks(image, mask), {k: from_official('deepfill_v2.generator', sd, **o) for k, o in
                                       dict(tf={}, one=dict(mask_steps=1), two=dict(mask_steps=2), plain=dict(fuse=False)).items()}
    assert [n.refine.attention.mask_steps for n in net.values()] == [1, 1, 2, 1]
    assert [n.refine.attention.fuse for n in net.values()] == [True, True, True, False]
    with torch.no_grad(): out = {k: n(x, mask)[1] for k, n in net.items()}
    assert torch.equal(out['tf'], out['one'])
    assert not torch.allclose(out['tf'], out['two']) and not torch.allclose(out['tf'], out['plain'])


def test_deepfill_with_a_sketch_and_in_half_precision():
    sd = slim('nipponjo_networks_tf_generator', 12)
    sd['conv1.conv.weight'] = torch.cat([sd['conv1.conv.weight'], sd['conv1.conv.weight'][:, :1]], 1).half()
    net = from_official('deepfill_v2.generator', sd)
    assert net.in_ch == 6 and next(net.parameters()).dtype == torch.float64       # the widest type of the file
    half = from_official('deepfill_v2.generator', {k: v.half() for k, v in sd.items()})
    assert all(p.dtype == torch.float16 for p in half.parameters())


def test_a_fuse_kernel_that_was_changed_is_told():
    sd = slim('nipponjo_networks_generator', 12); sd['stage2.contextual_attention.fuse_weight'] = torch.ones(1, 1, 3, 3)
    with pytest.warns(UserWarning, match='fuse_weight is not the identity'): from_official('deepfill_v2.generator', sd)


@pytest.mark.parametrize('network, layout, change, options, message', [
    ('v2', 'nipponjo_networks_tf_generator', {}, dict(padding='valid'), "padding 'valid'"),
    ('v2', 'nipponjo_networks_tf_generator', {}, dict(channels='rbg'), 'rgb or bgr'),
    ('v2', 'nipponjo_networks_tf_generator', {}, dict(mask_steps=3), 'expected 1 or 2'),
    ('v2', 'nipponjo_networks_tf_generator', {}, dict(fuse='no'), 'expected true or false'),
    ('v2', 'nipponjo_networks_tf_generator', {}, dict(padings='same'), "no option 'padings'; known: padding, channels"),
    ('v2', 'nipponjo_networks_tf_generator', {'conv1.conv.weight': torch.ones(4, 4, 5, 5)}, {}, 'in_ch 4; expected 5'),
    ('v2', 'nipponjo_networks_tf_generator', {'xconv3.conv.weight': None, 'xconv33.conv.weight': torch.ones(1)}, {},
     r'1 missing \(refine.xconv.xconv3.conv.weight\) and 1 unexpected \(xconv33.conv.weight\)'),
    ('v2', 'nipponjo_networks_generator', {'stage1.conv_bn3.conv.bias': torch.ones(7)}, {}, r'conv8_atrous.conv.bias \(7,\), expected \(16,\)'),
    ('v2', 'daa233_deepfillv1_generator', {}, {}, r'no layer of a known layout \(conv1.conv.weight, stage1.conv1.conv.weight\)'),
    ('v1', 'nipponjo_networks_generator', {}, {}, 'begins with stage1.conv1.conv.weight'),
    ('v1', 'mmagic_deepfillv1_generator', {'stage2.decoder.dec7.conv.bias': None}, {}, 'refine.allconv.allconv17.conv.bias'),
    ('v1', 'daa233_deepfillv1_generator', {'fine_generator.conv1.conv.weight': torch.ones(4, 3, 5, 5)}, {}, 'expected'),
])
def test_deepfill_files_that_do_not_fit(network, layout, change, options, message):
    sd = slim(layout, 12 if 'nipponjo' in layout else 8)
    for k, v in change.items(): sd.pop(k) if v is None else sd.update({k: v})
    with pytest.raises(InputError, match=message) as e: from_official(f'deepfill_{network}.generator', sd, **options)
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('method, layout, wrap, options', [
    ('deepfill_v2', 'nipponjo_networks_tf_generator', lambda sd: {'G': sd, 'D': {}, 'n_iter': 6}, dict(mask_steps=2)),
    ('deepfill_v2', 'nipponjo_networks_generator', lambda sd: sd, {}),
    ('deepfill_v1', 'daa233_deepfillv1_generator', lambda sd: {f'module.{k}': v for k, v in sd.items()}, dict(channels='bgr')),
    ('deepfill_v1', 'mmagic_deepfillv1_generator',
     lambda sd: {'meta': {}, 'state_dict': {f'generator.{k}': v for k, v in sd.items()} | {'disc.fc.bias': torch.ones(1)}}, {})])
def test_deepfill_import_then_fill(tmp_path, method, layout, wrap, options):
    "The weights file rebuilds the very network, conventions included, and fills any picture"
    from inpaint_lib.inference import load_inpainter
    from inpaint_lib.papers.deepfill_v2 import DeepFillV2Generator
    sd = {k: v.float() for k, v in slim(layout, 12 if method == 'deepfill_v2' else 8).items()}
    torch.save(wrap(sd), tmp_path/'theirs.pth')
    meta = IMPORTS[method](tmp_path/'theirs.pth', tmp_path/'w.safetensors', **options)
    nets, read = load_weights(tmp_path/'w.safetensors')
    assert read == json.loads(json.dumps(meta)) and (meta['method'], meta['recipe'], meta['steps']) == (method, 'official', 6 if 'tf' in layout else 0)
    make = DeepFillV2Generator if method == 'deepfill_v2' else DeepFillV1Generator
    back = make(read['config']['width'], **read['network']); back.load_state_dict(nets['generator'])
    theirs, x = from_official(f'{method}.generator', sd, **options), torch.rand(1, 5, 72, 80)
    x, mask = x if method == 'deepfill_v2' else x[:, :3], (x[:, 4:] > .7).float()
    with torch.no_grad(): assert torch.equal(back(x, mask)[1], theirs(x, mask)[1])
    image, hole = torch.rand(3, 90, 100), torch.zeros(90, 100, dtype=torch.bool); hole[30:60, 40:70] = True
    filled = load_inpainter(method, tmp_path/'w.safetensors', 'cpu')(image, hole).image
    assert torch.equal(filled[:, ~hole], image[:, ~hole]) and not torch.equal(filled, image)


@pytest.mark.parametrize('network, key, tensor, options, message', [
    ('deepfill_v2.generator', 'conv1.conv.weight', torch.ones(16), {}, r'conv1.conv.weight has the shape \(16,\)'),
    ('deepfill_v2.generator', 'conv1.conv.weight', torch.tensor(1.), {}, r'has the shape \(\)'),
    ('deepfill_v2.generator', 'conv1.conv.weight', torch.ones(0, 5, 5, 5), {}, 'has the shape'),
    ('deepfill_v2.generator', 'xconv1.conv.weight', torch.ones(16), dict(channels='bgr'), 'another shape'),
    ('deepfill_v2.generator', 'conv17.conv.bias', torch.tensor(1.), dict(channels='bgr'), 'another shape'),
    ('deepfill_v2.generator', 'conv17.conv.weight', torch.tensor(1.), dict(channels='bgr'), 'another shape'),
    ('deepfill_v2.discriminator', 'conv1.conv_sn.weight', torch.ones(64), {}, 'has the shape'),
    ('deepfill_v2.discriminator', 'conv3.conv_sn.weight', torch.ones(64), {}, r'convs.conv3.weight \(64,\) with _u'),
    ('deepfill_v2.discriminator', 'conv3.conv_sn.weight_u', torch.ones(7), {}, r'with _u \(7,\)'),
    ('deepfill_v2.discriminator', 'conv3.conv_sn.weight_u', torch.tensor(1.), {}, 'with _u'),
    ('edge_connect.edge_generator', 'encoder.1.weight_orig', torch.ones(4), {}, 'has the shape'),
    ('edge_connect.edge_discriminator', 'conv3.0.weight_orig', torch.ones(4), {}, 'another shape'),
    ('context_encoder.generator', 'main.14.weight', torch.tensor(1.), {}, 'has the shape'),
    ('partial_conv.unet', 'enc_1.conv.input_conv.weight', torch.tensor(1.), {}, 'has the shape|no enc_1'),
    ('partial_conv.unet', 'enc_1.conv.input_conv.weight', torch.ones(0, 3, 7, 7), {}, 'has the shape'),
], ids=str)
def test_tensors_with_too_few_axes_are_one_line(network, key, tensor, options, message):
    from inpaint_lib.papers.context_encoder import ContextEncoder
    from inpaint_lib.papers.edge_connect import Discriminator, EdgeGenerator
    from inpaint_lib.papers.partial_conv import PConvUNet
    rename = lambda sd: {k.replace('.conv.', '.conv.input_conv.'): v for k, v in sd.items()}
    make = {'deepfill_v2.generator': lambda: slim('nipponjo_networks_tf_generator', 12),
            'deepfill_v2.discriminator': lambda: dict(deepfill_like(recorded('nipponjo_networks_tf_discriminator'))),
            'edge_connect.edge_generator': lambda: EdgeGenerator(width=1/16).state_dict(),
            'edge_connect.edge_discriminator': lambda: {k: v for k, v in Discriminator(2, width=1/16).state_dict().items() if k != 'conv3.0.weight_u'},
            'context_encoder.generator': lambda: ContextEncoder(width=1/16, bottleneck=8).state_dict(),
            'partial_conv.unet': lambda: rename(PConvUNet(width=1/16, n_layers=6).state_dict())}
    sd = make[network]()
    assert key in sd
    from_official(network, sd, **options)                                     # as it is, it loads
    with pytest.raises(InputError, match=message) as e: from_official(network, sd | {key: tensor.to(torch.float64)}, **options)
    assert '\n' not in str(e.value)


def test_deepfill_import_refuses(tmp_path):
    torch.save({'G': {'conv1.conv.weight': torch.ones(48)}}, tmp_path/'bad.pth')
    with pytest.raises(InputError, match=r'bad.pth: conv1.conv.weight has the shape \(48,\)'): import_deepfill_v2(tmp_path/'bad.pth', tmp_path/'x')
    torch.save(slim('daa233_deepfillv1_generator', 8), tmp_path/'v1.pth')
    with pytest.raises(InputError, match='v1.pth: no layer of a known layout'): import_deepfill_v2(tmp_path/'v1.pth', tmp_path/'x')
    with pytest.raises(InputError, match="v1.pth: deepfill_v1.generator: no option 'color'"):
        import_deepfill_v1(tmp_path/'v1.pth', tmp_path/'x', color='bgr')
    with pytest.raises(InputError, match="no option 'channels'; known: none"):
        import_context_encoder(tmp_path/'v1.pth', tmp_path/'x', channels='bgr')
    assert not (tmp_path/'x').exists()


# ---------------------------------------------------------------------------------------------------------- StructureFlow

SF = {'structure_generator': ('StructureGen', 'hash_train1', 7), 'flow_generator': ('FlowGen', 'hash_eval', 7),
      'discriminator': ('MultiDiscriminator', 'hash_train1', 3)}


def recorded_flow(name): return json.loads((GOLDEN/'structure_flow_networks.json').read_text())[SF[name][0]]


def outputs(name, net, x):
    "Every output of a StructureFlow network, as a list in the order of the record"
    with torch.no_grad(): y = net(x)
    return [y] if isinstance(y, torch.Tensor) else list(y)


@pytest.mark.parametrize('name', SF)
def test_recorded_structure_flow(name):
    "One training forward (with its power step), or one evaluation, of all parameters in float64"
    record, (_, run, in_ch) = recorded_flow(name), SF[name]
    sd = fill({k: s for k, s, _ in record['state_dict']})
    net = from_official(f'structure_flow.{name}', sd)
    assert sum(p.numel() for p in net.parameters()) == record['n_params'] and next(net.parameters()).dtype == torch.float64
    assert sorted(net.state_dict()) == record['sorted_keys'] == sorted(sd)
    run = record['runs'][run]
    expected = run.get('outputs') or [run[k] for k in ('output', 'image', 'flow') if k in run]
    found = outputs(name, net.train('train' in SF[name][1]), sine((1, in_ch, 128, 128), 0., 1.))
    for y, g in zip(found, expected, strict=True):
        assert list(y.shape) == g['shape'] and gap(y, g) < 1e-9
        assert abs(float(y.mean()) - g['mean']) < 1e-9 and abs(float(y.std(correction=0)) - g['std']) < 1e-9


SF_SMALL = {'structure_generator': StructureGen, 'flow_generator': FlowGen, 'discriminator': MultiDiscriminator}
SF_INPUT = {'structure_generator': 7, 'flow_generator': 7, 'discriminator': 3}


@pytest.mark.parametrize('name', SF)
@pytest.mark.parametrize('how', [dict(), dict(new_names=True), dict(prefix='module.'), dict(wrapper='PART'),
                                 dict(new_names=True, prefix='module.module.', wrapper='state_dict')], ids=str)
def test_every_disguise_of_structure_flow(name, how):
    torch.manual_seed(0)
    net, x = SF_SMALL[name](width=1/16).eval(), torch.rand(1, SF_INPUT[name], 64, 64)
    if how.get('wrapper') == 'PART': how = how | dict(wrapper=OFFICIAL[f'structure_flow.{name}'].part)
    back = from_official(f'structure_flow.{name}', disguise(net.state_dict(), **how)).eval()
    assert all(torch.equal(a, b) for a, b in zip(outputs(name, back, x), outputs(name, net, x), strict=True))


def test_structure_flow_without_spectral_norm_and_without_its_vectors():
    torch.manual_seed(0)
    G, x = StructureGen(width=1/16, use_spectral_norm=False).eval(), torch.rand(1, 7, 16, 16)
    back = from_official('structure_flow.structure_generator', G.state_dict()).eval()
    assert torch.equal(outputs('', back, x)[0], outputs('', G, x)[0]) and not any('orig' in k for k in back.state_dict())
    normed = StructureGen(width=1/16).double().eval()
    sd = {k: v for k, v in normed.state_dict().items() if not k.endswith('weight_u')}
    with pytest.warns(UserWarning, match='spectral vectors of 9 layers'): back = from_official('structure_flow.structure_generator', sd)
    for _ in range(300): outputs('', normed.train(), x.double())                                  # u and v converge
    assert float((outputs('', back.eval(), x.double())[0] - outputs('', normed.eval(), x.double())[0]).abs().max()) < 1e-4


@pytest.mark.parametrize('name, other, message', [
    ('structure_generator', 'flow_generator', r'no input_layer.conv.weight in this state dict \(it begins with flow_column'),
    ('flow_generator', 'structure_generator', r'no conv_column.down_sample.0.0.conv.weight'),
    ('discriminator', 'structure_generator', r'no model_1.model.0.conv.weight')])
def test_one_structure_flow_network_for_another(name, other, message):
    with pytest.raises(InputError, match=message) as e: from_official(f'structure_flow.{name}', SF_SMALL[other](width=1/16).state_dict())
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('name', SF)
@pytest.mark.parametrize('tensor', [torch.tensor(1.), torch.ones(4), torch.ones(0, 7, 7, 7)], ids=lambda t: str(tuple(t.shape)))
def test_misshapen_first_layers_of_structure_flow(name, tensor):
    sd = SF_SMALL[name](width=1/16).state_dict()
    first = next(k for k in sd if k.startswith(('input_layer.conv.weight', 'conv_column.down_sample.0.0.conv.weight', 'model_1.model.0.conv.weight'))
                 and k.endswith(('weight', 'weight_orig')))
    with pytest.raises(InputError, match='has the shape'): from_official(f'structure_flow.{name}', sd | {first: tensor})
    with pytest.raises(InputError, match='no option'): from_official(f'structure_flow.{name}', sd, channels='bgr')
    del sd[[k for k in sd if k.endswith('.conv.bias')][-1]]
    with pytest.raises(InputError, match='1 missing'): from_official(f'structure_flow.{name}', sd)


def test_structure_flow_import_then_fill(tmp_path):
    "Two official files in one of ours, which holds what it takes to rebuild both networks, and fills"
    from inpaint_lib.inference import load_inpainter
    torch.manual_seed(0)
    S, G = StructureGen(width=1/16), FlowGen(width=1/16)
    torch.save(disguise(S.state_dict(), prefix='module.'), tmp_path/'5_net_s_gen.pth')
    torch.save(disguise(G.state_dict(), wrapper='generator'), tmp_path/'5_net_f_gen.pth')
    meta = import_structure_flow(tmp_path/'5_net_s_gen.pth', tmp_path/'5_net_f_gen.pth', tmp_path/'w.safetensors')
    nets, read = load_weights(tmp_path/'w.safetensors')
    assert read == json.loads(json.dumps(meta)) and (meta['method'], meta['recipe'], meta['iterations']) == ('structure_flow', 'official', {'flow': 3})
    assert read['config']['composite_structure'] is False                                         # as the published code runs
    assert read['config']['width'] == 1/16 and read['source'] == ['5_net_s_gen.pth', '5_net_f_gen.pth']
    for net, part in ((S, 'structure'), (G, 'flow')): assert all(torch.equal(v, nets[part][k]) for k, v in net.state_dict().items())
    image, mask = torch.rand(3, 70, 90), torch.zeros(70, 90, dtype=torch.bool); mask[20:50, 30:60] = True
    filled = load_inpainter('structure_flow', tmp_path/'w.safetensors', 'cpu')(image, mask).image
    assert torch.equal(filled[:, ~mask], image[:, ~mask]) and not torch.equal(filled, image)


def test_structure_flow_import_refuses(tmp_path):
    for name, net in (('s', StructureGen(1/16)), ('f', FlowGen(1/16)), ('wide', FlowGen(1/8))): torch.save(net.state_dict(), tmp_path/f'{name}.pth')
    s, f, wide, out = (tmp_path/n for n in ('s.pth', 'f.pth', 'wide.pth', 'x.safetensors'))
    with pytest.raises(InputError, match='f.pth: no input_layer'): import_structure_flow(f, s, out)
    with pytest.raises(InputError, match='s.pth has width 0.0625, .*wide.pth has width 0.125; expected one width'): import_structure_flow(s, wide, out)
    with pytest.raises(InputError, match='none.pth: no such file'): import_structure_flow(s, tmp_path/'none.pth', out)
    with pytest.raises(InputError, match="no option 'channels'; known: none"): import_structure_flow(s, f, out, channels='bgr')
    assert not out.exists()


def test_flipped_bytes_and_nan_never_become_weights(tmp_path):
    "torch.load looks at no checksum, and a network with NaN would fill holes with black"
    torch.save({'generator': torch.ones(999)}, tmp_path/'whole.pth'); whole = (tmp_path/'whole.pth').read_bytes()
    (tmp_path/'flipped.pth').write_bytes(whole.replace(bytes(torch.ones(999).numpy())[:400], bytes(400), 1))
    with pytest.raises(InputError, match='the checksum of .* is wrong'): load_pickle(tmp_path/'flipped.pth')
    assert load_pickle(tmp_path/'whole.pth')['generator'].sum() == 999
    sd = EdgeGenerator(width=1/8).state_dict(); sd['decoder.7.weight'] = sd['decoder.7.weight']*float('nan')
    torch.save(sd, tmp_path/'e.pth'); torch.save(InpaintGenerator(width=1/8).state_dict(), tmp_path/'i.pth')
    with pytest.raises(InputError, match='holds NaN or infinity'): import_edge_connect(tmp_path/'e.pth', tmp_path/'i.pth', tmp_path/'w.safetensors')
    assert not (tmp_path/'w.safetensors').exists()
