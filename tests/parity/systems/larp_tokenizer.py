"""LARP's tokenizer: encoding, decoding, shorter clips. Recorded videos are in [0, 1], ours in [-1, 1]."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.parity.runner import Case, capture, checkpoint_file, component
from vargen.official.larp_tokenizer import load
from vargen.tokenizers.larp import LARPTokenizer

# default of the timm version that the cases were recorded with; released models were trained with 1e-5
NORM_EPS = 1e-6


def build(case: Case) -> LARPTokenizer:
    prior = next((v for k, v in case.config.items() if k.startswith("prior GPTCConfig")), {})
    names = {"depth": "n_layer", "heads": "n_head", "dim": "n_embd"}
    state = {k: v for k, v in case.state32().items() if not k.startswith("loss.")}
    with checkpoint_file(state) as path:
        sizes = {ours: prior[theirs] for ours, theirs in names.items() if theirs in prior}
        return load(path, case.config["LARPTokenizer"], sizes, NORM_EPS)


def unit(pixels: Tensor) -> Tensor:
    return (pixels + 1) / 2


@component("larp", "tokenizer")
@torch.no_grad()
def tokenizer(case: Case) -> dict[str, Tensor]:
    model = build(case)
    video, short = (2 * case.inputs[name] - 1 for name in ("video", "video_short"))
    layers = {"patch": "embed", "encoder": "encoder.blocks.0", "encoded": "from_code", "decoder": "decoder.blocks.0"}
    with capture(model, layers) as taken:
        z = model.latents(video)
        q = model.quantizer(z, sample=False)
        recon = model.pixels(q.quantized, video.shape[2])
        out = {
            "patch_embed": taken["patch"],
            "enc_after_block0": taken["encoder"],
            "encoded": taken["encoded"],
            "dec_after_block0": taken["decoder"],
        }
    ids, short_ids = model.encode(video), model.encode(short)
    return {
        **out,
        "projected_z": z,
        "unregularized_z": F.normalize(z, dim=-1),
        "emb": model.quantizer.codes,
        "indices": ids,
        "regularized_z": q.quantized,
        "loss_commit": q.losses["commitment"] / model.quantizer.commitment_weight,
        "loss_codebook": q.losses["codebook"] / model.quantizer.codebook_weight,
        "loss_q": q.losses["commitment"] + q.losses["codebook"],
        "recon": unit(recon),
        "recon_from_indices": unit(model.decode(ids, frames=video.shape[2])),
        "short_indices": short_ids,
        "short_recon": unit(model.decode(short_ids, frames=short.shape[2])),
    }
