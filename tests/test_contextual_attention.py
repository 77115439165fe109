"The attention of DeepFill: recorded values, the loop as reference, gradients, memory, bad input."
import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from inpaint_lib.core import InputError
from inpaint_lib.papers.deepfill_v1 import ContextualAttention, contextual_attention_loop, fuse_scores, resize_index, usable

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = json.loads((ROOT/'tests'/'golden'/'contextual_attention.json').read_text())


def formula(n, k):
    "The numbers of the golden file"
    keep = np.uint64(0xFFFFFFFF)
    h = (np.arange(n, dtype=np.uint64)*np.uint64(2654435761) + np.uint64((k + 1)*40503)) & keep
    h ^= h >> np.uint64(15); h = (h*np.uint64(2246822519)) & keep
    h ^= h >> np.uint64(13); h = (h*np.uint64(3266489917)) & keep
    return 2*((h ^ (h >> np.uint64(16))).astype(np.float64)/2**32) - 1


def maps(B=3, C=5, H=12, W=20, seed=0):
    "Features, background with patches of zeros, three masks (one without a usable key), a gradient"
    g = torch.Generator().manual_seed(seed)
    f, b, d = (torch.randn(B, C, H, W, generator=g).double() for _ in range(3))
    f, b = F.relu(f), F.relu(b)
    b[:, :, :8, :8] = 0; f[:, :, -6:, -6:] = 0
    mask = torch.zeros(B, 1, 4*H, 4*W)
    mask[0, :, 8:32, 20:50] = 1; mask[1, :, :16, :70] = 1; mask[2:] = 1
    return f, b, mask, d


def everything(attention, f, b, mask, d):
    f, b = f.clone().requires_grad_(), b.clone().requires_grad_()
    y, offsets = attention(f, b, mask)
    return (y.detach(), *torch.autograd.grad(y, (f, b), d)), offsets


def near(x, y, tol=1e-10): return x.isfinite().all() and (x - y).abs().max() <= tol*y.abs().max().clamp(min=1e-30)


@pytest.mark.parametrize('name', GOLDEN['outputs'])
@pytest.mark.parametrize('attention', [None, dict(), dict(chunk=1), dict(chunk=5), dict(mask_steps=1)], ids=str)
def test_recorded_values(name, attention):
    how, _, fuse = name.split('_')
    if attention == dict(mask_steps=1) and how == 'tf': pytest.skip('recorded in two steps')
    options = dict(downsample=how, fuse=fuse == 'True')
    x = torch.from_numpy(np.stack([formula(16*32*32, k) for k in (0, 1)])).view(2, 16, 32, 32).clamp(min=0)
    mask = torch.zeros(1, 1, 128, 128).double(); mask[..., 36:96, 30:84] = 1
    layer = ContextualAttention(**options, **attention) if attention is not None else \
        lambda *a: contextual_attention_loop(*a, **options)
    y, want = layer(x, x, mask)[0], GOLDEN['outputs'][name]
    assert list(y.shape) == want['shape']
    picked = torch.tensor(want['values'], dtype=torch.float64)
    assert (y.flatten()[want['flat_indices']] - picked).abs().max() < 1e-13
    for k in ('mean', 'min', 'max'): assert abs(getattr(y, k)().item() - want[k]) < 1e-13
    assert abs(y.std(correction=0).item() - want['std']) < 1e-13


OPTIONS = [dict(fuse=fu, masked=m, paste=p, norm=n, downsample=d, mask_steps=s) for fu, m, p, n, d, s in itertools.product(
    (True, False), ('zero', 'exclude'), ('constant', 'overlap'), ('max', 'sum'), ('tf', 'strided'), (1, 2))]


@pytest.mark.parametrize('options', OPTIONS[::3] + OPTIONS[:1], ids=lambda o: '-'.join(map(str, o.values())))
def test_equals_the_loop_with_gradients(options):
    x = maps()
    want, offsets = everything(lambda *a: contextual_attention_loop(*a, **options), *x)
    for chunk in (None, 1, 2, 5, 6):
        got, moved = everything(ContextualAttention(chunk=chunk, **options), *x)
        assert torch.equal(moved, offsets)
        assert all(near(a, b) for a, b in zip(got, want)), chunk


def test_smallest_and_thin_maps():
    for H, W in ((4, 4), (4, 10), (10, 4), (6, 4)):
        f, b, mask, d = maps(2, 3, 12, 20)
        f, b, d, mask = (x[..., :k*H, :k*W] for x, k in ((f, 1), (b, 1), (d, 1), (mask, 4)))
        want, offsets = everything(contextual_attention_loop, f, b, mask, d)
        for chunk in (None, 1):
            got, moved = everything(ContextualAttention(chunk=chunk), f, b, mask, d)
            assert torch.equal(moved, offsets) and all(near(x, y) for x, y in zip(got, want))


