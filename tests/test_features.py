"VGG features: golden activations, partial files, what is refused"
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from inpaint_lib.core import InputError
from inpaint_lib.features import EDGE_CONNECT_LAYERS, VGGFeatures, vgg_convs, vgg_layers, vgg_shapes

GOLDEN = Path(__file__).parent/'golden'
sys.path.insert(0, str(GOLDEN))
from fill import fill, sine  # noqa: E402

LOSSES = json.loads((GOLDEN/'edge_connect_losses.json').read_text())


@pytest.fixture(scope='module')
def he(): return fill(vgg_shapes(), 'he')


@pytest.fixture(scope='module')
def partial_file(tmp_path_factory, he):
    path = tmp_path_factory.mktemp('w')/'vgg19_to_conv3_4.safetensors'
    save_file({k: v.half() for k, v in he.items() if int(k.split('.')[1]) <= 16}, path)
    return path


def test_key_order_is_the_goldens():
    assert [k.removeprefix('features.') for k in sorted(vgg_shapes())] == LOSSES['vgg_sorted_keys']


def test_torchvision_agrees_on_names_and_shapes():
    import torchvision
    for arch in ('vgg16', 'vgg19'):
        with torch.device('meta'): net = getattr(torchvision.models, arch)(weights=None).features
        assert {f'features.{k}': tuple(v.shape) for k, v in net.state_dict().items()} == vgg_shapes(arch)


def test_activations_equal_the_golden(he):
    relus = [l for l in vgg_layers() if l.startswith('relu')]
    f = VGGFeatures(layers=relus, weights=he)(sine((2, 3, 64, 64)))
    means, nonzero = (LOSSES['vgg_he'][k] for k in ('feature_means_x', 'feature_fraction_nonzero_x'))
    assert set(f) == set(means)
    for l in relus:
        assert abs(f[l].mean().item()/means[l] - 1) < 1e-9
        assert abs((f[l] != 0).double().mean().item() - nonzero[l]) < 1e-9


def test_only_what_is_needed_is_built(he):
    for layer, n in (('conv1_1', 1), ('relu3_1', 5), ('relu3_4', 8), ('pool3', 8), ('relu5_4', 16), ('pool5', 16)):
        assert len(VGGFeatures(layers=(layer,), weights=he).convs) == n
    assert len(VGGFeatures('vgg16', ('relu3_1',), fill(vgg_shapes('vgg16'), 'he')).convs) == 5
    assert len(vgg_convs('vgg16')) == 13


def test_conv_output_survives_the_relu(he):
    f = VGGFeatures(layers=('conv2_1', 'relu2_1'), weights=he)(sine((1, 3, 16, 16)))
    assert f['conv2_1'].min() < 0 and torch.equal(f['conv2_1'].relu(), f['relu2_1'])


def test_frozen_and_outside_checkpoints(he):
    vgg = VGGFeatures(layers=('relu1_2',), weights=he)
    around = torch.nn.ModuleDict(dict(vgg=vgg, net=torch.nn.Linear(1, 1)))
    assert set(around.state_dict()) == {'net.weight', 'net.bias'}
    around.load_state_dict(around.state_dict())
    x = sine((1, 3, 8, 8)).requires_grad_()
    vgg(x)['relu1_2'].sum().backward()
    assert x.grad.abs().sum() > 0 and not any(p.requires_grad for p in vgg.parameters())


def test_gradcheck(he):
    vgg = VGGFeatures(layers=('relu1_1', 'relu2_1'), weights=he, normalize=True)
    x = sine((1, 3, 4, 4), .5, .3, .7).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: tuple(vgg(x).values()), x)


def test_dtypes(he, partial_file):
    assert VGGFeatures(layers=('relu1_1',), weights=he)(torch.rand(1, 3, 4, 4))['relu1_1'].dtype == torch.float64
    vgg = VGGFeatures(layers=('relu3_4',), weights=partial_file)           # a float16 file computes in float32
    assert vgg(torch.rand(1, 3, 8, 8))['relu3_4'].dtype == torch.float32
    with torch.autocast('cpu', torch.bfloat16):
        assert vgg(torch.rand(1, 3, 8, 8))['relu3_4'].dtype == torch.bfloat16


