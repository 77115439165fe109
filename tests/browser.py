"""A JupyterLab or a Voila of our own, Chromium in front of it, a living kernel behind it: what the browser tests stand on.

Everything the servers write goes to a temporary folder outside the checkout; screenshots go to runs/browser/.
"""
import ast
import base64
import ctypes
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
SHOTS = ROOT/'runs'/'browser'
PROGRAM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
HOW = 'apt-get install chromium (Debian; `.ci/run` does it), then make test'


def missing():
    "Why the browser tests cannot run here, with what to do about it; '' if they can"
    if PROGRAM is None: return f'no Chromium on this machine: {HOW}'
    try: import playwright.sync_api  # noqa: F401
    except ImportError: return 'no playwright in this environment: make setup'
    return ''


# ---------------------------------------------------------------- servers
def free_port():
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); return s.getsockname()[1]


def _die_with_parent():
    "In the child, before it becomes the server: a killed test session leaves no server behind (Linux)"
    if sys.platform == 'linux': ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def fetch(url, timeout=5):
    "(status, final address) of a GET; 0 where nobody answers"
    try:
        with urllib.request.urlopen(url, timeout=timeout) as r: return r.status, r.url
    except urllib.error.HTTPError as e: return e.code, url
    except OSError: return 0, url


class Server:
    "JupyterLab over `folder`, or Voila on one notebook of it: own port, token, configuration and runtime folder"
    def __init__(self, kind, folder, notebook=None):
        self.kind, self.folder, self.home = kind, Path(folder), Path(tempfile.mkdtemp(prefix=f'{kind}-'))
        self.port, self.token, self.notebook = free_port(), secrets.token_hex(16), notebook
        self.log = open(self.home/'log.txt', 'w+')

    def environment(self):
        own = {f'JUPYTER_{k}_DIR': str(self.home/k.lower()) for k in ('CONFIG', 'DATA', 'RUNTIME')}
        return dict(os.environ, **own, IPYTHONDIR=str(self.home/'ipython'), OMP_WAIT_POLICY='passive', PYTHONUNBUFFERED='1',
                    JUPYTERLAB_SETTINGS_DIR=str(self.home/'settings'), JUPYTERLAB_WORKSPACES_DIR=str(self.home/'workspaces'),
                    PATH=f'{Path(sys.executable).parent}:{os.environ["PATH"]}', MPLBACKEND='module://matplotlib_inline.backend_inline')

    def command(self):
        if self.kind == 'voila':
            return ['-m', 'voila', self.notebook, '--no-browser', f'--port={self.port}', '--Voila.ip=127.0.0.1',
                    f'--token={self.token}', f'--Voila.connection_dir_root={self.home}']
        return ['-m', 'jupyter', 'lab', '--no-browser', '--allow-root', f'--ServerApp.port={self.port}', '--ServerApp.ip=127.0.0.1',
                '--ServerApp.port_retries=0', f'--IdentityProvider.token={self.token}', f'--ServerApp.root_dir={self.folder}',
                '--LabApp.expose_app_in_browser=True', '--LabApp.extension_manager=readonly',
                '--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate']

    def start(self):
        quiet = self.home/'settings'/'@jupyterlab'/'apputils-extension'; quiet.mkdir(parents=True)
        (quiet/'notification.jupyterlab-settings').write_text('{"fetchNews": "false", "checkForUpdates": false}')
        self.process = subprocess.Popen([sys.executable, *map(str, self.command())], cwd=self.folder, env=self.environment(),
                                        stdout=self.log, stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=_die_with_parent)
        ready = 'voila/static/voila.js' if self.kind == 'voila' else 'api'
        end = time.time() + 60
        while not fetch(f'{self.address(ready)}')[0]:
            if self.process.poll() is not None or time.time() > end: raise RuntimeError(f'{self.kind} did not start:\n{self.said()}')
            time.sleep(.1)
        return self

    def address(self, path='', token=True):
        return f'http://127.0.0.1:{self.port}/{path}' + (f'?token={self.token}' if token else '')

    def said(self): self.log.flush(); return (self.home/'log.txt').read_text()[-3000:]

    def stop(self):
        "The server ends its kernels itself; whoever is left after that (kernels have their own process groups) is killed"
        import psutil
        family = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)] if self.process.poll() is None else []
        if family: os.killpg(self.process.pid, signal.SIGTERM)
        _, alive = psutil.wait_procs(family, timeout=8)
        for p in alive:
            try: p.kill()
            except psutil.NoSuchProcess: continue
        self.process.wait(10); self.log.close()
        shutil.rmtree(self.home, ignore_errors=True)

    def kernel(self):
        "A client of the youngest kernel of this server"
        files = sorted(self.home.rglob('kernel-*.json'), key=lambda p: p.stat().st_mtime)
        return Kernel(files[-1])

    __enter__ = start
    def __exit__(self, *exception): self.stop()