@pytest.mark.parametrize('chunk', [None, 2])
def test_gradcheck(chunk):
    g = torch.Generator().manual_seed(1)
    f, b = (torch.rand(1, 2, 6, 8, generator=g).double().requires_grad_() for _ in range(2))
    mask = torch.zeros(1, 1, 6, 8); mask[..., 4:, 5:] = 1
    assert torch.autograd.gradcheck(lambda f, b: ContextualAttention(chunk=chunk, softmax_scale=2.)(f, b, mask)[0], (f, b), fast_mode=True)


def test_one_map_for_both_gets_both_gradients():
    f, _, mask, d = maps()
    x, z = f.clone().requires_grad_(), f.clone().requires_grad_()
    ContextualAttention()(x, None, mask)[0].backward(d)
    contextual_attention_loop(z, None, mask)[0].backward(d)
    assert near(x.grad, z.grad)


def test_pictures_do_not_meet():
    f, b, mask, _ = maps()
    y, offsets = ContextualAttention()(f, b, mask)
    for i in range(3):
        alone, moved = ContextualAttention()(f[i:i+1], b[i:i+1], mask[i:i+1])
        assert (alone - y[i:i+1]).abs().max() < 1e-12 and torch.equal(moved, offsets[i:i+1])
    shared, _ = ContextualAttention()(f, b, mask[:1])                        # one mask for all
    assert torch.equal(shared, ContextualAttention()(f, b, mask[:1].expand(3, -1, -1, -1))[0])


def test_zero_patches_have_a_finite_gradient():
    f = torch.zeros(1, 3, 8, 8, requires_grad=True)
    ContextualAttention()(f)[0].sum().backward()
    assert f.grad.isfinite().all()


@pytest.mark.parametrize('masked', ['zero', 'exclude'])
def test_no_usable_key_pastes_nothing(masked):
    f, b, mask, d = maps()
    (y, df, db), _ = everything(ContextualAttention(masked=masked), f, b, torch.ones_like(mask), d)
    assert y.eq(0).all() and df.eq(0).all() and db.eq(0).all()


def test_what_is_copied_lies_outside_the_hole():
    f, b, mask, _ = (x[:1] for x in maps())
    _, offsets = ContextualAttention()(f, b, mask)
    good = usable(mask, f.shape).view(6, 10)
    i, j = torch.meshgrid(torch.arange(6), torch.arange(10), indexing='ij')
    assert good[i + offsets[0, 0], j + offsets[0, 1]].all() and not good.all()


def test_a_shifted_copy_is_found():
    "The patch at the right end is the query's own, nine cells farther left"
    g = torch.Generator().manual_seed(0)
    tile = torch.randn(1, 16, 16, 18, generator=g)
    x = torch.cat([tile, tile], 3)
    mask = torch.zeros(1, 1, 64, 144); mask[..., 24:40, 100:116] = 1
    y, offsets = ContextualAttention(downsample='strided')(x, None, mask)
    assert (offsets[0, 0, 3:5, 12:15] == 0).all() and (offsets[0, 1, 3:5, 12:15] == -9).all()
    assert (y - x)[..., 6:10, 25:29].abs().max() < .05


def test_precisions():
    g = torch.Generator().manual_seed(0)
    x = F.relu(torch.randn(2, 32, 24, 24, generator=g)).requires_grad_()
    mask = torch.zeros(2, 1, 96, 96); mask[..., 30:60, 30:60] = 1
    y = ContextualAttention()(x, None, mask)[0]
    exact = ContextualAttention()(x.double(), None, mask)[0]
    assert (y - exact).abs().max() < 1e-4*exact.abs().max()
    few = ContextualAttention(precision='bf16')(x, None, mask)[0]
    assert 1e-4 < (few - y).norm()/y.norm() < .05
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(ContextualAttention()(x, None, mask)[0], few)
        assert torch.equal(ContextualAttention(precision='fp32')(x, None, mask)[0], y)
    grads = [torch.autograd.grad(z.square().sum(), x)[0] for z in (y, few)]
    assert grads[1].dtype == torch.float32 and F.cosine_similarity(*(g.flatten() for g in grads), dim=0) > .9
    for kind in (torch.float16, torch.bfloat16, torch.float64):
        z = ContextualAttention()(x.to(kind), None, mask)[0]
        assert z.dtype == kind and (z.float() - y).norm()/y.norm() < .05


