"05_viz: colours of displacements, arrows, heat (rows, curves and overlays are tested in the notebook)"
import math

import numpy as np
import pytest
import torch

from inpaint_lib.core import InputError
from inpaint_lib.viz import arrow_picture, arrows, colour_wheel, heat, offset_colours, principal_colours


def at(angle, length=1.):
    "One displacement, as the eye sees it: 0 right, 90 down"
    a = math.radians(angle)
    return torch.tensor([length*math.sin(a), length*math.cos(a)]).view(1, 2, 1, 1)


def middlebury(angle):
    "The rim of the wheel by its definition: arcs of 15, 6, 4, 11, 13, 6 steps, one channel rising or falling in each"
    k, colour = angle/360*55, None
    for n, rise in ((15, lambda f: (1, f, 0)), (6, lambda f: (1 - f, 1, 0)), (4, lambda f: (0, 1, f)), (11, lambda f: (0, 1 - f, 1)),
                    (13, lambda f: (f, 0, 1)), (6, lambda f: (1, 0, 1 - f))):
        if colour is None and k < n: colour = rise(k/n)
        k -= n
    return torch.tensor(colour)


def test_colours_on_the_rim():
    for angle in range(0, 360, 7):
        assert torch.allclose(offset_colours(at(angle))[0, :, 0, 0], middlebury(angle), atol=1e-5), angle


def test_strength_is_the_length():
    for length in (0., .25, .5, 1., 7.):
        c = offset_colours(at(40, length), radius=1.)[0, :, 0, 0]
        assert torch.allclose(c, 1 - min(length, 1)*(1 - middlebury(40)), atol=1e-5)


def test_radius_is_the_longest_of_the_batch():
    x = torch.cat([at(0, 4.), at(0, 2.)])
    c = offset_colours(x)
    assert torch.allclose(c[0, :, 0, 0], torch.tensor([1., 0, 0])) and torch.allclose(c[1, :, 0, 0], torch.tensor([1., .5, .5]))
    assert torch.equal(offset_colours(x.long()), c) and c.dtype == torch.float32          # cells are whole numbers
    assert (offset_colours(torch.zeros(2, 2, 3, 4)) == 1).all()


def test_colours_are_computed_in_double_where_that_exists():
    "Single and half precision come in, float32 goes out"
    g = torch.Generator().manual_seed(0)
    x = 9*torch.randn(2, 2, 64, 64, generator=g)
    want = offset_colours(x.double(), radius=12.)
    for kind in (torch.float32, torch.float16, torch.bfloat16):
        got = offset_colours(x.to(kind), radius=12.)
        assert got.dtype == torch.float32 and got.device == x.device
        assert (got - offset_colours(x.to(kind).double(), radius=12.)).abs().max() < 1e-6
    assert torch.equal(offset_colours(x, radius=12.), want)


def test_no_device_is_asked_for_float64():
    "A device without float64, as Apple's: every tensor that is not on the CPU refuses it"
    class Device(torch.Tensor):
        asked = []
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            cls.asked.append(getattr(func, '__name__', ''))
            with torch._C.DisableTorchFunctionSubclass(): return func(*args, **(kwargs or {}))
    offset_colours(torch.ones(1, 2, 2, 2).as_subclass(Device))
    assert Device.asked[0] == 'cpu'


def test_wheel():
    w = colour_wheel(33)
    assert w.shape == (3, 33, 33) and (w[:, 16, 16] == 1).all() and (w[:, 0, 0] == 1).all()
    assert torch.allclose(w[:, 16, 32], torch.tensor([1, 1/33, 1/33]), atol=1e-4)         # right: red, 16 of 16.5 strong
    assert torch.allclose(w[:, 32, 16], 1 - 16/16.5*(1 - middlebury(90)), atol=1e-4)      # down: nearly yellow


def test_arrows_end_where_the_cell_was_copied_from():
    offsets, where = torch.zeros(2, 4, 8), torch.zeros(1, 4, 8)
    offsets[:, 1, 2], where[0, 1, 2] = torch.tensor([2., -1]), 1                          # 2 cells down, 1 to the left
    fig = arrows(torch.rand(3, 32, 64), offsets, where)
    q, = fig.axes[0].collections
    assert (q.X, q.Y) == (2.5*8 - .5, 1.5*8 - .5) and (q.U, q.V) == (-8, 16)


def test_arrows_thin_out():
    offsets = torch.ones(2, 32, 32)
    count = lambda **kw: arrows(torch.rand(1, 64, 64), offsets, torch.ones(1, 32, 32), **kw).axes[0].collections[0].N
    assert 20 <= count() <= 80 and count(step=8) == 16 and count(step=1) == 32**2
    with pytest.raises(InputError, match='expected a hole'): arrows(torch.rand(3, 8, 8), offsets, torch.zeros(1, 32, 32))


