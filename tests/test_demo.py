"The painting widget without a browser: strokes to pixels, history, messages, runs, edits, files"
import io
import json
import math
import re
import subprocess
import sys
import threading
import time
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from inpaint_lib import demo
from inpaint_lib.core import InputError
from inpaint_lib.data.images import builtin_photograph
from inpaint_lib.demo import (Bench, Cancelled, Drawing, MaskPainter, Switch, capsule, check_stroke, edited, eighths, from_runs, line_pixels, paint, picture_bytes,
                              random_hole, rasterize, to_runs, warned)
from inpaint_lib.inference import METHODS, find_weights, load_inpainter

ROOT = Path(__file__).resolve().parent.parent
H, W = 48, 64
CAT = builtin_photograph('chelsea')[100:100 + H, 150:150 + W]
LINE = [(10, 20), (40, 25)]


def stroke(tool, points=(), width=6, layer='mask', erase=False, **more):
    return dict(layer=layer, tool=tool, erase=erase, width=width, points=[list(p) for p in points]) | more


@pytest.fixture
def painter(): return MaskPainter(CAT, device='cpu')


@pytest.fixture
def drawn(painter):
    painter.draw('brush', LINE, width=12)
    return painter


def press(painter, buffers=(), **message):
    "A message as the browser sends it: through the handler that `on_msg` registered"
    painter._handle_custom_msg(message, [memoryview(b) for b in buffers])


# ---- strokes against a literal loop

def covers(s, i, j):
    "Does a stroke cover pixel (i, j)? As the rules say it, one pixel at a time"
    px, py, tool, pts = j + .5, i + .5, s['tool'], s['points']
    if tool in ('clear', 'invert', 'bitmap'): return True
    if tool == 'rect':
        (x0, y0), (x1, y1) = pts
        return min(x0, x1) <= px <= max(x0, x1) and min(y0, y1) <= py <= max(y0, y1)
    if tool == 'lasso':
        odd = False
        for (ax, ay), (bx, by) in zip(pts, pts[1:] + pts[:1]):
            if (ay > py) != (by > py) and px < (bx - ax)*(py - ay)/(by - ay) + ax: odd = not odd
        return odd
    return any(near(p, q, s['width'], i, j) for p, q in zip(pts, pts[1:] or pts))


def near(p, q, width, i, j):
    (x0, y0), (x1, y1), px, py = p, q, j + .5, i + .5
    dx, dy = x1 - x0, y1 - y0
    if width == 1:
        n = math.ceil(max(abs(dx), abs(dy)))
        if n == 0: return (math.floor(x0), math.floor(y0)) == (j, i)
        return any((math.floor(x0 + dx*k/n), math.floor(y0 + dy*k/n)) == (j, i) for k in range(n + 1))
    l2 = dx*dx + dy*dy
    t = min(max(((px - x0)*dx + (py - y0)*dy)/l2, 0), 1) if l2 > 0 else 0
    ex, ey = px - x0 - t*dx, py - y0 - t*dy
    return ex*ex + ey*ey <= (width/2)*(width/2)


def literal(strokes, layer, h=24, w=32):
    a = [[0]*w for _ in range(h)]
    for s in strokes:
        if s['layer'] != layer: continue
        runs = from_runs(s['runs'], (h, w)) if s['tool'] == 'bitmap' else None
        for i in range(h):
            for j in range(w):
                if not covers(s, i, j): continue
                erase = s['erase'] if runs is None else not runs[i, j]
                ink = {'edges': -1 if erase else 1, 'structure': 0 if erase else s.get('color', 0)}.get(layer, int(not erase))
                a[i][j] = 0 if s['tool'] == 'clear' else 1 - a[i][j] if s['tool'] == 'invert' else ink
    return a


def plain(a, layer):
    "A rasterised layer in the form of `literal`"
    if layer != 'structure': return a.astype(int).tolist()
    return [['#%02x%02x%02x' % tuple(p[:3]) if p[3] else 0 for p in row] for row in a.tolist()]


STROKES = {
    'dot': stroke('brush', [(10.5, 7.5)], 5), 'dot on a corner': stroke('brush', [(10, 7)], 2), 'dot of one pixel': stroke('brush', [(3.25, 4.875)], 1),
    'brush': stroke('brush', [(3, 3), (20.5, 6.25), (28, 20)], 4), 'odd brush': stroke('brush', [(3.125, 3), (20.5, 6.25)], 3),
    'one pixel wide': stroke('brush', [(1.5, 1.5), (29.5, 13.875), (4, 22)], 1), 'steep': stroke('line', [(8, -4), (9.5, 30)], 1),
    'through the picture': stroke('brush', [(-20, -5), (60, 40)], 9), 'beside the picture': stroke('brush', [(-20, -5), (-9, 40)], 9),
    'far out, one pixel': stroke('line', [(-300, -300), (300, 280)], 1), 'line': stroke('line', [(2, 20), (30, 2)], 7),
    'the same point twice': stroke('brush', [(5, 5), (5, 5), (9, 5)], 6), 'wide': stroke('line', [(16, 12), (17, 12)], 100),
    'rect': stroke('rect', [(20.5, 15), (4, 3.5)]), 'rect on centres': stroke('rect', [(4.5, 3.5), (8.5, 6.5)]),
    'rect outside': stroke('rect', [(-9, -9), (50, 50)]), 'no rect': stroke('rect', [(4.625, 3), (5.375, 30)]),
    'lasso': stroke('lasso', [(2, 2), (28, 4.5), (20, 21), (9, 12.25)]), 'lasso on centres': stroke('lasso', [(2.5, 2.5), (20.5, 2.5), (20.5, 18.5), (2.5, 18.5)]),
    'star': stroke('lasso', [(16 + 14*math.sin(k*4*math.pi/5), 12 - 11*math.cos(k*4*math.pi/5)) for k in range(5)]),
    'lasso outside': stroke('lasso', [(-10, -10), (40, 3), (45, 60), (10, 12)]), 'lasso of two points': stroke('lasso', [(1, 1), (20, 20)]),
    'lasso of one point': stroke('lasso', [(1, 1)])}


@pytest.mark.parametrize('name', STROKES)
def test_each_stroke_equals_the_literal_loop(name):
    assert plain(rasterize([STROKES[name]], (24, 32)), 'mask') == literal([STROKES[name]], 'mask')


def random_strokes(seed, layer, n=12):
    rng = np.random.default_rng(seed)
    tools = ['brush', 'line', 'rect', 'lasso', 'clear'] + ['invert']*(layer == 'mask') + ['bitmap']*(layer != 'structure')
    for _ in range(n):
        tool = str(rng.choice(tools, p=None if rng.random() < .3 else [.9/4]*4 + [.1/(len(tools) - 4)]*(len(tools) - 4)))
        many = {'line': 2, 'rect': 2}.get(tool, int(rng.integers(1, 6)))
        s = stroke(tool, eighths(rng.uniform((-8, -8), (40, 32), (many, 2))), int(rng.integers(1, 12)), layer, bool(rng.random() < .3))
        if tool == 'bitmap': s['runs'] = to_runs(rng.random((24, 32)) < .5)
        yield s | (dict(color='#%06x' % int(rng.integers(1, 2**24))) if layer == 'structure' else {})


@pytest.mark.parametrize('layer', demo.LAYERS)
@pytest.mark.parametrize('seed', range(4))
def test_random_strokes_equal_the_literal_loop(layer, seed):
    strokes = list(random_strokes(seed, layer))
    assert plain(rasterize(strokes, (24, 32), layer=layer), layer) == literal(strokes, layer)


def test_other_layers_are_left_alone_and_start_is_copied():
    strokes = [stroke('brush', LINE, layer='sketch'), stroke('rect', [(1, 1), (5, 5)])]
    start = rasterize(strokes, (H, W)); kept = start.copy()
    assert start.sum() == 16 and rasterize(strokes[:1], (H, W), start=start).sum() == 16
    assert rasterize([stroke('invert')], (H, W), start=start).sum() == H*W - 16 and np.array_equal(start, kept)


