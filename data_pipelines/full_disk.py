"""What a full disk stops, told in one sentence."""

import errno
import os
from pathlib import Path

NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
MORE_SPACE = "free some space or choose another folder"
GO_ON = "free some and start the same command again to go on"


def raise_if_full(error: BaseException, written: Path, what_to_do: str = MORE_SPACE) -> None:
    """Raise OSError, one sentence, where `error` is that of a full disk; with its errno, for who catches it again."""
    if isinstance(error, OSError) and error.errno in NO_SPACE:
        # One argument: an errno before it would be printed as `[Errno 28]`.
        full = OSError(f"no space left while writing {written} ({os.strerror(error.errno)}): {what_to_do}")
        full.errno = error.errno
        raise full from error
