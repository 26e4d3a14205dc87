"""CLIP's byte-pair tokenizer: a prompt to the token ids that the text encoder was trained on.

The merges are OpenAI's (`sdjax/assets`), the engine is the `tokenizers` package, the cleaning of the text is
OpenAI's own: ftfy, HTML entities, white space, lower case. `clean="hf"` gives the ids of today's diffusers,
whose tokenizer leaves curly quotes, entities and broken encodings as they are.
"""

from __future__ import annotations

import gzip
import html
import json
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path

import ftfy
import numpy as np
import tokenizers
from tokenizers import Regex, models, pre_tokenizers, trainers

START, END = "<|startoftext|>", "<|endoftext|>"
PATTERN = r"<\|startoftext\|>|<\|endoftext\|>|(?i:'s|'t|'re|'ve|'m|'ll|'d)|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
FILE_BOUND = 32 * 2**20  # bytes; the real files have 0.5 to 3.6 MB


def clean_openai(text: str) -> str:
    """The cleaning that CLIP was trained with: ftfy, HTML entities (twice), white space, lower case.

    U+0345 separates words: no class of OpenAI's case-insensitive pattern matches it.
    """
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.lower().replace("\u0345", " ").split())


def clean_hf(text: str) -> str:
    """The cleaning of transformers 5: Unicode NFC, white space, lower case character by character."""
    text = " ".join(unicodedata.normalize("NFC", text).split())
    return "".join(character.lower() for character in text)


CLEANERS: dict[str, Callable[[str], str]] = {"openai": clean_openai, "hf": clean_hf}


@dataclass(frozen=True)
class Tokenizer:
    """Text to ids; `engine` splits and merges, `clean` prepares the text before it."""

    engine: tokenizers.Tokenizer
    clean: Callable[[str], str] = clean_openai

    @staticmethod
    def from_folder(folder: str | Path, clean: str = "openai") -> Tokenizer:
        """The tokenizer in a checkpoint's tokenizer/ folder: tokenizer.json, or vocab.json and merges.txt.

        Raises:
            FileNotFoundError: neither is there.
            ValueError: a file is too large or is not what its name says.
        """
        folder = Path(folder)
        try:
            if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
                vocab = json.loads(_read(folder / "vocab.json"))
                lines = _read(folder / "merges.txt").split("\n")
                merges = [line for line in lines if line and not line.startswith("#version")]
                added = folder / "added_tokens.json"
                extra = json.loads(_read(added)) if added.is_file() else {}
                if not isinstance(vocab, dict) or not isinstance(extra, dict):
                    raise ValueError("a vocabulary must be a JSON object of token to id")
                return Tokenizer(_build(vocab | extra, merges, list(extra)), _cleaner(clean))
            if (folder / "tokenizer.json").is_file():
                data = json.loads(_read(folder / "tokenizer.json"))
                merges = [m if isinstance(m, str) else " ".join(m) for m in data["model"]["merges"]]
                added_tokens = {token["content"]: token["id"] for token in data["added_tokens"]}
                vocab = data["model"]["vocab"] | added_tokens
                return Tokenizer(_build(vocab, merges, list(added_tokens)), _cleaner(clean))
        except OSError:
            raise
        except Exception as error:  # the engine raises no narrower one
            reason = "".join(c if c.isprintable() else " " for c in str(error))[:200]
            raise ValueError(f"{folder}: not a CLIP tokenizer ({reason or type(error).__name__})") from None
        raise FileNotFoundError(f"{folder}: no tokenizer here; expected vocab.json and merges.txt, or tokenizer.json")

    @property
    def vocab_size(self) -> int:
        return self.engine.get_vocab_size()

    @property
    def start(self) -> int:
        return self._id(START)

    @property
    def end(self) -> int:
        return self._id(END)

    @property
    def comma(self) -> int | None:
        """The id of a comma by itself; None for a tokenizer that has none."""
        return self.engine.token_to_id(",</w>")

    def _id(self, token: str) -> int:
        found = self.engine.token_to_id(token)
        assert found is not None, "every engine is built with both"
        return found

    def encode(self, text: str) -> list[int]:
        """The ids of a text of any length, without start and end.

        Raises:
            TypeError: `text` is not a string.
        """
        return self.engine.encode(self._prepared(text), add_special_tokens=False).ids

    def __call__(self, prompts: Sequence[str], length: int = 77, pad_token: int = 49407) -> np.ndarray:
        """prompts -> i32[b, length]: start, the text's ids, end, then `pad_token` (49407 SD 1, 0 SD 2).

        A text that does not fit is cut, with a warning that says which words were lost.

        Raises:
            TypeError: a prompt is not a string.
        """
        ids = np.full((len(prompts), length), pad_token, np.int32)
        for row, prompt in zip(ids, prompts, strict=True):
            text = self._prepared(prompt)
            encoding = self.engine.encode(text, add_special_tokens=False)
            kept = encoding.ids[: length - 2]
            if len(kept) < len(encoding.ids):
                lost = text[encoding.offsets[len(kept)][0] :]
                warnings.warn(
                    f"a prompt has {len(encoding.ids)} tokens and only {length - 2} fit; this was cut off: {lost!r}",
                    stacklevel=2,
                )
            row[: len(kept) + 2] = [self.start, *kept, self.end]
        return ids

    def _prepared(self, text: str) -> str:
        if not isinstance(text, str):
            raise TypeError(f"a prompt must be a string, found {type(text).__name__}: {text!r}")
        # a lone surrogate cannot be encoded as UTF-8
        return self.clean(text.encode("utf-8", "replace").decode())


