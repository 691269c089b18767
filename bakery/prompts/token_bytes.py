"""Which bytes a token stands for: to map a server's tokens back to ids exactly, or to refuse."""

from typing import Any

from bakery.errors import TeacherError


class TokenBytes:
    """bytes -> id of a tokenizer's ordinary tokens, and text -> id of its special ones."""

    def __init__(self, tokenizer: Any) -> None:
        from bakery.prompts.tokenizers import special_ids

        special = special_ids(tokenizer)
        self.special = {token: index for token, index in tokenizer.get_vocab().items() if index in special}
        self.ids: dict[bytes, int | None] = {}
        for token, index in tokenizer.get_vocab().items():
            if index not in special:
                data = _bytes_of(token)
                self.ids[data] = None if data in self.ids else index  # None: two tokens stand for the same bytes

    def id_of(self, token: str, data: list[int] | None) -> int:
        """The id of a token that a server names by its text and bytes. Raises TeacherError unless there is just one."""
        if token in self.special:
            return self.special[token]
        found = self.ids.get(bytes(data) if data else token.encode())
        if found is None:
            raise TeacherError(f"the server's token {token!r} is no single token of the student's vocabulary")
        return found


def _bytes_of(token: str) -> bytes:
    """Of a byte-level token (GPT-2's alphabet, where each byte is a letter) or of a SentencePiece one."""
    if token.startswith("<0x") and token.endswith(">") and len(token) == 6:
        return bytes([int(token[3:5], 16)])
    if all(letter in BYTE_OF for letter in token):
        return bytes(BYTE_OF[letter] for letter in token)
    return token.replace("▁", " ").encode()


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's letters for bytes: printable ones stand for themselves, the others follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + n): b for n, b in enumerate(rest)}


BYTE_OF = _byte_alphabet()
