"""Mistakes a user can make, as exceptions the command line shows in one sentence and without a traceback."""


class ZooError(Exception):
    """Base of every mistake a user can mend: the message says what was expected, what came and what to do."""


class UnknownComponentError(ZooError, LookupError):
    """No component has that name or kind."""


class ComponentArgumentError(ZooError, TypeError):
    """A component was given arguments its constructor does not take."""


class DataError(ZooError, ValueError):
    """Data that cannot be trained on: a missing file, an empty folder, a malformed record."""


class RunError(ZooError, RuntimeError):
    """A run directory or checkpoint that cannot be used as asked."""


class KernelError(ZooError, RuntimeError):
    """A native kernel that cannot be found, loaded or launched as asked."""


class KernelBuildError(KernelError):
    """A kernel source that does not compile, or nothing to compile it with; the message holds the compiler's."""
