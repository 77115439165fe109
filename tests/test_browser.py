"""The painting widget in a real browser: Chromium before a JupyterLab and a Voila that are started here.

The tests of one server share a page and build on each other, in order, as a session in front of it does. What the
browser rasterises, what the kernel holds and what a slow loop over the recorded points gives must be equal, pixel by pixel.
No test asserts a time; the round trip from mouse-up to mask is measured and written to runs/browser/round_trip.json.
"""
import base64
import io
import json
import math
import os
import re
import signal

import numpy as np
import pytest
from PIL import Image

import browser
from browser import Lab, Painter, Server, chromium, complaints, eventually, fetch, keep, long_trips, round_trips, write_notebook

if browser.missing(): pytest.skip(browser.missing(), allow_module_level=True)

CELLS = ('import time\nfrom inpaint_lib.demo import MaskPainter\npause, again = 0, False', 'painter = MaskPainter()\npainter',
         'time.sleep(pause)', 'painter if again else None')
SPY = '''
import inpaint_lib.papers.edge_connect as _ec, inpaint_lib.papers.structure_flow as _sf
_calls, _starts = {}, set()
def _count(kind, name='forward'):
    plain = getattr(kind, name)
    def counted(self, *args, **kw):
        _calls[kind.__name__] = _calls.get(kind.__name__, 0) + 1
        return plain(self, *args, **kw)
    setattr(kind, name, counted)
for _kind in (_ec.EdgeGenerator, _ec.InpaintGenerator, _sf.StructureGen): _count(_kind)
_count(_sf.FlowGen, 'flow')
painter.observe(lambda change: _starts.add(change['new']['started']), 'status')
'''


# ---------------------------------------------------------------- what a stroke covers, said slowly
def covers(stroke, px, py):
    "Is the pixel centre inside? By the definition, one pixel at a time"
    p, w = stroke['points'], stroke['width']
    if stroke['tool'] == 'rect':
        (x0, y0), (x1, y1) = p[0], p[-1]
        return min(x0, x1) <= px <= max(x0, x1) and min(y0, y1) <= py <= max(y0, y1)
    if stroke['tool'] == 'lasso':
        edges = zip(p[-1:] + p[:-1], p)
        return sum((ay > py) != (by > py) and px < (bx - ax)*(py - ay)/(by - ay) + ax for (ax, ay), (bx, by) in edges) % 2 == 1
    for (x0, y0), (x1, y1) in zip(p, p[1:]) if len(p) > 1 else [(p[0], p[0])]:
        dx, dy = x1 - x0, y1 - y0
        l2 = dx*dx + dy*dy
        t = min(max(((px - x0)*dx + (py - y0)*dy)/l2, 0), 1) if l2 > 0 else 0
        if (px - x0 - t*dx)**2 + (py - y0 - t*dy)**2 <= (w/2)**2: return True
    return False


def thin(stroke):
    "The pixels of a stroke of width 1"
    p = stroke['points']
    for (x0, y0), (x1, y1) in zip(p, p[1:]) if len(p) > 1 else [(p[0], p[0])]:
        n = math.ceil(max(abs(x1 - x0), abs(y1 - y0)))
        for k in range(n + 1): yield math.floor(y0 + (y1 - y0)*k/max(n, 1)), math.floor(x0 + (x1 - x0)*k/max(n, 1))


def slow_layer(strokes, shape, layer='mask'):
    "All strokes of a layer, in order, by loops over pixels"
    out, off = np.zeros(shape, np.int8), -1 if layer == 'edges' else 0
    strokes = [s for s in strokes if s['layer'] == layer]
    while any(s['tool'] == 'clear' for s in strokes[1:]): strokes = strokes[1:]     # what was cleared needs no drawing
    for s in strokes:
        ink = off if s['erase'] else 1
        if s['tool'] == 'invert': out = 1 - out
        elif s['tool'] == 'clear': out[:] = 0
        elif s['tool'] == 'bitmap': out = np.array([v for k, n in enumerate(s['runs']) for v in [1 if k % 2 else off]*n], np.int8).reshape(shape)
        elif s['width'] == 1 and s['tool'] in ('brush', 'line'):
            for i, j in thin(s):
                if 0 <= i < shape[0] and 0 <= j < shape[1]: out[i, j] = ink
        else:
            x, y = zip(*s['points'])
            reach = 0 if s['tool'] in ('rect', 'lasso') else s['width']
            for i in range(max(0, int(min(y) - reach) - 1), min(shape[0], int(max(y) + reach) + 2)):
                for j in range(max(0, int(min(x) - reach) - 1), min(shape[1], int(max(x) + reach) + 2)):
                    if covers(s, j + .5, i + .5): out[i, j] = ink
    return out