@lru_cache(maxsize=4)
def clip_tokenizer(clean: str = "openai") -> Tokenizer:
    """CLIP's own tokenizer of 49,408 tokens; `clean` is "openai" (as trained) or "hf" (as diffusers).

    Raises:
        ValueError: `clean` is something else.
    """
    packed = resources.files("sdjax.assets").joinpath("clip_merges.txt.gz").read_bytes()
    return from_merges(gzip.decompress(packed).decode().split("\n"), clean)


def from_merges(merges: Sequence[str], clean: str = "openai") -> Tokenizer:
    """A tokenizer of CLIP's kind: 512 byte symbols, one token for each merge ("left right"), start, end.

    Raises:
        ValueError: `clean` is unknown.
    """
    alphabet = _byte_alphabet()
    symbols = alphabet + [symbol + "</w>" for symbol in alphabet]
    symbols += [merge.replace(" ", "") for merge in merges] + [START, END]
    vocab = {symbol: index for index, symbol in enumerate(symbols)}
    return Tokenizer(_build(vocab, list(merges), []), _cleaner(clean))


def learn_merges(texts: Iterable[str], vocab_size: int, clean: str = "openai") -> list[str]:
    """The merges of a tokenizer of `vocab_size` tokens, learnt from texts by byte-pair encoding (Sennrich et al. 2016).

    Raises:
        ValueError: the texts do not hold so many pairs.
    """
    prepare = _cleaner(clean)
    engine = tokenizers.Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    engine.pre_tokenizer = _words()
    wanted = vocab_size - 2 * 256 - 2
    symbols = _byte_alphabet() + [symbol + "</w>" for symbol in _byte_alphabet()]
    trainer = trainers.BpeTrainer(
        vocab_size=len(symbols) + wanted,
        special_tokens=[symbol for symbol in symbols if symbol.endswith("</w>")],
        initial_alphabet=_byte_alphabet(),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    engine.train_from_iterator((prepare(text) for text in texts), trainer)
    found = json.loads(engine.to_str())["model"]["merges"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in found][:wanted]
    if len(merges) < wanted:
        raise ValueError(f"the texts give {len(merges)} merges and a vocabulary of {vocab_size} needs {wanted}")
    return merges


def _cleaner(clean: str) -> Callable[[str], str]:
    if clean not in CLEANERS:
        raise ValueError(f"clean must be one of {', '.join(CLEANERS)}, found {clean!r}")
    return CLEANERS[clean]


def _read(path: Path) -> str:
    if path.stat().st_size > FILE_BOUND:
        raise ValueError(f"{path.name} is larger than {FILE_BOUND} bytes")
    return path.read_text("utf-8-sig")


def _byte_alphabet() -> list[str]:
    """The 256 printable characters that stand for bytes, in the order of CLIP's vocabulary."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def _build(vocab: dict[str, int], merges: list[str], added: list[str]) -> tokenizers.Tokenizer:
    if START not in vocab or END not in vocab:
        raise ValueError(f"the vocabulary lacks {START} or {END}")
    wrong = [token for token, id in vocab.items() if type(id) is not int or not 0 <= id < 2**31]
    if wrong:
        raise ValueError(f"the id of {wrong[0][:60]!r} is no whole number from 0")
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    model = models.BPE(vocab, pairs, end_of_word_suffix="</w>", unk_token=END)
    engine = tokenizers.Tokenizer(model)
    engine.pre_tokenizer = _words()
    engine.add_special_tokens([START, END])
    engine.add_tokens([token for token in added if token not in (START, END)])
    return engine


def _words() -> pre_tokenizers.PreTokenizer:
    """Words as CLIP splits them, in the characters that stand for bytes."""
    split = pre_tokenizers.Split(Regex(PATTERN), behavior="removed", invert=True)
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([split, to_bytes])
