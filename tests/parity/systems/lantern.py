"""LANTERN: acceptance rules, drafter and its trees, and whole speculative generation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tests.parity.recorded import Draw
from tests.parity.runner import Case, RecordedNoise, capture, checkpoint_file, component
from vargen.backbones.drafter import EagleDrafter, drafter_losses
from vargen.backbones.llamagen import LlamaGen
from vargen.condition import Condition, TextFeatures
from vargen.decoding.acceptance import Acceptance, Relaxation
from vargen.decoding.draft import Draft, Readout, Sample, Settled, warp_logits
from vargen.decoding.eagle import DynamicTree, EagleDrafting, FixedTree, without_replacement
from vargen.decoding.lantern import Lantern
from vargen.decoding.neighbors import nearest_codes
from vargen.decoding.speculative import prefix_mask
from vargen.decoding.tree import StaticTree, Tree
from vargen.guidance import Guidance
from vargen.model import Sampling
from vargen.noise import Noise
from vargen.official.lantern import load_base, load_drafter

# the published code lets trees grow over the end of the grid, where rotary rows are zero: one more row of cells stands for that
OVER = 1


def sampling_of(settings: dict[str, Any]) -> Sampling:
    return Sampling(settings["temperature"], settings["top_k"], settings["top_p"])


def relaxed(mode: dict[str, Any], table: Tensor) -> tuple[Any, ...]:
    """Table, k, delta and ratio of a mode (whose ``delta`` above 1 is the ratio); empty without relaxation."""
    if not mode["relaxed"]:
        return ()
    bound = mode["delta"]
    return (table, mode["k"], None, bound) if bound > 1 else (table, mode["k"], bound)


def gumbel_uniform(gumbel: Tensor) -> Tensor:
    """The uniforms behind Gumbel noise."""
    return (-(-gumbel.double()).exp()).exp()


def along(values: Tensor, paths: Tensor, padding: float) -> Tensor:
    """Values of nodes along paths, with ``padding`` where a path has ended."""
    return torch.where(paths < 0, torch.tensor(padding, dtype=values.dtype), values[paths.clamp(min=0)])


@component("lantern", "accept")
def accept(case: Case) -> dict[str, Tensor]:
    inputs, config = case.inputs, case.config
    table = nearest_codes(inputs["codebook"], len(inputs["codebook"]) - 1)
    shape = StaticTree.of(config["tree"])
    out: dict[str, Any] = {"nearest": table.long(), "retrieve_indices": shape.tree.paths}
    settings = config["processor"]

    def processed(logits: Tensor, trial: int) -> Tensor:
        if trial % 2 == 0:
            return logits
        return warp_logits(logits, settings["temperature"], settings["top_p"], settings["top_k"])

    drafts: dict[str, list[Draft]] = {"dyn": [], "st": []}
    candidates, chances = [], []
    for trial, nodes in enumerate(inputs["node_tokens"]):
        drafts["dyn"].append(Draft(shape.tree, nodes))
        q = processed(inputs["draft_logits"][trial], trial).softmax(-1)
        draft, chance = drawn(shape, nodes[0], q, without_replacement(q, gumbel_uniform(inputs["gumbel"][trial]), 10))
        drafts["st"].append(draft)
        candidates.append(along(draft.tokens, shape.tree.paths, -1))
        chances.append(along(chance, shape.tree.paths, 1.0))
    out.update(static_candidates=torch.stack(candidates), static_candidate_probs=torch.stack(chances))

    for mode in config["modes"]:
        rule = Acceptance(Relaxation(*relaxed(mode, table)) if mode["relaxed"] else None)
        for kind, list_of_drafts in (("dyn", drafts["dyn"]), ("st", drafts["st"]), ("gr", drafts["dyn"])):
            columns: dict[str, list[Any]] = {name: [] for name in ("best", "len", "p", "used")}
            for trial, draft in enumerate(list_of_drafts):
                logits = inputs["target_logits"][trial]
                logits = logits * inputs["greedy_sharpness"] if kind == "gr" else processed(logits, trial)
                consumed = Consumed(inputs["uniforms"][trial])
                verdict = rule.accept(draft, logits, kind == "gr", lambda depth, number, c=consumed: c.next())
                columns["best"].append(shape.tree.first_path[verdict.path[-1]])
                columns["len"].append(len(verdict.path) - 1)
                columns["p"].append(verdict.probs)
                columns["used"].append(consumed.used)
            name = mode["name"]
            out[f"{kind}_best_{name}"] = torch.tensor(columns["best"])
            out[f"{kind}_len_{name}"] = torch.tensor(columns["len"])
            if kind == "gr":
                out[f"gr_logits_argmax_{name}"] = torch.stack(columns["p"]).argmax(-1)
            else:
                out[f"{kind}_p_{name}"] = torch.stack(columns["p"])
                out[f"{kind}_used_{name}"] = torch.tensor(columns["used"])
    return out


class Consumed:
    """Recorded draws, taken one after the other."""

    def __init__(self, values: Tensor) -> None:
        self.values, self.used = values, 0

    def next(self) -> float:
        self.used += 1
        return float(self.values[self.used - 1])

    def rows(self, count: int) -> Tensor:
        self.used += count
        return self.values[self.used - count : self.used]


def drawn(shape: StaticTree, root: Tensor, q: Tensor, ids: Tensor) -> tuple[Draft, Tensor]:
    """The draft whose expanded nodes have the children ``ids`` ``(expanded, 10)``, and every node's conditional probability."""
    expanded = [node for level in shape.expanded for node in level]
    chances = conditional(q, ids)
    tokens, chance = root.repeat(len(shape.tree)), torch.ones(len(shape.tree))
    for node, parent in enumerate(shape.tree.parents[1:], start=1):
        row = expanded.index(parent)
        tokens[node], chance[node] = ids[row, shape.ranks[node]], chances[row, shape.ranks[node]]
    return Draft(shape.tree, tokens, dict(zip(expanded, q))), chance