# ---------------------------------------------------------------- one Lab, one browser, one page
class Session:
    "What the tests of the Lab share"
    def strokes(self): return self.kernel.value('painter.strokes[:painter.position]')
    def mask(self): return self.kernel.array('painter.mask')
    def result(self, key): return self.kernel.array(f'painter.results[{key!r}].image')
    def title(self, method): return self.kernel.value(f'next(m["title"] for m in painter.methods if m["name"] == {method!r})')

    def choose(self, *methods): self.painter.choose(*map(self.title, methods))

    def fill(self, *methods, seconds=60):
        "Ticks the methods, presses Fill, waits for the cards"
        self.choose(*methods)
        before, runs = self.kernel.value('({c["key"]: c["seconds"] for c in painter.cards}, len(_starts))')
        self.painter.press('Fill')
        assert eventually(lambda: self.kernel.value('len(_starts)') > runs, seconds), f'{methods} did not start'
        assert eventually(lambda: self.kernel.value('painter.status["state"]') == 'ready', seconds), f'{methods} not filled in {seconds} s'
        self.painter.until(state='ready')
        after = self.kernel.value('{c["key"]: c["seconds"] for c in painter.cards}')
        return [k for k in after if before.get(k) != after[k]]

    def clear(self):
        self.painter.press('Clear')
        assert self.painter.heard() == 0

    def seen(self, where):
        "Mean brightness on the screen of some of the picture's pixels"
        shot = np.asarray(Image.open(io.BytesIO(self.page.screenshot())).convert('L'), float)
        scale, left, top = self.painter.view()
        i, j = ((np.argwhere(where) + .5)*scale).T
        return shot[(top + i).astype(int), (left + j).astype(int)].mean()

    def agree(self, slow=True):
        "Kernel, browser and (it takes a second) slow loop have the same mask"
        n, kernel = self.painter.heard(), self.mask()
        assert n == kernel.sum()
        assert np.array_equal(self.painter.layer('mask', kernel.shape), kernel), 'browser and kernel differ'
        if slow: assert np.array_equal(slow_layer(self.strokes(), kernel.shape), kernel), 'kernel and slow loop differ'
        return kernel


@pytest.fixture(scope='module')
def chrome():
    with chromium() as found: yield found


@pytest.fixture(scope='module')
def lab(chrome, tmp_path_factory):
    folder, s = tmp_path_factory.mktemp('lab'), Session()
    write_notebook(folder/'paint.ipynb', *CELLS)
    with Server('jupyterlab', folder) as s.server:
        s.page = chrome.new_page(viewport=dict(width=1500, height=1100), accept_downloads=True)
        s.complaints, s.folder = complaints(s.page), folder
        s.lab, s.painter = Lab(s.page, s.server).open('paint.ipynb'), Painter(s.page)
        s.lab.command('application:toggle-left-area')
        s.kernel = s.server.kernel()
        yield s
        s.kernel.close()


@pytest.fixture(autouse=True)
def artifact(request):
    "A picture of the page after each test, also after a failed one"
    yield
    for name in ('lab', 'app'):
        if name in request.fixturenames: keep(request.getfixturevalue(name).page, request.node.name.removeprefix('test_'))


def test_run_all_cells_then_the_widget_is_there(lab):
    lab.lab.run_all()
    lab.painter.wait().until(state='ready')
    lab.kernel.run(SPY)
    assert lab.lab.cells() == 4 and not lab.mask().any() and not lab.complaints
    assert 'hole 0.0 %' in lab.painter.root.locator('[role=status]').inner_text()


def test_round_trip_from_mouse_up_to_the_mask_in_the_kernel(lab):
    trips = round_trips(lab.painter, 24)
    lab.agree()
    long = long_trips(lab.painter, lab.kernel, 9)
    report = dict(strokes=len(trips), median_300_ms=float(np.median(long)), median_ms=float(np.median(trips)), p90_ms=float(np.percentile(trips, 90)), all_ms=trips)
    (browser.SHOTS/'round_trip.json').write_text(json.dumps(report, indent=1))
    print(f'\nmouse-up to mask in the kernel: median {report["median_ms"]:.1f} ms, 90th percentile {report["p90_ms"]:.1f} ms; '
          f'with 300 strokes of 80 points in the history: median {report["median_300_ms"]:.1f} ms')
    assert all(t > 0 for t in trips + long)
    lab.agree(slow=False)
    lab.kernel.run('painter.position = 0\npainter.strokes = []'); lab.painter.until(position=0); lab.painter.heard()


