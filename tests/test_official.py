"Official checkpoints: the recorded outputs of the authors' networks, and every form their files come in"
import json
import pickle
import sys
import warnings
from pathlib import Path

import pytest
import torch

from inpaint_lib.core import InputError
from inpaint_lib.official import OFFICIAL, from_official, import_edge_connect, load_pickle, unwrap
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


def test_unwrap_leaves_the_callers_dict_alone():
    sd = {'module.a': torch.ones(1)}
    assert list(unwrap(sd, 'generator')) == ['a'] and list(sd) == ['module.a']