def test_memory_layouts_and_modes():
    f, b, mask, _ = maps()
    y = ContextualAttention()(f, b, mask)[0]
    last = [x.to(memory_format=torch.channels_last) for x in (f, b)]
    assert torch.allclose(ContextualAttention()(*last, mask)[0], y, atol=1e-12)
    with torch.inference_mode(): assert torch.equal(ContextualAttention()(f, b, mask)[0], y)
    assert not list(ContextualAttention().state_dict()) and not list(ContextualAttention().parameters())


def test_second_derivative_is_refused():
    f = torch.rand(1, 2, 6, 8).double().requires_grad_()
    slope, = torch.autograd.grad(ContextualAttention()(f)[0].square().sum(), f, create_graph=True)
    with pytest.raises(RuntimeError, match='once_differentiable'): slope.sum().backward()


PEAK = '''
import torch
from inpaint_lib.papers.deepfill_v1 import ContextualAttention
torch.set_num_threads(1)
status = lambda key: int(next(line for line in open('/proc/self/status') if line.startswith(key)).split()[1])//1024
x = torch.rand(1, 4, 16, 16, requires_grad=True); ContextualAttention()(x)[0].sum().backward()
x = torch.rand(1, 96, 128, 128, requires_grad=True)
before = status('VmRSS'); y = ContextualAttention()(x)[0]; forward = status('VmHWM') - before
y.sum().backward(); print(forward, status('VmHWM') - before)
'''


@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='reads memory the way Linux tells it')
def test_memory_at_512_pixels():
    "A single full matrix would take 64 MiB, and the loop makes several; gigabytes with gradients"
    out = subprocess.run([sys.executable, '-c', PEAK], check=True, cwd=ROOT, capture_output=True, text=True).stdout
    forward, both = map(int, out.split())
    assert 10 < forward < 250 and both < 400, (forward, both)


def test_indices():
    for n, m in ((64, 32), (256, 32), (10, 5), (6, 3), (4, 2), (5, 1)):
        i = resize_index(n, m)
        assert len(i) == m and i.min() >= 0 and i.max() < n and (m == 1 or i[-1] == n - 1)
    assert resize_index(9, 3).tolist() == [0, 4, 8] and resize_index(9, 3, 'strided').tolist() == [0, 3, 6]


def test_the_fuse_by_hand():
    y = torch.rand(6, 6).double()                                            # 2 rows of 3 cells
    once = torch.zeros(6, 6).double()
    for k in (-1, 0, 1):
        for p, q in itertools.product(range(6), range(6)):
            if 0 <= p + k < 6 and 0 <= q + k < 6: once[p, q] += y[p + k, q + k]
    order, twice = [0, 3, 1, 4, 2, 5], torch.zeros(6, 6).double()            # column by column
    for k in (-1, 0, 1):
        for p, q in itertools.product(range(6), range(6)):
            if 0 <= p + k < 6 and 0 <= q + k < 6: twice[order[p], order[q]] += once[order[p + k], order[q + k]]
    assert torch.allclose(fuse_scores(y, (2, 3)), twice)


x = torch.rand(2, 3, 8, 12)
BAD = {'odd': (lambda: ContextualAttention()(x[..., :7, :]), 'H and W even'),
       'small': (lambda: ContextualAttention()(x[..., :2, :]), '4 or more'),
       'dimensions': (lambda: ContextualAttention()(x[0]), r'\(B,C,H,W\)'),
       'background': (lambda: ContextualAttention()(x, x[:1]), 'background'),
       'mask channels': (lambda: ContextualAttention()(x, None, torch.zeros(2, 3, 32, 48)), 'mask'),
       'mask batch': (lambda: ContextualAttention()(x, None, torch.zeros(3, 1, 32, 48)), 'mask'),
       'mask size': (lambda: ContextualAttention()(x, None, torch.zeros(2, 1, 32, 96)), 'mask'),
       'mask smaller': (lambda: contextual_attention_loop(x, None, torch.zeros(2, 1, 4, 6)), 'mask'),
       'norm': (lambda: ContextualAttention(norm='l2'), "'max', 'sum'"),
       'steps': (lambda: contextual_attention_loop(x, mask_steps=3), 'mask_steps is 3'),
       'masked': (lambda: ContextualAttention(masked='inf'), 'exclude'),
       'precision': (lambda: ContextualAttention(precision='int8'), 'bf16'),
       'chunk': (lambda: ContextualAttention(chunk=0), 'chunk is 0')}


@pytest.mark.parametrize('case', BAD)
def test_bad_input(case):
    attempt, message = BAD[case]
    with pytest.raises(InputError, match=message) as e: attempt()
    assert '\n' not in str(e.value)