def test_every_tool_gives_the_same_mask_in_browser_kernel_and_slow_loop(lab):
    p = lab.painter; lab.clear()
    p.tool('Brush', 18).stroke([(60, 60), (140, 70), (150, 130)]); p.heard()
    aimed = lab.strokes()[-1]['points']
    assert np.allclose([aimed[0], aimed[-1]], [(60, 60), (150, 130)], atol=1)
    p.tool('Eraser', 7).stroke([(100, 40), (105, 100)])
    p.tool('Line', 5).stroke([(200, 40), (300, 90)])
    p.width(1); p.stroke([(200, 60), (317, 223)])
    p.tool('Brush', 1).stroke([(330, 30), (380, 50), (340, 80)])
    p.tool('Rectangle').stroke([(250, 120), (330, 180)])
    p.tool('Lasso').stroke([(60, 180), (180, 170), (70, 270), (190, 280)])
    p.tool('Brush', 30).stroke([(430, 280), (470, 310)])   # out over the corner
    mask = lab.agree()
    assert mask[150, 290] and not mask[75, 103] and [s['tool'] for s in lab.strokes()[-8:]] == [
        'brush', 'brush', 'line', 'line', 'brush', 'rect', 'lasso', 'brush']
    p.press('Invert')
    assert np.array_equal(lab.agree(), ~mask)
    p.press('Invert'); p.heard()


def test_undo_and_redo(lab):
    p, before = lab.painter, lab.agree(slow=False)
    n = lab.kernel.value('painter.position')
    p.tool('Rectangle').stroke([(10, 10), (40, 40)]); after = lab.agree(slow=False)
    p.press('Undo'); assert np.array_equal(lab.agree(slow=False), before)
    p.press('Redo'); assert np.array_equal(lab.agree(slow=False), after)
    p.canvas.focus()
    p.page.keyboard.press('Control+z'); p.until(position=n)
    p.page.keyboard.press('Control+z'); p.until(position=n - 1); p.heard()
    p.page.keyboard.press('Control+Shift+Z'); p.until(position=n); p.heard()
    p.page.keyboard.press('Control+y'); p.until(position=n + 1)
    assert np.array_equal(lab.agree(slow=False), after)
    p.press('Undo'); p.press('Undo'); p.until(position=n - 1)
    p.stroke([(50, 50), (60, 60)]); p.until(position=n)
    lab.agree()
    assert p.button('Redo').is_disabled() and lab.kernel.value('len(painter.strokes)') == n


def test_keys_reach_the_widget_and_not_the_notebook(lab):
    p, page, cells = lab.painter, lab.page, lab.lab.cells()
    p.tool('Brush', 10).canvas.focus()
    width = lambda: int(p.root.get_by_label('Brush width', exact=True).input_value())
    page.keyboard.press(']'); wider = width(); assert wider > 10
    page.keyboard.press('['); page.keyboard.press('['); assert width() < wider
    pressed = lambda name: p.button(name).get_attribute('aria-pressed') == 'true'
    for key, name in dict(l='Line', r='Rectangle', o='Lasso', e='Eraser', p='Pan', b='Brush').items():
        page.keyboard.press(key); assert pressed(name), name
    sources = lambda: page.evaluate("jupyterapp.shell.currentWidget.content.model.toJSON().cells.map(c => [c.cell_type, c.source])")
    typed = sources()
    for key in 'bzlammyxddcvff': page.keyboard.press(key)   # command mode would add, cut, merge, retype cells
    assert sources() == typed and lab.lab.cells() == cells
    page.keyboard.press('b')


def test_drawing_with_the_keyboard(lab):
    p, page = lab.painter, lab.page
    lab.clear(); p.tool('Brush', 1).canvas.focus()
    page.keyboard.press('ArrowRight'); page.keyboard.press('Enter')
    for _ in range(3): page.keyboard.press('Shift+ArrowRight')
    page.keyboard.press('ArrowDown'); page.keyboard.press('ArrowDown'); page.keyboard.press('Enter')
    mask = lab.agree()
    assert mask.sum() == 33 and len(lab.strokes()[-1]['points']) >= 5


def test_a_key_in_the_middle_of_a_stroke(lab):
    "The pen of the keyboard is down when the mouse comes; Invert is pressed while the mouse draws"
    p, page = lab.painter, lab.page
    p.tool('Brush', 9).canvas.focus()
    for key in ('Enter', 'ArrowDown', 'Shift+ArrowDown'): page.keyboard.press(key)
    p.stroke([(60, 60), (120, 80)]); lab.agree()
    p.canvas.focus()
    p.stroke([(200, 60), (220, 80), (240, 100)], between=lambda: page.keyboard.press('i')); lab.agree()
    page.keyboard.press('Enter'); page.keyboard.press('Shift+ArrowLeft'); p.press('Clear'); page.keyboard.press('Escape'); lab.agree()


def test_histories_that_went_apart_come_together_again(lab):
    "As if the browser had said something else: both drew at the same moment. What the person sees counts"
    p = lab.painter
    p.tool('Rectangle').stroke([(30, 30), (90, 90)]); p.heard()
    seen = p.layer('mask', lab.mask().shape)
    lab.kernel.run("painter.set_state(dict(strokes=painter.strokes[:-1] + [dict(painter.strokes[-1], points=[[0, 0], [9, 9]])]))")
    p.heard()
    assert np.array_equal(lab.agree(), seen > 0)


