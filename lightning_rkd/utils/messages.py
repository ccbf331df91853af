"""What other libraries say of a mistake, shortened to what its author needs."""

from __future__ import annotations


def brief(message: str) -> str:
    """What jsonargparse says, without the subtypes it tried and the values it was given.

    Example:
        >>> brief("no RDK\\n  Does not validate against any of the Union subtypes")
        'no RDK'
    """
    noise = ("Does not validate", "Subtypes:", "Errors:", "- Expected a <class 'NoneType'>", "Given value")
    return "\n".join(line for line in message.splitlines() if not line.strip().startswith(noise))