def test_bands_of_a_long_line_lose_no_pixel():
    rows, cols = np.arange(700), np.arange(900)
    for p, q, width in (((5, 3), (890, 690), 11), ((880.5, 20), (10, 660.25), 2), ((-50, 350), (950, 352), 40), ((450, -10), (451, 720), 3)):
        assert np.array_equal(rasterize([stroke('line', [p, q], width)], (700, 900)), capsule(p, q, width, rows, cols))


@pytest.mark.parametrize('seed', range(4))
def test_a_thin_line_is_clipped_to_the_same_pixels(seed):
    rng = np.random.default_rng(seed)
    for k in range(60):
        reach = (12, 300, 40_000, 1e6)[k % 4]
        p, q = eighths(np.clip(rng.normal((16, 12), reach/2, (2, 2)), -9e5, 9e5))
        if k % 7 == 0: q[k % 2] = p[k % 2]
        if k % 5 == 0: q = eighths([2*np.array((16, 12)) - p + rng.uniform(-9, 9, 2)])[0]                 # through the picture
        x, y = line_pixels(p, q); want = np.zeros((24, 32), bool)
        seen = (x >= 0) & (x < 32) & (y >= 0) & (y < 24); want[y[seen], x[seen]] = True
        assert np.array_equal(rasterize([stroke('line', [p, q], 1)], (24, 32)), want), (p, q)


def test_points_far_away_cost_nothing():
    s = stroke('brush', [(-1e6, -1e6), (1e6, 1e6 - 5), (-1e6, 30), (1e6, 30.5)]*20, 1); at = time.perf_counter()
    assert rasterize([s], (1000, 1000)).sum() > 1000 and time.perf_counter() - at < .5


def test_eighths_round_half_upwards_as_javascript():
    assert eighths([(.0625, -.0625), (-.1875, 2.3)]) == [[.125, 0.], [-.125, 2.25]]


@pytest.mark.parametrize('seed', range(3))
def test_runs_there_and_back(seed):
    a = np.random.default_rng(seed).random((13, 7)) < (.1, .5, .9)[seed]
    assert np.array_equal(from_runs(to_runs(a), a.shape), a) and sum(to_runs(a)) == a.size
    assert to_runs(a | True) == [0, 91] and to_runs(a & False) == [91]


BAD = [('text', 'type str'), (stroke('spray'), "'spray'"), (stroke('brush', LINE, layer='hair'), "'hair'"), (stroke('brush', []), 'one or more'),
       (stroke('brush', [(1, math.nan)]), 'finite'), (stroke('brush', [(1, math.inf)]), 'finite'), (stroke('line', [(1, 1)]), 'two'),
       (stroke('rect', [(1, 1)]*3), 'two'), (stroke('brush', [(1, 1), (2,)]), 'one or more'), (stroke('brush', [(1e9, 1)]), 'up to'),
       (stroke('brush', [('1', '2')]), 'finite'), (stroke('brush', LINE, 0), 'width 0'), (stroke('brush', LINE, 2.5), 'width 2.5'),
       (stroke('brush', LINE, True), 'width True'), (stroke('brush', LINE, 10**9), 'width'), (stroke('brush', LINE, None), 'width None'),
       (stroke('invert', layer='edges'), 'invert'), (stroke('bitmap', layer='structure', runs=[1]), 'bitmap'), (stroke('bitmap', runs=[5]), 'add up to 64 x 48'),
       (stroke('bitmap', runs=[-1, H*W + 1]), 'add up'), (stroke('bitmap'), 'runs None'), (stroke('brush', LINE, layer='structure'), '#rrggbb'),
       (stroke('brush', LINE, layer='structure', color='red'), '#rrggbb'), (dict(layer='mask', tool='brush', width=3), 'points None'), ({}, "layer 'None'")]


@pytest.mark.parametrize('bad,says', BAD, ids=[b[1] for b in BAD])
def test_bad_strokes_are_refused_by_function_python_and_browser(painter, bad, says):
    with pytest.raises(InputError, match='expected') as e: check_stroke(bad, (H, W))
    assert says in str(e.value) and '\n' not in str(e.value)
    painter.draw('rect', [(0, 0), (4, 4)])
    with pytest.raises(InputError): painter.strokes = [*painter.strokes, bad]
    assert len(painter.strokes) == painter.position == 1 and painter.heard['hole'] == 16
    painter.set_state(dict(strokes=[*painter.strokes, bad], position=2))
    assert painter.error == str(e.value) and len(painter.strokes) == painter.position == 1
    painter.draw('rect', [(4, 4), (8, 8)]); assert painter.heard['hole'] == 32           # not dead


# ---- history

@pytest.mark.parametrize('limit', (64_000_000, 5000, 0))
def test_any_walk_through_a_history_equals_painting_anew(limit):
    rng, d = np.random.default_rng(limit), Drawing((24, 32), limit=limit)
    strokes = [s for k, layer in enumerate(demo.LAYERS) for s in random_strokes(k, layer, 5)]
    rng.shuffle(strokes)
    for _ in range(25):
        n = int(rng.integers(len(strokes) + 1))
        if rng.random() < .3: strokes = strokes[:n] + [next(random_strokes(int(rng.integers(999)), 'mask'))] + strokes[n + 1:]
        d.follow(strokes, n)
        assert d.used <= limit
        for layer in demo.LAYERS: assert np.array_equal(d.layer(layer), rasterize(strokes[:n], (24, 32), layer=layer))


def test_a_bad_stroke_changes_nothing_not_even_behind_the_position():
    d = Drawing((H, W)); good = [stroke('brush', LINE)]
    d.follow(good, 1); before = d.layer('mask').copy()
    with pytest.raises(InputError): d.follow([stroke('clear'), stroke('spray')], 1)
    assert np.array_equal(d.layer('mask'), before) and d.done == good


def test_only_new_strokes_are_painted(monkeypatch):
    seen, d = [], Drawing((H, W))
    monkeypatch.setattr(demo, 'paint', lambda a, s: seen.append(s['tool']) or paint(a, s))
    strokes = [stroke('brush', LINE), stroke('rect', [(1, 1), (9, 9)]), stroke('lasso', [(1, 1), (9, 9), (1, 9)])]
    for k in (1, 2, 3): d.follow(json.loads(json.dumps(strokes[:k])), k)               # equal, not the same objects, as from the browser
    d.follow(strokes, 1); d.follow(strokes, 2)
    assert seen == ['brush', 'rect', 'lasso', 'rect']


def test_layers_that_nobody_drew_on_take_no_memory(drawn):
    assert set(drawn._drawing.layers) == {'mask'}


def test_undo_redo_and_a_new_stroke_that_cuts(painter):
    painter.draw('rect', [(0, 0), (4, 4)]); painter.draw('rect', [(10, 10), (12, 12)], layer='sketch'); painter.draw('rect', [(0, 8), (4, 12)])
    painter.undo(); painter.undo()
    assert (painter.mask.sum(), painter.sketch.sum(), painter.position, len(painter.strokes)) == (16, 0, 1, 3)
    painter.redo(); assert painter.sketch.sum() == 4
    painter.draw('rect', [(20, 20), (30, 30)]); assert len(painter.strokes) == 3 and painter.mask.sum() == 116
    painter.redo(); assert painter.position == 3
    for _ in range(5): painter.undo()
    assert painter.position == 0 and not painter.mask.any() and painter.heard['hole'] == 0


def test_clear_and_invert_can_be_undone(drawn):
    before = drawn.mask
    drawn.clear(); assert not drawn.mask.any()
    drawn.undo(); drawn.invert(); assert np.array_equal(drawn.mask, ~before)
    drawn.undo(); assert np.array_equal(drawn.mask, before)


def test_a_position_out_of_range_is_put_right(drawn):
    drawn.position = 99; assert drawn.position == 1 and drawn.mask.any()
    drawn.set_state(dict(position=-3)); assert drawn.position == 0 and not drawn.mask.any()