def test_drawing_goes_on_while_the_kernel_is_busy(lab):
    p = lab.painter; lab.clear()
    position = lab.kernel.value('painter.position')
    lab.kernel.run('pause = 2.5')
    lab.lab.run_cell(2)
    prompt = lab.page.locator('.jp-Notebook .jp-CodeCell').nth(2).locator('.jp-InputArea-prompt')
    lab.page.wait_for_function("e => e.textContent.includes('*')", arg=prompt.element_handle())
    p.tool('Brush', 12)
    for k in range(4): p.stroke([(50 + 40*k, 60), (60 + 40*k, 160)], steps=2)
    assert p.number('position') == position + 4 and p.number('hole') > 4000
    assert '*' in prompt.inner_text(), 'the cell ended before the strokes did: nothing was tested'
    lab.kernel.run('pause = 0')
    lab.agree()
    assert lab.kernel.value('painter.position') == position + 4


# ---------------------------------------------------------------- filling
def pixels(page, source):
    "A picture on the page as an array (H,W,3)"
    code = """async e => { const c = document.createElement('canvas'), g = c.getContext('2d');
        for (let k = 0; e.decode && k < 40; k++)       // a picture may be replaced just now
            try { await e.decode(); break } catch { await new Promise(r => setTimeout(r, 50)) }
        c.width = e.naturalWidth || e.width; c.height = e.naturalHeight || e.height; g.drawImage(e, 0, 0); return c.toDataURL('image/png') }"""
    data = source.evaluate(code)
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data.split(',')[1]))).convert('RGB'))


def test_edge_connect_fills_the_hole(lab):
    p = lab.painter; lab.clear()
    p.tool('Rectangle').stroke([(150, 110), (250, 190)])
    p.tool('Brush', 20).stroke([(300, 60), (380, 80), (340, 150)])
    mask = lab.agree()
    lab.kernel.run('_calls.clear()')
    assert p.radio('Edges').is_disabled()
    assert lab.fill('edge_connect') == ['edge_connect']
    assert lab.kernel.value('_calls') == dict(EdgeGenerator=1, InpaintGenerator=1)
    picture, result = lab.kernel.array('painter._image'), lab.result('edge_connect')
    shown = pixels(lab.page, p.card('edge_connect').locator('img'))
    assert np.array_equal(shown, result) and np.array_equal(result[~mask], picture[~mask])
    assert (result[mask] != picture[mask]).mean() > .5 and p.card('edge_connect').locator('.ip-seconds').inner_text().endswith('s')


def test_edges_can_be_edited_and_only_the_second_stage_runs_again(lab):
    p = lab.painter; first = lab.result('edge_connect')
    p.radio('Edges').check(); p.until(layer='edges')
    base, hole = lab.kernel.array('painter.edges'), lab.mask()
    assert eventually(lambda: lab.seen(base & ~hole) > lab.seen(~base & ~hole) + 40), 'what was found is not to be seen'
    p.tool('Line', 1).stroke([(155, 120), (245, 180)])
    p.tool('Brush', 2).stroke([(160, 180), (200, 130), (240, 115)])
    p.tool('Eraser', 15).stroke([(310, 65), (370, 85)])
    p.heard()
    expected = slow_layer(lab.strokes(), base.shape, 'edges')
    assert np.array_equal(p.layer('edges', base.shape), expected)
    assert np.array_equal(lab.kernel.array('painter.edges'), np.where(expected == 0, base, expected > 0))
    mask_before = lab.mask()
    lab.kernel.run('_calls.clear()')
    assert lab.fill('edge_connect') == ['edge_connect:edited']
    assert lab.kernel.value('_calls') == dict(InpaintGenerator=1)
    edited = lab.result('edge_connect:edited')
    assert np.array_equal(lab.mask(), mask_before) and np.array_equal(edited[~mask_before], first[~mask_before])
    assert (edited != first)[mask_before].any() and p.card('edge_connect').is_visible()
    assert not p.card('edge_connect').locator('.ip-stale').is_visible()


