"""A plan of notebooks under a limit of time: killed, cut off, gone on with, one step failing; real trainings, real processes."""
import json
import time

import pytest
import torch

from inpaint_lib.training import in_use


def waited_for(what, seconds=60):
    "Is it so within that time?"
    until = time.monotonic() + seconds
    while not what() and time.monotonic() < until: time.sleep(.1)
    return what()


ENDLESS = '40_train recipe=context_encoder preset=smoke folder=ce steps=100000 save_every=2'
PACED = '; context_encoder preset=smoke folder=paced minutes=0.02'


@pytest.fixture(scope='module')
def called(papermill, begin_papermill, tmp_path_factory):
    "The same plan in four calls: killed and cut off within its first training; to its end, with a step that fails; once more"
    out = tmp_path_factory.mktemp('campaign')
    common = dict(out_dir=out/'steps', device='cpu', evaluations='built-in per_bin=1 size=128')
    begun = begin_papermill('47_campaign', out/'killed.ipynb', out/'killed.err', out, plan=ENDLESS, **common)
    assert waited_for((out/'steps'/'ce'/'checkpoint.pt').exists)
    code, err, _ = papermill('47_campaign', out, plan=ENDLESS, **common)
    assert code != 0 and 'another process is training in this folder' in err
    begun.kill(); begun.join()
    assert waited_for(lambda: not in_use(out/'steps'/'ce'), 10)           # neither kernel outlives it
    def call(plan, **more):
        code, err, _ = papermill('47_campaign', out, plan=plan, **common, **more)
        steps = json.loads((out/'steps'/'campaign.json').read_text())['steps']
        return code, err.strip().splitlines()[-1] if err.strip() else '', steps
    first = call(ENDLESS + PACED, minutes=.28)
    reached = torch.load(out/'steps'/'ce'/'checkpoint.pt', weights_only=True)['step']
    plan, fails = ENDLESS.replace('100000', str(reached + 3)) + PACED, '; 40_train recipe=edge_connect.joint preset=smoke folder=joint'
    second = call(plan + fails)
    (out/'steps'/'paced'/'on-built-in'/'step.json').write_text('{"state": "do')                                # damaged: executed again
    return out/'steps', reached, first, second, call(plan.replace('0.02', '0.08'))


def test_a_step_that_is_cut_off_goes_on_at_the_next_call(called):
    out, reached, first, second, _ = called
    assert first[0] == 0 and {k: s['state'] for k, s in first[2].items()} == {'ce': 'cut off', 'paced/train': 'waiting', 'paced/on-built-in': 'waiting'}
    done = second[2]['ce']
    assert done['state'] == 'done' and done['steps'] == reached + 3
    assert len(json.loads((out/'ce'/'started.json').read_text())['starts']) == 3
    assert [json.loads(line)['step'] for line in (out/'ce'/'log.jsonl').read_text().splitlines()] == list(range(1, reached + 4))


def test_a_step_that_fails_is_told_and_stops_no_other(called):
    out, _, _, (code, line, steps), _ = called
    assert code != 0 and "1 of 4 steps failed; joint: " in line and "needs the network 'edge'" in line
    assert steps['joint']['state'].startswith('failed') and steps['paced/on-built-in']['state'] == 'done'
    evaluation = steps['paced/on-built-in']
    assert evaluation['l1_hole']['n'] == 6 and len(evaluation['protocol']) == 12 and str(out) not in (out/'campaign.json').read_text()


def test_minutes_become_steps_by_the_measured_pace(called):
    out, steps = called[0], called[3][2]
    seconds = json.loads((out/'paced'/'train'/'pace.json').read_text())['seconds']
    assert steps['paced/train']['steps'] == max(20, round(1.2/seconds)) and called[4][2]['paced/train']['steps'] == max(20, round(4.8/seconds)) > 20


def test_what_is_done_is_not_done_again_but_what_changed_is(called):
    "More minutes are more steps, and what they trained is measured anew; the rest stays"
    _, _, _, second, (code, _, third) = called
    assert code == 0 and third['ce'] == second[2]['ce'] and third['paced/train']['steps'] > second[2]['paced/train']['steps']
    before, after = (s['paced/on-built-in'] for s in (second[2], third))
    assert after['l1_hole'] != before['l1_hole'] and after['protocol'] == before['protocol'] and after['calls'] == 1
