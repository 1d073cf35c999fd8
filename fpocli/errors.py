"""What a user can cause. The command line prints it as a sentence with a hint and exits with 2."""


class UserError(Exception):
    """A mistake or a condition outside the program, told in one sentence.

    Args:
        message: what is wrong, naming the file, flag or value.
        hint: what to do about it; empty when nothing sensible can be advised.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        # Both go to Exception, so that the error can be sent between processes.
        super().__init__(message, hint)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message