def test_structure_and_sketch_are_layers_too(lab):
    p = lab.painter
    p.radio('Sketch').check(); p.until(layer='sketch')
    p.tool('Line', 2).stroke([(150, 150), (250, 150)]); p.heard()
    sketch = lab.kernel.array('painter.sketch')
    assert np.array_equal(p.layer('sketch', sketch.shape) != 0, sketch) and sketch.sum() > 100
    lab.kernel.run('_calls.clear()')
    assert lab.fill('deepfill_v2', 'structure_flow') == ['deepfill_v2:sketch', 'structure_flow']
    assert lab.kernel.value('_calls') == dict(StructureGen=1, FlowGen=1)
    p.radio('Structure').check(); p.until(layer='structure')
    p.root.get_by_label('Colour', exact=True).fill('#208040')
    p.tool('Brush', 14).stroke([(170, 130), (230, 170)]); p.heard()
    structure = lab.kernel.array('painter.structure')
    assert structure.shape == (*sketch.shape, 3) and tuple(structure[150, 200]) == (0x20, 0x80, 0x40)
    lab.kernel.run('_calls.clear()')
    assert lab.fill('structure_flow') == ['structure_flow:edited'] and lab.kernel.value('_calls') == dict(FlowGen=1)
    mask, plain, edited = lab.mask(), lab.result('structure_flow'), lab.result('structure_flow:edited')
    assert (plain != edited)[mask].any() and np.array_equal(plain[~mask], edited[~mask])
    p.radio('Hole').check(); p.until(layer='mask')


def test_three_methods_side_by_side_and_a_wipe(lab):
    p, page = lab.painter, lab.page
    keys = lab.fill('edge_connect', 'partial_conv', 'telea')
    assert {'partial_conv', 'telea'} <= set(keys)
    for key in ('partial_conv', 'telea'): assert np.array_equal(pixels(page, p.card(key).locator('img')), lab.result(key))
    compare = p.root.get_by_role('region', name='Compare')
    compare.get_by_label('Left picture').select_option('partial_conv')
    compare.get_by_label('Right picture').select_option('telea')
    left, right = (compare.locator('canvas').nth(k) for k in (0, 1))
    for side, key in ((left, 'partial_conv'), (right, 'telea')):
        wanted = lab.result(key)
        assert eventually(lambda: np.array_equal(pixels(page, side), wanted)), f'{key} is not shown as it is'
    compare.get_by_label('Wipe').evaluate("e => { e.value = 70; e.dispatchEvent(new Event('input', {bubbles: true})) }")
    frame = compare.locator('.ip-wipe')
    shot = np.asarray(Image.open(io.BytesIO(frame.screenshot())).convert('RGB').resize(lab.mask().shape[::-1]), int)
    hole = lab.mask()
    off = lambda key, part: np.abs(shot[part] - lab.result(key)[part])[hole[part]].mean()      # where the two differ at all
    a, b = np.s_[:, :280], np.s_[:, 350:]
    assert hole[a].any() and hole[b].any()
    assert off('partial_conv', a) < .6*off('telea', a) and off('telea', b) < .6*off('partial_conv', b)
    compare.screenshot(path=browser.SHOTS/'wipe.png')


def test_a_look_inside(lab):
    "Edges, gates, the closing mask, flow: a button under each result"
    for key, word in (('edge_connect', 'edges'), ('deepfill_v2:sketch', 'gate'), ('partial_conv', 'mask after'), ('structure_flow', 'flow')):
        card = lab.painter.card(key)
        before, image = pixels(lab.page, card.locator('img')), card.locator('img')
        views = lab.kernel.value(f'next(list(c["views"]) for c in painter.cards if c["key"] == {key!r})')
        button = card.locator(f'button[data-view="{next(v for v in views if word in v)}"]')
        button.click()
        assert eventually(lambda: not np.array_equal(pixels(lab.page, image), before)), f'{key}: {word} is not shown'
        assert button.get_attribute('aria-pressed') == 'true' and card.get_attribute('aria-busy') == 'false'
        card.locator('button[data-view="result"]').click()
        assert eventually(lambda: np.array_equal(pixels(lab.page, image), before))


def test_the_focus_stays_where_the_keyboard_was(lab):
    p, page = lab.painter, lab.page
    focus = lambda: page.evaluate("document.activeElement.getAttribute('aria-label')")
    lab.choose('telea')
    runs = lab.kernel.value('len(_starts)')
    p.button('Fill').focus(); page.keyboard.press('Enter')
    assert eventually(lambda: lab.kernel.value('len(_starts)') > runs)
    p.until(state='ready')
    assert eventually(lambda: focus() == 'Fill', 3), focus()
    n = lab.kernel.value('painter.position')
    p.button('Undo').focus(); page.keyboard.press('Enter'); p.until(position=n - 1); assert focus() == 'Undo'
    p.button('Redo').focus(); page.keyboard.press('Enter'); p.until(position=n); assert focus() == 'Redo'
    p.heard()


