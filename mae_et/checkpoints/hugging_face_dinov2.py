"""Names of transformers' Dinov2 models, with and without registers, as those of its ViT.

Source: the `dinov2` and `dinov2_with_registers` models of transformers.
"""

import re

MODEL_TYPES = ("dinov2", "dinov2_with_registers")
# Theirs and ViT's, which differ in the blocks alone.
RENAMES = (
    (r"^dinov2(_with_registers)?\.", "vit."),
    (r"(\.layer\.\d+)\.norm1\.", r"\1.layernorm_before."),
    (r"(\.layer\.\d+)\.norm2\.", r"\1.layernorm_after."),
    (r"(\.layer\.\d+)\.mlp\.fc1\.", r"\1.intermediate.dense."),
    (r"(\.layer\.\d+)\.mlp\.fc2\.", r"\1.output.dense."),
)
# What a ViT of ours may have and transformers' ViT has not, after our names: to read only.
EXTRA_NAMES = {
    "reg_token": "vit.embeddings.register_tokens",
    "blocks.#.ls1.gamma": "vit.encoder.layer.#.layer_scale1.lambda1",
    "blocks.#.ls2.gamma": "vit.encoder.layer.#.layer_scale2.lambda1",
}


def as_vit(name: str) -> str:
    """Return the name that a tensor of a Dinov2 would have in a ViT; others stay as they are."""
    for theirs, vit in RENAMES:
        name = re.sub(theirs, vit, name, count=1)
    return name