def test_heat():
    from matplotlib import colormaps
    x = torch.linspace(0, 1, 12).view(2, 1, 2, 3)
    y = heat(x)
    assert y.shape == (2, 3, 2, 3) and np.allclose(y[1, :, 1, 2], colormaps['viridis'](1.)[:3])
    assert np.allclose(y.movedim(1, -1), colormaps['viridis']((x[:, 0]*255).round().int().numpy())[..., :3])
    assert torch.equal(heat(10*x - 5), heat((10*x - 5).clamp(0, 1)))
    with pytest.raises(InputError, match='NaN'): heat(torch.full((1, 1, 2, 2), math.nan))


def one_arrow(angle, length=4., size=(64, 64), row=8, col=8):
    "A grey picture with one arrow from the cell (row, col) of 16 x 16"
    where = torch.zeros(1, 1, 16, 16); where[0, 0, row, col] = 1
    return arrow_picture(torch.full((1, 3, *size), .5), at(angle, length).expand(1, 2, 16, 16), where, step=1)


def test_an_arrow_in_the_picture_points_from_the_cell_to_its_source():
    for angle in (0, 45, 90, 180, 270):
        touched = (one_arrow(angle) != .5).any(1)[0]
        y, x = touched.nonzero().double().T
        middle, way = torch.stack([y.mean(), x.mean()]) - 8.5*4 + .5, at(angle).flatten().double()
        assert abs(float(middle @ way) - 8) < 4 and abs(float(middle[0]*way[1] - middle[1]*way[0])) < 1, angle
        assert 20 < touched.sum() < 200


def test_an_arrow_shows_on_any_ground():
    for ground in (0., .5, 1.):
        where = torch.zeros(1, 1, 16, 16); where[0, 0, 8, 8] = 1
        pic = torch.full((1, 3, 64, 64), ground)
        change = (arrow_picture(pic, at(240, 4.).expand(1, 2, 16, 16), where, step=1) - pic).abs().amax(1)
        assert (change > .3).sum() > 8, ground


def test_arrows_thin_out_and_never_get_lost():
    offsets, pic = torch.ones(1, 2, 16, 16), torch.full((1, 3, 256, 256), .5)
    dense, sparse = ((arrow_picture(pic, offsets, step=s) != .5).any(1).sum() for s in (2, 8))
    assert dense > 3*sparse > 0
    assert (one_arrow(0, row=9, col=11) != .5).any()
    thin = torch.zeros(1, 1, 16, 16); thin[..., 5, 5] = 1                                  # off the grid of step 4
    assert (arrow_picture(pic, offsets, thin) != .5).any()


def test_arrow_picture_leaves_the_rest_alone():
    g = torch.Generator().manual_seed(1)
    pic, offsets = torch.rand(2, 3, 40, 72, generator=g), torch.randn(2, 2, 10, 18, generator=g)
    where = torch.zeros(2, 1, 10, 18); where[1, :, 2:5, 3:9] = 1
    out = arrow_picture(pic, offsets, where)
    assert torch.equal(out[0], pic[0]) and torch.equal(out[1, :, 30:], pic[1, :, 30:]) and not torch.equal(out[1], pic[1])
    far = arrow_picture(pic, 1e7*offsets, where)
    assert far.shape == pic.shape and far.isfinite().all() and 0 <= far.amin() <= far.amax() <= 1
    still = arrow_picture(pic, 0*offsets, where)
    assert not torch.equal(still[1], pic[1])                                               # a dot where nothing moves
    with pytest.raises(InputError, match=r'expected \(2,2,h,w\) and \(2,1,h,w\)'): arrow_picture(pic, offsets, where[:1])


def test_principal_colours_are_the_largest_components():
    g = torch.Generator().manual_seed(2)
    y = torch.randn(1, 3, 12, 20, generator=g)*torch.tensor([9., 3, 1]).view(1, 3, 1, 1)
    basis = torch.linalg.qr(torch.randn(24, 24, generator=g))[0]
    c = principal_colours(torch.einsum('kc,bchw->bkhw', basis[:, :3], y))
    assert c.shape == (1, 3, 12, 20) and c.amin() == 0 and c.amax() == 1
    for k in range(3):
        r = torch.corrcoef(torch.stack([c[0, k].flatten(), y[0, k].flatten()]))[0, 1].abs()
        assert r > .9, (k, float(r))


def test_principal_colours_of_few_channels_and_bad_input():
    ramp = torch.linspace(0, 1, 48).view(1, 1, 6, 8)
    c = principal_colours(ramp)
    assert (c[:, 1:] == .5).all() and c[0, 0].flatten().diff().ge(0).all()
    assert principal_colours(ramp.half().expand(2, 5, 6, 8)).shape == (2, 3, 6, 8)
    both = torch.cat([ramp, -3*ramp.flip(-1)]).expand(2, 4, 6, 8)
    assert torch.allclose(principal_colours(both)[1:], principal_colours(both[1:]))        # not the neighbour's business
    with pytest.raises(InputError, match='NaN'): principal_colours(ramp/0)
