"""Messages of a conversation that is a problem's prompt, and the check that they are valid."""

from __future__ import annotations

Messages = tuple[tuple[str, str], ...]  # (role, content) each
ROLES = ("system", "user", "assistant")


def why_not_messages(messages: Messages) -> str:
    """Return why the messages cannot be a prompt, as the end of a sentence; "" if they can."""
    if not messages:
        return "has no messages"
    for i, (role, _) in enumerate(messages):
        if role not in ROLES:
            return f"has a message with the role {role[:40]!r} (known roles: {', '.join(ROLES)})"
        if role == "system" and i > 0:
            return f"has a system message at position {i}, which is not the first"
    if messages[-1][0] != "user":
        return f"ends with a message of the role {messages[-1][0]!r}, not 'user'"
    return "" if messages[-1][1].strip() else "ends with an empty message"
