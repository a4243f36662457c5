"""Lines that say how far some work is, for work that has no bar."""

import time
from collections.abc import Callable


def telling(
    say: Callable[[str], None], what: str, every: float = 10.0
) -> Callable[[int, int], None]:
    """tell(done, total), which says "3 of 8 texts, 12 s left" where more than `every` seconds have
    passed since it last did. what: what is counted, in the plural."""
    began = told = time.monotonic()

    def tell(done: int, total: int) -> None:
        nonlocal told
        now = time.monotonic()
        if now - told > every and 0 < done < total:
            told = now
            say(f"{done} of {total} {what}, {(now - began) * (total - done) / done:.0f} s left")

    return tell