def test_light_and_dark(lab):
    "Text stands out from its background in both themes (contrast 4.5, as WCAG wants it)"
    code = """r => ['.ip-title', '.ip-line', '.ip-paper', '.ip-name', '.ip-seconds', '.ip-heading', '.ip-chip'].map(q => {
        const e = r.querySelector(q); let b = e, c;
        do { c = getComputedStyle(b).backgroundColor; b = b.parentElement } while (/, [\\d.]+, [\\d.]+, 0|transparent|\\/ 0/.test(c));
        return [q, getComputedStyle(e).color, c] })"""
    grounds = []
    for theme in ('light', 'dark'):
        lab.lab.dark(theme == 'dark')
        lab.page.wait_for_function("!document.querySelector('#jupyterlab-splash')")
        lab.painter.root.evaluate("r => r.scrollIntoView({block: 'start'})")
        keep(lab.page, theme)
        for name, text, ground in lab.painter.root.evaluate(code):
            a, b = sorted((luminance(text), luminance(ground)))
            assert (b + .05)/(a + .05) >= 4.5, f'{theme}: {name} {text} on {ground}'
        grounds.append(luminance(ground))
    lab.lab.dark(False)
    lab.page.wait_for_function("!document.querySelector('#jupyterlab-splash')")
    assert grounds[0] > .8 and grounds[1] < .1


def luminance(css):
    "Relative luminance of 'rgb(r, g, b)' or 'rgba(...)' (WCAG)"
    rgb = [float(v) for v in re.findall(r'[\d.]+', css)[:3]]
    if 'srgb' not in css: rgb = [v/255 for v in rgb]
    return sum(w*(v/12.92 if v <= .04045 else ((v + .055)/1.055)**2.4) for w, v in zip((.2126, .7152, .0722), rgb))


def test_another_mask_marks_what_was_made_before(lab):
    p = lab.painter
    p.tool('Rectangle').stroke([(20, 20), (60, 60)]); lab.agree(slow=False)
    p.card('telea').locator('.ip-stale').wait_for()
    p.press('Undo'); lab.agree(slow=False)
    p.card('telea').locator('.ip-stale').wait_for(state='hidden')


def test_an_empty_mask_and_missing_weights_say_so(lab):
    p = lab.painter
    lab.clear(); lab.choose('telea'); p.press('Fill')
    p.root.get_by_role('alert').wait_for()
    assert 'mask' in p.root.get_by_role('alert').inner_text()
    p.button('Dismiss').click()
    p.press('Undo'); p.heard()
    lab.kernel.run('import inpaint_lib.inference as _inf, pathlib, tempfile\n_checkout = _inf.checkout\n_inf.checkout = lambda: pathlib.Path(tempfile.mkdtemp())')
    lab.fill('deepfill_v1')
    assert 'inpaint train deepfill_v1' in p.card('deepfill_v1').locator('.ip-error').inner_text()
    lab.kernel.run('_inf.checkout = _checkout')


def test_a_long_run_can_be_cancelled(lab):
    p = lab.painter
    lab.kernel.run('import time as _t, inpaint_lib.papers.context_encoder as _ce\n'
                   'def _slow(*args, **kw):\n    end = _t.time() + 60\n    while _t.time() < end: sum(range(1000))\n'
                   '_plain, _ce.fill = _ce.fill, _slow')
    lab.choose('context_encoder'); p.press('Fill'); p.until(state='running')
    p.tool('Brush', 10).stroke([(20, 250), (80, 260)]); p.heard()      # the worker runs, painting goes on
    p.button('Cancel').click(); p.until(state='ready')
    assert 'context_encoder' not in lab.kernel.value('[c["key"] for c in painter.cards if not c["error"]]')
    lab.kernel.run('_ce.fill = _plain')
    p.press('Undo'); p.heard()
    assert lab.fill('telea') == ['telea']


# ---------------------------------------------------------------- files, fingers, other views, other days
def test_save_mask_and_result(lab, tmp_path):
    p = lab.painter
    with lab.page.expect_download() as d: p.press('Save mask')
    d.value.save_as(tmp_path/'mask.png')
    assert np.array_equal(np.asarray(Image.open(tmp_path/'mask.png').convert('L')) >= 128, lab.mask())
    p.card('telea').locator('.ip-look').click()
    with lab.page.expect_download() as d: p.press('Save result')
    d.value.save_as(tmp_path/'result.png')
    saved = np.asarray(Image.open(tmp_path/'result.png'))
    assert np.array_equal(saved, lab.result('telea'))