def conditional(q: Tensor, ids: Tensor) -> Tensor:
    """Probability of each of ``ids`` after the ones before it were taken out."""
    own = q.gather(1, ids)
    chance = own / (1 - (own.cumsum(1) - own))
    return chance.nan_to_num(-1.0, -1.0, -1.0).clamp(0, 1)


def build_drafter(state: dict[str, Tensor], config: dict[str, Any], over: int = 0) -> EagleDrafter:
    side = {"t2i": 16, "t2i2": 32, "c2i": 24}[config["input_type"]]
    with checkpoint_file(state) as path:
        drafter = load_drafter(path, grid=[side + over, side], heads=config["num_attention_heads"], norm_eps=config["rms_norm_eps"])
    drafter.rotary_rows[side * side :] = 0
    return drafter


@component("lantern", "drafter")
def drafter_and_trees(case: Case) -> dict[str, Tensor]:
    config, inputs, run = case.config, case.inputs, case.config["run"]
    drafter = build_drafter(case.state32(), config, OVER)
    out = training(case, drafter)
    side = drafter.config.grid[1]
    model = LlamaGen((side + OVER, side), config["vocab_size"], config["hidden_size"], 1, 1, 8, None, 1, 120)
    model.output_heads[0].linear.weight.data = inputs["lm_head"]
    dynamic = DynamicTree(config["total_token"], config["depth"], config["top_k"])
    for tag, sampling in (("greedy", Sampling(0.0)), ("proc", sampling_of(run["processor"]))):
        sample = Sample(model, Readout(model, Guidance(run["cfg_scale"]), sampling, 0, 256, True), 2, Noise(0))
        work = EagleDrafting(drafter, dynamic, sample)
        for number in (1, 2):
            hidden, ids = inputs[f"round{number}_hidden"], inputs[f"round{number}_ids"][0]
            draft = work.propose(settled(ids[1:], hidden))
            out[f"dyn_{tag}_round{number}_draft_tokens"] = draft.tokens[None]
            out.update({f"dyn_{tag}_round{number}_{name}": value for name, value in buffers(draft.tree).items()})
        out[f"dyn_{tag}_stable_k"] = work.cache.keys[0, :, :, work.cache.length - 6 : work.cache.length]
    return {**out, **static(case, drafter, model)}


