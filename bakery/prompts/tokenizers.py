"""Tokenizers, and what makes two of them the same: the map from ids to tokens, nothing else."""

from hashlib import sha256
from typing import Any

from bakery.errors import RecipeError, first_line
from bakery.models import local_files


def load_tokenizer(name: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """A transformers tokenizer from a directory or a hub id. Raises RecipeError where there is none."""
    from transformers import AutoTokenizer

    path = local_files(name, revision, weights=False)
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise RecipeError(f"{name} holds no tokenizer that transformers can load: {first_line(error)}") from error


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """sha256 over (id, token) in order of id. Padding the embedding does not change it; another vocabulary does."""
    digest = sha256()
    for token, index in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        digest.update(f"{index}\t{token}\n".encode())
    return digest.hexdigest()


def vocabulary_size(tokenizer: Any) -> int:
    """One more than the largest id of a real token; a model's output may be padded beyond it."""
    return max(tokenizer.get_vocab().values()) + 1


def special_ids(tokenizer: Any) -> set[int]:
    """Ids of control tokens: those with a role (bos, eos, …) and all others that the tokenizer marks as special."""
    return set(tokenizer.all_special_ids) | {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}


def template_sha(tokenizer: Any) -> str:
    return sha256(str(tokenizer.chat_template or "").encode()).hexdigest()
