"Relative total variation: weights, system, the solvers `direct` and `reference`, the front door `rtv_smooth`"
import numpy as np
import pytest
import torch

from inpaint_lib.core import InputError, checkout, keyed_rng
from inpaint_lib.data import structure
from inpaint_lib.data.structure import damaged_structure, differences, direct, low_pass, reference, rtv_smooth, rtv_weights

GOLDEN = np.load(checkout()/'tests'/'golden'/'rtv_synth64.npz')
EXACT = ('direct', 'reference')


def picture(*shape, key='picture'):
    return torch.from_numpy(keyed_rng(0, key).random(shape))


def couplings(H, W):
    ax, ay = picture(1, 1, H, W, key='ax')*20, picture(1, 1, H, W, key='ay')*20
    ax[..., -1] = 0
    ay[..., -1, :] = 0
    return ax, ay


def dense(ax, ay):
    "The system written down pixel by pixel"
    H, W = ax.shape[2:]
    A = torch.eye(H*W, dtype=torch.float64)
    for i in range(H):
        for j in range(W):
            for (k, m), a in (((i, j + 1), ax[0, 0, i, j]), ((i + 1, j), ay[0, 0, i, j])):
                if k == H or m == W: continue
                p, q = i*W + j, k*W + m
                A[p, p] += a; A[q, q] += a; A[p, q] -= a; A[q, p] -= a
    return A


@pytest.mark.parametrize('key, kw, limit', [
    ('off_direct', dict(solver='direct'), 1e-9),
    ('off_direct_mask', dict(solver='direct', mask=GOLDEN['mask']), 1e-9),
    ('default_direct', dict(solver='direct', lam=.01), 1e-9),
    ('off_pcg', dict(solver='reference'), 1e-6),
    ('off_pcg_mask', dict(solver='reference', mask=GOLDEN['mask']), 1e-6)])
def test_golden(key, kw, limit):
    assert np.abs(rtv_smooth(GOLDEN['input'], **kw) - GOLDEN[key]).max() < limit


def test_a_small_change_is_seen_by_the_golden_file():
    for kw in dict(lam=.0151), dict(sigma=2.8), dict(sharpness=.021), dict(iterations=3), dict(mask=GOLDEN['mask']):
        assert np.abs(rtv_smooth(GOLDEN['input'], solver='direct', **kw) - GOLDEN['off_direct']).max() > 1e-5


def test_weights_by_hand():
    "One row, window of three taps: every number written out"
    x = torch.tensor([.2, .3, .9, .9], dtype=torch.float64).expand(1, 3, 1, 4)
    g = np.exp(-1/(2*.25)); g0, g1 = 1/(1 + 2*g), g/(1 + 2*g)
    smooth = [g0*v for v in (g0*.2 + g1*.3, g1*.2 + g0*.3 + g1*.9, g1*.3 + g0*.9 + g1*.9, g1*.9 + g0*.9)]   # zeros above
    expected = [1/max(s, .02)/max(abs(b - a), 1e-3) for s, a, b in zip((.1, .6, 0), smooth, smooth[1:])]
    wx, wy = rtv_weights(x, .5)
    assert np.allclose(wx[0, 0, 0], [*expected, 0], rtol=1e-12) and (wy == 0).all()
    hole = torch.tensor([0., 1, 0, 0]).view(1, 1, 1, 4)
    expected[1] = 50/max(abs(smooth[2] - smooth[1]), 1e-3)
    assert np.allclose(rtv_weights(x, .5, mask=hole)[0][0, 0, 0], [*expected, 0], rtol=1e-12)


def test_low_pass_is_the_same_for_large_pictures():
    wide = picture(1, 1, 6, 600)
    assert (low_pass(wide, 3)[..., 30:500] - low_pass(wide[..., :512], 3)[..., 30:500]).abs().max() < 1e-14
    assert (low_pass(wide.float(), 3) - low_pass(wide, 3)).abs().max() < 1e-6


def test_differences_end_with_zeros():
    dx, dy = differences(picture(2, 3, 5, 7))
    assert dx.shape == dy.shape == (2, 3, 5, 7) and (dx[..., -1] == 0).all() and (dy[..., -1, :] == 0).all()


