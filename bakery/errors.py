"""What a user can get wrong, as a tree. The command line prints one line and exits with `exit_code`.

BakeryError            1
├── RecipeError        2   a recipe or a flag says something that cannot be
├── DataError          1   a prompt row, a prompt file or an example is unusable
├── TeacherError       1   a teacher cannot do what is asked, or answered with something that is no distribution
├── CacheError         1   a cache is missing, foreign, damaged, or does not fit
├── DeviceError        1   a device is too small for the work, or lost
└── OutputError        1   an output directory cannot be used
"""


class BakeryError(Exception):
    """Base of every error that a user can cause: one line that names the thing, both values and the cure."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def printable(text: str) -> str:
    """In one line, fit for a terminal: line breaks, colours and invisible letters of strangers' text as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def first_line(error: BaseException) -> str:
    """What a library says, without its explanations; its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip()


class RecipeError(BakeryError):
    exit_code = 2


class DataError(BakeryError):
    pass


class TeacherError(BakeryError):
    pass


class CacheError(BakeryError):
    pass


class DeviceError(BakeryError):
    pass


class OutputError(BakeryError):
    pass
