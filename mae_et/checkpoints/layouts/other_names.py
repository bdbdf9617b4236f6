"""Tables from the tensor names of other libraries' vision transformers to timm's.

A library is recognised by a name that only it uses. Prefixes before its names are kept.

Source: torchvision (`vision_transformer.py`), mmpretrain (`backbones/vision_transformer.py`,
`necks/mae_neck.py`), DINOv2 (`block_chunks`); names only.
"""

import re
from collections.abc import Iterable
from pathlib import Path

# Per library: a name that only it uses, and its names (patterns) with timm's, applied in order.
RENAMED: dict[str, dict[str, str]] = {
    r"\bconv_proj\.weight$": {
        r"\bclass_token$": "cls_token",
        r"\bconv_proj\.": "patch_embed.proj.",
        r"\bencoder\.pos_embedding$": "pos_embed",
        r"\bencoder\.ln\.": "norm.",
        r"\bencoder\.layers\.encoder_layer_(\d+)\.": r"blocks.\1.",
        r"\bself_attention\.in_proj_": "attn.qkv.",
        r"\bself_attention\.out_proj\.": "attn.proj.",
        r"\bln_([12])\.": r"norm\1.",
        r"\bmlp\.(0|linear_1)\.": "mlp.fc1.",
        r"\bmlp\.(3|linear_2)\.": "mlp.fc2.",
        r"\bheads\.head\.": "head.",
    },
    # The final norm is ln1, or, after pooling, ln2. Decoder and head move into the backbone, as in
    # MAE's files.
    r"\blayers\.0\.ln1\.weight$": {
        r"\bneck\.ln1\.": "backbone.decoder_norm.",
        r"\bneck\.(mask_token$|decoder_)": r"backbone.\1",
        r"\bhead\.fc\.": "backbone.head.",
        r"\bpatch_embed\.projection\.": "patch_embed.proj.",
        r"(?<=\d\.)ln([12])\.": r"norm\1.",
        r"(?<!\d\.)\bln1\.": "norm.",
        r"(?<!\d\.)\bln2\.": "fc_norm.",
        r"\blayers\.(\d+)\.(?=norm|attn|ffn)": r"blocks.\1.",
        r"\battn\.gamma1\.(weight|scale)$": "ls1.gamma",
        r"\bffn\.gamma2\.(weight|scale)$": "ls2.gamma",
        r"\bffn\.layers\.0\.0\.": "mlp.fc1.",
        r"\bffn\.layers\.1\.": "mlp.fc2.",
    },
    # Blocks in chunks, numbered through.
    r"(?<!\d\.)\bblocks\.0\.0\.norm1\.weight$": {r"\bblocks\.\d+\.(\d+)\.": r"blocks.\1."},
}

BY_NAME = "give its timm model with --architecture (finetune: --model.backbone)"
# A name that only one kind of network has: a description of it, and advice for the user.
NETWORKS = {
    r"\blora_[AB]\b": ("adapters", "merge them into their network, and save that"),
    r"\bpatch_embeddings\.projection\.": (
        "a network under transformers' names",
        "give the folder that save_pretrained wrote",
    ),
    r"\battn\.w_msa\.": (
        "OpenMMLab's Swin",
        "its patch merging orders channels otherwise than timm's, and it is not supported",
    ),
    r"\bpatch_embedding\.patch_embeddings\.": ("a network of MONAI", "it is not supported"),
    r"\bto_patch_embedding\.": ("a network of vit-pytorch", "it is not supported"),
    r"\brelative_position_bias_table$": ("a BEiT or a Swin", BY_NAME),
    r"\b(rope|rope_embed)\.|\bfreqs_(cos|sin)$": ("a ViT with rotary positions", BY_NAME),
    r"\bclass_embedding$": ("a CLIP", BY_NAME),
    r"\blayer1\.0\.conv1\.weight$|\bstages\.0\.": (
        "a hierarchical network",
        "finetune reads it with --model.backbone, and evaluate with --architecture",
    ),
}
# A file that identifies a sharded checkpoint folder, and how to merge the shards.
FOLDERS = {
    ".metadata": (
        "it is one of torch.distributed, which `python -m "
        "torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE` joins"
    ),
    "adapter_config.json": "it holds adapters: merge them into their network, and save that",
    "zero_to_fp32.py": "it is one of DeepSpeed, which its zero_to_fp32.py joins",
}


def renamed_to_timm(names: Iterable[str]) -> dict[str, str]:
    """Map each name of another library to timm's, and unknown names to themselves.

    A table that would merge two names does not apply: in timm's Twins, the block numbers restart in
    each stage.
    """
    names = list(names)
    for mark, table in RENAMED.items():
        if any(re.search(mark, name) for name in names):
            renamed = {name: _rename(name, table) for name in names}
            if len(set(renamed.values())) == len(renamed):
                return renamed
    return {name: name for name in names}


def recognise_network(names: Iterable[str]) -> tuple[str, str] | None:
    """Return a description of a network that is not a plain ViT, and advice; None if unknown."""
    names = list(names)
    for mark, network in NETWORKS.items():
        if any(re.search(mark, name) for name in names):
            return network
    return None


def describe_folder(folder: Path) -> str:
    """Return how to merge a checkpoint that is sharded over a folder; empty for other folders."""
    found = [advice for name, advice in FOLDERS.items() if (folder / name).is_file()]
    return f": {found[0]}" if found else ""


def _rename(name: str, table: dict[str, str]) -> str:
    for pattern, replacement in table.items():
        name = re.sub(pattern, replacement, name)
    return name
