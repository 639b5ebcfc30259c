"""``vargen sample``: pictures and videos from a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vargen.cli.options import Device, Dtype, Quiet, parse_settings, parse_shard, read_prompts


def sample(
    model: Annotated[str, typer.Argument(help="Bundled name (see `vargen models`), directory or hub id.")],
    class_labels: Annotated[
        list[str] | None,
        typer.Option(
            "--class-labels",
            "--class",
            metavar="LABELS",
            help="Class numbers or names, e.g. 3,7; they cycle. By default all classes in turn.",
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="Text to draw; repeat it for several, they cycle.")
    ] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="A file with one prompt per line.")] = None,
    frames: Annotated[
        list[Path] | None,
        typer.Option(metavar="CLIP", help="Continue the first frames of this video file or folder of frames; several cycle."),
    ] = None,
    given: Annotated[int | None, typer.Option(help="How many of its frames are given; default about half a clip.")] = None,
    image: Annotated[Path | None, typer.Option(metavar="FILE", help="Edit this picture; of the model's size.")] = None,
    mask: Annotated[Path | None, typer.Option(metavar="FILE", help="White where the picture is drawn anew.")] = None,
    keep_pixels: Annotated[
        bool, typer.Option("--keep-pixels", help="Pixels outside the mask are those of the picture, not of its tokens.")
    ] = False,
    num: Annotated[int, typer.Option("--num", "-n", help="Number of images in all.")] = 16,
    seed: Annotated[int, typer.Option(help="Image i of a seed is the same whatever the count, shard or restart.")] = 0,
    guidance_scale: Annotated[float | None, typer.Option("--guidance-scale", "--cfg-scale", help="1 is no guidance.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Keep the k likeliest tokens; 0 keeps all.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Keep the likeliest tokens up to this probability.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Other settings, e.g. guidance_schedule=linear.")
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            help="Images per pass (16, or 1 where speculation takes them singly); the job keeps to it, others differ by rounding."
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder; default outputs/<model>-<settings>.")] = None,
    format: Annotated[
        str | None, typer.Option(metavar="FORMAT", help="Of videos: mp4, gif or frames (a folder of PNG files each).")
    ] = None,
    fps: Annotated[float, typer.Option(help="Frames per second of videos.")] = 8.0,
    npz: Annotated[bool, typer.Option("--npz", help="Also write samples.npz for FID evaluators, shuffled.")] = False,
    animate: Annotated[bool, typer.Option("--animate", help="Also write animation.gif of the tokens appearing in order.")] = False,
    shard: Annotated[str, typer.Option(help="k/n: draw only the images whose number is k modulo n.")] = "0/1",
    compile: Annotated[
        bool, typer.Option("--compile", help="Fast: blocks through torch.compile; compiling first takes a while.")
    ] = False,
    cuda_graphs: Annotated[
        bool, typer.Option("--cuda-graphs", help="Fast: passes of causal models as CUDA graphs, with or without --compile.")
    ] = False,
    int8: Annotated[bool, typer.Option("--int8", help="Fast: 8-bit weights of causal models (torchao), compiled.")] = False,
    drafter: Annotated[
        str | None,
        typer.Option(
            "--drafter",
            "--drafter-path",
            metavar="DIR",
            help="Fast: an EAGLE drafter for a next-token model; lossless without --lantern-k.",
        ),
    ] = None,
    tree: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Of the drafter: static, chain_5, naive_extend_57 or mc_sim_7b_63; else dynamic."),
    ] = None,
    jacobi: Annotated[
        bool, typer.Option("--jacobi", help="Fast: a next-token model drafts for itself; lossless without --lantern-k.")
    ] = False,
    lantern_k: Annotated[
        int | None, typer.Option(help="LANTERN: accept drafts also for their k nearest codes, up to one of the next two bounds.")
    ] = None,
    lantern_delta: Annotated[float | None, typer.Option(help="Bound in total variation, 0..1 (LANTERN).")] = None,
    lantern_ratio: Annotated[float | None, typer.Option(help="Bound as a ratio of probabilities, from 1 on (LANTERN++).")] = None,
    draft: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Fast: a smaller MAR drafts for a MAR, by the published rule, which is lossy."),
    ] = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="With --draft: the rule that keeps the model's distribution, slower than no draft.")
    ] = False,
    device: Device = None,
    dtype: Dtype = "float32",
    quiet: Quiet = False,
) -> None:
    """Draw pictures or videos from a model.

    Writes numbered images or clips, a labelled grid and a manifest. A job that was stopped continues when the same command is run
    again.
    """
    part, others = parse_shard(shard), parse_settings(settings or ())
    prompts = [*(prompt or []), *(read_prompts(prompt_file) if prompt_file else [])]

    from vargen.sample.decoding import DecodingChoice
    from vargen.sample.images import sample as run

    result = run(
        model,
        class_labels=class_labels or (),
        prompts=prompts,
        num=num,
        seed=seed,
        batch_size=batch_size,
        output=output,
        npz=npz,
        animate=animate,
        clips=frames or (),
        frames=given,
        image=image,
        mask=mask,
        keep_pixels=keep_pixels,
        format=format,
        fps=fps,
        shard=part,
        device=device,
        dtype=dtype,
        progress=not quiet,
        settings={**others, "guidance_scale": guidance_scale, "temperature": temperature, "top_k": top_k, "top_p": top_p},
        decoding=DecodingChoice(
            compile=compile,
            cuda_graphs=cuda_graphs,
            int8=int8,
            drafter=drafter,
            tree=tree,
            jacobi=jacobi,
            lantern_k=lantern_k,
            lantern_delta=lantern_delta,
            lantern_ratio=lantern_ratio,
            draft=draft,
            exact=exact,
        ),
    )
    if result.gain is not None:
        typer.echo(result.gain)
    if result.flops is not None:
        typer.echo(f"{result.flops / 1e9:.3g} GFLOPs per image")
    typer.echo(f"{result.done} of {result.num} {result.noun} in {result.folder}")
    for file in result.files:
        typer.echo(str(file))
