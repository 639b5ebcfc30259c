"""What `compare.py` compares: models of about equal size for 8 x 8 tokens, with the settings that they are drawn with."""

from __future__ import annotations

from typing import Any

# a stride of 40 down from 960: at the last timestep, 999, the error of a short-trained network would be blown up 20,000 times
_HEAD_STEPS = "ddim25"
# in so short a run nobody overfits, and dropout only makes everybody slower to learn
_CAUSAL = {"dim": 72, "heads": 3, "mlp_hidden": 192, "token_dropout": 0.0, "residual_dropout": 0.0}
_PLAIN = {"attn_dropout": 0.0, "dropout": 0.0}


def _xar(**entity: Any) -> dict[str, Any]:
    return {
        "tokens": "continuous",
        "system": "xar",
        "config": {**_PLAIN, "dim": 64, "encoder_depth": 2, "decoder_depth": 2, "heads": 2, "sampling_steps": 20, **entity},
        "sampling": {"guidance_schedule": "linear-entity"},
    }


# name -> which tokenizer, system, constructor arguments, and sampling settings besides those of the data set's generator recipe
SYSTEMS: dict[str, dict[str, Any]] = {
    "llamagen": {
        "tokens": "discrete",
        "system": "llamagen",
        "config": {**_CAUSAL, "depth": 5, "mlp_dropout": 0.0},
        "sampling": {},
    },
    "nar": {
        "tokens": "discrete",
        "system": "nar",
        "config": {**_CAUSAL, "depth": 4, "mlp_dropout": 0.0},
        "sampling": {},
    },
    # its models know no unconditional row
    "nbp": {
        "tokens": "discrete",
        "system": "nbp",
        "config": {
            "dim": 72,
            "depth": 5,
            "heads": 3,
            "block_size": 8,
            "condition_vocabulary": 10,
            "max_positions": 80,
            "token_dropout": 0.0,
            "residual_dropout": 0.0,
        },
        "sampling": {"guidance_scale": 1.0},
    },
    # its temperature scales Gumbel noise
    "maskgit": {
        "tokens": "discrete",
        "system": "maskgit",
        "config": {"trunk": "uvit", "dim": 72, "depth": 4, "heads": 3, "mlp_hidden": 288, "dropout": 0.0},
        "sampling": {"temperature": 2.0, "guidance_scale": 2.0},
    },
    "mar": {
        "tokens": "continuous",
        "system": "mar",
        "config": {
            **{
                f"{stack}_{key}": value
                for stack in ("encoder", "decoder")
                for key, value in (("dim", 72), ("depth", 2), ("heads", 3))
            },
            "buffer_size": 4,
            "head_width": 72,
            "head_depth": 2,
            "head_steps": _HEAD_STEPS,
        },
        "sampling": {"guidance_schedule": "linear", "options": {"steps": 16}},
    },
    "himar": {
        "tokens": "continuous",
        "system": "himar",
        "config": {
            **_PLAIN,
            "pivots": [4, 4],
            "dim": 56,
            "encoder_depth": 2,
            "decoder_depth": 2,
            "heads": 2,
            "buffer_size": 4,
            "head_width": 48,
            "head_depth": 2,
            "head_steps": _HEAD_STEPS,
            "dense_head_width": 48,
            "dense_head_depth": 2,
            "dense_head_heads": 2,
            "dense_head_steps": _HEAD_STEPS,
        },
        "sampling": {"guidance_schedule": "linear", "options": {"steps": 4, "pivot_steps": 8}},
    },
    "xar-token": _xar(entity="token", sampling_steps=10),  # 64 entities
    "xar-cell": _xar(entity="cell", entity_size=[4, 4]),
    "xar-subsample": _xar(entity="subsample", entity_size=[2, 2]),
    "xar-scale": _xar(entity="scale"),
    "xar-image": _xar(entity="image"),
    "ecar": {
        "tokens": "continuous",
        "system": "ecar",
        "config": {
            "stages": 3,
            "dim": 72,
            "depth": 2,
            "heads": 3,
            "head_width": 56,
            "head_depth": 3,
            "head_heads": 2,
            "sampling_steps": 10,
        },
        "sampling": {},
    },
}
