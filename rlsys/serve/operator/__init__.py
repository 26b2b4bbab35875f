"""What the operator of a server sees: access lines, metrics, health, and a page."""