@pytest.mark.parametrize('H, W', [(6, 9), (9, 6), (1, 7), (7, 1), (1, 1), (2, 2)])
def test_both_solvers_against_a_dense_matrix(H, W):
    ax, ay = couplings(H, W)
    b = picture(1, 3, H, W)
    x = torch.linalg.solve(dense(ax, ay), b.reshape(3, -1).T).T.reshape(1, 3, H, W)
    assert (direct(b, ax, ay) - x).abs().max() < 1e-12
    assert (reference(b, ax, ay, tol=1e-14) - x).abs().max() < 1e-11


def test_reference_stops_at_a_tenth_and_not_before():
    "Every channel by itself: its residual is below a tenth at the last step, and was above at the one before"
    ax, ay = couplings(20, 24)
    b = picture(1, 3, 20, 24)*torch.tensor([1., .5, .01])[:, None, None]
    b[:, 1] = (2*b[:, 1]).round()
    A = dense(ax, ay)
    size = lambda x: ((A @ x.reshape(3, -1).T - b.reshape(3, -1).T).norm(dim=0)/b.reshape(3, -1).norm(dim=1)).tolist()
    done, steps = reference(b, ax, ay), [reference(b, ax, ay, limit=n) for n in range(1, 12)]
    for c in range(3):
        last = next(n for n, x in enumerate(steps) if torch.equal(x[:, c], done[:, c]))
        assert size(steps[last])[c] <= .1 and (last == 0 or size(steps[last - 1])[c] > .1)


def test_incomplete_factor_by_hand():
    "MIC(0) of a 3x4 picture against a loop over a dense matrix: drop fill-in, take it from the diagonals"
    ax, ay = couplings(3, 4)
    A = dense(ax, ay); pattern = A != 0; E = A.clone()
    for p in range(12):
        for q in range(p + 1, 12):
            for r in range(p + 1, 12):
                fill = E[q, p]*E[p, r]/E[p, p]
                if pattern[q, r]: E[q, r] -= fill
                else: E[q, q] -= fill
        E[p + 1:, p] = E[p, p + 1:]
    d = structure._straight(structure._mic(structure._skewed(ax.numpy()), structure._skewed(ay.numpy()))['d'])
    assert np.allclose(d.reshape(-1), E.diagonal(), rtol=1e-12)


@pytest.mark.parametrize('solver', EXACT)
def test_layouts_and_types(solver):
    x = picture(2, 3, 12, 17)
    out = rtv_smooth(x, solver=solver)
    one = rtv_smooth(x[0].permute(1, 2, 0), solver=solver)                     # (H,W,3), not contiguous
    assert torch.equal(one, out[0].permute(1, 2, 0)) and isinstance(one, torch.Tensor)
    for array in x.numpy(), np.asfortranarray(x.numpy()), x.numpy()[::-1, ..., ::-1]:
        got = rtv_smooth(array, solver=solver)
        assert isinstance(got, np.ndarray) and got.dtype == np.float64 and got.shape == (2, 3, 12, 17)
    for dtype, limit in ((torch.float32, 1e-6), (torch.float16, 2e-2), (torch.bfloat16, 5e-2)):
        got = rtv_smooth(x.to(dtype), solver=solver)
        assert got.dtype == dtype and (got.double() - rtv_smooth(x.to(dtype).double(), solver=solver)).abs().max() < limit


@pytest.mark.parametrize('solver', EXACT)
def test_masks(solver):
    x = picture(2, 3, 14, 14)
    m = (picture(2, 1, 14, 14, key='mask') > .7).float()
    both = rtv_smooth(x, mask=m, solver=solver)
    for k in range(2):
        assert (rtv_smooth(x[k:k + 1], mask=m[k, 0], solver=solver) - both[k:k + 1]).abs().max() < 1e-12
    assert torch.equal(rtv_smooth(x, mask=m[:1]*255, solver=solver), rtv_smooth(x, mask=m[0, 0].bool().numpy(), solver=solver))
    assert torch.equal(rtv_smooth(x, mask=m*0, solver=solver), rtv_smooth(x, solver=solver))


