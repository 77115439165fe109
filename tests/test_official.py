"Official checkpoints: the recorded outputs of the authors' networks, and every form their files come in"
import json
import pickle
import sys
import warnings
from pathlib import Path

import pytest
import torch

from inpaint_lib.core import InputError
from inpaint_lib.official import (OFFICIAL, from_official, import_context_encoder, import_edge_connect, import_partial_conv,
                                  load_pickle, unwrap)
from inpaint_lib.papers.context_encoder import ContextEncoder
from inpaint_lib.papers.edge_connect import Discriminator, EdgeGenerator, InpaintGenerator
from inpaint_lib.training import load_weights

GOLDEN = Path(__file__).parent/'golden'
sys.path.insert(0, str(GOLDEN))
from fill import fill, sine  # noqa: E402

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
    expected = {'evil': 'refused, it wants to run', 'raw': 'refused', 'cut': 'cut short', 'empty': 'cut short', 'text': 'cut short',
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
    with pytest.raises(InputError, match='expected one width'): import_edge_connect(tmp_path/'e.pth', tmp_path/'other.pth', tmp_path/'x')
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