def test_upload_a_mask_and_a_picture(lab, tmp_path):
    p = lab.painter
    h, w = lab.mask().shape
    holes = np.zeros((h, w), np.uint8); holes[40:90, 100:220] = 255; holes[::37, ::41] = 255
    Image.fromarray(holes).save(tmp_path/'holes.png')
    with lab.page.expect_file_chooser() as f: p.press('Open mask')
    f.value.set_files(tmp_path/'holes.png')
    p.until(hole=int((holes > 0).sum())); p.heard()
    assert np.array_equal(lab.mask(), holes > 0) and np.array_equal(p.layer('mask', (h, w)) > 0, holes > 0)
    colours = np.ascontiguousarray(lab.kernel.array('painter._image')[60:220, 400:160:-1])
    Image.fromarray(colours).save(tmp_path/'turned.png')
    with lab.page.expect_file_chooser() as f: p.press('Open picture')
    f.value.set_files(tmp_path/'turned.png')
    lab.page.wait_for_function("r => /240 . 160/.test(r.querySelector('.ip-heading').textContent)", arg=p.root.element_handle())
    p.until(hole=0)
    assert lab.mask().shape == (160, 240) and not lab.kernel.value('[c["key"] for c in painter.cards]')
    p.tool('Rectangle').stroke([(50, 40), (120, 100)]); lab.agree()
    assert lab.fill('telea') == ['telea'] and np.array_equal(lab.result('telea')[~lab.mask()], colours[~lab.mask()])
    bad = tmp_path/'bad.png'; bad.write_bytes(b'not a picture')
    with lab.page.expect_file_chooser() as f: p.press('Open picture')
    f.value.set_files(bad)
    p.root.get_by_role('alert').wait_for()
    assert 'bad.png' in p.root.get_by_role('alert').inner_text() and lab.mask().shape == (160, 240)
    p.button('Dismiss').click()


def test_a_random_hole_of_a_wanted_ratio(lab):
    p = lab.painter
    for kind in ('free_form', 'block'):
        p.root.get_by_label('Kind of hole').select_option(kind)
        p.root.get_by_label('Hole ratio').fill('30')
        n = lab.kernel.value('painter.position')
        p.press('Random hole'); p.until(position=n + 1); p.heard()
        mask = lab.mask()
        assert abs(mask.mean() - .3) < .006, mask.mean()
        assert np.array_equal(p.layer('mask', mask.shape) > 0, mask)


def test_zoom_pan_and_still_to_the_pixel(lab):
    p = lab.painter; lab.clear()
    for _ in range(4): p.press('Zoom in')
    p.tool('Pan').stroke([(120, 80), (110, 70)])
    p.tool('Brush', 6).stroke([(115, 75), (130, 90.5), (122, 70)]); p.heard()
    points = lab.strokes()[-1]['points']
    assert np.allclose(points[0], (115, 75), atol=.5)
    lab.agree(); p.press('Fit')


def test_fingers_paint_and_pinch(lab):
    p, cdp = lab.painter, lab.page.context.new_cdp_session(lab.page)
    cdp.send('Emulation.setTouchEmulationEnabled', dict(enabled=True, maxTouchPoints=2))
    p.canvas.scroll_into_view_if_needed()

    def touch(kind, *points):
        cdp.send('Input.dispatchTouchEvent', dict(type=kind, touchPoints=[dict(x=x, y=y, id=i) for i, (x, y) in enumerate(points)]))
    p.tool('Brush', 8)
    n = lab.kernel.value('painter.position')
    touch('touchStart', p.at(40, 40))
    for k in range(1, 6): touch('touchMove', p.at(40 + 10*k, 40 + 4*k))
    touch('touchEnd')
    p.until(position=n + 1); mask = lab.agree()
    assert mask[50, 65] and lab.strokes()[-1]['tool'] == 'brush'
    scale = float(p.canvas.get_attribute('data-view').split()[0])
    touch('touchStart', p.at(100, 80)); touch('touchStart', p.at(100, 80), p.at(120, 80))
    ends = [p.at(100, 80), p.at(120, 80)]
    for k in range(1, 5): touch('touchMove', (ends[0][0] - 15*k, ends[0][1]), (ends[1][0] + 15*k, ends[1][1]))
    touch('touchEnd')
    assert float(p.canvas.get_attribute('data-view').split()[0]) > scale*1.2
    assert lab.kernel.value('painter.position') == n + 1 and np.array_equal(lab.agree(), mask)
    p.press('Fit')
    cdp.send('Emulation.setTouchEmulationEnabled', dict(enabled=False)); cdp.detach()


def test_two_views_show_one_painter(lab):
    lab.kernel.run('again = True')
    lab.lab.run_cell(3)
    other = Painter(lab.page, 1).wait()
    first = lab.painter
    assert other.data('hole') == first.data('hole')
    other.tool('Rectangle').stroke([(20, 100), (60, 130)]); other.heard()
    assert first.heard() == other.heard() and np.array_equal(first.layer('mask', (160, 240)), other.layer('mask', (160, 240)))
    first.press('Undo'); first.heard(); other.heard()
    assert np.array_equal(other.layer('mask', (160, 240)) > 0, lab.mask())
    lab.kernel.run('again = False'); lab.lab.run_cell(3)
    lab.page.locator('.ip-painter').nth(1).wait_for(state='detached')


