"""SEED on held-out pictures: retrieval by captions, agreement of decoded embeddings, and what its codes look like when drawn.

    python benchmarks/seed.py outputs/train/shapes-seed-stage1 outputs/train/shapes-seed-stage2 outputs/train/shapes-seed-unclip

SEED's codes stand for the meaning of a picture, so that it is not judged by its pixels. Every picture looks for its caption, and
every caption for its picture, among all that are held out: by the first stage's embeddings, by what is left of them behind the
codebook, and by the embeddings of the unCLIP decoder, given or decoded from codes. Pictures that are drawn from codes are read by
rule and compared with the captions, beside those drawn from the given embeddings. Results go to a JSON file, pictures and loss
curves to images.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor

from vargen.checkpoint import atomic_write
from vargen.data.base import VisualDataset, build_dataset
from vargen.data.loader import ordered_batches
from vargen.model import VisualTokenizer
from vargen.nn.quantize import codebook_statistics
from vargen.noise import Noise
from vargen.sample.load import load_tokenizer
from vargen.sample.picture import save_image, side_by_side, to_images
from vargen.tokenizers.seed.embedder import SeedEmbedder
from vargen.tokenizers.seed.tokenizer import SeedTokenizer
from vargen.tokenizers.seed.unclip_training import UnCLIP
from vargen.train.build import plain
from vargen.train.card import loss_curve
from vargen.train.log import read_metrics

BATCH = 64
SHOWN = 8
RANKS = (1, 5)


def load(run: Path, expected: type[VisualTokenizer]) -> Any:
    model = load_tokenizer(str(run / "final"), "cpu")
    if not isinstance(model, expected):
        raise SystemExit(f"'{run}' holds a {type(model).__name__}: expected a {expected.__name__}")
    return model


def recipe_of(run: Path) -> dict[str, Any]:
    return plain(OmegaConf.load(max(run.glob("checkpoint-*/recipe.yaml"))))


def budget(run: Path, model: VisualTokenizer) -> dict[str, Any]:
    timed = [line for line in read_metrics(run) if "seconds" in line]
    recipe = recipe_of(run)
    return {
        "steps": int(timed[-1]["step"]),
        "batch_size": int(recipe["training"]["batch_size"]),
        "minutes": float(timed[-1]["seconds"]) / 60,
        "seed": int(recipe["seed"]),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def mean_error(values: Tensor) -> list[float]:
    """Mean and its standard error."""
    return [float(values.double().mean()), float(values.double().std() / len(values) ** 0.5)]


def retrieval(queries: Tensor, candidates: Tensor, same: Tensor) -> dict[str, Any]:
    """How many queries find their own among the candidates nearest to them by cosine.

    Args:
        queries, candidates: ``(n, C)``.
        same: bool ``(n, n)``, pairs that stand for the same; a query may find any of them.
    """
    similarity = F.normalize(queries, dim=-1) @ F.normalize(candidates, dim=-1).T
    best = similarity.masked_fill(~same, -2.0).amax(1, keepdim=True)
    # a tie is no find, else constant embeddings would find everything
    before = ((similarity >= best) & ~same).sum(1)
    return {f"top{k}": mean_error((before < k).float()) for k in RANKS}


def both_ways(images: Tensor, captions: Tensor, same: Tensor) -> dict[str, Any]:
    return {"image_to_text": retrieval(images, captions, same), "text_to_image": retrieval(captions, images, same)}


def right(dataset: VisualDataset, pixels: Tensor, captions: list[str]) -> dict[str, list[float]]:
    """Share of pictures that show what their captions say, attribute by attribute and all together."""
    return {name: mean_error(found) for name, found in dataset.judge(pixels.clamp(-1, 1), captions=captions).items()}


@torch.inference_mode()
def judge(first: SeedEmbedder, second: SeedTokenizer, unclip: UnCLIP, dataset: VisualDataset, drawn: int) -> dict[str, Any]:
    """All scores on the whole of ``dataset``; pictures are drawn of the first ``drawn`` samples."""
    batches = list(ordered_batches(dataset, BATCH))
    pixels = torch.cat([batch["pixels"] for batch in batches])
    captions = [caption for batch in batches for caption in batch["captions"]]
    same = torch.tensor([[a == b for b in captions] for a in captions])
    words = torch.cat([first.text_features(first.text_encoder.encode(batch["captions"])) for batch in batches])
    clip_words = torch.cat([unclip.caption_tower(unclip.text_encoder.encode(batch["captions"])) for batch in batches])
    parts: dict[str, list[Tensor]] = {"embedded": [], "behind": [], "cosine": [], "ids": [], "given": [], "decoded": []}
    for batch in batches:
        embeddings = first.encode(batch["pixels"])
        ids = second.encode(batch["pixels"])
        rebuilt = second.causal_decoder(second.from_code(second.quantizer.lookup(ids)))
        parts["embedded"].append(first.image_features(embeddings))
        parts["behind"].append(first.image_features(rebuilt))
        parts["cosine"].append(F.cosine_similarity(rebuilt, embeddings, dim=-1).mean(1))
        parts["ids"].append(ids)
        parts["given"].append(unclip.embed(batch["pixels"]))
        parts["decoded"].append(second.embed(ids))
    found = {name: torch.cat(values) for name, values in parts.items()}
    given, decoded = found["given"], found["decoded"]
    mean = given.mean(0, keepdim=True).expand_as(given)
    itself = torch.eye(len(pixels), dtype=torch.bool)
    assert second.space.codebook_size is not None
    return {
        "samples": len(pixels),
        "different_captions": len(set(captions)),
        "chance": {f"top{k}": float((k * same.sum(1) / len(pixels)).mean()) for k in RANKS},
        "first_stage": both_ways(found["embedded"], words, same),
        "behind_the_codebook": both_ways(found["behind"], words, same),
        "causal_cosine": mean_error(found["cosine"]),
        "codes": {k: float(v) for k, v in codebook_statistics(found["ids"], second.space.codebook_size).items()},
        "unclip_given_embedding": both_ways(given, clip_words, same),
        "unclip_decoded_embedding": both_ways(decoded, clip_words, same),
        "decoded_finds_given": retrieval(decoded, given, itself),
        "embedding_cosine": {
            "decoded": mean_error(F.cosine_similarity(decoded, given)),
            "mean_embedding": mean_error(F.cosine_similarity(mean, given)),
            "of_another_picture": mean_error(F.cosine_similarity(given.roll(1, 0), given)),
            "decoded_less_mean": mean_error(F.cosine_similarity(decoded - mean, given - mean)),
        },
        "pictures": pictures(second, unclip, dataset, pixels[:drawn], captions[:drawn]),
    }


def pictures(second: SeedTokenizer, unclip: UnCLIP, dataset: VisualDataset, pixels: Tensor, captions: list[str]) -> dict[str, Any]:
    """What pictures show that are drawn from codes, beside the steps on the way and captions of other pictures (chance)."""
    drawn = draw(second, unclip, pixels)
    report: dict[str, Any] = {name: right(dataset, painted, captions) for name, painted in drawn.items()}
    report["codes, other captions"] = right(dataset, drawn["codes"], captions[1:] + captions[:1])
    return {"samples": len(pixels), **report}


@torch.inference_mode()
def draw(second: SeedTokenizer, unclip: UnCLIP, pixels: Tensor) -> dict[str, Tensor]:
    """Pictures, the autoencoder's round trip, and what unCLIP draws from given and from decoded embeddings with the same noise."""
    noise = Noise(0, len(pixels))
    columns: dict[str, list[Tensor]] = {"original": [], "autoencoder": [], "embedding": [], "codes": []}
    for rows in torch.arange(len(pixels)).split(BATCH):
        few, draws = pixels[rows], noise.select(rows)
        columns["original"].append(few)
        columns["autoencoder"].append(unclip.vae.decode(unclip.vae.encode(few).latent_dist.mean).sample)
        columns["embedding"].append(unclip.decode(unclip.encode(few), noise=draws))
        columns["codes"].append(second.decode(second.encode(few), noise=draws))
    return {name: torch.cat(parts).clamp(-1, 1) for name, parts in columns.items()}


