"""The errors a user can cause: each message is one sentence naming the thing, the reason and the next move."""

import errno

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system says where a disk, a quota or a limit on files is full."""


class VlquantError(Exception):
    """Base of everything the command line shows as one line and exit code 2."""


class UnsupportedCheckpoint(VlquantError):
    """The checkpoint is readable but is not a model this version can run."""


class BrokenCheckpoint(VlquantError):
    """Files of the checkpoint are missing, truncated, or do not fit the configuration."""


class InvalidRequest(VlquantError):
    """A question, picture or video cannot be turned into model input."""


class InvalidRecipe(VlquantError):
    """A quantization recipe that cannot be carried out on this model."""


class OutputRefused(VlquantError):
    """The output cannot be written where it was asked for."""


class MissingDependency(VlquantError):
    """A library this action needs is not installed."""
