"""Matrix rules: stacks of equally shaped blocks, and the calls on them."""