def sheet(second: SeedTokenizer, unclip: UnCLIP, dataset: VisualDataset) -> Image.Image:
    items = [dataset[index] for index in range(SHOWN)]
    drawn = draw(second, unclip, torch.stack([item["pixels"] for item in items]))
    rows = [list(row) for row in zip(*(to_images(painted) for painted in drawn.values()))]
    return side_by_side(rows, list(drawn), [item["caption"] for item in items], side=64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage1", type=Path, help="directory that `vargen train shapes/seed_stage1` made")
    parser.add_argument("stage2", type=Path, help="directory that `vargen train shapes/seed_stage2` made")
    parser.add_argument("unclip", type=Path, help="directory that `vargen train shapes/seed_unclip` made")
    parser.add_argument("--samples", type=int, default=512, help="held-out pictures")
    parser.add_argument("--drawn", type=int, default=128, help="how many of them are drawn from their codes")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/seed.json"))
    parser.add_argument("--pictures", type=Path, default=Path("docs/tokenizers"))
    arguments = parser.parse_args()
    first, second = load(arguments.stage1, SeedEmbedder), load(arguments.stage2, SeedTokenizer)
    unclip = load(arguments.unclip, UnCLIP)
    data = {**recipe_of(arguments.stage2)["dataset"], "split": "test", "length": arguments.samples}
    held_out = build_dataset(data)
    report = {
        "data": data,
        "errors": "pairs are a mean over samples and its standard error",
        "budgets": {
            run.name: budget(run, model)
            for run, model in ((arguments.stage1, first), (arguments.stage2, second), (arguments.unclip, unclip))
        },
        "environment": {"torch": torch.__version__, "threads": torch.get_num_threads(), "machine": platform.machine()},
        **judge(first, second, unclip, held_out, arguments.drawn),
    }
    text = json.dumps(report, indent=2) + "\n"
    atomic_write(arguments.output, lambda path: path.write_text(text))
    save_image(sheet(second, unclip, held_out), arguments.pictures / "seed.png")
    for run, name in ((arguments.stage1, "stage1"), (arguments.stage2, "stage2"), (arguments.unclip, "unclip")):
        curve = loss_curve(read_metrics(run))
        if curve is not None:
            save_image(curve, arguments.pictures / f"seed-{name}-loss.png")


if __name__ == "__main__":
    main()
