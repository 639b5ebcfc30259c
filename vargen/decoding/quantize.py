"""Weights of generators as 8-bit integers: half the bytes of bfloat16 to read for every token."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from vargen.errors import VargenError


def int8_weights(model: nn.Module) -> nn.Module:
    """Makes the weights of a causal generator's blocks and output layers int8, one scale per output channel, in place (torchao).

    Activations stay as they are. It pays where weights are what decoding reads most, at small batches, and only with
    ``Engine(compile=True)``, which fuses the conversion into the product; without, every product first writes the weights out.
    The model is for decoding from then on: it is neither trained nor saved.

    Raises:
        VargenError: torchao is not installed.
    """
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise VargenError("int8 weights need torchao: pip install 'vargen[int8]'") from error
    quantize_(
        model,
        Int8WeightOnlyConfig(),
        lambda part, name: isinstance(part, nn.Linear) and name.startswith(("blocks.", "output_heads.")),
    )
    return model


def stored(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that a tensor consists of: itself, or the parts of a quantised one."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from stored(getattr(tensor, name))
    else:
        yield tensor