def test_every_control_has_a_name(lab):
    unnamed = lab.painter.root.evaluate("""r => [...r.querySelectorAll('button, input, select, canvas, textarea, [role]')]
        .filter(e => e.checkVisibility() && !e.closest('.ip-wipe'))
        .filter(e => !(e.getAttribute('aria-label') || e.textContent.trim() || e.closest('label')?.textContent.trim() || e.title))
        .map(e => e.outerHTML)""")
    assert unnamed == []
    for name in ('Brush', 'Eraser', 'Line', 'Rectangle', 'Lasso', 'Pan', 'Undo', 'Redo', 'Clear', 'Invert', 'Zoom in', 'Zoom out', 'Fit',
                 'Open picture', 'Open mask', 'Random hole', 'Save mask', 'Save result', 'Fill', 'All', 'None'):
        assert lab.painter.button(name).count() == 1, name
    assert lab.painter.canvas.get_attribute('aria-label') == 'Painting area' and lab.painter.canvas.get_attribute('tabindex') == '0'


def test_a_reload_of_the_page_brings_everything_back(lab):
    p = lab.painter
    before, keys, hole = lab.mask(), lab.kernel.value('[c["key"] for c in painter.cards]'), p.data('hole')
    lab.lab.command('docmanager:save')
    lab.page.reload()
    p.wait(); p.until(hole=hole, state='ready')
    assert np.array_equal(p.layer('mask', before.shape) > 0, before) and keys
    for key in keys: p.card(key).wait_for()
    lab.lab.idle()
    p.press('Undo'); p.press('Redo')
    p.tool('Brush', 9).stroke([(200, 20), (220, 60)])
    assert lab.agree().sum() > before.sum()
    assert not lab.complaints, lab.complaints


# ---------------------------------------------------------------- the page for people who never open a cell
@pytest.fixture(scope='module')
def app(chrome, tmp_path_factory):
    folder, s = tmp_path_factory.mktemp('app'), Session()
    (folder/'app.ipynb').write_bytes((browser.ROOT/'nbs'/'35_app.ipynb').read_bytes())
    with Server('voila', folder, 'app.ipynb') as s.server:
        s.page = chrome.new_page(viewport=dict(width=1300, height=1200), accept_downloads=True)
        s.complaints, s.painter = complaints(s.page), Painter(s.page)
        s.page.goto(s.server.address())
        s.painter.wait().until(state='ready')
        s.kernel = s.server.kernel()
        s.kernel.run('import gc, inpaint_lib.demo as _d\npainter = next(o for o in gc.get_objects() if isinstance(o, _d.MaskPainter))')
        yield s
        s.kernel.close()


def test_the_app_wants_its_token(app):
    status, address = fetch(app.server.address(token=False))
    assert '/login' in address or status in (401, 403)


def test_the_app_on_a_narrow_screen(app):
    p, page = app.painter, app.page
    page.set_viewport_size(dict(width=420, height=900))
    outside = """r => { const b = r.getBoundingClientRect(); return [...r.querySelectorAll('button, input, select, canvas')]
        .filter(e => e.checkVisibility()).map(e => [e, e.getBoundingClientRect()])
        .filter(([e, c]) => c.width && (c.left < b.left - 1 || c.right > b.right + 1)).map(([e]) => e.outerHTML.slice(0, 90)) }"""
    assert eventually(lambda: p.canvas.bounding_box()['width'] < 420) and p.root.bounding_box()['width'] <= 420
    assert p.root.evaluate(outside) == []
    p.stroke([(30, 30), (200, 150)]); mask = app.agree(); assert mask[90, 115]
    keep(page, 'narrow')
    p.press('Undo'); p.heard()
    page.set_viewport_size(dict(width=1300, height=1200))
    assert eventually(lambda: p.canvas.bounding_box()['width'] > 420)


def test_the_app_paints_fills_and_saves(app, tmp_path):
    p = app.painter
    assert app.page.locator('.jp-InputArea-editor').count() == 0, 'code is shown'
    p.tool('Brush', 24).stroke([(150, 120), (230, 150), (300, 130)])
    mask = app.agree(); assert mask.any()
    p.press('Fill'); p.until(state='running'); p.until(state='ready')
    keys = app.kernel.value('[c["key"] for c in painter.cards]')
    assert keys == ['edge_connect', 'telea'] and not app.kernel.value('[c["error"] for c in painter.cards if c["error"]]')
    with app.page.expect_download() as d: p.press('Save result')
    d.value.save_as(tmp_path/'result.png')
    saved = np.asarray(Image.open(tmp_path/'result.png'))
    assert any(np.array_equal(saved, app.result(k)) for k in keys) and not app.complaints, app.complaints


def test_a_kernel_that_is_gone_is_told_and_the_drawing_stays(app):
    p = app.painter
    p.root.evaluate("r => { r.dataset.patience = 1500 }")
    os.kill(app.kernel.value('__import__("os").getpid()'), signal.SIGKILL)      # the server starts another: it knows nothing of this page
    p.tool('Brush', 20).stroke([(60, 60), (120, 90)])
    assert p.number('hole') > 0
    p.root.get_by_text('no answer from the kernel').wait_for(timeout=20000)