def test_a_drawing_is_saved_and_loaded_as_json(drawn):
    drawn.draw('brush', LINE, layer='structure', color='#102030'); drawn.undo()
    other = MaskPainter(CAT); other.strokes = json.loads(json.dumps(drawn.strokes))
    assert other.position == 2 and np.array_equal(other.mask, drawn.mask)
    other.strokes = []; assert other.position == 0 and other.heard['hole'] == 0


def test_every_change_is_answered(painter):
    turns = [painter.heard['turn']]
    painter.observe(lambda c: turns.append(c['new']['turn']), 'heard')
    s = stroke('rect', [(0, 0), (4, 4)])
    painter.set_state(dict(strokes=[s], position=1))
    assert painter.heard | dict(turn=0) == dict(n=1, position=1, hole=16, turn=0)
    painter.set_state(dict(position=0)); painter.set_state(dict(strokes=[stroke('rect', [(8, 8), (12, 12)])], position=1))
    painter.set_state(dict(strokes=[stroke('rect', [(20, 8), (24, 12)])]))              # the same counts, another hole
    assert turns == [0, 1, 2, 3, 4] and painter.heard['hole'] == 16


def test_the_mask_key_changes_with_the_mask_alone(drawn):
    key = drawn.mask_key
    drawn.draw('brush', LINE, layer='sketch'); assert drawn.mask_key == key
    drawn.draw('rect', [(0, 0), (2, 2)]); assert drawn.mask_key != key
    drawn.undo(); assert drawn.mask_key == key


@pytest.mark.parametrize('name', ['heard', 'bases', 'cards', 'picture', 'status', 'mask_key', 'methods', 'size', 'shown', 'layers', 'title', '_esm', 'nonsense'])
def test_what_the_browser_may_not_write_is_refused_and_sent_back(drawn, monkeypatch, name):
    sent, before = [], getattr(drawn, name, None)
    monkeypatch.setattr(drawn, '_send', lambda msg, buffers=None: sent.append(msg))
    drawn.set_state({name: {} if isinstance(before, dict) else 'x', 'layer': 'sketch'})
    assert getattr(drawn, name, None) == before and drawn.layer == 'sketch' and f'sent {name}; expected only strokes' in drawn.error
    assert name == 'nonsense' or any(m['method'] == 'update' and name in m['state'] or [name] in m['buffer_paths'] for m in sent)
    assert not any(m['method'] == 'echo_update' and name in m['state'] for m in sent)


@pytest.mark.parametrize('state', [dict(strokes='text'), dict(strokes=None), dict(position='far'), dict(chosen=5), dict(strokes=[3], position=1)])
def test_nonsense_from_the_browser_becomes_one_line(drawn, state):
    drawn.set_state(state)
    assert drawn.error and '\n' not in drawn.error and len(drawn.strokes) == drawn.position == 1
    drawn.draw('rect', [(0, 0), (4, 4)]); assert drawn.heard['n'] == 2


def test_draw_says_what_is_wrong(painter):
    for args, says in (((('spray'), LINE), 'spray'), (('line', [(1, 1)]), 'two'), (('bitmap', np.ones((W, H), bool)), 'shape'), (('brush', [(math.nan, 1)]), 'finite')):
        with pytest.raises(InputError, match=says): painter.draw(*args)
    with pytest.raises(InputError, match='rrggbb'): painter.draw('brush', LINE, layer='structure')
    assert painter.strokes == []


def test_a_stroke_in_a_large_picture_is_quick():
    painter = MaskPainter(np.zeros((1080, 1920, 3), np.uint8)); rng, taken = np.random.default_rng(0), []
    for k in range(12):
        start, points = rng.uniform((200, 200), (1700, 900)), rng.normal(0, 8, (60, 2)).cumsum(0)
        s = stroke('brush', eighths(start + points), 60)
        at = time.perf_counter(); painter.set_state(dict(strokes=[*painter.strokes, s], position=k + 1)); taken.append(time.perf_counter() - at)
    assert np.median(taken) < .06


# ---- random holes

@pytest.mark.parametrize('kind', ('free_form', 'block'))
@pytest.mark.parametrize('ratio', (.01, .1, .25, .5, .9))
def test_random_holes_have_the_ratio(kind, ratio):
    for size in ((48, 64), (300, 451), (64, 200)): assert abs(random_hole(kind, ratio, size, seed=3).mean() - ratio) <= .005


def test_random_hole_replaces_the_mask_in_one_step(drawn):
    before = drawn.mask
    drawn.random_mask('block', .2, seed=1); first = drawn.mask; assert abs(first.mean() - .2) <= .005 and len(drawn.strokes) == 2
    drawn.random_mask('block', .2, seed=1); assert np.array_equal(drawn.mask, first)
    drawn.undo(); drawn.undo(); assert np.array_equal(drawn.mask, before)
    for kind, ratio in (('round', .2), ('block', 0), ('block', 1.5), ('free_form', 'half')):
        with pytest.raises(InputError, match='expected'): drawn.random_mask(kind, ratio)


def test_the_random_button_gives_another_hole_each_time(painter):
    press(painter, do='random', kind='free_form', ratio=.3); first = painter.mask
    press(painter, do='random', kind='free_form', ratio=.3)
    assert abs(first.mean() - .3) < .005 and not np.array_equal(first, painter.mask)
    press(painter, do='random', kind='free_form', ratio=7); assert 'hole ratio 7' in painter.error


# ---- pictures and masks from files

def exif_file(folder, name='turned.jpg'):
    exif = Image.Exif(); exif[0x0112] = 6
    Image.fromarray(CAT).save(folder/name, exif=exif, quality=95)
    return folder/name


def test_pictures_of_every_kind(tmp_path):
    Image.fromarray(CAT).quantize(16).save(tmp_path/'palette.png'); Image.fromarray(CAT).convert('L').save(tmp_path/'grey.png')
    for image, size in ((exif_file(tmp_path), [H, W]), (tmp_path/'palette.png', [W, H]), (tmp_path/'grey.png', [W, H]), (Image.fromarray(CAT).convert('CMYK'), [W, H]),
                        (CAT.astype(np.uint16)*257, [W, H]), (torch.rand(3, 40, 50), [50, 40]), (torch.rand(1, 3, 40, 50), [50, 40])):
        painter = MaskPainter(image)
        assert painter.size == size and painter.mask.shape == (size[1], size[0])
        assert Image.open(io.BytesIO(painter.picture)).size == tuple(size)


def test_pictures_that_are_none(tmp_path):
    (tmp_path/'text.png').write_text('no picture')
    for image, says in ((tmp_path/'text.png', 'text.png'), (tmp_path/'none.png', 'no such file'), (torch.rand(2, 3, 8, 8), 'batch of 2'), (5, 'type int'), (CAT[:1], '2 x 2')):
        with pytest.raises(InputError, match=says): MaskPainter(image)


def test_open_begins_anew(drawn, tmp_path):
    drawn.fill('edge_connect'); drawn.draw('line', LINE, width=1, layer='edges'); drawn.error = 'old'
    drawn.open(exif_file(tmp_path))
    assert drawn.size == [H, W] and drawn.title == 'turned.jpg' and drawn.strokes == [] and drawn.position == 0 and not drawn.mask.any()
    assert not (drawn.cards or drawn.bases or drawn.results or drawn.error or drawn.result) and drawn.heard['n'] == 0
    drawn.draw('rect', [(1, 1), (9, 9)]); assert drawn.heard['hole'] == 64 and drawn.mask.shape == (W, H)
    drawn.open(CAT); assert drawn.title == '' and drawn.strokes == []


def test_the_picture_in_the_browser_is_exact_up_to_a_megapixel():
    sent = np.asarray(Image.open(io.BytesIO(MaskPainter(CAT).picture))); assert np.array_equal(sent, CAT)
    big = MaskPainter(np.zeros((1001, 1000, 3), np.uint8)).picture
    assert Image.open(io.BytesIO(big)).format == 'JPEG' and Image.open(io.BytesIO(big)).size == (1000, 1001)
    assert Image.open(io.BytesIO(picture_bytes(np.zeros((500, 2048), np.uint8)))).size == (1024, 250)