def test_half_precision_is_close(he):
    vgg = VGGFeatures(weights={k: v.float() for k, v in he.items()})
    x = sine((1, 3, 32, 32)).float()
    full = vgg(x)
    with torch.autocast('cpu', torch.bfloat16): half = vgg(x)
    for l in full: assert (full[l] - half[l]).abs().mean() < .02*full[l].abs().mean(), l


def test_normalize_is_explicit(he):
    raw, norm = (VGGFeatures(layers=('conv1_1',), weights=he, normalize=n) for n in (False, True))
    x = sine((1, 3, 8, 8))
    m, s = (torch.tensor(v, dtype=torch.float64).view(1, 3, 1, 1) for v in ((.485, .456, .406), (.229, .224, .225)))
    torch.testing.assert_close(norm(x)['conv1_1'], raw((x - m)/s)['conv1_1'])
    assert not torch.allclose(norm(x)['conv1_1'], raw(x)['conv1_1'])


def test_partial_file(partial_file, he):
    vgg = VGGFeatures(layers=('relu1_1', 'relu3_4'), weights=str(partial_file))
    assert vgg.available == tuple(vgg_layers()[:8*2 + 3]) and vgg.source == str(partial_file)
    assert torch.equal(vgg.convs['conv3_4'].weight, he['features.16.weight'].half().float())
    with pytest.raises(InputError) as e: VGGFeatures(layers=EDGE_CONNECT_LAYERS, weights=partial_file)
    assert 'relu5_2' in str(e.value) and 'ends at pool3' in str(e.value) and partial_file.name in str(e.value)
    assert '\n' not in str(e.value)


def test_pth_file(tmp_path, he):
    path = tmp_path/'vgg.pth'
    torch.save({k: v for k, v in he.items() if int(k.split('.')[1]) <= 2} | {'classifier.0.bias': torch.ones(1)}, path)
    assert VGGFeatures(layers=('relu1_2',), weights=path).available[-1] == 'pool1'


class Evil:
    def __reduce__(self): return print, ('code from a pickle ran',)


def test_files_that_are_refused(tmp_path, capsys, he):
    def says(pattern, weights, **kw):
        with pytest.raises(InputError, match=pattern) as e: VGGFeatures(weights=weights, **kw)
        assert '\n' not in str(e.value)
    says('no such file', tmp_path/'none.pth')
    for name in ('a.pth', 'a.safetensors'):
        (tmp_path/name).write_bytes(b'half a fi'); says(f'{name}: no state dict', tmp_path/name)
    with open(tmp_path/'evil.pth', 'wb') as f: pickle.dump(Evil(), f, protocol=2)
    says('evil.pth: no state dict', tmp_path/'evil.pth')
    assert 'ran' not in capsys.readouterr().out
    says("holds none of torchvision's vgg19 keys", {'conv.weight': torch.ones(1)})
    says(r'features.0.weight is \(1, 3, 3, 3\); vgg19 has \(64, 3, 3, 3\)', he | {'features.0.weight': torch.ones(1, 3, 3, 3)})
    part = {k: v for k, v in he.items() if int(k.split('.')[1]) <= 16}
    says('relu4_1 is asked for, but the given state dict ends at pool3', part, layers=('relu4_1',))


@pytest.mark.parametrize('arch,other,first', [('vgg16', 'vgg19', 16), ('vgg19', 'vgg16', 17)])
def test_weights_of_the_other_vgg_are_refused(arch, other, first):
    "pool1 to pool3 would run without complaint"
    state = fill(vgg_shapes(other), 'he')
    for cut in (first, 99):
        part = {k: v for k, v in state.items() if int(k.split('.')[1]) <= cut}
        with pytest.raises(InputError, match=rf'holds features.{first}.weight, which {arch} does not have, and looks like that of a {other}; '
                           rf'expected weights of {arch}') as e: VGGFeatures(arch, ('pool1', 'pool2'), part)
        assert '\n' not in str(e.value)
    VGGFeatures(arch, ('pool2', 'relu3_3'), {k: v for k, v in state.items() if int(k.split('.')[1]) <= 14})    # can't be told apart
    with pytest.raises(InputError, match='another network'): VGGFeatures(arch, ('pool1',), state | {'features.3.weight': torch.ones(1)})


