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
    "A weights file of recipe `name`, untrained, as training would write it; networks of earlier stages lie beside it"
    stage = recipes.RECIPES[name]
    config = dict(width=1/16) | (dict(vgg_weights='none') if stage.vgg else {})
    if 'bottleneck' in {f.name for f in dataclasses.fields(stage.config)}: config['bottleneck'] = 8
    given = {n: save_untrained(path.with_name(f'{path.stem}_{n}.safetensors'), f"{name.split('.')[0]}.{n}") for n in stage.needs}
    recipe, *_ = recipes.build(name, 'tiny', config=config, checkpoints=given)
    recipe.eval()
    save_weights(path, {k: g.state_dict() for k, g in recipe.generators().items()},
                 dict(method=recipe.method, recipe=name, config=dataclasses.asdict(recipe.config)))
    return path