def test_masks_from_outside(drawn, tmp_path):
    hole = np.zeros((H, W), bool); hole[5:20, 5:30] = True
    Image.fromarray(hole).save(tmp_path/'m.png')
    for mask in (tmp_path/'m.png', str(tmp_path/'m.png'), hole, Image.fromarray(hole), torch.from_numpy(hole).float()[None], hole.astype(np.uint8)*255):
        drawn.open_mask(mask); assert np.array_equal(drawn.mask, hole); drawn.undo(); assert drawn.heard['hole'] != hole.sum()
    for mask, says in ((hole[:30], 'mask is 64 x 30 pixels, the image 64 x 48'), (hole & False, 'empty'), (hole | True, 'full'), (tmp_path/'no.png', 'no.png')):
        with warnings.catch_warnings(), pytest.raises(InputError, match=says): warnings.simplefilter('ignore'); drawn.open_mask(mask)


def send_file(painter, what, data, name, of=3, order=None):
    cut = [data[len(data)*k//of:len(data)*(k + 1)//of] for k in range(of)]
    for k in order or range(of): press(painter, [cut[k]], do='piece', what=what, name=name, index=k, of=of)


def test_a_picture_in_pieces(painter, tmp_path):
    data = exif_file(tmp_path).read_bytes()
    send_file(painter, 'picture', data, 'My cat.jpg')
    assert painter.size == [H, W] and painter.title == 'My cat.jpg' and painter.status['text'] == 'My cat.jpg is open' and not painter.error
    send_file(painter, 'picture', data[:500], 'broken.jpg', of=1)
    assert painter.error.startswith('broken.jpg: not a readable image') and 'tmp' not in painter.error and painter.title == 'My cat.jpg'


def test_pieces_in_any_order_and_files_that_never_end(painter):
    data = picture_bytes(CAT[:30])
    send_file(painter, 'picture', data, 'half.png', order=(0, 1)); send_file(painter, 'picture', data, 'half.png', order=(0, 2, 1))
    assert painter.size == [W, 30]
    for m in (dict(what='hat'), dict(index=-1), dict(index=3, of=3), dict(of=10**9), dict(index='0'), dict(index=None)):
        painter.error = ''; press(painter, [b'x'], **dict(do='piece', what='mask', name='n', index=0, of=1) | m); assert 'expected a picture or a mask' in painter.error
    painter.error = ''; press(painter, do='piece', what='mask', name='n', index=0, of=1); assert painter.error


def test_a_mask_in_pieces(drawn, tmp_path):
    hole = np.zeros((H, W), bool); hole[5:20, 5:30] = True
    f = io.BytesIO(); Image.fromarray(hole).convert('L').save(f, 'JPEG', quality=60)
    send_file(drawn, 'mask', f.getvalue(), 'm.jpg')
    assert drawn.strokes[-1]['tool'] == 'bitmap' and abs(int(drawn.heard['hole']) - 375) < 30 and 'neither 0 nor 255' in drawn.status['text']
    f = io.BytesIO(); Image.fromarray(hole[:40]).save(f, 'PNG')
    send_file(drawn, 'mask', f.getvalue(), 'small.png', of=1); assert drawn.error == 'small.png is 64 x 40 pixels, the image 64 x 48; expected the same size'


# ---- fills

@pytest.fixture(scope='module')
def all_filled():
    painter = MaskPainter(CAT, device='cpu'); painter.draw('brush', LINE, width=12); painter.draw('lasso', [(45, 5), (60, 8), (50, 30)])
    painter.fill(*METHODS)
    return painter


@pytest.mark.parametrize('method', METHODS)
def test_pixels_outside_of_the_hole_are_bit_identical(all_filled, method):
    result, mask = all_filled.results[method], all_filled.mask
    assert np.array_equal(result.image[~mask], CAT[~mask]) and not np.array_equal(result.image[mask], CAT[mask])
    card = next(c for c in all_filled.cards if c['key'] == method)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(card['picture'])).convert('RGB')), result.image)
    assert card['seconds'] > 0 and card['error'] == '' and card['views'] == list(result.views) and card['mask_key'] == all_filled.mask_key


def test_cards_in_order_results_and_the_last_word(all_filled):
    assert [c['key'] for c in all_filled.cards] == list(METHODS) == list(all_filled.results)
    assert all_filled.result is all_filled.results['patch'] and all_filled.status['state'] == 'ready'
    assert all_filled.status['text'].startswith(f'{len(METHODS)} fills in ') and 'to load weights' in all_filled.status['text']


@pytest.mark.parametrize('image', [Image.fromarray(CAT).convert('RGBA'), CAT.astype(np.uint16)*257, torch.from_numpy(CAT.copy()).permute(2, 0, 1)/255.], ids=['RGBA', '16 bit', 'tensor'])
def test_results_come_back_in_the_kind_of_the_picture(image):
    painter = MaskPainter(image); painter.draw('rect', [(5, 5), (20, 20)])
    out = painter.fill('telea')['telea'].image
    assert type(out) is type(image) and (not isinstance(out, Image.Image) or out.mode == image.mode)
    a, b = (np.moveaxis(x.numpy(), 0, -1) if isinstance(x, torch.Tensor) else np.asarray(x) for x in (out, image))
    assert a.dtype == b.dtype and np.array_equal(a[~painter.mask], b[~painter.mask])


def test_what_is_offered(painter):
    assert [m['name'] for m in painter.methods] == list(METHODS) and painter.layers == list(demo.LAYERS) and painter.chosen == ['edge_connect']
    few = MaskPainter(CAT, methods=['telea', 'patch']); assert few.layers == ['mask'] and few.chosen == ['telea']
    assert MaskPainter().size == [451, 300] and MaskPainter().title == 'chelsea'
    for bad in (dict(methods=['magic']), dict(checkpoints={'magic': 'x'}), dict(chosen=['magic'])):
        with pytest.raises(InputError, match="no method 'magic'"): MaskPainter(CAT, **bad)


def test_what_can_not_be_run(painter):
    for method, says in (('telea', 'the mask is empty'), ('magic', "no method 'magic'")):
        with pytest.raises(InputError, match=says): painter.fill(method)
        press(painter, do='run', methods=[method]); assert says in painter.error
    painter.invert()
    with pytest.raises(InputError, match='full'): painter.run('telea')
    painter.chosen = []
    with pytest.raises(InputError, match='no method is chosen'): painter.run()
    assert painter.cards == [] and painter.status['state'] == 'ready' and painter._thread is None


def test_the_run_button_brings_the_history(painter):
    s = stroke('rect', [(5, 5), (20, 20)])
    painter.error = 'old'; press(painter, do='run', methods=['telea', 'telea'], strokes=[s], position=1)
    assert painter.wait(20) and [c['key'] for c in painter.cards] == ['telea'] and painter.mask.sum() == 225 and painter.error == ''
    press(painter, do='run', methods=['copy_mean'], strokes=[s, stroke('spray')], position=2)
    assert 'spray' in painter.error and painter.wait(1) and len(painter.cards) == 1 and painter.strokes == [s]


def test_a_rerun_replaces_its_card(drawn):
    drawn.fill('telea', 'copy_mean'); first = drawn.results['telea']
    drawn.draw('rect', [(50, 30), (60, 40)]); drawn.fill('telea')
    assert [c['key'] for c in drawn.cards] == ['telea', 'copy_mean'] and drawn.cards[0]['mask_key'] == drawn.mask_key != drawn.cards[1]['mask_key']
    assert drawn.result is not first and list(drawn.results) == ['copy_mean', 'telea']


def test_weights_are_loaded_once_and_not_timed(drawn, monkeypatch):
    loads = []
    def slow_load(*args, **kw): loads.append(args[0]); time.sleep(.3); return load_inpainter(*args, **kw)
    monkeypatch.setattr(demo, 'load_inpainter', slow_load)
    drawn.fill('telea'); assert drawn.cards[0]['seconds'] < .25 and '0.3' in drawn.status['text']
    drawn.fill('telea'); assert loads == ['telea'] and 'load' not in drawn.status['text']