def test_scale_is_the_files_unit(he, tmp_path):
    for factor, kind in ((1, torch.float64), (40, torch.float32), (40, torch.float16)):
        state = {k: (v*factor if k == 'features.0.weight' else v).to(kind) for k, v in he.items()}
        vgg = VGGFeatures('vgg19', ('conv1_1', 'relu2_1'), state)
        assert isinstance(vgg.scale, float) and abs(vgg.scale/(factor*he['features.0.weight'].abs().mean().item()) - 1) < 1e-3
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path/'large.safetensors')
    assert VGGFeatures('vgg19', ('relu1_1',), tmp_path/'large.safetensors', normalize=True).scale == vgg.scale


def test_arguments_that_are_refused(he):
    for kw, pattern in ((dict(layers=('relu6_1',)), "asked for 'relu6_1'; expected names from conv1_1 to pool5"),
                        (dict(layers=()), 'no layer at all'), (dict(layers=('relu3_4',), arch='vgg16'), 'relu3_4'),
                        (dict(arch='resnet'), "no VGG called 'resnet'; expected one of vgg16, vgg19")):
        with pytest.raises(InputError, match=pattern): VGGFeatures(weights=he, **kw)
    vgg = VGGFeatures(layers=('relu3_1',), weights=he)
    for shape in ((1, 1, 8, 8), (3, 8, 8), (1, 3, 3, 8)):
        with pytest.raises(InputError, match='sides of 4 or more'): vgg(torch.rand(shape))


def test_failed_download_is_one_line(monkeypatch):
    import urllib.error
    from torchvision.models._api import WeightsEnum

    def offline(self, *a, **k): raise urllib.error.URLError('no route to host')
    monkeypatch.setattr(WeightsEnum, 'get_state_dict', offline)
    with pytest.raises(InputError, match='vgg19 can.t be downloaded .*no route.*file') as e: VGGFeatures()
    assert '\n' not in str(e.value)


def test_import_stays_light():
    code = "import sys, inpaint_lib.features, inpaint_lib.layers, inpaint_lib.losses; print([m for m in " \
           "('torchvision', 'torchmetrics', 'matplotlib', 'fastcore', 'nbdev', 'skimage') if m in sys.modules])"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'


@pytest.mark.parametrize('arch', ['vgg16', 'vgg19'])
def test_pools_are_torchvisions(arch):
    "The three cuts that partial convolution's losses use, and the two behind them, against torchvision's module list"
    import torchvision
    state = {k: v.float() for k, v in fill(vgg_shapes(arch), 'he').items()}
    net = getattr(torchvision.models, arch)(weights=None).features
    net.load_state_dict({k.removeprefix('features.'): v for k, v in state.items()})
    x, pools = sine((1, 3, 32, 32)).float(), [f'pool{b}' for b in range(1, 6)]
    f, want = VGGFeatures(arch, pools, state)(x), []
    with torch.no_grad():
        for m in net:
            x = m(x)
            if isinstance(m, torch.nn.MaxPool2d): want.append(x.clone())
    assert list(f) == pools and all(torch.equal(a, b) for a, b in zip(f.values(), want, strict=True))


def test_a_pool_needs_its_whole_block(he):
    part = {k: v for k, v in he.items() if int(k.split('.')[1]) <= 14}                 # ends at conv3_3 of four
    assert VGGFeatures(layers=('pool2', 'relu3_3'), weights=part).available[-1] == 'relu3_3'
    with pytest.raises(InputError, match='pool3 is asked for, but the given state dict ends at relu3_3'):
        VGGFeatures(layers=('pool3',), weights=part)
    with pytest.raises(InputError, match=r'sides of 8 or more'):
        VGGFeatures(layers=('pool3',), weights=he)(torch.rand(1, 3, 7, 8))
    assert VGGFeatures(layers=('pool3',), weights=he)(torch.rand(1, 3, 8, 8))['pool3'].shape == (1, 256, 1, 1)
