"""A model on this machine, as its files describe it: all that is known of a teacher before any weight is read."""

from typing import Any

from bakery.config import TeacherConfig
from bakery.models import context_length, load_config, weights_fingerprint
from bakery.prompts.tokenizers import vocabulary_size
from bakery.records import TeacherInfo


class LocalTeacher:
    """The part of a Teacher that backends with the weights at hand have in common."""

    backend: str

    def __init__(self, config: TeacherConfig, tokenizer: Any) -> None:
        self.config = config
        self.model_config = load_config(config.model_name_or_path, config.revision, config.trust_remote_code)
        # Ids past the tokenizer's last token are padding of the output layer.
        self.vocab_size = min(self.model_config.get_text_config().vocab_size, vocabulary_size(tokenizer))
        self.max_length: int | None = context_length(self.model_config)
        self.info = TeacherInfo(
            backend=self.backend,
            name=config.model_name_or_path,
            revision=config.revision,
            dtype=self.dtype,
            fingerprint=weights_fingerprint(config.model_name_or_path, config.revision),
        )

    @property
    def dtype(self) -> str:
        return self.config.dtype