def test_a_checkpoint_of_ones_own(tmp_path):
    path = tmp_path/'mine.safetensors'; path.write_bytes(find_weights('edge_connect').read_bytes())
    painter = MaskPainter(CAT, checkpoints={'edge_connect': path}); painter.draw('brush', LINE, width=12)
    assert painter.fill('edge_connect') and painter._bench.loaded['edge_connect'].source == str(path)


# ---- threads: progress, cancel, errors

class Fake:
    "Stands for an inpainter: does what the test wants"
    guide = ''
    def __init__(self, do): self.do = do
    def __call__(self, image, mask, **guide): return self.do(image, mask, **guide)


def use(monkeypatch, **fakes):
    monkeypatch.setattr(demo, 'load_inpainter', lambda method, *a, **kw: Fake(fakes[method]) if method in fakes else load_inpainter(method, *a, **kw))


def for_ever(image, mask):
    n = 0
    while True: n += 1


def wait_for(condition, seconds=10):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, 'waited in vain'
        time.sleep(.005)


def test_progress_is_told(drawn, monkeypatch):
    told = []
    drawn.observe(lambda c: told.append(c['new']), 'status')
    drawn.fill('telea', 'copy_mean')
    assert [s['state'] for s in told] == ['running']*5 + ['ready'] and [s['index'] for s in told] == [0, 1, 1, 2, 2, 0]
    assert told[2]['text'] == 'Telea: filling (1 of 2)' and told[2]['method'] == 'telea' and abs(told[2]['started'] - time.time()) < 20
    assert told[2]['expected'] == 0
    pace = drawn.cards[0]['seconds']; told.clear(); drawn.open(np.tile(CAT, (2, 1, 1))); drawn.draw('brush', LINE); told.clear()
    drawn.fill('telea'); assert math.isclose(told[2]['expected'], 2*pace)                # twice the pixels


def test_cancel_stops_a_fill_in_the_middle(drawn, monkeypatch):
    use(monkeypatch, telea=for_ever)
    drawn.fill('copy_mean'); drawn.run('telea', 'patch'); wait_for(lambda: 'filling' in drawn.status['text']); time.sleep(.02)
    at = time.time(); drawn.cancel(); drawn.cancel(); press(drawn, do='cancel')
    assert drawn.wait(5) and time.time() - at < 2
    assert drawn.status | dict(text='') == demo._READY and drawn.status['text'] == 'cancelled' and drawn.error == ''
    assert [c['key'] for c in drawn.cards] == ['copy_mean'] and 'telea' not in drawn._bench.loaded
    drawn.cancel(); assert drawn.status['state'] == 'ready'                              # without effect
    monkeypatch.undo(); assert list(drawn.fill('telea', 'patch')) == ['telea', 'patch']


def test_a_cancelled_rerun_keeps_the_first_result(drawn, monkeypatch):
    first = drawn.fill('telea')['telea']
    drawn._bench.loaded['telea'] = Fake(for_ever); drawn.run('telea'); wait_for(lambda: 'filling' in drawn.status['text']); drawn.cancel(); assert drawn.wait(5)
    assert drawn.results['telea'] is first and len(drawn.cards) == 1 and not drawn.cards[0]['error']


def test_cancel_while_weights_are_loaded(drawn, monkeypatch):
    entered, filled = threading.Event(), []
    def load(*a, **kw): entered.set(); time.sleep(.3); return Fake(lambda *a: filled.append(1))
    monkeypatch.setattr(demo, 'load_inpainter', load)
    drawn.run('telea'); assert entered.wait(5)
    drawn.cancel(); assert drawn.status['state'] == 'cancelling' and drawn.wait(5)
    assert drawn.status['text'] == 'cancelled' and not filled and not drawn.cards and 'telea' in drawn._bench.loaded


def test_cancel_can_not_be_swallowed(drawn, monkeypatch):
    swallowed = []
    def stubborn(image, mask):
        for _ in range(10**9):
            try: time.sleep(.001)
            except Exception as e: swallowed.append(e)       # many a method does; a cancel is no Exception
    def deaf(image, mask):
        try: for_ever(image, mask)
        except BaseException: return types.SimpleNamespace(image=image, pred=None, views={})
    for method, do in (('telea', stubborn), ('copy_mean', deaf)):
        use(monkeypatch, **{method: do}); drawn.run(method); wait_for(lambda: 'filling' in drawn.status['text']); time.sleep(.02)
        drawn.cancel(); assert drawn.wait(5) and drawn.status['text'] == 'cancelled' and not drawn.cards and not swallowed


def test_many_cancels_at_any_moment_never_hit_anything_else(drawn, monkeypatch):
    use(monkeypatch, telea=lambda image, mask: types.SimpleNamespace(image=image, pred=None, views={}))
    rng = np.random.default_rng(0)
    for k in range(60):
        drawn.run('telea', 'copy_mean'); time.sleep(float(rng.uniform(0, .012))); drawn.cancel()
        assert drawn.wait(5) and drawn.status['state'] == 'ready'
    monkeypatch.undo(); drawn._bench.loaded.clear(); assert drawn.fill('telea')


def test_a_switch_strikes_inside_or_not_at_all():
    switch, landed = Switch(), []
    def work():
        for _ in range(300):
            switch.asked = False
            try: switch.call(lambda: time.sleep(.0005))
            except Cancelled: landed.append(1)
            sum(range(200))                                                             # outside: nothing may strike here
        landed.append('end')
    thread = threading.Thread(target=work); thread.start()
    while thread.is_alive(): switch.stop(); time.sleep(.0007)
    assert landed[-1] == 'end' and len(landed) > 10


def test_a_second_run_is_refused_in_one_line_and_drawing_goes_on(drawn, monkeypatch):
    use(monkeypatch, telea=for_ever); key = drawn.mask_key
    drawn.run('telea'); wait_for(lambda: 'filling' in drawn.status['text'])
    with pytest.raises(InputError, match='a fill is running'): drawn.run('copy_mean')
    with pytest.raises(InputError, match='a fill is running'): drawn.open(CAT)
    press(drawn, do='run', methods=['copy_mean']); assert 'a fill is running' in drawn.error
    drawn.set_state(dict(strokes=[*drawn.strokes, stroke('rect', [(50, 30), (60, 40)])], position=2))
    assert drawn.heard['n'] == 2 and drawn.mask_key != key and drawn.status['state'] == 'running'
    drawn.cancel(); assert drawn.wait(5)


def test_the_card_of_a_run_belongs_to_the_mask_it_began_with(drawn, monkeypatch):
    go = threading.Event(); key, hole = drawn.mask_key, drawn.mask
    def fill(image, mask): go.wait(5); assert np.array_equal(mask, hole); return types.SimpleNamespace(image=image, pred=None, views={})
    use(monkeypatch, telea=fill); drawn.run('telea'); drawn.invert(); go.set(); assert drawn.wait(5)
    assert drawn.cards[0]['mask_key'] == key != drawn.mask_key and not drawn.cards[0]['error']


def test_one_method_fails_while_others_succeed(drawn, monkeypatch):
    def broken(image, mask): raise ZeroDivisionError('over\nthere')
    use(monkeypatch, copy_mean=broken, navier_stokes=lambda image, mask: (_ for _ in ()).throw(InputError('found this; expected that')))
    done = drawn.fill('telea', 'copy_mean', 'navier_stokes', 'patch')
    assert list(done) == ['telea', 'patch'] == list(drawn.results) and [c['error'] for c in drawn.cards] == ['', 'ZeroDivisionError: over there', 'found this; expected that', '']
    assert drawn.status['text'].endswith('failed: Mean colour, Navier-Stokes') and isinstance(drawn.failures['copy_mean'], ZeroDivisionError)
    with pytest.raises(InputError, match='ZeroDivisionError: over there'): drawn.fill('copy_mean')
    monkeypatch.undo(); drawn._bench.loaded.clear(); drawn.fill('copy_mean'); assert 'copy_mean' not in drawn.failures and not drawn.cards[1]['error']


