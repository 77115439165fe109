"Weights files of untrained networks: for tests only, never shipped"
import dataclasses

import torch

from inpaint_lib import recipes
from inpaint_lib.papers.edge_connect import EdgeConnectConfig, EdgeGenerator, InpaintGenerator
from inpaint_lib.training import save_weights


def save_tiny(path, width=1/16, nets=('edge', 'inpaint'), **meta):
    "A weights file with untrained EdgeConnect networks"
    torch.manual_seed(0)
    made = dict(edge=EdgeGenerator(width=width), inpaint=InpaintGenerator(width=width))
    config = dataclasses.asdict(EdgeConnectConfig(width=width))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_weights(path, {n: made[n].state_dict() for n in nets}, dict(method='edge_connect', recipe='test', config=config) | meta)
    return path


def save_untrained(path, name):
    "A weights file of recipe `name` (one network), untrained, as training would write it"
    config = dict(width=1/16) | (dict(vgg_weights='none') if recipes.RECIPES[name].vgg else {})
    if 'bottleneck' in {f.name for f in dataclasses.fields(recipes.RECIPES[name].config)}: config['bottleneck'] = 8
    recipe, *_ = recipes.build(name, 'tiny', config=config)
    recipe.eval()
    save_weights(path, {k: g.state_dict() for k, g in recipe.generators().items()},
                 dict(method=recipe.method, recipe=name, config=dataclasses.asdict(recipe.config)))
    return path
