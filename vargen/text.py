"""Text encoders: captions to features, by T5 or CLIP through transformers, or by a small word encoder that we train."""

from __future__ import annotations

import html
import json
import os
import re
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable
from urllib.parse import unquote_plus

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from vargen.condition import TextFeatures
from vargen.errors import CheckpointError, ConfigError, VargenError
from vargen.model import VargenModel
from vargen.nn.block import TransformerBlock
from vargen.nn.norm import make_norm


@runtime_checkable
class TextEncoder(Protocol):
    """Captions to features.

    Attributes:
        dim: width of the features.
        max_length: largest number of tokens; longer texts are cut.
    """

    dim: int
    max_length: int

    def encode(self, texts: Sequence[str]) -> TextFeatures:
        """Features ``(B, L, dim)``, L <= max_length, of ``B`` texts; padding stands on the right and holds zeros."""


def check_texts(texts: Sequence[str]) -> list[str]:
    """Returns ``texts`` as a list; raises VargenError for a single string, an empty batch, or an entry that is not a string."""
    if isinstance(texts, str) or not len(texts) or not all(isinstance(t, str) for t in texts):
        raise VargenError(f"texts {str(texts)[:60]!r}: expected a non-empty list of strings")
    return list(texts)


# beside transformers' own files: what they have no place for
_LENGTH_FILE = "text_encoder.json"