class Kernel:
    "Reads and runs in the page's own kernel, past the page (the variables a reader's next cell would see)"
    def __init__(self, connection_file):
        from jupyter_client import BlockingKernelClient
        self.client = BlockingKernelClient(connection_file=str(connection_file))
        self.client.load_connection_file(); self.client.start_channels(); self.client.wait_for_ready(timeout=60)

    def _ask(self, code, expressions, timeout):
        number = self.client.execute(code, store_history=False, user_expressions=expressions)
        end = time.time() + timeout
        while True:   # answers to earlier calls that nobody waited for are passed over
            reply = self.client.get_shell_msg(timeout=max(.1, end - time.time()))
            if reply['parent_header'].get('msg_id') == number: break
        if reply['content']['status'] != 'ok': raise RuntimeError('\n'.join(reply['content'].get('traceback', ['?'])))
        return reply['content'].get('user_expressions', {})

    def run(self, code, timeout=60): self._ask(code, {}, timeout)
    def start(self, code): self.client.execute(code, store_history=False)

    def value(self, expression, timeout=60):
        "A variable that Python can write as a literal"
        found = self._ask('', {'v': f'({expression})'}, timeout)['v']
        if found['status'] != 'ok': raise RuntimeError(f'{expression}: {found["ename"]}: {found["evalue"]}')
        return ast.literal_eval(found['data']['text/plain'])

    def array(self, expression, timeout=60):
        with tempfile.TemporaryDirectory() as d:
            self.run(f'import numpy as _np; _np.save({d + "/a.npy"!r}, _np.asarray({expression}))', timeout)
            return np.load(f'{d}/a.npy')

    def close(self): self.client.stop_channels()


# ---------------------------------------------------------------- the browser
@contextmanager
def chromium():
    "Debian's Chromium under Playwright, headless"
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=PROGRAM, headless=True,
                                    args=['--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage', '--force-color-profile=srgb'])
        try: yield browser
        finally: browser.close()


def keep(page, name, clip=None):
    "A screenshot among the artifacts"
    SHOTS.mkdir(parents=True, exist_ok=True)
    (clip or page).screenshot(path=SHOTS/f'{name}.png')


def complaints(page):
    "Collects what the page itself reports as an error"
    found = []
    page.on('pageerror', lambda e: found.append(str(e)))
    return found


def write_notebook(path, *cells):
    "A notebook of code cells, as a person would have typed them"
    import nbformat
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    nb.metadata.kernelspec = dict(display_name='python3', language='python', name='python3')
    nbformat.write(nb, path)


class Lab:
    "A notebook open in JupyterLab"
    def __init__(self, page, server): self.page, self.server = page, server

    def open(self, name, timeout=60):
        self.page.goto(self.server.address(f'lab/tree/{name}'))
        self.page.locator('.jp-Notebook .jp-CodeCell').first.wait_for(timeout=timeout*1000)
        self.idle(timeout)
        return self

    def idle(self, timeout=60):
        "Waits until the notebook's own session has a kernel and that kernel waits for work"
        self.page.wait_for_function("window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'",
                                    timeout=timeout*1000)

    def run_all(self):
        self.page.get_by_role('menuitem', name='Run', exact=True).click()
        self.page.get_by_role('menuitem', name='Run All Cells', exact=True).click()

    def run_cell(self, number):
        "Shift+Enter in one cell, as a reader does"
        self.page.locator('.jp-Notebook .jp-CodeCell').nth(number).locator('.cm-content').click()
        self.page.keyboard.press('Control+Enter')

    def cells(self): return self.page.evaluate("jupyterapp.shell.currentWidget.content.model.cells.length")
    def command(self, name, **options): return self.page.evaluate('([n, o]) => jupyterapp.commands.execute(n, o).then(() => 0)', [name, options])

    def dark(self, on=True):
        self.command('apputils:change-theme', theme='JupyterLab Dark' if on else 'JupyterLab Light')
        self.page.wait_for_function(f"document.body.dataset.jpThemeLight === '{'false' if on else 'true'}'")


