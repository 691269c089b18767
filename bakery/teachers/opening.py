"""recipe.teacher -> a teacher that is described but not opened: no weights are loaded, no server is asked."""

from typing import Any

from bakery.config import TeacherConfig
from bakery.errors import RecipeError
from bakery.prompts.tokenizers import load_tokenizer
from bakery.teachers.protocol import Teacher


def open_teacher(config: TeacherConfig, tokenizer: Any, temperatures: tuple[float, ...] = ()) -> Teacher:
    """Raises RecipeError for what this teacher can never do."""
    match config.backend:
        case "hf":
            from bakery.teachers.hf import HFTeacher

            teacher: Teacher = HFTeacher(config, tokenizer, temperatures)
        case "fake":
            from bakery.teachers.fake import FakeTeacher

            teacher = FakeTeacher(config, tokenizer, temperatures)
        case "local_toggle":
            from bakery.teachers.local_toggle import LocalToggleTeacher

            teacher = LocalToggleTeacher(config, tokenizer, temperatures)
        case "vllm":
            from bakery.teachers.vllm_engine import VLLMTeacher

            teacher = VLLMTeacher(config, tokenizer, temperatures)
        case "openai":
            teacher = _served(config)(config, tokenizer, temperatures)
    if config.draws and temperatures:
        raise RecipeError(
            f"cache.temperatures {list(temperatures)} beside teacher.support sampled: draws are at temperature 1 and "
            "have no norm at another; leave it empty, or choose support topk"
        )
    if not config.draws and config.top_k > teacher.vocab_size:
        raise RecipeError(
            f"teacher.top_k is {config.top_k}, but {config.model_name_or_path} has a vocabulary of "
            f"{teacher.vocab_size} tokens; ask for at most that many"
        )
    return teacher


def open_beside(
    config: TeacherConfig, tokenizer: Any, temperatures: tuple[float, ...], student: Any
) -> tuple[Teacher, bool]:
    """A teacher that is asked while `student` trains, open, and whether it can answer at the same time."""
    teacher = open_teacher(config, tokenizer, temperatures)
    if config.backend == "local_toggle":
        teacher.share(student)  # type: ignore[attr-defined]
        return teacher, False
    return teacher.open(), True


def probe_teacher(config: TeacherConfig) -> Any:
    """All that a served teacher can do, found by asking it: Capabilities. Raises RecipeError for any other teacher."""
    if config.backend != "openai":
        raise RecipeError(f"teacher.backend is {config.backend}; only a served teacher (openai) is probed")
    tokenizer = load_tokenizer(config.model_name_or_path, config.revision, config.trust_remote_code)
    return _served(config)(config, tokenizer).probe(full=True)


def _served(config: TeacherConfig) -> Any:
    from bakery.teachers.chat_api import ChatTeacher
    from bakery.teachers.openai_api import OpenAITeacher

    return ChatTeacher if config.api is not None and config.api.endpoint == "chat" else OpenAITeacher
