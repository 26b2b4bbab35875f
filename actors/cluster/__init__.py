"""The Ray cluster: connecting, placement, nodes, and what is sent to them."""