@pytest.mark.parametrize('solver', EXACT)
def test_nothing_under_the_mask_has_influence(solver):
    x, m = picture(1, 3, 20, 20), torch.zeros(1, 1, 20, 20)
    m[..., 5:12, 8:15] = 1
    other = torch.where(m > 0, 1 - x, x)
    assert torch.equal(damaged_structure(x, m, solver=solver), damaged_structure(other, m, solver=solver))
    assert not torch.equal(rtv_smooth(x, mask=m, solver=solver), rtv_smooth(other, mask=m, solver=solver))
    hwc = damaged_structure(x[0].permute(1, 2, 0).numpy(), m[0, 0].numpy(), solver=solver)
    assert np.array_equal(hwc, damaged_structure(x, m, solver=solver)[0].permute(1, 2, 0).numpy())


@pytest.mark.parametrize('solver', EXACT)
def test_flat_pictures_stay_flat(solver):
    grey = torch.full((1, 3, 16, 16), .25, dtype=torch.float64)
    got = rtv_smooth(grey, solver=solver)
    assert (got - grey).abs().max() < (1e-12 if solver == 'direct' else .03)    # the early stop leaves a little
    assert (rtv_smooth(grey*0, solver=solver) == 0).all()
    colour = grey*torch.tensor([1., 0, 2])[:, None, None]
    assert (rtv_smooth(colour, solver=solver)[:, 1] == 0).all() and rtv_smooth(colour, solver=solver).isfinite().all()


def test_the_picture_is_not_changed_and_no_gradient_kept():
    x = picture(1, 3, 10, 10).requires_grad_()
    before = x.detach().clone()
    assert not rtv_smooth(x, solver='direct').requires_grad and torch.equal(x, before)


def test_autocast_does_not_reach_the_weights():
    x = picture(1, 3, 16, 16).float()
    plain = rtv_smooth(x, solver='direct')
    with torch.autocast('cpu', torch.bfloat16): assert torch.equal(rtv_smooth(x, solver='direct'), plain)


@pytest.mark.parametrize('change, words', [
    (dict(image=np.zeros((8, 8, 3), np.uint8)), r'shape \(8, 8, 3\) and type torch.uint8; expected .* floats'),
    (dict(image=np.zeros((3, 8, 8))), 'expected .H,W,3. or .B,3,H,W.'),
    (dict(image=np.zeros((8, 8))), r'shape \(8, 8\)'),
    (dict(image=np.zeros((0, 8, 3))), r'shape \(0, 8, 3\)'),
    (dict(image=np.full((8, 8, 3), 255.)), 'values from 255 to 255; expected'),
    (dict(image=np.full((8, 8, 3), -1.)), r'values from -1 to -1; expected \[0,1\]'),
    (dict(image=np.full((8, 8, 3), np.nan)), 'values from nan'),
    (dict(mask=np.ones((8, 9))), r'a mask of shape \(8, 9\) for pictures of 8x8; expected'),
    (dict(mask=torch.ones(3, 1, 8, 8)), r'a mask of shape \(3, 1, 8, 8\)'),
    (dict(solver='matlab'), "solver 'matlab'; expected one of .*direct"),
    (dict(lam=0), 'lam=0; expected a positive number'),
    (dict(sigma=-3), 'sigma=-3; expected'), (dict(sharpness=float('nan')), 'sharpness=nan'),
    (dict(sigma=float('inf')), 'sigma=inf'), (dict(iterations=0), 'iterations=0; expected a whole number'),
    (dict(iterations=2.5), 'iterations=2.5')])
def test_bad_input(change, words):
    with pytest.raises(InputError, match=words) as e:
        rtv_smooth(**{'image': np.zeros((8, 8, 3)), 'solver': 'direct', **change})
    assert '\n' not in str(e.value)


def test_damaged_structure_needs_a_mask():
    with pytest.raises(InputError, match='no mask'): damaged_structure(np.zeros((8, 8, 3)), None)
    with pytest.raises(InputError, match='a mask of shape'): damaged_structure(np.zeros((8, 8, 3)), np.ones((4, 4)))
