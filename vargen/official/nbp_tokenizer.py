"""Released checkpoints of NBP's video tokenizer, alone or inside a generator's file."""

from __future__ import annotations

import os
from typing import Any

from vargen.checkpoint import load_strictly, read_file, rename, unwrap
from vargen.errors import CheckpointError
from vargen.official.shared import shape_of
from vargen.tokenizers.nbp import NBPTokenizer

RULES = (
    (r"(encoder|decoder)_layers\.(\d+)\.fn\.(\d+)\.(?:conv\.)?(weight|bias|beta)", r"\1.\2.branch.\3.\4"),
    (r"(encoder|decoder)_layers\.(\d+)\.residual_fn\.0\.conv\.(weight|bias)", r"\1.\2.skip.\3"),
    (r"(encoder|decoder)_layers\.(\d+)\.(?:conv\.)?(weight|bias|beta)", r"\1.\2.\3"),
)


def load(path: str | os.PathLike[str], **options: Any) -> NBPTokenizer:
    """A tokenizer with the widths that the file's tensors have.

    Args:
        options: further arguments of :class:`NBPTokenizer`, such as ``sample_size``, ``levels`` or ``norm_groups``.

    Raises:
        CheckpointError: unreadable file, or keys that do not fit.
    """
    state = {k.removeprefix("module."): v for k, v in unwrap(read_file(path), ("model_state_dict", "state_dict", "model")).items()}
    inner = {k.removeprefix("first_stage_model."): v for k, v in state.items() if k.startswith("first_stage_model.")}
    state = inner or state
    if not any(k.startswith("encoder_layers.") for k in state):
        raise CheckpointError(f"'{path}' has no keys 'encoder_layers.N...': it holds no video tokenizer of NBP")
    widths = [shape_of(state, f"encoder_layers.{layer}.conv.bias")[0] for layer in (0, 10)]
    widths.append(shape_of(state, "decoder_layers.0.conv.bias")[0])
    model = NBPTokenizer(**{"widths": widths, **options})
    load_strictly(model, rename(state, RULES), source=str(path))
    return model.eval()
