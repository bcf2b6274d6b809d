"""The errors of lorc, named by who must act; each is also the builtin it resembles."""


def first_line(error: BaseException) -> str:
    """What an exception says, in one line; its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class LorcError(Exception):
    """Any foreseen failure. Its message is one line that says what was got and what is allowed."""


class ConfigError(LorcError, ValueError):
    """The caller must change the zoo file or an argument."""


class UnsupportedModelError(LorcError, NotImplementedError):
    """Someone must teach the project this architecture."""


class NumericsError(LorcError, ArithmeticError):
    """The numbers are unusable; a retry cannot help."""


class ArtifactError(LorcError):
    """A file is absent, unfinished, altered or of another schema."""