class _PretrainedTextEncoder(ModelMixin):
    """A frozen text model of transformers with its own tokenizer, saved and loaded as one directory in transformers' layout."""

    model_class: ClassVar[str]
    default_length: ClassVar[int]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.__module__ = "vargen"

    def __init__(self, model: nn.Module, tokenizer: Any, max_length: int | None = None) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.max_length = max_length or self.default_length
        if self.max_length < 2:
            raise ConfigError(f"max_length {max_length}: expected at least 2 tokens")

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        max_length: int | None = None,
        torch_dtype: torch.dtype | None = None,
        subfolder: str = "",
        **hub: Any,
    ) -> Any:
        """Loads model and tokenizer from a directory or a hub id, such as ``google/flan-t5-xl``.

        Args:
            max_length: tokens per text; by default what was saved with the encoder, else the usual number for its kind.
            torch_dtype: of the weights, as stored by default.
            hub: ``revision``, ``cache_dir``, ``token``, ``local_files_only``; other keywords of diffusers' loaders have no effect.

        Raises:
            CheckpointError: nothing there, or no safetensors weights.
        """
        import transformers

        source = Path(path) / subfolder if Path(path).exists() else path
        hub = {k: v for k, v in hub.items() if k in ("revision", "cache_dir", "token", "local_files_only") and v is not None}
        if not isinstance(source, Path) and subfolder:
            hub["subfolder"] = subfolder
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(source, **hub)
            model_class = getattr(transformers, cls.model_class)
            model = model_class.from_pretrained(source, torch_dtype=torch_dtype or "auto", use_safetensors=True, **hub)
        except Exception as error:  # hub, tokenizer and weight errors have no common base
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(
                f"cannot load {cls.__name__} from '{path}': expected a {cls.model_class} with safetensors weights and its "
                f"tokenizer ({reason})"
            ) from error
        saved = _saved_length(source) if isinstance(source, Path) else None
        return cls(model, tokenizer, max_length or saved)

    def save_pretrained(self, path: str | os.PathLike[str], **options: Any) -> None:
        """Writes weights, configuration and tokenizer into a directory."""
        self.model.save_pretrained(path)
        self.tokenizer.save_pretrained(path)
        (Path(path) / _LENGTH_FILE).write_text(json.dumps({"max_length": self.max_length}))

    def _tokenize(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Ids and bool mask ``(B, max_length)``, padded on the right to one shape, so that a text's features do not depend on
        the rest of its batch."""
        batch = self.tokenizer(
            texts,
            max_length=self.max_length,
            padding="max_length",
            padding_side="right",
            truncation=True,
            return_tensors="pt",
        )
        return batch["input_ids"].to(self.device), batch["attention_mask"].bool().to(self.device)

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> TextFeatures: ...


class T5TextEncoder(_PretrainedTextEncoder):
    """The encoder of a T5 model; texts are cleaned first (:func:`clean_caption`) unless ``clean`` is set to False.

    LlamaGen and NAR read flan-t5-xl (dim 2048) at 120 tokens, the end token included.
    """

    model_class = "T5EncoderModel"
    default_length = 120
    clean = True

    @property
    def dim(self) -> int:
        return self.model.config.d_model

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> TextFeatures:
        """Last hidden states ``(B, max_length, dim)``; only places of real tokens are valid."""
        texts = check_texts(texts)
        ids, mask = self._tokenize([clean_caption(t) for t in texts] if self.clean else texts)
        features = self.model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        return TextFeatures(features * mask.unsqueeze(-1), mask)


class CLIPTextEncoder(_PretrainedTextEncoder):
    """The text model of CLIP: last hidden states after the final norm at all 77 positions, padding included, all of them valid."""

    model_class = "CLIPTextModel"
    default_length = 77

    @property
    def dim(self) -> int:
        return self.model.config.hidden_size

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> TextFeatures:
        """Last hidden states ``(B, max_length, dim)``."""
        ids, mask = self._tokenize(check_texts(texts))
        features = self.model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        return TextFeatures(features, torch.ones_like(mask))


class WordEncoder(VargenModel):
    """A small transformer over the words of a closed vocabulary, trained along with a generator.

    A text is a begin token and its lower-cased words; words outside the vocabulary become one unknown token.

    Args:
        words: the vocabulary, lower-case and without repeats; see :meth:`from_captions`.
        dim: width of the features.
        max_length: tokens per text, the begin token included.
        depth, heads: transformer blocks (0 for embeddings alone) and their heads.
    """

    PAD, BEGIN, UNKNOWN = range(3)

    @register_to_config
    def __init__(self, words: list[str], dim: int = 64, max_length: int = 24, depth: int = 1, heads: int = 4) -> None:
        super().__init__()
        if not words or len(set(words)) != len(words) or any(split_words(w) != [w] for w in words):
            raise ConfigError(f"word vocabulary of {len(words)}: expected distinct lower-case words without spaces or punctuation")
        if max_length < 1:
            raise ConfigError(f"max_length {max_length}: expected at least 1 token")
        self.dim, self.max_length = dim, max_length
        self._ids = {word: i for i, word in enumerate(words, start=3)}
        self.embedding = nn.Embedding(3 + len(words), dim)
        self.positions = nn.Parameter(0.02 * torch.randn(max_length, dim))
        self.blocks = nn.ModuleList(TransformerBlock(dim, heads, 4 * dim) for _ in range(depth))
        self.norm = make_norm("layer", dim, 1e-6)
        nn.init.normal_(self.embedding.weight, std=0.02)

    @classmethod
    def from_captions(cls, captions: Iterable[str], **options: Any) -> WordEncoder:
        """A fresh encoder whose vocabulary is every word of ``captions``, sorted."""
        return cls(sorted({word for caption in captions for word in split_words(caption)}), **options)

    def tokenize(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and bool mask ``(B, max_length)``: one shape, so that a text's features do not depend on its batch."""
        rows = [[self.BEGIN, *(self._ids.get(w, self.UNKNOWN) for w in split_words(t))][: self.max_length] for t in texts]
        ids = torch.full((len(rows), self.max_length), self.PAD)
        for row, tokens in enumerate(rows):
            ids[row, : len(tokens)] = torch.tensor(tokens)
        ids = ids.to(self.positions.device)
        return ids, ids != self.PAD

    def forward(self, ids: Tensor, mask: Tensor) -> TextFeatures:
        """Features ``(B, L, dim)`` of token ids and their mask."""
        x = self.embedding(ids) + self.positions[: ids.shape[1]]
        for block in self.blocks:
            x = block(x, mask=mask[:, None, None, :])
        return TextFeatures(self.norm(x) * mask.unsqueeze(-1), mask)

    def encode(self, texts: Sequence[str]) -> TextFeatures:
        """Features ``(B, max_length, dim)``, differentiable in the encoder's weights; an empty text is the begin token alone."""
        return self(*self.tokenize(check_texts(texts)))


def _saved_length(folder: Path) -> int | None:
    file = folder / _LENGTH_FILE
    return json.loads(file.read_text())["max_length"] if file.is_file() else None


def load_text_encoder(path: str | os.PathLike[str], **options: Any) -> Any:
    """The text encoder in a directory or of a hub id, its class told by its configuration.

    Raises:
        CheckpointError: no configuration, or of a model that is no text encoder.
    """
    if Path(path).exists():
        file = Path(path) / "config.json"
        try:
            config = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise CheckpointError(f"'{path}' is not a text encoder: no readable config.json") from error
    else:
        import transformers

        try:
            config = transformers.AutoConfig.from_pretrained(path).to_dict()
        except Exception as error:
            raise CheckpointError(f"text encoder '{path}': neither a directory nor a model that can be fetched") from error
    kinds = {"t5": T5TextEncoder, "clip_text_model": CLIPTextEncoder, "clip": CLIPTextEncoder, "WordEncoder": WordEncoder}
    kind = str(config.get("_class_name") or config.get("model_type"))
    if kind not in kinds:
        raise CheckpointError(f"'{path}' holds a '{kind}': expected a text encoder of kind t5, clip or WordEncoder")
    return kinds[kind].from_pretrained(path, **options)


def split_words(text: str) -> list[str]:
    """Lower-cased words: runs of letters and digits; everything else separates."""
    return re.findall(r"[^\W_]+", text.lower())


# Caption cleaning in the manner of DeepFloyd-IF, in whose form the released text-to-image models saw their captions: what a text
# scraped from the web carries beside its words goes, quotes, dashes and spaces become uniform. Rules apply in this order.
_CJK = "\u31c0-\u4dbf\u4dc0-\u9fff"
_DASHES = "-\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0\ufe31\ufe32\ufe58\ufe63\uff0d"
_FILE_TYPES = "png|jpe?g|bmp|webp|eps|pdf|apk|mp4"
_WEB_RULES = (
    (r"<person>", "person"),
    (r"\b(https?:/*|www\.)\S+|\b[a-z0-9.-]+\.(com|co|ru|net|org|edu|gov|it)\b(/\S*)?", ""),
    (r"<[^<>]+>", ""),
    (r"@\w+\b", ""),
    (f"[{_CJK}]+", ""),
    (f"[{_DASHES}]+", "-"),
    ("[`´«»“”¨]", '"'),
    ("[‘’]", "'"),
    (r"&quot;?|&amp", ""),
    (r"\d{1,3}(\.\d{1,3}){3}", " "),
    (r"\d:\d\d\s+$", ""),
    (r"\\n", " "),
    (r"#(\d{1,3}|\d{5,})\b|\b\d{6,}\b", ""),
    (rf"\S+\.({_FILE_TYPES})", ""),
    (r"[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~()\[\]{}|\\/*]+", " "),
    (r"\s+\.\s+", " "),
)
_SHOP_RULES = (
    (r"\b([a-z]{1,3}\d{3,15}|[a-z]+\d+[a-z]+|\d+[a-z]+\d+)\b", ""),
    (r"(worldwide\s+)?(free\s+)?shipping", ""),
    (r"(free\s)?download(\sfree)?", ""),
    (r"\bclick\b\s(for|on)\s\w+", ""),
    (rf"\b({_FILE_TYPES})(\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-z]+\d+[a-z]+\d+[a-z\d]*\b", " "),
    (r"\b\d+\.?\d*[xх×]\d+\.?\d*\b", ""),
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
)
_EDGE_RULES = (
    (r"^[\"'](.+)[\"']$", r"\1"),
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S+$", ""),
)


def _apply(rules: Sequence[tuple[str, str]], text: str) -> str:
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text, flags=re.DOTALL)
    return text


def clean_caption(text: str, times: int = 2) -> str:
    """A caption as T5-conditioned models were trained on it: lower case, without links, markup, CJK signs and shop talk.

    The cleaning runs ``times`` times, as released systems do; a plain lower-case sentence is left as it is.
    """
    for _ in range(times):
        text = _apply(_WEB_RULES, unquote_plus(text).strip().lower())
        if len(re.findall("[-_]", text)) > 3:
            text = re.sub("[-_]", " ", text)
        text = _apply(_SHOP_RULES, html.unescape(html.unescape(text))).strip()
        text = _apply(_EDGE_RULES, text).strip()
    return text
