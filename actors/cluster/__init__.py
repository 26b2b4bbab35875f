"""The Ray cluster: connection, placement groups, nodes, and the data sent to them."""