@pytest.mark.parametrize('kind', [SystemExit, GeneratorExit, type('Odd', (BaseException,), {})])
def test_a_method_that_exits_is_a_failed_method(drawn, monkeypatch, kind):
    def leave(image, mask): raise kind('gone')
    use(monkeypatch, telea=leave)
    assert list(drawn.fill('copy_mean', 'telea', 'navier_stokes')) == ['copy_mean', 'navier_stokes']
    assert drawn.cards[1]['error'] == f'{kind.__name__}: gone' and drawn.status['text'].endswith('failed: Telea')


def test_a_failing_rerun_takes_its_result_away(drawn, monkeypatch):
    drawn.fill('telea', 'patch'); drawn._bench.loaded['telea'] = Fake(lambda *a: 1/0)
    drawn.fill('telea', 'patch'); assert list(drawn.results) == ['patch'] and drawn.cards[0]['picture'] == b''
    press(drawn, do='view', key='telea', name='result'); assert "no result 'telea'" in drawn.error


def test_missing_weights_name_the_command(drawn, monkeypatch, tmp_path):
    monkeypatch.setattr(demo, 'find_weights', lambda method, root=None: find_weights(method, tmp_path))
    painter = MaskPainter(CAT); painter.draw('brush', LINE)
    row = next(m for m in painter.methods if m['name'] == 'partial_conv')
    assert not row['ready'] and 'inpaint train partial_conv' in row['why'] and painter.chosen == ['copy_mean']
    painter.fill('partial_conv', 'telea')
    assert 'inpaint train partial_conv' in painter.cards[0]['error'] and '\n' not in painter.cards[0]['error'] and not painter.cards[1]['error']
    for path, says in ((tmp_path/'none.safetensors', 'no such file'), (find_weights('partial_conv'), "weights of 'partial_conv'")):
        painter = MaskPainter(CAT, checkpoints={'edge_connect': path}); painter.draw('brush', LINE)
        with pytest.raises(InputError, match=says): painter.fill('edge_connect')
        assert 'make demo' in painter.cards[0]['error']


@pytest.mark.filterwarnings('error::pytest.PytestUnhandledThreadExceptionWarning')
def test_traits_that_can_not_be_sent_do_not_hang_the_painter(drawn, monkeypatch):
    def broken(key=None): raise RuntimeError('the connection is gone')
    def fill(image, mask): monkeypatch.setattr(drawn, 'send_state', broken); return types.SimpleNamespace(image=image, pred=None, views={})
    use(monkeypatch, telea=fill); drawn.run('telea'); assert drawn.wait(5)
    assert drawn.status['state'] == 'ready' and 'the connection is gone' in drawn.status['text']


def test_an_observer_that_waits_is_refused_instead_of_hanging(drawn):
    said = []
    def fill_now(change):
        try: drawn.fill('telea')
        except InputError as e: said.append(str(e))
    drawn.observe(fill_now, 'heard'); drawn.draw('rect', [(1, 1), (5, 5)])
    assert len(said) == 1 and 'inside of an observer' in said[0] and drawn.status['state'] == 'ready'
    drawn.unobserve_all('heard'); assert drawn.fill('telea')


def test_warnings_of_a_fill_are_its_note_and_the_filters_stay(painter):
    before = list(warnings.filters), warnings.showwarning
    painter.draw('rect', [(0, 0), (64, 40)])
    with warnings.catch_warnings(record=True) as loud:
        painter.fill('telea'); painter.fill('telea')
    assert 'looks inverted' in painter.cards[0]['note'] and not loud and (list(warnings.filters), warnings.showwarning) == before


def test_warnings_of_other_threads_go_their_way_whatever_the_order_of_ends():
    started, end, heard = threading.Event(), threading.Event(), []
    def other():
        with warned() as lines: started.set(); end.wait(5); warnings.warn('from the thread'); heard.extend(lines)
    before = list(warnings.filters)
    thread = threading.Thread(target=other); thread.start(); started.wait(5)
    with warnings.catch_warnings(record=True) as mine:                                 # begins and ends after the other
        warnings.warn('from here'); end.set(); thread.join(5)
    assert [str(w.message) for w in mine if 'here' in str(w.message)] == ['from here'] and warnings.filters == before
    with pytest.warns(UserWarning, match='later'): warnings.warn('later')


def test_two_fills_that_warn_at_the_same_time_leave_nothing_behind():
    before, shown, said = list(warnings.filters), warnings.showwarning, {}
    turns = [threading.Event() for _ in range(3)]
    def one(name, first, last):
        with warned() as lines: turns[first].set(); turns[last].wait(5); warnings.warn(name); said[name] = lines
    a = threading.Thread(target=one, args=('a', 0, 1)); a.start(); turns[0].wait(5)
    b = threading.Thread(target=one, args=('b', 1, 2)); b.start(); a.join(5); turns[2].set(); b.join(5)      # a begins first and ends first
    assert said == {'a': ['a'], 'b': ['b']} and warnings.filters == before and warnings.showwarning is shown
    with warnings.catch_warnings():
        warnings.simplefilter('always'); kept = list(warnings.filters)
        with warned(): pass
        assert warnings.filters == kept                                                # a filter of one's own is not taken for ours


def test_threads_end(drawn):
    drawn.fill('telea'); drawn.run('patch'); drawn.cancel(); drawn.wait(10)
    wait_for(lambda: not [t for t in threading.enumerate() if t.name == 'inpaint_lib fill'])


def test_a_process_ends_while_a_fill_runs():
    code = ('import time, numpy as np; from inpaint_lib import demo\n'
            'def for_ever(*a):\n    while True: pass\n'
            'demo.load_inpainter = lambda *a, **k: for_ever\n'
            "p = demo.MaskPainter(np.zeros((9, 9, 3), np.uint8)); p.draw('rect', [(1, 1), (5, 5)]); p.run('telea'); time.sleep(.1); print('over')")
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert (r.returncode, r.stdout, r.stderr) == (0, 'over\n', '')


def test_nothing_is_printed_by_a_run(drawn, monkeypatch, capfd):
    use(monkeypatch, copy_mean=lambda *a: 1/0); drawn.fill('copy_mean', 'telea')
    assert capfd.readouterr() == ('', '')


# ---- guides

def forwards(painter, method):
    "Counts the forward passes of each network of a loaded method"
    counts = {}
    for cell in painter._bench.loaded[method].fill.__closure__:
        if isinstance(cell.cell_contents, torch.nn.Module):
            cell.cell_contents.register_forward_hook(lambda net, *_: counts.__setitem__(type(net).__name__, counts.get(type(net).__name__, 0) + 1))
    return counts


@pytest.fixture
def with_edges(drawn):
    drawn.fill('edge_connect')
    return drawn


def test_the_edges_of_the_first_run_lie_under_the_layer(with_edges):
    p, view = with_edges, with_edges.results['edge_connect'].views['edges'][0].numpy()
    sent = np.asarray(Image.open(io.BytesIO(p.bases['edges']['picture'])))
    assert sent.dtype == np.uint8 and np.array_equal(sent, np.rint(view*255)) and np.array_equal(p.edges, view >= .5)
    p.draw('rect', [(20, 18), (26, 24)], layer='edges'); assert p.edges[18:24, 20:26].all()
    p.draw('rect', [(20, 18), (26, 24)], layer='edges', erase=True); assert not p.edges[18:24, 20:26].any()
    p.clear('edges'); assert np.array_equal(p.edges, view >= .5)


def test_edited_edges_run_the_second_network_only(with_edges):
    p, counts = with_edges, forwards(with_edges, 'edge_connect'); first = p.results['edge_connect']
    p.draw('line', [(12, 18), (38, 27)], width=2, layer='edges')
    result = p.fill('edge_connect'); assert list(result) == ['edge_connect:edited'] and counts == dict(InpaintGenerator=1)
    out = result['edge_connect:edited'].image
    assert not np.array_equal(out, first.image) and np.array_equal(out[~p.mask], CAT[~p.mask])
    card = p.cards[-1]; assert (card['key'], card['method'], card['title']) == ('edge_connect:edited', 'edge_connect', 'EdgeConnect, edges edited')
    p.undo(); again = p.fill('edge_connect'); assert counts == dict(InpaintGenerator=2, EdgeGenerator=1)
    assert list(again) == ['edge_connect'] and np.array_equal(again['edge_connect'].image, first.image) and torch.equal(again['edge_connect'].pred, first.pred)


