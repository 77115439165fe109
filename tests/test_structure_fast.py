"The `fast` solver of 04: promise, batches, sizes, types; and the pieces it is made of against dense matrices"
import numpy as np
import pytest
import torch

from inpaint_lib.core import checkout, keyed_rng
from inpaint_lib.data import structure as st
from inpaint_lib.data.images import builtin_photograph, to_tensor


def couplings(seed, h, w, *, batch=1, top=375.):
    "Random couplings over four orders of magnitude, zero where they must be"
    rng = keyed_rng(seed, 'couplings')
    ax, ay = (torch.tensor(top*10**(-4*rng.random((batch, 1, h, w)))) for _ in range(2))
    ax[..., -1] = 0
    ay[..., -1, :] = 0
    return ax, ay


def picture(seed, h, w, batch=1):
    return torch.tensor(keyed_rng(seed, 'picture').random((batch, 3, h, w)))


def dense(E, h, w):
    unit = torch.eye(h*w, dtype=torch.float64).view(1, h*w, h, w)
    return st._product(E, unit)[0].flatten(1)


def dense_interpolation(P, h, w):
    unit = torch.eye(h*w, dtype=torch.float64).view(1, h*w, h, w)
    return st._prolong(P, unit, unit.new_zeros(1, h*w, 2*h, 2*w))[0].flatten(1).T      # (fine, coarse)


@pytest.mark.parametrize('size', [(1, 1), (1, 40), (40, 1), (7, 9), (16, 16), (17, 16), (33, 70), (64, 64), (20, 200)])
def test_promise_at_any_size(size):
    "Largest error below the tolerance, for hard random systems and a warm or cold start"
    (ax, ay), b = couplings(1, *size), picture(2, *size)
    want = st.direct(b, ax, ay)
    for start in (None, picture(3, *size)):
        assert (st.fast(b, ax, ay, start) - want).abs().max() < 1e-3
    assert (st.fast(b, ax, ay, tol=1e-4) - want).abs().max() < 1e-4


@pytest.mark.parametrize('name,options', [('off_direct', {}), ('default_direct', dict(lam=.01)),
                                          ('off_direct_mask', dict(masked=True))])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_golden(name, options, dtype):
    gold = np.load(checkout()/'tests'/'golden'/'rtv_synth64.npz')
    options = dict(options)
    mask = gold['mask'] if options.pop('masked', False) else None
    out = st.rtv_smooth(torch.tensor(gold['input'], dtype=dtype), mask=mask, solver='fast', **options)
    off = np.abs(out.numpy() - gold[name])
    assert out.dtype == dtype and off.max() < 1e-3 and off.mean() < 1e-4


@pytest.mark.parametrize('options', [{}, dict(lam=.1), dict(lam=1.), dict(sigma=8.), dict(sharpness=1e-3),
                                     dict(iterations=7)])
def test_parameters(options):
    "Far from the published parameters the promise holds as well"
    x = to_tensor(builtin_photograph('coffee')[100:180, 200:296])[None].double()
    off = (st.rtv_smooth(x, solver='fast', **options) - st.rtv_smooth(x, solver='direct', **options)).abs()
    assert off.max() < 1e-3 and off.mean() < 1e-4


def test_batches_chunks_and_neighbours(monkeypatch):
    "A picture's structure depends neither on its batch nor on how the batch is cut"
    x = torch.stack([to_tensor(builtin_photograph('rocket')[k:k + 48, 200:264]) for k in (0, 100, 200)])
    whole = st.rtv_smooth(x)
    for k in range(3):
        assert (st.rtv_smooth(x[k:k + 1]) - whole[k:k + 1]).abs().max() < 1e-5
    for chunk in (1, 2*48*64):
        monkeypatch.setattr(st, 'CHUNK', chunk)
        assert (st.rtv_smooth(x) - whole).abs().max() < 1e-5


def test_inputs_are_left_alone_and_no_gradient():
    (ax, ay), b, start = couplings(4, 32, 48), picture(5, 32, 48).requires_grad_(), picture(6, 32, 48)
    kept = [t.clone() for t in (ax, ay, start)]
    out = st.fast(b.float(), ax.float(), ay.float(), start.float())
    assert not out.requires_grad and out.dtype == torch.float32
    out = st.fast(b, ax, ay, start)
    assert out.dtype == torch.float64 and all((a == k).all() for a, k in zip((ax, ay, start), kept))
    start32 = start.float()
    st.fast(b.detach().float(), ax.float(), ay.float(), start32)
    assert (start32 == start.float()).all()


def test_constant_and_black_pictures():
    ax, ay = couplings(7, 40, 40)
    for value in (0., .3, 1.):
        flat = torch.full((1, 3, 40, 40), value)
        assert (st.fast(flat, ax, ay) - flat).abs().max() < 1e-5
    assert torch.isfinite(st.rtv_smooth(torch.zeros(1, 3, 20, 20))).all()