def settled(ids: Tensor, hidden: Tensor) -> Settled:
    """The last tokens of a drafter's ids, of which 119 stand for the condition."""
    return Settled(len(ids) - 119, ids[-hidden.shape[1] :], hidden, torch.empty(0), [0], 100)


def buffers(tree: Tree) -> dict[str, Tensor]:
    return {
        "position_ids": torch.tensor(tree.depths),
        "tree_mask": tree.mask[None, None].to(torch.uint8),
        "retrieve_indices": tree.paths,
    }


def training(case: Case, drafter: EagleDrafter) -> dict[str, Tensor]:
    inputs = case.inputs
    drafter.zero_grad()
    length = inputs["train_ids"].shape[1]
    cells = torch.arange(length) - 119
    real = inputs["train_attention_mask"].bool()
    mask = torch.ones(length, length, dtype=torch.bool).tril() & real[:, None, None, :]
    with capture(drafter, {"fc": "join", "attn": "blocks.0.attn"}) as seen:
        predicted = drafter(inputs["train_hidden"] + inputs["train_noise"], inputs["train_ids"], cells.clamp(min=-1), mask)
    losses = drafter_losses(
        predicted, inputs["train_target"], inputs["train_loss_mask"], lambda x: x @ inputs["lm_head"].T, case.config["run"]["p_w"]
    )
    losses["loss"].backward()
    q_rows = slice(0, drafter.config.dim)
    return {
        "train_predict": predicted[:, 112:],
        "train_after_fc": seen["fc"][:, 112:],
        "train_attn_out": seen["attn"][:, 112:],
        "train_loss": losses["loss"],
        "train_vloss": losses["state"],
        "train_ploss": losses["probability"],
        "grad_fc_weight": drafter.join.weight.grad,
        "grad_q_proj": drafter.blocks[0].attn.qkv.weight.grad[q_rows],
    }


class Seen:
    """A readout that keeps the logits it made."""

    def __init__(self, read: Readout) -> None:
        self.read, self.sampling = read, read.sampling
        self.kept: list[Tensor] = []

    def __call__(self, hidden: Tensor, known: Sequence[int]) -> Tensor:
        self.kept.append(self.read(hidden, known))
        return self.kept[-1]


def static(case: Case, drafter: EagleDrafter, model: LlamaGen) -> dict[str, Tensor]:
    inputs, run = case.inputs, case.config["run"]
    shape = StaticTree.of(run["tree"])
    tree = shape.tree
    expanded = [node for level in shape.expanded for node in level]
    gumbel = torch.cat([inputs[f"static_gumbel_{level}"] for level in range(run["levels"])])
    out: dict[str, Tensor] = {
        "static_tree_attn_mask": tree.mask[None, None].to(torch.uint8),
        "static_tree_position_ids": torch.tensor(tree.depths),
        "static_retrieve_indices": tree.paths,
        # places of the nodes among the root and the ten children of each expanded node
        "static_tree_indices": torch.tensor(
            [0] + [1 + 10 * expanded.index(tree.parents[n]) + shape.ranks[n] for n in range(1, len(tree))]
        ),
    }
    within = {node: row for level in shape.expanded for row, node in enumerate(level)}
    rows = torch.tensor([-1] + [within[parent] for parent in tree.parents[1:]])
    out["static_p_indices"] = rows[tree.paths]
    out["static_b_count"] = torch.tensor([0, *shape.ranks[1:]])[tree.paths]
    for tag, sampling in (("greedy", Sampling(0.0)), ("sample", sampling_of(run["processor"]))):
        read = Seen(Readout(model, Guidance(run["cfg_scale"]), sampling, 0, 256, True))
        consumed = Consumed(gumbel_uniform(gumbel))
        noise = RecordedNoise({"children": lambda draw, c=consumed: children(draw, c)}, 1)
        work = EagleDrafting(drafter, FixedTree(shape), Sample(model, read, 2, noise))
        draft = work.propose(settled(inputs["round1_ids"][0][1:], inputs["round1_hidden"]))
        out[f"static_{tag}_candidates"] = along(draft.tokens, tree.paths, -1)
        out[f"static_{tag}_tree_tokens"] = draft.tokens[None]
        logits = torch.cat(read.kept)
        if tag == "greedy":
            out["static_greedy_tokens"] = logits.topk(10).indices
            continue
        q = torch.stack(list(draft.proposals.values()))
        ids = without_replacement(q, gumbel_uniform(gumbel), 10)
        _, chance = drawn(shape, draft.tokens[:1], q, ids)
        out.update(static_sample_q=q, static_sample_tokens=ids, static_sample_cond_probs=conditional(q, ids))
        out["static_sample_candidate_probs"] = along(chance, tree.paths, 1.0)
    return out