class Painter:
    "One painting widget on a page; points are image pixels, (x right, y down)"
    def __init__(self, page, number=0): self.page, self.root = page, page.locator('.ip-painter').nth(number)

    @property
    def canvas(self): return self.root.locator('canvas.ip-canvas')

    def wait(self, seconds=60): self.canvas.wait_for(timeout=seconds*1000); return self

    def data(self, name): return self.root.get_attribute(f'data-{name}')
    def number(self, name): return float(self.data(name) or 'nan')

    def until(self, seconds=30, **wanted):
        "Waits until data attributes have these values: until(position=3, state='ready')"
        found = lambda: {k: self.data(k.replace('_', '-')) for k in wanted}
        try:
            self.page.wait_for_function('([r, wanted]) => wanted.every(([k, v]) => r.getAttribute("data-" + k) === v)', timeout=seconds*1000,
                                        arg=[self.root.element_handle(), [[k.replace('_', '-'), str(v)] for k, v in wanted.items()]])
        except Exception as e: raise AssertionError(f'waited {seconds} s for {wanted}; found {found()}') from e
        return self

    def heard(self, seconds=20):
        "Waits until the kernel has answered the last change and both count the same hole"
        self.page.wait_for_function('''r => r.dataset.heardPosition === r.dataset.position && r.dataset.heard === r.dataset.hole''',
                                    arg=self.root.element_handle(), timeout=seconds*1000)
        return int(self.data('hole'))

    def button(self, name): return self.root.get_by_role('button', name=name, exact=True)
    def press(self, name): self.button(name).click()
    def radio(self, name): return self.root.get_by_role('radio', name=name, exact=True)
    def card(self, key): return self.root.locator(f'article.ip-card[data-key="{key}"]')

    def view(self):
        "(scale, x, y): page pixels per image pixel, and where the picture's corner is on the page now"
        box = self.canvas.bounding_box()
        scale, tx, ty = map(float, self.canvas.get_attribute('data-view').split())
        return scale, box['x'] + tx, box['y'] + ty

    def at(self, x, y):
        "Where an image point is on the page now"
        scale, left, top = self.view()
        return left + x*scale, top + y*scale

    def stroke(self, points, steps=6, between=None):
        "Presses at the first point, moves through the others, lets go"
        self.canvas.scroll_into_view_if_needed()
        mouse, (first, *rest) = self.page.mouse, [self.at(*p) for p in points]
        mouse.move(*first); mouse.down()
        for p in rest:
            mouse.move(*p, steps=steps)
            if between: between()
        mouse.up()

    def tool(self, name, width=None):
        self.press(name)
        if width: self.width(width)
        return self

    def width(self, value):
        "Sets the slider as a hand does: a value and its input event"
        self.root.get_by_label('Brush width', exact=True).evaluate(
            "(e, v) => { e.value = v; e.dispatchEvent(new Event('input', {bubbles: true})); e.dispatchEvent(new Event('change', {bubbles: true})) }", str(value))

    def layer(self, name, shape):
        "What the browser itself rasterised, an int8 array of this shape"
        code = """(r, n) => { const a = r.ipPainter.layer(n), bytes = new Uint8Array(a.buffer, a.byteOffset, a.byteLength), out = [];
            for (let k = 0; k < bytes.length; k += 4096) out.push(String.fromCharCode(...bytes.subarray(k, k + 4096)));
            return btoa(out.join('')) }"""
        return np.frombuffer(base64.b64decode(self.root.evaluate(code, name)), np.int8).reshape(shape)

    def choose(self, *names):
        "Ticks exactly these methods, by their titles"
        self.press('None')
        for n in names: self.root.get_by_role('checkbox', name=n, exact=True).check()


def eventually(true, seconds=10):
    "Asks until the answer is yes"
    end = time.time() + seconds
    while not true():
        if time.time() > end: return False
        time.sleep(.02)
    return True


LONG = 300, 80   # strokes in a history that somebody has worked on for a while, and points of each
LONG_HISTORY = f"""import numpy as _np
_rng = _np.random.default_rng(0)
_p = _rng.uniform(0, 200, ({LONG[0]}, 1, 2)) + _rng.integers(0, 400, ({LONG[0]}, {LONG[1]}, 2))/8
_p = (_np.round(_p*8)/8).tolist()
painter.strokes = [dict(layer='mask', tool='brush', erase=k > 0, width=4, points=q) for k, q in enumerate(_p)]"""


def long_trips(painter, kernel, n=15):
    "Round trips on a history of 300 strokes of 80 points"
    kernel.run(LONG_HISTORY)
    painter.until(position=LONG[0], seconds=60); painter.heard(60)
    return round_trips(painter, n)


def round_trips(painter, n):
    "Milliseconds from mouse-up to the kernel's answer, for n strokes of three widths"
    out = []
    for k in range(n):
        x, y = 30 + 60*(k % 7), 30 + 55*(k//7 % 4)
        painter.width((9, 16, 5)[k % 3])
        painter.stroke([(x, y), (x + 30, y + 11.3), (x + 12, y + 30)], steps=3)
        painter.heard(); out.append(painter.number('round-trip'))
    return out
