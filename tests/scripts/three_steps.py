"""Three updates in float64 of each recipe given as NAME OUT PHOTOS, in one process or under torchrun.

Process 0 writes terms and weights to the file OUT. Batch norm keeps its first statistics: each process would have its own.
"""
import os
import sys

import torch
from accelerate.state import PartialState

from inpaint_lib import recipes, training
from inpaint_lib.data import images, masks

torch.set_num_threads(1)


class Double(images.PhotoDataset):
    "Photographs in float64"
    def __getitem__(self, key):
        item = super().__getitem__(key)
        return item if isinstance(item, images.Skipped) else {k: v.double() if torch.is_tensor(v) else v for k, v in item.items()}


def three_steps(name, out, photos):
    config = dict(width=.1) | (dict(vgg_weights='none') if recipes.RECIPES[name].vgg else {}) | (dict(joint_from=1) if 'structural' in name else {})
    recipe, run, data = recipes.build(name, 'tiny', config=config, run=dict(steps=3, batch_size=4, device='cpu', ema=.5, save_every=3))
    size = 32 if 'edge_connect' in name else data.size
    dataset = Double(images.open_source(photos), size, masks.mask_sampler(data.masks, **data.mask_options))
    for m in recipe.modules():
        if isinstance(m, torch.nn.BatchNorm2d): m.train = lambda mode=True, m=m: torch.nn.Module.train(m, False)
    up = training.Updater(recipe.double(), run)
    stream = training._batches(up, dataset)
    terms = [up.update(next(stream)) for _ in range(3)]
    if up.engine.is_main_process:
        torch.save(dict(world=up.engine.num_processes, terms=terms, weights=recipe.state_dict(), ema=up.ema), out)
    up.engine.wait_for_everyone()


for n in range(1, len(sys.argv), 3): three_steps(*sys.argv[n:n + 3])
PartialState().destroy_process_group()
os._exit(0)   # gloo's threads now and then abort while the interpreter is taken down ('terminate called without ...')