def test_a_map_handed_back_untouched_gives_the_first_result(with_edges):
    p = with_edges; first = p.results['edge_connect']
    same = p._bench.loaded['edge_connect'](CAT, p.mask, edges=torch.from_numpy(edited('edges', p._bench.bases['edges'][1], np.zeros((H, W), np.int8))))
    assert np.array_equal(same.image, first.image) and torch.equal(same.pred, first.pred)


def test_another_mask_makes_a_new_base_first(with_edges):
    p, counts = with_edges, forwards(with_edges, 'edge_connect'); old = p.bases['edges']
    p.draw('line', [(12, 18), (38, 27)], width=2, layer='edges'); p.draw('rect', [(46, 30), (60, 44)])
    assert list(p.fill('edge_connect')) == ['edge_connect', 'edge_connect:edited'] and counts == dict(InpaintGenerator=2, EdgeGenerator=1) and p.bases['edges'] != old
    assert list(p.fill('edge_connect')) == ['edge_connect:edited'] and counts == dict(InpaintGenerator=3, EdgeGenerator=1)


def test_a_base_of_another_mask_says_nothing_inside_of_the_present_hole(with_edges):
    p, key, first = with_edges, with_edges.mask_key, with_edges.edges; assert p.bases['edges']['mask_key'] == key
    p.clear(); assert np.array_equal(p.edges, first)                                     # no hole, nothing to hide
    p.draw('rect', [(2, 26), (60, 46)]); new = p.mask
    assert (first & new).any() and not (p.edges & new).any() and np.array_equal(p.edges[~new], first[~new])
    p.draw('line', [(10, 36), (40, 40)], width=1, layer='edges'); line = rasterize(p.strokes, (H, W), layer='edges') > 0
    assert np.array_equal(p.edges & new, line)
    p.undo(); p.undo(); p.undo(); assert p.mask_key == key and np.array_equal(p.edges, first)   # the mask it was made for
    p.redo(); p.redo(); p.fill('edge_connect'); assert p.bases['edges']['mask_key'] == p.mask_key != key
    assert np.array_equal(p.edges, p.results['edge_connect'].views['edges'][0].numpy() >= .5)


def test_a_structure_of_another_mask_is_grey_inside_of_the_present_hole(drawn):
    drawn.fill('structure_flow'); base, old = drawn.structure, drawn.bases['structure']['mask_key']; assert old == drawn.mask_key
    drawn.clear(); drawn.draw('rect', [(2, 30), (60, 46)]); drawn.draw('rect', [(4, 32), (9, 40)], layer='structure', color='#ff0080')
    painted = drawn._drawing.layer('structure')[..., 3] > 0
    assert (drawn.structure[painted] == (255, 0, 128)).all() and (abs(drawn.structure[drawn.mask & ~painted].astype(int) - 128) <= 1).all()
    assert np.array_equal(drawn.structure[~drawn.mask], base[~drawn.mask]) and drawn.bases['structure']['mask_key'] == old != drawn.mask_key
    assert list(drawn.fill('structure_flow')) == ['structure_flow', 'structure_flow:edited'] and drawn.bases['structure']['mask_key'] == drawn.mask_key


def test_edges_drawn_before_any_run(drawn):
    drawn.draw('line', [(12, 18), (38, 27)], width=1, layer='edges'); assert drawn.edges.any()
    assert list(drawn.fill('edge_connect')) == ['edge_connect', 'edge_connect:edited']


def test_what_is_drawn_outside_of_the_hole_has_no_effect_and_that_is_said(with_edges):
    for layer, method in (('edges', 'edge_connect'), ('sketch', 'deepfill_v2')):
        with_edges.draw('line', [(50, 40), (60, 44)], width=1, layer=layer)
        assert list(with_edges.fill(method)) == [method]
        assert f'layer {layer} lies outside of the hole' in next(c['note'] for c in with_edges.cards if c['key'] == method)


def test_a_failing_first_stage_is_not_followed_by_the_second(drawn, monkeypatch):
    use(monkeypatch, edge_connect=lambda *a, **kw: 1/0); drawn.draw('line', LINE, width=1, layer='edges')
    with pytest.raises(InputError, match='ZeroDivision'): drawn.fill('edge_connect')
    assert [c['key'] for c in drawn.cards] == ['edge_connect']


def test_a_painted_structure_changes_the_hole_only(drawn):
    assert drawn.structure is None
    first = drawn.fill('structure_flow')['structure_flow']; base = drawn.structure
    assert base.shape == (H, W, 3) and np.array_equal(base, np.asarray(Image.open(io.BytesIO(drawn.bases['structure']['picture']))))
    counts = forwards(drawn, 'structure_flow')
    drawn.draw('brush', LINE, width=8, layer='structure', color='#ff0080')
    assert (drawn.structure[drawn._drawing.layer('structure')[..., 3] > 0] == (255, 0, 128)).all()
    out = drawn.fill('structure_flow')['structure_flow:edited']
    assert np.array_equal(out.image[~drawn.mask], CAT[~drawn.mask]) and not np.array_equal(out.image, first.image) and 'StructureGen' not in counts
    drawn.draw('brush', LINE, width=20, layer='structure', erase=True); assert np.array_equal(drawn.structure, base)
    assert torch.equal(drawn.fill('structure_flow')['structure_flow'].pred, first.pred)


def test_a_sketch_uses_the_weights_that_take_one(drawn):
    plain_fill = drawn.fill('deepfill_v2')['deepfill_v2']
    drawn.draw('line', [(12, 18), (38, 27)], width=2, layer='sketch')
    out = drawn.fill('deepfill_v2'); assert list(out) == ['deepfill_v2:sketch'] and drawn.cards[-1]['title'] == 'DeepFill v2, with a sketch'
    assert set(drawn._bench.loaded) == {'deepfill_v2', 'deepfill_v2:sketch'} and 'sketch' in drawn._bench.loaded['deepfill_v2:sketch'].source
    image = out['deepfill_v2:sketch'].image
    assert np.array_equal(image[~drawn.mask], CAT[~drawn.mask]) and not np.array_equal(image, plain_fill.image)
    drawn.clear('sketch'); assert list(drawn.fill('deepfill_v2')) == ['deepfill_v2']


def test_edited_maps():
    base = np.array([[.1, .6, .5]], np.float32)
    assert edited('edges', base, np.array([[1, -1, 0]], np.int8)).tolist() == [[1, 0, .5]]
    rgba = np.array([[[255, 0, 51, 255], [9, 9, 9, 0]]], np.uint8)
    assert np.allclose(edited('structure', np.full((3, 1, 2), .25, np.float32), rgba), [[[1, .25]], [[0, .25]], [[.2, .25]]])


# ---- views, files, what readers see

def test_views(all_filled):
    p = all_filled
    assert p.view('edge_connect', 'edges').shape == (H, W) and p.shown['name'] == 'edges' and Image.open(io.BytesIO(p.shown['picture'])).size == (W, H)
    assert np.array_equal(p.view('telea'), p.results['telea'].image) and p.view('structure_flow', 'flow').shape == (H, W, 3)
    for c in p.cards:
        for name in ('result', 'pred', *c['views']): assert p.view(c['key'], name).shape[:2] == (H, W)
    for key, name, says in (('magic', 'edges', "no result 'magic'"), ('telea', 'edges', "no view 'edges'")):
        with pytest.raises(InputError, match=says): p.view(key, name)
        press(p, do='view', key=key, name=name); assert says in p.error
    turns = []; p.observe(lambda c: turns.append(c['new']['name']), 'shown')
    for _ in range(2): press(p, do='view', key='edge_connect', name='edges'); time.sleep(.002)
    assert turns == ['edges', 'edges']                                                  # a second browser window asks again


