"""The messages of a conversation that a problem gives the model to go on with."""

from __future__ import annotations

Messages = tuple[tuple[str, str], ...]  # (role, content) each
ROLES = ("system", "user", "assistant")


def why_not_messages(messages: Messages) -> str:
    """Why they are no prompt; "" where they are one."""
    for at, (role, _) in enumerate(messages):
        if role not in ROLES:
            return f"has a message of the role {role[:40]!r} (known are {', '.join(ROLES)})"
        if role == "system" and at > 0:
            return f"has a system message behind {at} others"
    if not messages or messages[-1][0] != "user":
        return f"ends in a message of {messages[-1][0] if messages else 'nobody'}, not the user's"
    return "" if messages[-1][1].strip() else "ends in an empty message"
