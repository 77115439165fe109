"""What `make notebooks` stores: no widget that only its own kernel could show."""
from pathlib import Path

import nbformat
import pytest

from execute_notebooks import WIDGET, without_widgets

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT/'nbs').glob('*.ipynb'))


def test_widgets_are_left_out_and_what_stands_beside_them_stays():
    v4, both = nbformat.v4, {WIDGET: dict(model_id='1'), 'image/jpeg': 'QUJD', 'text/plain': 'MaskPainter()'}
    outputs = [v4.new_output('display_data', both), v4.new_output('execute_result', {WIDGET: dict(model_id='2'), 'text/plain': 'x'}),
               v4.new_output('stream', text='hello')]
    nb = v4.new_notebook(cells=[v4.new_markdown_cell('text'), v4.new_code_cell('1', outputs=outputs)])
    nb.metadata.widgets = {'application/vnd.jupyter.widget-state+json': dict(state={}, version_major=2, version_minor=0)}
    without_widgets(nb)
    first, second, stream = nb.cells[1].outputs
    assert 'widgets' not in nb.metadata and stream.text == 'hello'
    assert first.data == {'image/jpeg': 'QUJD', 'text/plain': 'MaskPainter()'} and second.data == {'text/plain': 'x'}
    nbformat.validate(nb)


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.name)
def test_no_stored_notebook_holds_a_widget(path):
    nb = nbformat.read(path, as_version=4)
    assert 'widgets' not in nb.metadata
    assert not [o for c in nb.cells for o in c.get('outputs', []) if WIDGET in o.get('data', {})]