def test_save(all_filled, tmp_path):
    assert all_filled.save(tmp_path/'m.png', 'mask') == '' and np.array_equal(np.asarray(Image.open(tmp_path/'m.png')), all_filled.mask*np.uint8(255))
    all_filled.save(tmp_path/'t.png', key='telea'); assert np.array_equal(np.asarray(Image.open(tmp_path/'t.png')), all_filled.results['telea'].image)
    assert 'lossy' in all_filled.save(tmp_path/'t.jpg')
    for args, says in ((('x.png', 'hat'), 'hat'), (('x.png', 'result', 'magic'), 'magic'), (('x.doc',), 'x.doc')):
        with pytest.raises(InputError, match=says): all_filled.save(*args)


def test_save_for_the_browser(monkeypatch):
    sent, p = [], MaskPainter(Image.fromarray(CAT).convert('CMYK')); p.title = 'my cat/../é.jpg'
    monkeypatch.setattr(p, 'send', lambda content, buffers=None: sent.append((content, bytes(buffers[0]))))
    press(p, do='save', what='result', key=''); assert 'no result yet' in p.error and not sent
    p.draw('rect', [(5, 5), (20, 20)]); p.fill('telea')
    press(p, do='save', what='mask', id='v1'); press(p, do='save', what='result', key='telea', id=2)
    assert [(m['did'], m['id']) for m, _ in sent] == [('save', 'v1'), ('save', 2)] and [m['name'] for m, _ in sent] == ['é-mask.png', 'é-telea.tif']
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(sent[0][1]))) > 0, p.mask) and Image.open(io.BytesIO(sent[1][1])).mode == 'CMYK'


@pytest.mark.parametrize('message', [{}, None, 'run', dict(do='dance'), dict(do='_unknown'), dict(do='__init__'), dict(do=['run']), dict(do='run', methods=5), dict(do='run', methods=None), dict(do='run', methods=[['a']]), dict(do='run', methods='telea'),
                                     dict(do='run', methods=[['telea']]), dict(do='save', what='hat'), dict(do='view'), dict(do='random', kind=None), dict(do='random', kind=[]), dict(do='random', ratio='x'), dict(do='random', ratio=None),
                                     dict(do='piece', what='mask', name='n', index=0, of=1.0), dict(do='piece', what='mask', name='n', index=0.0, of=1), dict(do='piece', what=[]),
                                     dict(do='view', key=['a'], name={}), dict(do='save', what=[]), dict(do='save', key=['a']), dict(do='history', strokes=5)], ids=str)
def test_messages_that_are_none(drawn, message):
    if isinstance(message, dict) and 'key' in message: drawn.fill('telea')
    drawn._handle_custom_msg(message, [memoryview(b'x')])
    assert drawn.error and '\n' not in drawn.error and not re.match(r'\w+Error', drawn.error) and drawn.status['state'] == 'ready'
    assert drawn.fill('copy_mean') and drawn.error == ''


@pytest.mark.parametrize('shape', [(H, W), (1080, 1920), (900, 60), (60, 1500)], ids=str)
def test_what_readers_see_is_small(shape):
    noise = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    p = MaskPainter(noise); p.random_mask('free_form', .3); p.fill('copy_mean'); p._bench.results['again'] = p.result
    data, _ = p._repr_mimebundle_()
    assert set(data) == {'text/plain', 'application/vnd.jupyter.widget-view+json', 'image/jpeg'} and len(json.dumps(data)) <= 12_000
    assert data['text/plain'] == f'MaskPainter: picture {shape[1]} x {shape[0]}, hole 30.0%, results: 2'


def test_the_front_end_gets_the_present_files(painter):
    for name in ('js', 'css'):
        assert getattr(painter, {'js': '_esm', 'css': '_css'}[name]) == (ROOT/'inpaint_lib'/'static'/f'painter.{name}').read_text(encoding='utf-8')


def test_the_state_of_a_reloaded_page_is_complete_and_json(with_edges):
    state = {k: v for k, v in with_edges.get_state().items() if not k.startswith('_')}
    assert {'strokes', 'position', 'cards', 'bases', 'heard', 'status', 'methods', 'chosen', 'bins', 'layers', 'size', 'mask_key'} <= set(state)
    plain_state = json.loads(json.dumps(state, default=lambda b: 'bytes' if isinstance(b, bytes) else str(type(b))))
    assert plain_state['cards'][0]['picture'] == 'bytes' and plain_state['bases'] == {'edges': dict(picture='bytes', mask_key=with_edges.mask_key)}


def test_a_bench_needs_no_widget():
    told, mask = [], rasterize([stroke('brush', LINE)], (H, W))
    bench = Bench('cpu', tell=lambda **news: told.append(news))
    bench.work(types.SimpleNamespace(image=CAT, mask=mask, key='k', methods=['telea'], switch=Switch(), loading=0., cards=[], drawn={}))
    assert list(bench.results) == ['telea'] and [k for news in told for k in news] == ['status', 'status', 'card', 'status']


def test_one_message_answers_a_stroke_and_a_refused_history_is_sent_back(painter, monkeypatch):
    sent = []
    monkeypatch.setattr(painter, '_send', lambda msg, buffers=None: sent.append(msg))
    good, bad = stroke('rect', [(0, 0), (4, 4)]), stroke('spray')
    painter.set_state(dict(strokes=[good], position=1))
    assert [(m['method'], set(m['state'])) for m in sent] == [('update', {'heard', 'mask_key'})]
    sent.clear(); painter.set_state(dict(strokes=[good, bad], position=2))
    back = {k: v for m in sent for k, v in m['state'].items()}
    assert back['strokes'] == [good] and back['position'] == 1 and 'spray' in back['error']


CELLS = (f"import os, time; os.chdir({str(ROOT)!r})\nfrom inpaint_lib import demo\n"
         "class Slow:\n    guide = ''\n    def __call__(self, image, mask): time.sleep(2); return load('telea')(image, mask)\n"
         "load, demo.load_inpainter = demo.load_inpainter, lambda *a, **k: Slow()\n"
         "painter = demo.MaskPainter(); painter.draw('rect', [(9, 9), (40, 40)])")


def test_a_stroke_is_answered_while_a_cell_fills_in_a_real_kernel():
    from jupyter_client.manager import start_new_kernel
    manager, client = start_new_kernel(kernel_name='python3', startup_timeout=120)
    try:
        assert client.execute_interactive(CELLS, timeout=120, output_hook=lambda m: None)['content']['status'] == 'ok'
        said = client.execute_interactive('', user_expressions=dict(id='painter.model_id'), timeout=30, output_hook=lambda m: None)
        comm = said['content']['user_expressions']['id']['data']['text/plain'].strip("'")
        client.control_channel.send(client.session.msg('create_subshell_request', {}))                # as JupyterLab does
        subshell = client.get_control_msg(timeout=30)['content']['subshell_id']
        cell = client.execute("painter.fill('telea')")
        def status(m): return m['content'].get('data', {}).get('state', {}).get('status', {}).get('text', '')
        while 'filling' not in status(client.get_iopub_msg(timeout=30)): pass
        state = dict(strokes=[stroke('rect', [(1, 1), (5, 5)])], position=1)
        message = client.session.msg('comm_msg', dict(comm_id=comm, data=dict(method='update', state=state, buffer_paths=[])))
        message['header']['subshell_id'] = subshell; client.shell_channel.send(message)
        told = []
        while not told or told[-1] != 'ready':
            m = client.get_iopub_msg(timeout=30)
            if m['msg_type'] == 'comm_msg': s = m['content']['data']['state']; told += [s['heard']['hole']] if 'heard' in s else [s['status']['state']] if 'status' in s else []
        assert told == [16, 'ready'] and client.get_shell_msg(timeout=30)['parent_header']['msg_id'] == cell
    finally: client.stop_channels(); manager.shutdown_kernel(now=True)
