"""Evaluation metrics: statistics on features and frames."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.parity.runner import Case, component
from vargen.metrics.frames import clip_psnr, psnr, ssim
from vargen.metrics.frechet import FeatureStatistics, frechet_distance, frechet_from_features
from vargen.metrics.inception_score import inception_score
from vargen.metrics.kid import kernel_distance
from vargen.metrics.manifold import manifold_scores, squared_radii


@component("metrics", "fid")
def frechet(case: Case) -> dict[str, Tensor]:
    features = [case.inputs["features1"], case.inputs["features2"]]
    a, b = (FeatureStatistics.of(f) for f in features)
    # the same statistics from a stream in two parts
    streamed = FeatureStatistics.empty(features[0].shape[1])
    for part in features[0].tensor_split(2):
        streamed.update(part)
    rows = case.config["rankdef rows"]
    distance = frechet_distance(streamed.mean, streamed.covariance(), b.mean, b.covariance())
    few = frechet_from_features(*(f[:n] for f, n in zip(features, rows)))
    out = {f"fid_{name}": distance for name in ("cleanfid", "adm", "torchfidelity")}
    out |= {f"fid_rankdef_{name}": few for name in ("cleanfid", "torchfidelity")}
    out["fid_biased_cov"] = frechet_from_features(*features, unbiased=False)
    statistics = {"mu1": a.mean, "mu2": b.mean, "sigma1": a.covariance(), "sigma2": b.covariance()}
    return {**_scalars(out), **statistics}


@component("metrics", "pr")
def precision_recall(case: Case) -> dict[str, Tensor]:
    k = case.config["k"]
    real, generated = case.inputs["ref_features"].double(), case.inputs["sample_features"].double()
    # small blocks, so that they do not change the result
    scores = manifold_scores(real, generated, k, block=32)
    out = {f"precision_{name}": scores.precision for name in ("adm", "tf")}
    out |= {f"recall_{name}": scores.recall for name in ("adm", "tf")}
    return {
        **_scalars(out),
        "radii_ref_sq": squared_radii(real, k, block=32)[:, None],
        "radii_sample_sq": squared_radii(generated, k, block=32)[:, None],
        "in_manifold": scores.inside.long()[:, None],
        "realism": scores.realism,
    }


@component("metrics", "kid")
def kernel(case: Case) -> dict[str, Tensor]:
    a, b = case.inputs["features1"], case.inputs["features2"]
    clean, _ = kernel_distance(b, a, case.inputs["cleanfid_subsets"])
    mean, std = kernel_distance(a, b, case.inputs["tf_subsets"])
    return _scalars({"kid_cleanfid": clean, "kid_tf_mean": mean, "kid_tf_std": std})


@component("metrics", "is")
def inception(case: Case) -> dict[str, Tensor]:
    logits = case.inputs["pool_features"] @ case.inputs["fc_weight"]
    splits = case.config["splits"]
    mean, std = inception_score(logits, splits, permutation=case.inputs["permutation"])
    plain_mean, plain_std = inception_score(logits, splits)
    return _scalars(
        {
            "is_tf_mean": mean,
            "is_tf_std": std,
            "is_noshuffle_mean": plain_mean,
            "is_noshuffle_std": plain_std,
            "is_adm": inception_score(logits, split_size=case.config["split_size"])[0],
            "is_adm_one_split": inception_score(logits, split_size=5000)[0],
        }
    )


@component("metrics", "frames")
def frames(case: Case) -> dict[str, Tensor]:
    a, b = (2 * case.inputs[name].double() - 1 for name in ("video1", "video2"))
    out: dict[str, Tensor] = {}
    for name, values in (("psnr", psnr(a, b)), ("ssim", ssim(a, b))):
        out |= {name: values.mean(), f"{name}_std": values.std(correction=0), f"{name}_per_frame": values.mean(0)}
    out["ssim_pytorch_msssim"] = ssim(a, b, torch.float32).mean()
    out["psnr_per_video_mse_then_mean"] = clip_psnr(a, b).mean()
    return out


def _scalars(values: dict[str, float]) -> dict[str, Tensor]:
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}