def children(draw: Draw, consumed: Consumed) -> Tensor:
    return consumed.rows(draw.at[-1].shape[1])[None]


@component("lantern", "generate")
def generate(case: Case) -> dict[str, Tensor]:
    inputs, run, c = case.inputs, case.config["run"], case.config["base"]
    side = round(c["block_size"] ** 0.5)
    with checkpoint_file(case.state32("base.")) as path:
        base = load_base(
            path,
            grid=[side + OVER, side],
            heads=c["num_attention_heads"],
            norm_eps=c["rms_norm_eps"],
            rope_base=c["rope_base"],
        )
    base.rotary_rows[c["cls_token_num"] + c["block_size"] :] = 0
    drafter = build_drafter(case.state32("drafter."), case.config["drafter"], OVER)
    table = nearest_codes(inputs["codebook"], len(inputs["codebook"]) - 1)
    condition = Condition(text=TextFeatures(inputs["caption_embs"], inputs["caption_mask"].bool()))
    guidance = Guidance(run["cfg"])
    out = prefill(base, condition)
    plain = base.generate(condition, guidance=guidance, sampling=Sampling(0.0)).flatten(1)
    out["tokens_plain_greedy"] = plain[:, : run["plain_len"]]
    drafting = case.config["drafting"]
    for name, settings in run["runs"].items():
        mode = {"relaxed": settings["lantern"], "k": settings.get("lantern_k"), "delta": settings.get("lantern_delta")}
        shape = settings["tree"] if settings["static_tree"] else None
        tree = DynamicTree(drafting["total_token"], drafting["depth"], drafting["top_k"]) if shape is None else shape
        lantern = Lantern(drafter, *relaxed(mode, table), tree=tree, top_p_first=True)
        draws = {kind: Consumed(inputs[f"{kind}_{name}"]) for kind in "rug" if f"{kind}_{name}" in inputs}
        noise = recorded(draws) if draws else Noise(0)
        # published rounds stop when more than max_length tokens were fed; ours count the next root too
        length = settings["max_length"]
        tokens = lantern.decode(base, condition, 1, noise, guidance, sampling_of(settings), stop=length + 2)
        out[f"tokens_{name}"] = tokens.flatten(1)[:, :length]
        out[f"compression_{name}"] = torch.tensor(lantern.statistics.tokens_per_round)
        if draws:
            used = [draws[kind].used if kind in draws else 0 for kind in "rug"]
            if shape is not None:
                # they draft once more after the last round
                used[2] += sum(map(len, StaticTree.of(shape).expanded))
            out[f"used_{name}"] = torch.tensor(used)
    return out


def recorded(draws: dict[str, Consumed]) -> RecordedNoise:
    def gumbel(draw: Draw) -> Tensor:
        return gumbel_uniform(draws["g"].rows(draw.at[-1].shape[1]))[None]

    return RecordedNoise(
        {
            "accept": lambda draw: torch.tensor([draws["r"].next()]),
            "token": lambda draw: torch.tensor([draws["u"].next()]),
            "children": gumbel,
        },
        1,
    )


@torch.no_grad()
def prefill(base: LlamaGen, condition: Condition) -> dict[str, Tensor]:
    state = base.start(condition, 1, rows=2)
    slots = torch.arange(base.layout.prefix)
    ids = torch.zeros(2, len(slots), dtype=torch.int64)
    hidden = base.forward(state, ids, slots, prefix_mask(base.layout, slots, state.cache.visible))[0]
    return {"prefill_hidden": hidden[:, 100:], "prefill_logits": base.logits(hidden[:, -1])}
