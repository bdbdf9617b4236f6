"""Write a model card (README.md) from the records of a run folder alone."""

from typing import Any

from mae_et.checkpoints.weights import Weights
from mae_et.config.schema import PretrainConfig
from mae_et.io.plain_files import read_mapping
from mae_et.runtime.console import printable

CARD = """\
---
library_name: transformers
pipeline_tag: {task}
license: unknown
---

# {name}

`{architecture}`: ViT of width {hidden_size}, depth {num_hidden_layers},
{num_attention_heads} heads, patch {patch_size}, images of {image_size} pixels.

## Data and recipe

{recipe}

## Compute and figures

{figures}

## Use

```python
from transformers import AutoImageProcessor, {architecture}

processor = AutoImageProcessor.from_pretrained("PATH")
model = {architecture}.from_pretrained("PATH"{options})
```

## Licence

Not recorded. Weights follow the licence of the weights that they started from and the terms of
their data: write it here and in the header.
"""
RECIPE = """\
Masked autoencoder (He et al., arXiv 2111.06377) pre-trained under the frequency curriculum of
EfficientTrain++ (Wang et al., arXiv 2405.08768).

- starting weights: {start}
- data: {data}, mean {mean}, std {std}
- target: {model.target}; mask ratio {model.mask_ratio:g}; decoder of depth {model.decoder_depth}
- curriculum: {curriculum.preset}, {curriculum.epochs:g} epochs; crop {crop.method}
- AdamW: batch {optim.batch_size}, learning rate {optim.lr:g}, weight decay {optim.weight_decay:g};
  seed {seed}"""
NOT_RECORDED = "Not recorded in the checkpoint."


def model_card(weights: Weights, about: dict[str, Any]) -> str:
    """Return the text of a card, from a checkpoint and the exported `config.json`."""
    architecture = about["architectures"][0]
    classifies = architecture == "ViTForImageClassification"
    return CARD.format(
        **about,
        name=printable(weights.path.name),
        architecture=architecture,
        task="image-classification" if classifies else "image-feature-extraction",
        options=", add_pooling_layer=False" if architecture == "ViTModel" else "",
        recipe=_recipe(weights.config),
        figures=_figures(weights),
    )


def _recipe(config: PretrainConfig | None) -> str:
    if config is None:
        return NOT_RECORDED
    data, start = config.data, config.init.weights
    described = {
        "start": printable(start.name) if start else "random",
        "data": printable(data.root.name if data.root else data.source),
        "mean": list(data.mean),
        "std": list(data.std),
    }
    return RECIPE.format(**vars(config) | described)


def _figures(weights: Weights) -> str:
    path = weights.path / "results.json"
    figures = read_mapping(path) if path.is_file() else {}
    lines = [
        f"- {name}: {f'{value:.5g}' if isinstance(value, float) else value}"
        for name, value in figures.items()
        if isinstance(value, int | float | str)
    ]
    return "\n".join(lines) or NOT_RECORDED