def test_pieces_against_dense_matrices():
    "Product, interpolation's transpose and P'AP, on two grids"
    h, w = 16, 12
    E = st._entries(*couplings(8, h, w))
    A = dense(E, h, w)
    assert (A - A.T).abs().max() < 1e-12 and (A.sum(1) - 1).abs().max() < 1e-9
    for _ in range(2):
        P = st._interpolation(st._whole(E))
        Q = dense_interpolation(P, h//2, w//2)
        r = picture(9, h, w)
        assert (st._restrict(P, r)[0].flatten(1) - r[0].flatten(1) @ Q).abs().max() < 1e-12
        E, A, h, w = st._galerkin(st._whole(E), P), Q.T @ A @ Q, h//2, w//2
        assert (dense(E, h, w) - A).abs().max() < 1e-10*A.abs().max()


@pytest.mark.parametrize('n', [1, 2, 3, 8, 31, 64])
def test_lines_are_solved(n):
    ax, ay = couplings(10, n, 5)
    column = {(0, 0): st._entries(ax, ay)[0, 0], (1, 0): -ay}
    r = picture(11, n, 5)
    x = r.clone()
    st._line_solve(st._line_factors(column[0, 0], column[1, 0], 9), x)
    assert st._product(column, x, r).abs().max() < 1e-10


def test_preconditioner_is_symmetric_and_positive():
    "Conjugate gradients need it; every eigenvalue of M A near 1 is what makes them quick"
    E = st._entries(*couplings(12, 32, 32))
    grids, bottom = st._grids(E)
    unit = torch.eye(1024, dtype=torch.float64).view(1, 1024, 32, 32)
    M = st._v_cycle(grids, bottom, unit)[0].flatten(1)
    assert (M - M.T).abs().max() < 1e-10*M.abs().max()
    L = torch.linalg.cholesky((M + M.T)/2)                  # raises unless positive definite
    spread = torch.linalg.eigvalsh(L.T @ dense(E, 32, 32) @ L)
    assert .05 < spread[0] and spread[-1] < 2.5


def test_iterations_and_limit():
    "Few iterations on a photograph; `limit` stops them, and the largest residual bounds the error at each"
    x = to_tensor(builtin_photograph('astronaut')[:96, 150:246])[None].double()
    ax, ay = (.0075*w for w in st.rtv_weights(x, 3.))
    want, y = st.direct(x, ax, ay), x.clone()
    E = st._entries(ax, ay)
    grids, bottom = st._grids(E)
    for k, worst in enumerate(st._descent(E, x, y, lambda r: st._v_cycle(grids, bottom, r), 1e-6)):
        assert (y - want).abs().max() <= worst.item() + 1e-12
        if worst <= 1e-6: break
    assert k < 15
    for n in (0, 1):                                       # stopped too early: solved exactly, and said
        with pytest.warns(UserWarning, match='did not converge'): out = st.fast(x, ax, ay, limit=n)
        assert (out - want).abs().max() < 1e-6


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_gpu_equals_cpu():
    x = torch.stack([to_tensor(builtin_photograph('rocket')[k:k + 48, 200:264]) for k in (0, 100)])
    assert (st.rtv_smooth(x.cuda()).cpu() - st.rtv_smooth(x)).abs().max() < 1e-3


def hard_pictures():
    "Black and white areas meet at random, in stripes, in squares; and two photographs driven into black and white"
    rng = keyed_rng(13, 'hard')
    yield torch.tensor(rng.random((2, 1, 64, 64)) > .7).double().expand(-1, 3, -1, -1)
    yield torch.tensor(np.kron(rng.random((2, 1, 8, 8)) > .5, np.ones((8, 8)))).expand(-1, 3, -1, -1)
    yield (torch.arange(64) % 2).double().expand(1, 3, 64, 64)
    for name, top, left in (('astronaut', 40, 380), ('coffee', 120, 280), ('rocket', 60, 300)):
        x = to_tensor(builtin_photograph(name)[top:top + 64, left:left + 64])[None].double()
        yield (x*3 - 1).clamp(0, 1)
        yield (x > .5).double()
        yield x*torch.tensor(rng.random((1, 1, 64, 64)) > .5)


@pytest.mark.parametrize('k', range(12))
def test_black_meets_white(k):
    "Springs of 375 beside hardly any: interpolation weights stay in [0,1], results finite and as promised"
    x = list(hard_pictures())[k]
    ax, ay = (.0075*w for w in st.rtv_weights(x, 3.))
    for E, P, _ in st._grids(st._entries(ax, ay))[0]:
        assert all(0 <= p.min() and p.max() <= 1 + 1e-9 for p in P.values())
    off = (st.rtv_smooth(x.float(), solver='fast').double() - st.rtv_smooth(x, solver='direct')).abs()
    assert off.max() < 1e-3 and off.mean() < 1e-4


@pytest.mark.parametrize('how', [dict(lam=300.), dict(lam=1000.)])
def test_what_float32_does_not_bear_is_solved_exactly_and_said(how):
    x = torch.from_numpy(builtin_photograph('astronaut')[20:84, 150:214].copy()).permute(2, 0, 1)[None].float()/255
    with pytest.warns(UserWarning, match='1 of 1 pictures did not converge in float32; solved exactly'): out = st.rtv_smooth(x, **how)
    assert (out - st.rtv_smooth(x, solver='direct', **how)).abs().max() < 1e-5
